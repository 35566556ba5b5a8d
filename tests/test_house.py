"""Rules of the house: who may import whom, what must stay lazy, and how long a file may be."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import cpt_kernels
from tests.helpers import ROOT

PACKAGE = ROOT / "cpt_kernels"
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))

# Who may import whom, by folder (or file at the top). Everybody may import itself and LEAVES.
LEAVES = {"errors", "files", "plots", "version"}
FOLDERS = {
    **{leaf: set() for leaf in LEAVES},
    "losses": set(),
    "ops": {"losses"},
    "data": set(),
    "pairs": {"data"},
    "config": {"data", "losses", "ops"},  # ops: the names of attention backends
    "model": {"ops", "data", "config", "losses"},
    "reference": {"model", "ops", "data"},
    "training": {"planning", "reference", "model", "ops", "data", "config", "losses"},
    "trainer": {"training", "planning", "reference", "model", "ops", "data", "config", "losses"},
    "planning": {"reference", "model", "ops", "data", "config", "losses"},
    "generation": {"data"},
    "evaluation": {"reference", "generation", "pairs", "model", "data", "config", "losses"},
}
COMMANDS = {"cli", "demo"}  # on top: they import whatever they need
SHOWS = COMMANDS | {"report.py"}  # what may parse arguments and print
USES_TRANSFORMERS = {"model", "reference", "training", "trainer", "config", "generation", *COMMANDS}
NUMPY_ALONE = {
    "data/batches.py",
    "data/curriculum.py",
    "data/packing.py",
    "data/stream_curriculum.py",
    "data/truncation.py",
    "evaluation/win_rate.py",
    "pairs/build.py",
    "pairs/order.py",
}


class Import(NamedTuple):
    name: str  # absolute
    lazy: bool  # inside of a function, or for type checkers only


def imports_of(path: Path) -> Iterator[Import]:
    """All imports of a file of the package, relative ones made absolute."""
    package = ["cpt_kernels", *path.parent.parts]

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) - child.level + 1] if child.level else []
                module = ".".join([*base, *([child.module] if child.module else [])])
                for alias in child.names:  # `from . import x` may name a module
                    yield Import(f"{module}.{alias.name}" if is_module(f"{module}.{alias.name}") else module, lazy)
            checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            deferred = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            yield from walk(child, lazy or checking or deferred)

    yield from walk(ast.parse((PACKAGE / path).read_text()), False)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return name.startswith("cpt_kernels.") and (path.is_dir() or path.with_suffix(".py").is_file())


def third_party(path: Path, lazy: bool = False) -> set[str]:
    """Packages that a file needs when it is imported, or with ``lazy`` ever."""
    roots = {found.name.split(".")[0] for found in imports_of(path) if lazy or not found.lazy}
    return roots - set(sys.stdlib_module_names) - {"cpt_kernels"}


def component(name: str) -> str:
    """The part of the package that a module belongs to: ``ops`` for ``cpt_kernels.ops.gather``."""
    return name.split(".")[1]


def module_name(path: Path) -> str:
    parts = ["cpt_kernels", *path.with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_follow_the_table_of_folders(path):
    own = component(module_name(path) + ".")
    if not own or own in COMMANDS:
        return
    assert own in FOLDERS, f"cpt_kernels/{own} has no row in FOLDERS of {Path(__file__).name}"
    others = {component(found.name) for found in imports_of(path) if found.name.startswith("cpt_kernels.")}
    assert others <= FOLDERS[own] | LEAVES | {own}, f"{path} imports {others - FOLDERS[own]}"


def test_folders_have_no_cycle():
    graph, order = {name: set(others) for name, others in FOLDERS.items()}, []
    while free := [name for name, others in graph.items() if others <= set(order)]:
        order += free
        graph = {name: others for name, others in graph.items() if name not in free}
    assert not graph, f"folders that import each other: {sorted(graph)}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_only_commands_and_reports_parse_arguments_and_print(path):
    if path.parts[0] in SHOWS or path.name in SHOWS:
        return
    assert not third_party(path, lazy=True) & {"rich"}
    assert "argparse" not in {found.name for found in imports_of(path)}
    calls = [node for node in ast.walk(ast.parse((PACKAGE / path).read_text())) if isinstance(node, ast.Call)]
    assert not [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]


def test_the_top_of_the_repository_holds_what_it_is_known_for():
    """A run that was started here leaves folders, which must not be committed."""
    entries = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    folders = {name.split("/")[0] for name in entries.stdout.split("\0") if "/" in name}
    assert folders == {".ci", "bench", "cpt_kernels", "csrc", "docs", "examples", "tests"}


def test_the_top_of_the_package_is_small():
    entries = subprocess.run(["git", "ls-files", "cpt_kernels"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = {line.split("/")[1] for line in entries.stdout.splitlines()}
    assert len(names) <= 20, sorted(names)


def test_imports_have_no_cycle():
    """Lazy imports count, too: a cycle that runs through functions is a cycle all the same."""
    names = {module_name(path): path for path in FILES}
    graph = {
        name: {found.name for found in imports_of(path) if found.name in names} - {name} for name, path in names.items()
    }
    while leaves := [name for name, others in graph.items() if not others]:
        for leaf in leaves:
            del graph[leaf]
        graph = {name: others - set(leaves) for name, others in graph.items()}
    assert not graph, f"modules that import each other: {sorted(graph)}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_what_a_file_needs_to_be_imported(path):
    needs = third_party(path)
    if path.parts == ("__init__.py",):
        assert not needs
    elif path.as_posix() in NUMPY_ALONE:
        assert needs <= {"numpy"}
        assert not [found for found in imports_of(path) if component(found.name + ".") in ("ops", "losses", "model")]
    elif path.parts[0] in ("ops", "losses"):
        assert needs <= ({"torch", "triton"} if path.name == "triton.py" else {"torch"})
    if "transformers" in needs:
        assert path.parts[0].removesuffix(".py") in USES_TRANSFORMERS


@pytest.mark.parametrize("path", FILES, ids=str)
def test_kernels_are_imported_lazily(path):
    for found in imports_of(path):
        last = found.name.rsplit(".", 1)[-1]
        if found.name.startswith("cpt_kernels.") and last in ("triton", "cuda", "_C"):
            assert found.lazy, f"{path} imports {found.name} when it is imported itself"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_nothing_imports_bench_or_tests(path):
    assert not third_party(path, lazy=True) & {"bench", "tests", "conftest", "numerics"}


@pytest.mark.parametrize("folder", ["cpt_kernels", "bench", "tests"])
def test_files_have_at_most_600_lines(folder):
    lengths = {path: len(path.read_text().splitlines()) for path in (ROOT / folder).rglob("*.py")}
    assert not {str(path.relative_to(ROOT)): length for path, length in lengths.items() if length > 600}


# Functions, classes and type aliases that several files define on purpose: every command's entry point; and the same
# pair of (prompt ids, completion ids) in data/collate.py and model/proof.py.
DEFINED_TWICE = {"main"}
# Signatures that somebody else dictates, by file and name: TRL's for the trainer's constructor, PyTorch's for
# registered backwards. `Function.is_dictated` adds the methods of autograd functions.
DICTATED = {
    ("trainer.py", "ContrastiveTrainer.__init__"),
    ("ops/head/compiled.py", "_logprobs_backward"),
    ("ops/head/compiled.py", "_preference_backward"),
}


class Function(NamedTuple):
    path: Path
    name: str  # with its class: "PackedModel.__call__"
    node: ast.FunctionDef
    owner: ast.ClassDef | None = None

    def is_dictated(self) -> bool:
        compiled = any("triton.jit" in ast.unparse(decorator) for decorator in self.node.decorator_list)
        bases = [ast.unparse(base).removeprefix("torch.") for base in self.owner.bases] if self.owner else []
        of_autograd = self.node.name in ("forward", "backward") and "autograd.Function" in bases
        return compiled or of_autograd or (self.path.as_posix(), self.name) in DICTATED


def functions() -> Iterator[Function]:
    """All functions of the package, nested ones included."""

    def walk(path: Path, node: ast.AST, owner: ast.ClassDef | None) -> Iterator[Function]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield Function(path, f"{owner.name}.{child.name}" if owner else child.name, child, owner)
            yield from walk(path, child, child if isinstance(child, ast.ClassDef) else owner)

    for path in FILES:
        yield from walk(path, ast.parse((PACKAGE / path).read_text()), None)


def test_every_name_is_defined_once():
    places: dict[str, list[str]] = {}
    for path in FILES:
        for node in ast.parse((PACKAGE / path).read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                places.setdefault(node.name, []).append(str(path))
            if isinstance(node, ast.Assign) and re.match(r"[A-Z]\w*[a-z]\w*$", ast.unparse(node.targets[0])):
                places.setdefault(node.targets[0].id, []).append(str(path))  # a type alias
    assert not {name: files for name, files in places.items() if len(files) > 1 and name not in DEFINED_TWICE}


def test_no_function_has_more_than_seven_positional_parameters():
    def count(node: ast.FunctionDef) -> int:
        names = [argument.arg for argument in (*node.args.posonlyargs, *node.args.args)]
        return len(names) - (names[:1] in (["self"], ["cls"], ["ctx"]))

    assert not {f"{f.path}: {f.name}": count(f.node) for f in functions() if count(f.node) > 7 and not f.is_dictated()}


def test_results_with_more_than_three_parts_have_names():
    assert not {f"{f.path}: {f.name}" for f in functions() if not f.is_dictated() and max(result_sizes(f.node)) > 3}


def result_sizes(function: ast.FunctionDef) -> Iterator[int]:
    """Sizes of the tuples that a function returns or yields, and of those that its annotation names (at any depth)."""

    def values(node: ast.AST) -> Iterator[ast.expr | None]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.Return, ast.Yield)):
                yield child.value
            if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                yield from values(child)

    yield 0
    for value in values(function):
        yield len(value.elts) if isinstance(value, ast.Tuple) else 0
    for part in ast.walk(function.returns) if function.returns else ():
        if isinstance(part, ast.Subscript) and ast.unparse(part.value) in ("tuple", "Tuple"):
            yield len(part.slice.elts) if isinstance(part.slice, ast.Tuple) else 1


@pytest.mark.parametrize(
    "code",
    [
        "return a, b, c, d",
        "yield a, b, c, d",
        "x = yield a, b, c, d",
        "-> tuple[int, int, int, int]",
        "-> Iterator[tuple[A, B, C, D]]",
    ],
)
def test_unnamed_results_are_found(code):
    source = f"def f() {code}: ..." if code.startswith("->") else f"def f():\n    {code}"
    (function,) = ast.parse(source).body
    assert max(result_sizes(function)) == 4


def test_the_version_is_the_one_of_the_distribution():
    assert f'\nversion = "{cpt_kernels.__version__}"\n' in (ROOT / "pyproject.toml").read_text()


_HIDE = """
import importlib.machinery as machinery
found = machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in {hidden!r} else found(name, path, target)
machinery.PathFinder.find_spec = staticmethod(find_spec)
"""


def _run_without(hidden: set[str], code: str) -> None:
    process = subprocess.run(
        [sys.executable, "-c", _HIDE.format(hidden=hidden) + code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr


def test_losses_and_operators_work_with_torch_alone():
    _run_without(
        {"triton", "transformers", "datasets", "accelerate", "peft", "pyarrow", "tokenizers", "huggingface_hub"},
        """
import torch
import cpt_kernels.losses, cpt_kernels.ops, cpt_kernels.ops.attention, cpt_kernels.ops.linear_preference
from cpt_kernels import build_loss, linear_logprobs
weight = torch.randn(7, 4, requires_grad=True)
out = linear_logprobs(torch.randn(3, 4), weight, torch.tensor([0, 6, 2]))
out.logps.sum().backward()
assert weight.grad.shape == (7, 4) and build_loss("sigmoid").needs_reference
try:
    cpt_kernels.ops.vocab_score.vocab_score(torch.zeros(1, 4), torch.tensor([0]), backend="triton")
except RuntimeError as error:
    assert "pip install triton" in str(error)
else:
    raise AssertionError("no error without triton")
""",
    )


def test_layouts_work_with_numpy_alone():
    modules = [path.removesuffix(".py").replace("/", ".") for path in sorted(NUMPY_ALONE) if (PACKAGE / path).exists()]
    assert len(modules) >= 3
    _run_without(
        {"torch", "triton", "transformers", "datasets"}, "\n".join(f"import cpt_kernels.{module}" for module in modules)
    )
