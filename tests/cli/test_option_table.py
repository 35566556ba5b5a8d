"""Tests of the cached table of options, and of the CPU time of ``--help`` and of a mistyped option."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cpt_kernels.cli import option_table as table_module
from cpt_kernels.cli.option_table import option_table
from cpt_kernels.cli.option_types import Option, OptionTable
from cpt_kernels.cli.options import build_table
from tests.helpers import ROOT


def start(*argv: str, home: Path) -> tuple[str, float]:
    """Returns a command's output, its imports, and its CPU time in seconds."""
    command = [sys.executable, "-X", "importtime", "-m", "cpt_kernels.cli", *argv]
    env = os.environ | {"XDG_CACHE_HOME": str(home), "PYTHONPATH": str(ROOT)}
    with (
        open(home / "output", "w+") as output,
        subprocess.Popen(command, env=env, cwd=ROOT, stdout=output, stderr=output) as process,
    ):
        _, _, usage = os.wait4(process.pid, 0)
        process.returncode = 0
        output.seek(0)
        return output.read(), usage.ru_utime + usage.ru_stime


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """Returns a cache folder that contains the table."""
    home = tmp_path_factory.mktemp("cache")
    printed, _ = start("train", "--help", home=home)
    assert "usage: cpt train" in printed and len(list(home.glob("cpt_kernels/options-*.json"))) == 1
    return home


@pytest.mark.parametrize(
    ("argv", "printed"),
    [
        (["--help"], "cpt COMMAND --help shows the options"),
        (["--version"], "cpt-kernels "),
        (["pairs", "--help"], "usage: cpt pairs"),
        (["train", "--help"], "Weight of the reference: beta of DPO"),
        (["train", "--betta", "1"], "cpt train: error: unknown option --betta; did you mean --beta?"),
        (["train", "--beta", "high"], "cpt train: error: --beta: 'high' is not a number"),
        (["cache", "--help"], "usage: cpt cache"),
        (["generate", "--help"], "usage: cpt generate"),
        (["eval", "pairs", "--help"], "usage: cpt eval pairs"),
        (["demo", "--help"], "usage: cpt demo"),
        (["plan", "--help"], "usage: cpt plan [MODEL DATA]"),
    ],
)
def test_help_and_mistakes_take_less_than_a_second_without_torch(home, argv, printed):
    output, seconds = start(*argv, home=home)
    assert printed in output
    assert seconds < 1.0
    imported = {line.split("|")[-1].strip() for line in output.splitlines() if line.startswith("import time:")}
    assert not imported & {"torch", "transformers", "datasets"}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    option_table.cache_clear()
    yield tmp_path / "cpt_kernels"
    option_table.cache_clear()


def again() -> OptionTable:
    option_table.cache_clear()
    return option_table()


def test_the_cached_table_is_the_one_that_was_built(cache):
    built = build_table()
    assert option_table() == built and again() == built
    (file,) = cache.iterdir()
    assert built.options["beta"] == Option("Loss", {"float": None}, 0.1, built.options["beta"].help)

    edited = json.loads(file.read_text())  # an edited value shows that the file is read
    edited["options"]["beta"]["default"] = 7.0
    file.write_text(json.dumps(edited))
    assert again().defaults["beta"] == 7.0


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"key": 1}', None])
def test_a_damaged_or_outdated_table_is_built_again(cache, content):
    built = option_table()
    (file,) = cache.iterdir()
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {"options": {"beta": {}}}) if content is None else content)
    assert again() == built
    assert json.loads(file.read_text()) == kept


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert again() == build_table()
    option_table.cache_clear()


def test_the_key_follows_source_files_and_versions(tmp_path, monkeypatch):
    (tmp_path / "losses").mkdir()
    source = tmp_path / "losses" / "options.py"
    source.write_text("beta = 0.1\n")
    monkeypatch.setattr(table_module, "_SOURCE", tmp_path)
    keys = [table_module._key(), table_module._key()]
    os.utime(source, ns=(1, 1))
    keys.append(table_module._key())
    monkeypatch.setattr(table_module, "version", lambda name: "99.0")
    keys.append(table_module._key())
    assert keys[0] == keys[1] and len(set(keys)) == 3
