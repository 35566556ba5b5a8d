"""Every script in examples/ runs on the files of the quickstart."""

from __future__ import annotations

import runpy
import sys

import pytest

from cpt_kernels import cli
from cpt_kernels.demo.quickstart import write_quickstart
from tests.helpers import ROOT

SCRIPTS = {
    "curriculum_from_responses.py": ["model", "responses.jsonl", "--max_steps", "3", "--output_dir", "out"],
    "train_dpo.py": ["model", "pairs.jsonl", "--max_steps", "3", "--output_dir", "out"],
    "use_the_head.py": ["--steps", "81"],
}


def test_every_script_is_run():
    assert SCRIPTS.keys() == {path.name for path in (ROOT / "examples").glob("*.py")}


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
