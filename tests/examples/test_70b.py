"""The recipes for 70B: their options train a tiny model for two steps."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.helpers import ROOT
from tests.helpers.command import bpe_tokenizer, read_metrics, run, word_pairs, write_model, write_rows

RECIPES = ROOT / "examples/70b"
NAMES = ("full", "lora", "qlora")


@pytest.fixture
def home(tmp_path):
    pairs = word_pairs(40)
    for row in pairs[:4]:
        row["chosen"] += " blue" * 3000  # as long as max_length permits
    write_rows(tmp_path / "pairs.jsonl", pairs)
    write_model(tmp_path / "tiny", bpe_tokenizer(text for row in pairs for text in row.values()), initializer_range=0.1)
    AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(tmp_path / "tiny")).save_pretrained(tmp_path / "tiny")
    return tmp_path


def options_of(home, model: str) -> list[str]:
    return ["--model_name_or_path", str(home / model), "--dataset_name", str(home / "pairs.jsonl"), "--use_cpu"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_steps_of_a_tiny_model(home, name):
    if name == "qlora":
        pytest.importorskip("bitsandbytes", reason="quantized weights need it: pip install bitsandbytes")
    argv = ["--config", RECIPES / f"{name}.yaml", *options_of(home, "tiny"), "--bf16", "false", "--max_steps", "2"]
    argv += ["--dtype", "float32", "--max_length", "64", "--logging_steps", "1", "--ref_cache_dir", home / "ref"]
    assert run(*argv, "--output_dir", home / "out", "--gradient_accumulation_steps", "2", "--save_strategy", "no") == 0
    records = [record for record in read_metrics(home / "out") if "loss" in record]
    assert len(records) == 2 and records[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert (home / "out" / ("model.safetensors" if name == "full" else "adapter_model.safetensors")).is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "lora"])
def test_two_steps_on_two_processes_of_fsdp2(home, name):
    engine = (
        RECIPES / "fsdp2_offload.yaml" if name == "full" else ROOT / "cpt_kernels/cli/accelerate_configs/fsdp2.yaml"
    )
    argv = [
        "--config",
        str(RECIPES / f"{name}.yaml"),
        *options_of(home, "tiny"),
        "--max_steps",
        "2",
        "--max_length",
        "64",
    ]
    argv += ["--logging_steps", "1", "--ref_cache_dir", str(home / "ref"), "--output_dir", str(home / "out")]
    argv += ["--gradient_accumulation_steps", "2", "--save_steps", "1"]
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(engine), "--num_processes", "2"]
    command = [sys.executable, *launch, "--main_process_port", "0", "-m", "cpt_kernels.cli", "train", *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "runs each completion in a padded row" not in done.stderr
    records = [record for record in read_metrics(home / "out") if "loss" in record]
    assert len(records) == 2 and records[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert (home / "out" / ("model.safetensors" if name == "full" else "adapter_model.safetensors")).is_file()
