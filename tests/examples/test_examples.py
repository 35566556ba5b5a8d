"""Every script in examples/ runs on the files of the quickstart."""

from __future__ import annotations

import json
import runpy
import sys

import pytest

from cpt_kernels import cli
from cpt_kernels.demo.quickstart import write_quickstart
from tests.helpers import ROOT
from tests.helpers.command import read_metrics, write_rows
from tests.helpers.rows import real_rows

SCRIPTS = {
    "curriculum_from_responses.py": ["model", "responses.jsonl", "--max_steps", "3", "--output_dir", "out"],
    "train_dpo.py": ["model", "pairs.jsonl", "--max_steps", "3", "--output_dir", "out"],
    "use_the_head.py": ["--steps", "81"],
}
ALIGN = "align_from_responses.py"  # all commands, so its test is slow


def test_every_script_is_run():
    assert {*SCRIPTS, ALIGN} == {path.name for path in (ROOT / "examples").glob("*.py")}


@pytest.mark.parametrize("name", SCRIPTS)
def test_script(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", [name, *SCRIPTS[name]])
    if "model" in SCRIPTS[name]:
        write_quickstart(tmp_path)
        order = ["--order", "large > small", "--output", "pairs.jsonl"]
        assert cli.main(["pairs", "responses.jsonl", *order, "--pairs", "large > small"]) == 0
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    if "out" in SCRIPTS[name]:
        assert (tmp_path / "out" / "model.safetensors").is_file()
    else:
        losses = [float(line.split()[3]) for line in capsys.readouterr().out.splitlines()]
        assert losses[-1] < 0.7 * losses[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("data", "order", "held_out"),
    [
        ("quickstart", "large > medium > small", 2),
        ("real", "gpt4 > gpt-3.5-turbo-0301 > text_davinci_003 > text_davinci_001", 30),
    ],
)
def test_from_responses_to_an_aligned_model(data, order, held_out, tmp_path, monkeypatch):
    """All commands, one after the other, on a tiny random model."""
    monkeypatch.chdir(tmp_path)
    write_quickstart(tmp_path)
    if data == "real":  # 300 prompts, four models
        write_rows(tmp_path / "responses.jsonl", real_rows("responses.jsonl"))
    argv = ["model", "responses.jsonl", "--order", order, "--output_dir", "out", "--max_steps", "4"]
    argv += ["--max_length", "256", "--max_new_tokens", "8"]
    monkeypatch.setattr(sys, "argv", [ALIGN, *argv])
    runpy.run_path(str(ROOT / "examples" / ALIGN), run_name="__main__")

    # DPO starts from the adapter of SFT, and the merged model is the one that DPO trained.
    dpo = read_metrics(tmp_path / "out/dpo")
    assert any("rewards/margins" in row for row in dpo)
    table = json.loads((tmp_path / "out/eval-pairs/pairs.json").read_text())["summary"]
    margin = {row["model"]: row["rewards/margins"]["mean"] for row in table if row["by"] == "all pairs"}
    assert margin["sft"] == 0 != margin["dpo"]
    assert margin["merged"] == pytest.approx(margin["dpo"], abs=1e-4)
    (rates,) = json.loads((tmp_path / "out/eval-win-rate/win_rate.json").read_text())["models"]
    assert rates["prompts"] == pytest.approx(held_out, abs=2)
