"""The README and the pages of docs/: their code runs, and the files, options and names that they mention exist."""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest

import cpt_kernels
from bench.__main__ import main as bench_main
from cpt_kernels import cli
from cpt_kernels.cli.option_table import option_table
from cpt_kernels.demo.quickstart import write_quickstart
from tests.helpers import ROOT

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "bench/NOTES.md")]
PAGES = [path for path in [*PAGES, *sorted((ROOT / "docs").glob("*.md"))] if path.exists()]
QUICKSTART_CPU_SECONDS = 120


class Block(NamedTuple):
    """A fenced block of code of a page."""

    page: Path
    language: str
    text: str
    reason: str | None  # why no test runs it


def blocks_of(page: Path) -> list[Block]:
    pattern = r"(?:<!-- not run: ([^\n]*) -->\n)?^```(\w*)\n(.*?)^```$"
    found = re.findall(pattern, page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return [Block(page, language, text, reason or None) for reason, language, text in found]


def id_of(block: Block) -> str:
    return f"{block.page.stem}: {block.text.splitlines()[0][:40]}"


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
RUN = [block for block in BLOCKS if block.reason is None]
PYTHON = [block for block in RUN if block.language == "python"]


# --- Code ---


def test_every_block_is_run_or_says_why_not():
    assert PYTHON
    for block in RUN:
        assert block.language in ("python", "bash", "text", "math"), id_of(block)
    (quickstart,) = (block for block in RUN if block.language == "bash")
    assert quickstart.page.name == "README.md"


@pytest.fixture(scope="module")
def quickstart_folder(tmp_path_factory):
    """A folder with the files of the quickstart, in which blocks of Python run."""
    folder = tmp_path_factory.mktemp("quickstart")
    write_quickstart(folder)
    order, output = "large > medium > small", str(folder / "pairs.jsonl")
    arguments = ["--order", order, "--validation", "0.4", "--output", output]
    assert cli.main(["pairs", str(folder / "responses.jsonl"), *arguments]) == 0
    return folder


@pytest.mark.parametrize("block", PYTHON, ids=map(id_of, PYTHON))
def test_python_blocks(block, quickstart_folder, monkeypatch, tmp_path):
    monkeypatch.chdir(quickstart_folder)
    monkeypatch.setenv("CPT_CACHE", str(tmp_path))
    exec(compile(block.text, str(block.page), "exec"), {"__name__": block.page.stem})


def test_the_quickstart_runs_as_pasted(tmp_path):
    (block,) = (block for block in RUN if block.language == "bash")
    python = shlex.quote(sys.executable)
    commands = f'cpt() {{ {python} -m cpt_kernels.cli "$@"; }}; cpt-train() {{ cpt train "$@"; }}\n'
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CPT_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = ["bash", "-euo", "pipefail", "-c", commands + block.text]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr[-3000:]
    # CPU time, as tests run beside other work.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < QUICKSTART_CPU_SECONDS
    (report,) = (tmp_path / "quickstart").rglob("pairs.json")
    rows = [row for row in json.loads(report.read_text())["summary"] if row["by"] == "all pairs"]
    accuracies = {row["model"]: row["rewards/accuracies"]["mean"] for row in rows}
    assert accuracies["model"] == 0.5 and accuracies["dpo"] > 0.6, "the README says that dpo ranks most pairs right"


# --- Commands that are not run ---


def commands_of(block: Block) -> list[list[str]]:
    """The words of every command, without comments and continuation lines."""
    lines = block.text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [part for line in words for part in split_at(line, "&&") if part]


def split_at(words: list[str], separator: str) -> list[list[str]]:
    parts: list[list[str]] = [[]]
    for word in words:
        parts[-1].append(word) if word != separator else parts.append([])
    return parts


SHELL = [block for block in BLOCKS if block.language == "bash"]
COMMANDS = [command for block in SHELL for command in commands_of(block)]
PREFIXES = {"cpt": 3, "cpt-train": 1, "python": 4}  # words that choose a command, at most


def help_of(command: list[str], capsys) -> str:
    """What ``--help`` prints for a command line."""
    name, *rest = command
    subject = [word for word in rest[: PREFIXES[name] - 1] if re.fullmatch(r"[a-z_-]+", word) and word[0] != "-"]
    module = rest[1] if name == "python" else ""
    if module == "bench":
        subject = rest[2:3]
    elif name == "cpt" and subject[0] not in ("eval", "cache"):
        subject = subject[:1]
    mains: dict[str, Callable] = {"cpt": cli.main, "cpt-train": cli.train_main, "bench": bench_main}
    main = mains.get(module or name) or importlib.import_module(module).main
    with suppress(SystemExit):
        main([*subject, "--help"])
    text = capsys.readouterr().out
    if "options of cpt-train" in text:
        with suppress(SystemExit):
            cli.train_main(["--help"])
    launched = [f"--{option}" for option in option_table().launch] if name == "cpt-train" else []
    return text + capsys.readouterr().out + " ".join(launched)


def test_options_in_shell_blocks_exist(capsys):
    helps: dict[tuple[str, ...], str] = {}
    for command in COMMANDS:
        if command[0] not in PREFIXES or (command[0] == "python" and command[1:2] != ["-m"]):
            continue
        key = tuple(word for word in command[:4] if not word.startswith("--") and "/" not in word)
        if key not in helps:
            helps[key] = help_of(command, capsys)
        for option in (word.split("=")[0] for word in command if word.startswith("--")):
            assert re.search(rf"{re.escape(option)}\b", helps[key]), f"{' '.join(command)}: no option {option}"


def test_make_targets_exist():
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    text = "\n".join(page.read_text() for page in PAGES)
    named = set(re.findall(r"(?:^|`)make ([\w-]+)", text, flags=re.MULTILINE))
    assert named and named <= set(targets), named - set(targets)


def test_commands_name_modules_and_files_that_exist():
    text = "\n".join(page.read_text() for page in PAGES)
    for module, subject in re.findall(r"python -m (bench[\w.]*)(?: ([a-z_]+))?", text):
        name = "gpu.check" if subject == "gpu_check" else subject
        path = ROOT.joinpath(*module.split("."), *name.split(".")) if name else ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or path.is_dir(), (module, subject)
    for file in re.findall(r"(?<![\w/])(?:examples|docs|bench|tests|csrc|cpt_kernels)/[\w./-]+\.\w+", text):
        assert (ROOT / file).is_file(), file


# --- Links, names and numbers ---


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_anchors_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], link


def test_the_readme_is_short_and_links_every_page():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 160
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in text, page.name


def test_every_public_name_is_in_the_api_page():
    rows = re.findall(r"^\| (`.*?) \|", (ROOT / "docs/api.md").read_text(), flags=re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(cpt_kernels.__all__)


@pytest.mark.parametrize(
    "name", ["linear_logprobs", "linear_preference_loss", "vocab_score", "pair_loss", "shared_prompt_attention"]
)
def test_every_function_without_the_trainer_has_an_example(name):
    assert name in cpt_kernels.__all__
    assert any(re.search(rf"\b{name}\(", block.text) for block in PYTHON if block.page.name == "kernels.md")


def test_claims_beside_trl_name_tests_that_exist():
    page = (ROOT / "docs" / "coming-from-trl.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and "tested by" not in line]
    assert len(rows) > 20
    for row in rows:
        tests = re.findall(r"`([\w/]*test_\w+\.py)`", row)
        assert tests, row
        for test in tests:
            assert (ROOT / "tests" / test).is_file(), test
