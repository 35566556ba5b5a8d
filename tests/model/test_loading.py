"""Loading reads whole weights under every engine."""

from __future__ import annotations

import os

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_enabled

from cpt_kernels import ContrastiveConfig
from cpt_kernels.model.loading import load_model, whole_weights
from tests.helpers.architectures import tiny_model
from tests.helpers.toy import config


def test_fsdp_loads_whole_weights(tmp_path, monkeypatch):
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    for name in ("ACCELERATE_USE_FSDP", "FSDP_CPU_RAM_EFFICIENT_LOADING"):
        monkeypatch.setenv(name, "true")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert is_fsdp_enabled()
    with whole_weights():
        assert not is_fsdp_enabled()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert is_fsdp_enabled() and os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


@pytest.mark.parametrize("world", [1, 2])
def test_a_device_map_is_for_one_process_and_this_is_said(tmp_path, caplog, monkeypatch, world):
    given = []
    monkeypatch.setattr("cpt_kernels.model.loading.load_pretrained", lambda name, **kwargs: given.append(kwargs))
    monkeypatch.setattr(ContrastiveConfig, "world_size", world)
    load_model("model", config(tmp_path, model_init_kwargs={"device_map": "auto"}))
    assert ("device_map" in given[0]) == (world == 1)
    assert ("device_map has no effect on several processes" in caplog.text) == (world == 2)


def test_zero3_is_back_after_loading():
    pytest.importorskip("deepspeed")
    from transformers.integrations import HfDeepSpeedConfig

    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    assert is_deepspeed_zero3_enabled()
    with pytest.raises(RuntimeError), whole_weights():
        assert not is_deepspeed_zero3_enabled()
        raise RuntimeError
    assert is_deepspeed_zero3_enabled() and config.is_zero3()
