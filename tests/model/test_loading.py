"""Weights are whole after loading, whatever engine the process was launched for."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.fsdp import is_fsdp_enabled

from cpt_kernels import ContrastiveConfig
from cpt_kernels.model.loading import check_engine, load_model, load_models, whole_weights
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
    monkeypatch.setattr(
        "cpt_kernels.model.loading.AutoModelForCausalLM.from_pretrained", lambda name, **kwargs: given.append(kwargs)
    )
    monkeypatch.setattr(ContrastiveConfig, "world_size", world)
    load_model("model", config(tmp_path, model_init_kwargs={"device_map": "auto"}))
    assert ("device_map" in given[0]) == (world == 1)
    assert ("device_map has no effect on several processes" in caplog.text) == (world == 2)


@pytest.mark.parametrize("wrap", [lambda model: model, lambda model: get_peft_model(model, LoraConfig())])
def test_a_reference_with_the_policys_weights(tmp_path, wrap):
    """It would be frozen, and its adapter with it."""
    model = tiny_model("llama")
    policy = wrap(model)
    with pytest.raises(ValueError, match="model and ref_model are the same weights: leave ref_model out"):
        load_models(policy, model, config(tmp_path))
    assert load_models(policy, tiny_model("llama"), config(tmp_path))[0] is policy


def test_fsdp1_is_refused(tmp_path):
    plugin = SimpleNamespace(fsdp_version=1)
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, state=SimpleNamespace(fsdp_plugin=plugin))
    with pytest.raises(ValueError, match="FSDP1 is not supported: set fsdp_version to 2"):
        check_engine(config(tmp_path), accelerator)
    plugin.fsdp_version = 2
    check_engine(config(tmp_path), accelerator)


def test_zero3_is_back_after_loading():
    pytest.importorskip("deepspeed")
    from transformers.integrations import HfDeepSpeedConfig

    config = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    assert is_deepspeed_zero3_enabled()
    with pytest.raises(RuntimeError), whole_weights():
        assert not is_deepspeed_zero3_enabled()
        raise RuntimeError
    assert is_deepspeed_zero3_enabled() and config.is_zero3()
