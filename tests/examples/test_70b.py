"""The recipes for 70B: README.md shows what ``cpt plan`` says of them, and they train a tiny model for two steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from cpt_kernels import cli
from tests.helpers import ROOT
from tests.helpers.command import WORDS, bpe_tokenizer, read_metrics, run, word_pairs, write_model, write_rows

RECIPES = ROOT / "examples/70b"
NAMES = ("full", "lora", "qlora")
SHAPE = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
SHAPE |= {"num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 131072}
PARTS = ("weights", "gradients", "optimizer", "engine", "activations", "head", "peak", "host")
# The recipe and its engine on so many GPUs of so many GiB.
PLANS = [
    ("full", RECIPES / "fsdp2_offload.yaml", 8, 80),
    ("full", "fsdp2", 64, 80),
    ("lora", "fsdp2", 8, 80),
    ("lora", "fsdp2", 64, 80),
    ("qlora", "multi_gpu", 8, 80),
    ("qlora", "multi_gpu", 64, 80),
]


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
@pytest.mark.parametrize(("name", "engine", "gpus", "gib"), PLANS)
def test_the_readme_shows_what_the_plan_says(home, capsys, name, engine, gpus, gib):
    """Of the longest rows that the recipe permits: a pair whose sides both have ``max_length`` tokens."""
    text = lambda row, side: "".join(f" {WORDS[row % 14]} {WORDS[row // 14]} {side}" for _ in range(1000))  # noqa: E731
    rows = [{"prompt": "rain over", "chosen": text(i, "so"), "rejected": text(i, "or")} for i in range(64)]
    write_rows(home / "longest.jsonl", rows)
    write_model(home / "big", bpe_tokenizer(rows[0].values()), tie_word_embeddings=False, **SHAPE)
    argv = [
        home / "big",
        home / "longest.jsonl",
        "--config",
        RECIPES / f"{name}.yaml",
        "--use_cpu",
        "--device_gib",
        gib,
    ]
    argv += ["--num_processes", gpus, "--accelerate_config", engine, "--json", home / "plan.json"]
    argv += ["--gradient_accumulation_steps", 8 * 8 // gpus]
    assert cli.main(["plan", *map(str, argv)]) == 0
    run = json.loads((home / "plan.json").read_text())["run"]
    sizes = run["bytes"] | run["memory"]["with checkpointing"]
    saved = sum(run["checkpoint"].values()) / 2**30
    cells = [name, gpus, *(f"{sizes.get(part, 0) / 2**30:.1f}" for part in PARTS), f"{saved:.1f}"]
    budget = run["memory"]["largest max_tokens_per_batch"]
    line = " | ".join(map(str, [*cells, f"{budget:,}"]))
    assert f"| {line} |" in (RECIPES / "README.md").read_text()
    assert sizes["peak"] < 0.9 * gib * 2**30 and run["engine"] in capsys.readouterr().out


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
