"""Tests of ``cpt export``: files of torch.distributed.checkpoint become what transformers and PEFT load."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp
from transformers import AutoModelForCausalLM

from cpt_kernels.cli import main
from tests.helpers.architectures import tiny_model
from tests.helpers.engine_run import run_rank
from tests.helpers.forked import run_ranks
from tests.helpers.toy import word_tokenizer

TOKENS = torch.arange(3, 20)[None]


def write(folder, model, state):
    """Writes a checkpoint as accelerate does for FSDP2, by one process."""
    (getattr(model, "peft_config", {}).get("default") or model.config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    (folder / "trainer_state.json").write_text("{}")
    dcp.save({"model": state}, storage_writer=dcp.FileSystemWriter(folder / "pytorch_model_fsdp_0"), no_dist=True)
    return folder


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "mixtral"])
def test_a_model(tmp_path, name, capsys):
    model = tiny_model(name).eval()
    folder = write(tmp_path / "checkpoint-3", model, model.state_dict())
    assert main(["export", str(folder), "--output", str(tmp_path / "whole")]) == 0
    assert "written to" in capsys.readouterr().out
    names = {file.name for file in (tmp_path / "whole").iterdir()}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= names and "trainer_state.json" not in names
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", dtype="auto").eval()
    with torch.no_grad():
        assert torch.equal(found(TOKENS).logits, model(TOKENS).logits)
    assert main(["export", str(folder), "--output", str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    assert all(value.dtype == torch.bfloat16 for value in load_file(tmp_path / "half/model.safetensors").values())


def test_an_adapter(tmp_path):
    model = get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False))
    state = get_peft_model_state_dict(model)
    folder = write(tmp_path / "checkpoint-3", model, state)
    assert main(["export", str(folder), "--output", str(tmp_path / "adapter")]) == 0
    found = load_file(tmp_path / "adapter/adapter_model.safetensors")
    assert found.keys() == state.keys() and all(torch.equal(found[name], state[name]) for name in state)


def test_folders_that_are_refused(tmp_path, capsys):
    model = tiny_model("llama")
    state = {name: value for name, value in model.state_dict().items() if "layers.1" not in name}
    model.save_pretrained(tmp_path / "whole")
    cases = {
        tmp_path / "nowhere": "there is no such folder",
        tmp_path / "whole": "holds no sharded weights",
        write(tmp_path / "checkpoint-3", model, state): "the weights are not those of its config.json",
    }
    for folder, said in cases.items():
        assert main(["export", str(folder), "--output", str(tmp_path / "out")]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_sharded_run_resumes_on_other_numbers_of_ranks(tmp_path):
    """Saved by two ranks, resumed by three, and exported: the weights that the run has at its end."""
    sharded = {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}
    options = {"model": "llama-tied", "max_steps": 4, "learning_rate": 1e-3, "fsdp_config": sharded}
    cases = {2: {"save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 3}}
    cases[3] = {"per_device_train_batch_size": 2, "resume": str(tmp_path / "2/out/checkpoint-2")}
    for ranks, more in cases.items():
        run_ranks(tmp_path, ranks, run_rank, tmp_path, [[str(ranks), "fsdp2", options | more]])
    two, three = (json.loads((tmp_path / f"{ranks}.json").read_text())["losses"] for ranks in (2, 3))
    assert len(two) == 4 and three == pytest.approx(two, abs=1e-5)
    checkpoint = tmp_path / "2/out/checkpoint-4"
    assert not list(checkpoint.glob("*.safetensors"))
    assert len(list(checkpoint.glob("pytorch_model_fsdp_0/*.distcp"))) == 2
    assert main(["export", str(checkpoint), "--output", str(tmp_path / "whole")]) == 0
    found, expected = (load_file(tmp_path / folder / "model.safetensors") for folder in ("whole", "2/final"))
    assert all(torch.equal(found[name], expected[name]) for name in found) and len(found) > 10
