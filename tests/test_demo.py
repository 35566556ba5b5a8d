"""``cpt demo``: its data, and a quick run from nothing to the closing table."""

from __future__ import annotations

import json
import logging
import math
from io import StringIO

import datasets
import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer

from cpt_kernels import cli, demo


def test_rows_are_right_wrong_and_apart():
    rows = demo.make_rows(600, seed=1)
    assert rows == demo.make_rows(600, seed=1) != demo.make_rows(600, seed=2)
    assert len({row["prompt"] for row in rows}) == 600 and {row["task"] for row in rows} == set(demo.TASKS)
    assert all(row["chosen"] != row["rejected"] for row in rows)
    for row in rows:
        word = row["prompt"].removesuffix(": ").split()[-1]
        expected = {
            "reverse": word[::-1],
            "sort": "".join(sorted(word)),
            "count": str(word.count(row["prompt"].split()[1])),
            "next letters": "".join(chr(ord(letter) + 1) for letter in word),
        }
        assert row["chosen"] == f"{expected[row['task']]}."
    wrong = sum(row["chosen"].rstrip(".") not in row["rejected"] for row in rows)
    assert 300 < wrong < 500


def test_the_tokenizer_gives_every_text_back(tmp_path):
    demo.make_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for row in demo.make_rows(50, seed=0):
        text = row["prompt"] + row["rejected"]
        assert len(tokenizer(text)["input_ids"]) == len(text) and tokenizer.decode(tokenizer(text)["input_ids"]) == text


def numbers(loss):
    return {"loss on the chosen": loss, "chosen is likelier": 0.9, "reward accuracy": 0.8, "reward margin": 1.0}


@pytest.mark.parametrize(
    ("mended", "broken", "said"),
    [(0, 0, "chance alone"), (5, 8, "chance alone"), (20, 2, "more than chance"), (1, 12, "more than chance")],
)
def test_the_verdict_follows_from_the_numbers(mended, broken, said):
    before = [False] * mended + [True] * broken + [True, False]
    after = [True] * mended + [False] * broken + [True, False]
    text = " ".join(demo.verdict({"after SFT": numbers(0.1), "after DPO": numbers(0.2)}, before, after))
    assert f"mended {mended} and broke {broken}" in text and said in text
    assert "became less likely" in text and "says nothing of large models" in text
    text = " ".join(demo.verdict({"after SFT": numbers(0.3), "after DPO": numbers(0.2)}, before, after))
    assert "less likely" not in text


def test_quick_demo(tmp_path):
    console = Console(file=StringIO(), width=120)
    stages = demo.run_demo(tmp_path, seed=0, size=demo.Size(400, 40, 30, 8), console=console)
    printed = console.file.getvalue()
    assert list(stages) == ["start", "after SFT", "after DPO"]
    assert all(math.isfinite(value) for stage in stages.values() for value in stage.values())
    assert stages["after SFT"]["loss on the chosen"] < 0.6 * stages["start"]["loss on the chosen"]
    assert stages["after DPO"]["reward margin"] > 0 and 0 <= stages["after DPO"]["reward accuracy"] <= 1
    assert json.loads((tmp_path / "results.json").read_text()) == stages
    for stage in ("sft", "dpo"):
        files = {path.name for path in (tmp_path / stage).iterdir()}
        assert {"model.safetensors", "tokenizer.json", "metrics.jsonl", "curves.png", "curves.svg"} <= files
        AutoModelForCausalLM.from_pretrained(tmp_path / stage)
    assert "exact answers" in printed and "after DPO" in printed and f"Written to {tmp_path}" in printed
    assert "40 held-out prompts" in printed and "400 pairs to train on" in printed


@pytest.fixture
def _process_settings():
    """What the command sets for its process, put back."""
    logger, threads = logging.getLogger("cpt_kernels"), torch.get_num_threads()
    level = logger.level
    yield
    logger.setLevel(level)
    torch.set_num_threads(threads)
    datasets.enable_progress_bars()


@pytest.mark.usefixtures("_process_settings")
def test_the_command(monkeypatch, tmp_path):
    called = []
    monkeypatch.setattr(demo, "run_demo", lambda *args: called.append(args))
    assert cli.main(["demo", "--quick", "--seed", "3", "--output_dir", str(tmp_path)]) == 0
    assert cli.main(["demo"]) == 0
    assert called[0] == (tmp_path, 3, demo.QUICK) and called[1][1:] == (0, demo.FULL)
