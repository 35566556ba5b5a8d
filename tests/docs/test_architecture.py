"""docs/architecture.md and CONTRIBUTING.md: the folders, functions and files that they name exist, and recipes work.

The recipe of a loss is followed in a copy of the repository.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import heads, step
from cpt_kernels import HeadOptions, linear_logprobs, linear_preference_loss, vocab_score
from cpt_kernels.ops.backends import Backend
from tests.helpers import ROOT
from tests.helpers.heads import Head
from tests.test_house import COMMANDS, FOLDERS, LEAVES

ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()
PACKAGE = ROOT / "cpt_kernels"
# Reference.fill may change folders so often on its way from the model to disk.
MOST_FOLDER_CHANGES = 6


def section(text: str, heading: str) -> str:
    """The text under a heading, up to the next one of the same or a higher level."""
    level = heading.split(" ")[0]
    start = text.index(f"\n{heading}\n") + len(heading) + 2
    following = re.search(rf"^#{{1,{len(level)}}} ", text[start:], flags=re.MULTILINE)
    return text[start : start + following.start()] if following else text[start:]


def resolve(name: str) -> Any:
    """The object ``folder.module.attribute...`` of the package."""
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        path = PACKAGE.joinpath(*parts[:cut])
        if path.is_dir() or path.with_suffix(".py").is_file():
            found: Any = import_module(".".join(["cpt_kernels", *parts[:cut]]))
            for attribute in parts[cut:]:
                found = getattr(found, attribute)
            return found
    raise AssertionError(f"{name} is in no module")


# --- Folders and glossary ---


def test_the_map_has_every_folder_and_nothing_else():
    tree = section(ARCHITECTURE, "## Folders")
    package = tree[tree.index("cpt_kernels/") : tree.index("csrc/")]
    named = set(re.findall(r"^  ([\w./]+)", package, flags=re.MULTILINE))
    there = {path.name + "/" * path.is_dir() for path in PACKAGE.iterdir() if path.suffix in ("", ".py")}
    assert named == {name for name in there if not name.startswith((".", "__py"))}
    for folder in re.findall(r"^(\w+)/", tree, flags=re.MULTILINE):
        assert (ROOT / folder).is_dir(), folder
    for folder in re.findall(r"^    (\w+)/", package, flags=re.MULTILINE):
        assert (PACKAGE / "ops" / folder).is_dir(), folder


def test_the_picture_of_imports_is_the_table_that_is_checked():
    rows = re.findall(r"^(\w[\w ]*?) +-> (.*)$", section(ARCHITECTURE, "## Who imports whom"), flags=re.MULTILINE)
    picture = {name: set(imported.split()) - {"nothing"} for names, imported in rows for name in names.split()}
    assert {name for name, others in picture.items() if "everything" in others} == COMMANDS
    everywhere = {leaf: set() for leaf in LEAVES}
    assert {name: others for name, others in picture.items() if name not in COMMANDS} | everywhere == FOLDERS


def test_the_glossary_defines_each_term_once():
    rows = re.findall(r"^\| ([^|]+) \|", section(ARCHITECTURE, "## Glossary"), flags=re.MULTILINE)
    terms = [term for term in rows if term != "term" and not term.startswith("-")]
    assert len(terms) == len(set(terms)) >= 25


# --- Journeys ---


def journey(heading: str) -> list[str]:
    """The first function of every step."""
    steps = re.findall(r"^\d+\. (.*)$", section(ARCHITECTURE, heading), flags=re.MULTILINE)
    return [names[0] for step in steps if (names := re.findall(r"`((?:\w+\.)+\w+)`", step))]


JOURNEYS = [line for line in section(ARCHITECTURE, "## Journeys").splitlines() if line.startswith("### ")]


def test_there_are_three_journeys():
    assert len(JOURNEYS) == 3 and all(len(journey(heading)) > 10 for heading in JOURNEYS)


@pytest.mark.parametrize("heading", JOURNEYS)
def test_functions_of_journeys_exist(heading):
    for name in re.findall(r"`((?:\w+\.)+\w+)`", section(ARCHITECTURE, heading)):
        assert callable(resolve(name)), name


def test_reference_fill_stays_in_few_folders():
    steps = journey(next(heading for heading in JOURNEYS if "reference" in heading))
    assert steps[0] == "reference.scorer.Reference.fill"
    way = steps[: steps.index("reference.shards.write_shard") + 1]
    folders = [name.split(".")[0] for name in way]
    changes = sum(first != second for first, second in pairwise(folders))
    assert changes <= MOST_FOLDER_CHANGES, folders


# --- Recipes of CONTRIBUTING.md ---

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
RECIPES = re.findall(r"^## (Add .*)$", CONTRIBUTING, flags=re.MULTILINE)


def files_of(recipe: str) -> list[str]:
    """The files in the list at the end of a recipe."""
    text = section(CONTRIBUTING, f"## {recipe}")
    return re.findall(r"`([\w./-]+\.\w+)`", "\n".join(line for line in text.splitlines() if line.startswith("- ")))


def test_every_change_has_a_recipe():
    assert [recipe.split()[2] for recipe in RECIPES] == ["loss", "architecture", "kernel", "peer"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_files_of_recipes_exist(recipe):
    files = files_of(recipe)
    assert files
    for file in files:
        assert (ROOT / file).is_file(), file


NEW_LOSS = '''

@_builtin("−κ·log(σ(β·h))", "nobody", of_difference=True)
def scaled(logps: PairLogps, *, beta: float = 0.1, scaled_by: float = 2.0) -> Tensor:
    """DPO times a constant."""
    return -scaled_by * F.logsigmoid(beta * logps.log_ratio_difference())
'''
NEW_OPTION = '    scaled_by: float = option(2.0, "Factor of the scaled loss.")\n'
OF_LOSSES = [
    *("tests/losses", "tests/docs/test_losses.py", "tests/docs/test_docs.py", "tests/test_config.py"),
    *("tests/ops/test_pair_loss.py", "tests/cli/test_parsing.py"),
]


@pytest.mark.slow
def test_a_loss_touches_at_most_four_files(tmp_path):
    """In a copy of the repository, the recipe adds a loss with an option; the tests of all losses ask for no more."""
    tracked = subprocess.run(
        ["git", "ls-files", "-zco", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tmp_path / name)
    recipe = [tmp_path / name for name in files_of("Add a loss")]
    assert len(recipe) <= 4
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    environment = os.environ | {"COLUMNS": "200", "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)

    def edit(path: str, old: str, new: str) -> None:
        text = (tmp_path / path).read_text()
        assert text.count(old) == 1, path
        (tmp_path / path).write_text(text.replace(old, new))

    def check() -> subprocess.CompletedProcess:
        chosen = "scaled or test_every_loss_is_covered or test_the_tables_are_written or readme or symbol"
        return run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen, *OF_LOSSES)

    (tmp_path / "cpt_kernels/losses/functions.py").open("a").write(NEW_LOSS)
    edit("cpt_kernels/losses/options.py", "\n    def build_loss(", f"{NEW_OPTION}\n    def build_loss(")
    edit(
        "cpt_kernels/losses/options.py",
        '    "discopop_tau": "τ",\n',
        '    "discopop_tau": "τ",\n    "scaled_by": "κ",\n',
    )
    demands = re.findall(r"^FAILED \S+::(\w+)", check().stdout, flags=re.MULTILINE)
    assert sorted(demands) == ["test_every_loss_is_covered", "test_the_tables_are_written_from_the_code"]
    assert run("docs/losses.py").returncode == 0
    numbers = '    ("scaled", {"beta": 0.5}, [2 * softplus(-1.5), 2 * softplus(1.0)]),\n'
    edit("tests/losses/test_functions.py", "HAND_WRITTEN = [\n", f"HAND_WRITTEN = [\n{numbers}")
    done = check()
    assert done.returncode == 0, done.stdout[-3000:]
    assert "scaled" in run("-m", "cpt_kernels.cli", "train", "--help").stdout
    changed = {path for path in tmp_path.rglob("*") if path.is_file() and before.get(path) != path.read_bytes()}
    assert changed == set(recipe)


def test_a_backend_in_memory(monkeypatch):
    """One entry in the table of one operator makes a backend, also of the head, in each of its modes."""
    operator = import_module("cpt_kernels.ops.vocab_score")
    calls = []

    def mine(logits, targets, options):
        calls.append(tuple(logits.shape))
        return operator.BACKENDS["eager"].load()(logits, targets, options)

    monkeypatch.setitem(sys.modules, "my_backend", SimpleNamespace(vocab_score_mine=mine))
    monkeypatch.setitem(operator.BACKENDS, "mine", Backend("my_backend:vocab_score_mine"))
    logits, targets = torch.randn(3, 7), torch.tensor([0, 6, 2])
    found = vocab_score(logits, targets, backend="mine")
    torch.testing.assert_close(found.logps, logits.log_softmax(1).gather(1, targets[:, None])[:, 0])
    with pytest.raises(ValueError, match="choose one of auto, eager, triton, cuda, mine"):
        vocab_score(logits, targets, backend="yours")
    options = HeadOptions(backend="mine")
    linear_logprobs(torch.randn(3, 4), torch.randn(7, 4), targets, options=options)
    assert calls == [(3, 7)] * 2
    head = Head(columns=7, width=4)
    pairs, rows = head.pairs(), sum(head.lengths)
    for trained, general in ((True, False), (False, False), (True, True)):
        calls.clear()
        hidden, weight = torch.randn(rows, 4, requires_grad=True), torch.randn(7, 4, requires_grad=trained)
        found = linear_preference_loss(hidden, weight, head.targets, pairs, head.loss, None, options, general=general)
        found.loss.backward()
        assert calls == [(rows, 7)]


def test_a_peer_in_memory(monkeypatch):
    """A head is compared with the expected loss and gradients, and a trainer is one entry of the contestants."""
    problem = heads.Problem.make(32, 16, 50, 4, "cpu", torch.float32)
    peer = heads.Contestant(lambda p: lambda x, w: p.dpo(heads.token_logps(x @ w.t(), p.targets)))
    hidden, weight = (x.clone().requires_grad_() for x in (problem.hidden, problem.weight))
    loss = peer.build(problem)(hidden, weight)
    loss.backward()
    found = {"loss": loss.item(), **heads.norms(hidden.grad, weight.grad)}
    assert heads.disagreement(found, problem.expected()[peer.kind], half=False) is None
    monkeypatch.setitem(step.CONTESTANTS, "mine", step.Entry("ours"))
    assert step.parse(["--peers", "mine"]).peers == ["mine"]
