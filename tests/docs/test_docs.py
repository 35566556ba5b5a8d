"""The README: its examples run, and what it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import cpt_kernels
from tests.helpers import ROOT

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("block", BLOCKS, ids=[block.splitlines()[0][:40] for block in BLOCKS])
def test_examples(block):
    if "..." in block or "dataset," in block:  # needs a model and data of the reader's
        compile(block, "README.md", "exec")
        block = "\n".join(line for line in block.splitlines() if line.startswith(("from cpt_kernels", "import")))
    exec(compile(block, "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize(
    "name", ["linear_logprobs", "linear_preference_loss", "vocab_score", "pair_loss", "shared_prompt_attention"]
)
def test_every_function_without_the_trainer_has_an_example(name):
    assert name in cpt_kernels.__all__
    assert any(re.search(rf"\b{name}\(", block) and "..." not in block for block in BLOCKS)


def test_files_named_in_the_map_exist():
    tree = README[README.index("## Files") :]
    package = tree[tree.index("cpt_kernels/") : tree.index("csrc/")]
    for name in re.findall(r"\b[\w/]+\.py\b", package):
        assert (ROOT / "cpt_kernels" / name).is_file(), name
    for folder in re.findall(r"^(\w+)/", tree, flags=re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder


def test_commands_name_modules_and_files_that_exist():
    for module in re.findall(r"python -m (bench[\w.]*)(?: (\w+))?", README):
        parts = [part for part in (*module[0].split("."), module[1]) if part]
        assert (ROOT / Path(*parts)).with_suffix(".py").is_file() or (ROOT / Path(*parts)).is_dir(), module
    for file in re.findall(r"(?:examples|docs)/[\w-]+\.\w+", README):
        assert (ROOT / file).is_file(), file


@pytest.mark.parametrize("page", ["README.md", "docs/losses.md", "docs/coming-from-trl.md", "bench/NOTES.md"])
def test_links_and_anchors_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings], link


def test_claims_beside_trl_name_tests_that_exist():
    page = (ROOT / "docs" / "coming-from-trl.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and "held by" not in line]
    assert len(rows) > 20
    for row in rows:
        tests = re.findall(r"`([\w/]*test_\w+\.py)`", row)
        assert tests, row
        for test in tests:
            assert (ROOT / "tests" / test).is_file(), test
