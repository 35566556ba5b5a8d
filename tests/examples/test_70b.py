"""The recipes for 70B: `cpt plan` finds that they fit, and the same options train a tiny model for two steps."""

from __future__ import annotations

import json

import pytest
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig

from cpt_kernels import cli
from cpt_kernels.cli import planned
from cpt_kernels.planning.calibration import TooLargeError
from tests.helpers import ROOT
from tests.helpers.command import bpe_tokenizer, read_metrics, run, word_pairs, write_model, write_rows

RECIPES = ROOT / "examples/70b"
SIZES = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "vocab_size": 128256}
SIZES |= {"num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": False}
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
    return ["--model_name_or_path", str(home / model), "--dataset_name", str(home / "pairs.jsonl"), "--bf16", "false"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_plan_fits(home, monkeypatch, name):
    def no_calibration(*_):
        raise TooLargeError("a layer is too large")

    monkeypatch.setattr(planned, "calibrate", no_calibration)
    monkeypatch.setattr(planned, "find_budget", lambda *_, **__: None)
    big = home / "big"
    write_model(big, bpe_tokenizer(["a b"]))
    LlamaConfig(
        **SIZES, bos_token_id=None, eos_token_id=1, pad_token_id=0, max_position_embeddings=8192
    ).save_pretrained(big)
    argv = [
        "--config",
        str(RECIPES / f"{name}.yaml"),
        *options_of(home, "big"),
        "--use_cpu",
        "--json",
        str(home / "plan.json"),
    ]
    if name == "qlora":  # a plan has no weights to quantize
        values = yaml.safe_load((RECIPES / "qlora.yaml").read_text())
        kept = {key: value for key, value in values.items() if "4bit" not in key}
        (home / "qlora.yaml").write_text(yaml.safe_dump(kept))
        argv[1] = str(home / "qlora.yaml")
    assert cli.main(["plan", *argv]) == 0
    found = json.loads((home / "plan.json").read_text())["run"]
    assert found["largest"]["tokens"] > 2048
    size, gb = found["bytes"], 1e9
    activations = (
        found["memory"]["with checkpointing"]["activations"] + found["memory"]["with checkpointing"]["head"]
    ) / gb
    layer = 3 * 0.86 * (4 if name == "full" else 2)  # GB: the gathered layer, the next one, and a gradient
    states = {part: size[part] / gb for part in ("weights", "gradients", "optimizer")}
    if name == "full":
        assert states["weights"] == pytest.approx(282, rel=0.01) and sum(states.values()) == pytest.approx(
            1129, rel=0.01
        )
        on_8, on_64, host = 0, sum(states.values()) / 64, sum(states.values())
        assert host < 1200
    elif name == "lora":
        assert states["weights"] == pytest.approx(141, rel=0.02) and sum(states.values()) < 150
        on_8, on_64 = sum(states.values()) / 8, sum(states.values()) / 64
    else:
        on_8 = on_64 = states["weights"] / 4 * 1.03 + states["gradients"] + states["optimizer"]
    assert on_8 + activations + layer < 80 and on_64 + activations + layer < 80


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_two_steps_of_a_tiny_model(home, name):
    if name == "qlora":
        pytest.importorskip("bitsandbytes", reason="quantized weights need it: pip install bitsandbytes")
    argv = ["--config", RECIPES / f"{name}.yaml", *options_of(home, "tiny"), "--use_cpu", "--max_steps", "2"]
    argv += ["--dtype", "float32", "--max_length", "64", "--logging_steps", "1", "--ref_cache_dir", home / "ref"]
    assert run(*argv, "--output_dir", home / "out", "--gradient_accumulation_steps", "2", "--save_strategy", "no") == 0
    records = [record for record in read_metrics(home / "out") if "loss" in record]
    assert len(records) == 2 and records[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert (home / "out" / ("model.safetensors" if name == "full" else "adapter_model.safetensors")).is_file()
