"""The CUDA sources under emulation: planted bugs are found, the sanitizers find nothing, plans fit the device."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from cpt_kernels.losses import build_loss
from cpt_kernels.ops.pair_loss import kernel_loss, pair_loss
from cpt_kernels.ops.vocab_score import vocab_score
from tests.helpers.emulation import CSRC, WARNINGS, build, emulated, load, sources
from tests.numerics import assert_close
from tests.ops.test_vocab_score import BF16, Case, check

ROOT = CSRC.parent

# Planted bugs: (file, right, wrong), and the device on which they show.
CLUSTER, STREAM = {"shared_kib": 16}, {"major": 8}
SCORE_BUGS = {
    "tail column not summed": (
        (
            "vocab_score.cu",
            "if (!inside(row.first_column(v) + i, p.vocab_size)) y[i] = -INFINITY;",
            "if (!inside(row.first_column(v) + i, p.vocab_size - 1)) y[i] = -INFINITY;",
        ),
        CLUSTER,
    ),
    "head of an unaligned row not read": (
        ("vectors.cuh", "columns)) x.values[i] = at(vector)[i];", "columns) && vector) x.values[i] = at(vector)[i];"),
        STREAM,
    ),
    "sum not rescaled": (("online_softmax.cuh", "s.scale(factor);", ""), CLUSTER),
    "no barrier before warps are merged": (
        ("online_softmax.cuh", "__syncthreads();  // the warps' statistics are there", ""),
        STREAM,
    ),
    "no cluster barrier before blocks are merged": (
        ("online_softmax.cuh", "Cluster::sync();  // the blocks' statistics are there", ""),
        CLUSTER,
    ),
    "no cluster barrier before a block leaves": (
        ("vocab_score.cu", "if (kResident) Cluster::wait();", ""),
        CLUSTER,
    ),
    "arrival before the last read of another block": (
        (
            "online_softmax.cuh",
            "mine = lane < Cluster::size() ? Cluster::read(&shared->block, lane) : Online<kStatistics>();\n"
            "        Cluster::arrive();",
            "Cluster::arrive();\n"
            "        mine = lane < Cluster::size() ? Cluster::read(&shared->block, lane) : Online<kStatistics>();\n",
        ),
        CLUSTER,
    ),
    "asynchronous copies not waited for": (("vocab_score.cu", "__pipeline_wait_prior(0);", ""), CLUSTER),
    "target read after the score is written": (
        (
            "vocab_score.cu",
            "p.logps[row_index] = (target_y - all.m) * p.factor - log_sum;",
            "p.logps[row_index] = to_float(logits[target]) - lse;",
        ),
        STREAM,
    ),
    "target's element written by another thread than its vector": (
        ("vocab_score.cu", "owner == threadIdx.x", "owner == threadIdx.x - 1"),
        CLUSTER,
    ),
    "tail of whole vectors not scored": (
        ("vocab_score.cu", "v < min(rest + kChunk, end); v += kWarp", "v < min(rest + kWarp, end); v += kWarp"),
        CLUSTER,
    ),
}
SCORE_CASE = Case(BF16, 2, 9001, offset=3)  # several warps, several blocks


@pytest.mark.parametrize("bug", [None, *SCORE_BUGS])
def test_planted_bugs_are_found_in_vocab_score(bug, monkeypatch):
    """Each bug fails the checks in at least one of the two orders of threads; without a bug both pass."""
    devices = [SCORE_BUGS[bug][1]] if bug else [CLUSTER, STREAM]
    patches = (SCORE_BUGS[bug][0],) if bug else ()
    found = 0
    for device in devices:
        for descending in (False, True):
            with emulated(monkeypatch, patches, descending=descending, **device):
                try:
                    check(SCORE_CASE, "cuda")
                except (AssertionError, RuntimeError):
                    found += 1
    assert (found > 0) == (bug is not None)


PAIR_BUGS = {
    "last token not summed": ("i < end; i += kThreads", "i < end - 1; i += kThreads"),
    "no barrier before partial sums are read": ("__syncthreads();  // partial sums are there", ""),
    "no barrier after partial sums were read": ("__syncthreads();  // partial sums were read", ""),
    "no grid barrier": ("cg::this_grid().sync();", ""),
}


@pytest.mark.parametrize("bug", [None, *PAIR_BUGS])
def test_planted_bugs_are_found_in_pair_loss(bug, monkeypatch):
    patches = (("pair_loss.cu", *PAIR_BUGS[bug]),) if bug else ()
    lengths = torch.tensor([700, 1, 900, 300, 500, 0, 650, 270, 444])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    tokens = -torch.rand(int(offsets[-1]), generator=torch.Generator().manual_seed(0))
    chosen, rejected = torch.tensor([0, 2, 4, 8]), torch.tensor([3, 1, 0, 7])
    arguments = (offsets, chosen, rejected, None)
    eager = pair_loss(tokens, *arguments, torch.zeros(9), beta=0.01)
    exact = pair_loss(tokens.double(), *arguments, torch.zeros(9).double(), beta=0.01)
    found = 0
    for descending in (False, True):
        with emulated(monkeypatch, patches, descending=descending, multiprocessors=2):
            result = pair_loss(tokens, *arguments, torch.zeros(9), beta=0.01, backend="cuda")
        try:
            for name in result._fields:
                assert_close(getattr(result, name), getattr(eager, name), getattr(exact, name), name)
        except AssertionError:
            found += 1
    assert (found > 0) == (bug is not None)


def test_a_barrier_that_some_threads_skip_is_a_deadlock(monkeypatch):
    patch = (("pair_loss.cu", "cg::this_grid().sync();", "if (threadIdx.x) cg::this_grid().sync();"),)
    offsets = torch.tensor([0, 3])
    with emulated(monkeypatch, patch), pytest.raises(RuntimeError, match="deadlock"):
        pair_loss(-torch.rand(3), offsets, torch.tensor([0]), loss="sft", backend="cuda")


@pytest.mark.parametrize(
    ("sanitizer", "bug"),
    [
        ("address,undefined", None),
        ("thread", None),
        ("thread", ("pair_loss.cu", *PAIR_BUGS["no barrier after partial sums were read"])),
    ],
)
def test_sanitizers(sanitizer, bug):
    """With every CUDA thread a std::thread, no access is out of bounds, misaligned or unordered."""
    folder = ROOT / "tests" / "helpers" / "emulation"
    files = {path.name: path.read_text() for path in [folder / "sanitize.cpp", folder / "emulation.cpp"]}
    files |= {path.name: path.read_text() for path in (folder / "include").iterdir()}
    texts = sources((bug,) if bug else ())
    files |= {name: text for name, text in texts.items() if name != "bindings.cpp"}
    names = [name for name in files if name.endswith((".cu", ".cpp"))]
    flags = ["-std=c++17", "-O1", "-g1", *WARNINGS, f"-fsanitize={sanitizer}", "-fno-sanitize-recover=all"]
    command = ("g++", *flags, "-DEMULATION_THREADS", "-I.", "-pthread", "-x", "c++", *names)
    program = build(f"sanitize-{sanitizer.split(',')[0]}", command, files)
    # The thread sanitizer needs a fixed memory layout.
    fixed = ["setarch", "-R"] if sanitizer == "thread" and shutil.which("setarch") else []
    run = subprocess.run([*fixed, str(program)], capture_output=True, text=True)
    if bug:
        assert run.returncode and "data race" in run.stderr
    else:
        assert run.returncode == 0 and "largest deviation" in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("device", "columns", "blocks"),
    [
        ({}, 32000, 1),  # 64 KB of bf16: one block, three to a multiprocessor
        ({}, 50257, 2),
        ({}, 128256, 4),
        ({}, 256000, 8),
        ({"major": 8, "shared_kib": 164}, 32000, 1),
        ({"major": 8, "shared_kib": 100}, 32000, 0),  # streams
        ({"major": 8, "shared_kib": 164}, 50257, 0),
    ],
)
def test_plan(device, columns, blocks, monkeypatch):
    """The number of blocks that keep a row in shared memory; 0 if the row streams."""
    with emulated(monkeypatch, **device) as library:
        vocab_score(torch.zeros(1, columns, dtype=BF16), torch.tensor([0]), score=True, backend="cuda")
        cluster, shared = library.last_cluster(), library.last_shared_bytes()
    if blocks:
        assert cluster == blocks and shared >= 2 * columns / cluster
    else:
        assert cluster == 1 and shared < 2048


def rejects(function, good: dict, *wrong: dict) -> None:
    function(**good)
    for change in wrong:
        with pytest.raises(ValueError, match=function.__name__):
            function(**{**good, **change})


def test_arguments_of_vocab_score_are_checked():
    tile, targets, out = torch.zeros(2, 8), torch.zeros(2, dtype=torch.int64), torch.zeros(2)
    pointers = {name: tensor.data_ptr() for name, tensor in (("logits", tile), ("logps", out), ("lse", out))}
    absent = dict.fromkeys(("bias", "entropy", "mean_logit", "correct", "log_sum_sq", "stream"), 0)
    sizes = {"rows": 2, "columns": 8, "row_stride": 8, "vocab_size": 8, "targets": targets.data_ptr()}
    rejects(
        load().vocab_score,
        {"dtype": "float32", "logit_scale": 1.0, "softcap": 0.0, "score": True, **pointers, **absent, **sizes},
        {"dtype": "float64"},
        {"rows": -1},
        {"columns": 0},
        {"columns": 1 << 31},
        {"vocab_size": 9},
        {"row_stride": 7},
        {"softcap": -1.0},
        {"targets": 0},
        {"entropy": out.data_ptr()},
    )


def test_arguments_of_pair_loss_are_checked():
    numbers, index = torch.zeros(4), torch.tensor([0, 1, 2, 3])
    inputs = {"token_logps": numbers, "ref_logps": numbers, "cu_completions": index, "chosen": index, "rejected": index}
    outputs = {name: torch.zeros(4) for name in ("completion_logps", "losses", "weights")}
    pointers = {name: tensor.data_ptr() for name, tensor in {**inputs, **outputs}.items()}
    sizes = {"tokens": 3, "wide": True, "completions": 3, "pairs": 2, "targets": 0, "stream": 0}
    options = dataclasses.asdict(kernel_loss(build_loss("sigmoid")))
    del options["name"]
    rejects(
        load().pair_loss,
        {**pointers, **sizes, "loss": "sigmoid", **options},
        {"loss": "dpo"},
        {"pairs": -1},
        {"tokens": -1},
        {"completions": 0},
        {"cu_completions": 0},
        {"token_logps": 0},
        {"weights": 0},
        {"chosen": 0},
        {"rejected": 0},
        {"ref_logps": 0},
    )


def test_launch_errors_are_raised(monkeypatch):
    """A cooperative launch with too many blocks: CUDA's message reaches Python."""
    patch = (("pair_loss.cu", "std::min(resident, useful)", "std::max(resident, useful)"),)
    offsets = torch.arange(10)
    with emulated(monkeypatch, patch, multiprocessors=2), pytest.raises(RuntimeError, match="invalid configuration"):
        pair_loss(-torch.rand(9), offsets, torch.tensor([0]), loss="sft", backend="cuda")


def test_sources_are_portable():
    """What nvcc reads has no torch and nothing of the emulation, except for one macro."""
    text = "".join(sources().values())
    assert not re.search(r"torch/|ATen|EMULATION", text)
    assert text.count("#ifndef CPT_SHARED_MEMORY") == 1


@pytest.mark.parametrize("cuda", ["0", "1"])
def test_wheel(cuda, tmp_path):
    """A wheel builds with and without nvcc, says which in one line, carries the sources, and imports without a GPU."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    if cuda == "1" and not (shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")):
        with pytest.raises(subprocess.CalledProcessError):
            _build_wheel(cuda, tmp_path)
        return
    wheel, log = _build_wheel(cuda, tmp_path)
    assert len(set(re.findall(r"^\s*(cpt_kernels: .*)", log, re.MULTILINE))) == 1
    names = zipfile.ZipFile(wheel).namelist()
    assert {f"cpt_kernels/csrc/{path.name}" for path in CSRC.iterdir()} <= set(names)
    assert "cpt_kernels/evaluation/judge.jinja" in names
    built = [name for name in names if name.startswith("cpt_kernels/_C")]
    assert len(built) == int(cuda)
    if built and not torch.cuda.is_available():
        zipfile.ZipFile(wheel).extract(built[0], tmp_path)
        code = (
            "import _C\n"
            "try: _C.vocab_score(1, 'float32', 1, 1, 1, 1, 1, 0, 1.0, 0.0, 1, 1, 0, 0, 0, 0, False, 0)\n"
            "except RuntimeError as error: print(error)"
        )
        run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "cpt_kernels", capture_output=True, text=True)
        assert "CUDA driver" in run.stdout or "no CUDA-capable device" in run.stdout, run.stdout + run.stderr


@pytest.mark.parametrize("wanted", ["", "1"])
@pytest.mark.parametrize(
    ("release", "said"),
    [
        ("Cuda compilation tools, release 11.5, V11.5.119", "nvcc is older than CUDA 12"),
        ("bash: not a compiler", "nvcc is older than CUDA 12"),
        (None, "there is no nvcc on the PATH, in CUDA_HOME or in /usr/local/cuda"),
    ],
)
def test_an_nvcc_that_cannot_build_the_kernels(release, said, wanted, tmp_path):
    """Linux distributions often ship an old nvcc. Without CPT_BUILD_CUDA=1 the package installs without the kernels."""
    if release is not None:
        (tmp_path / "nvcc").write_text(f"#!/bin/sh\necho '{release}'\n")
        (tmp_path / "nvcc").chmod(0o755)
    environment = {"PATH": str(tmp_path), "CUDA_HOME": "/nowhere", "CPT_BUILD_CUDA": wanted}
    command = [sys.executable, "setup.py", "--name"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert said in run.stdout + run.stderr and (run.returncode == 0) == (not wanted)


def _build_wheel(cuda: str, tmp_path: Path) -> tuple[Path, str]:
    """Builds a wheel from a copy of the tree, so that the tree stays clean."""
    copy = tmp_path / "source"
    copy.mkdir()
    for name in ("cpt_kernels", "csrc"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in"):
        shutil.copy(ROOT / name, copy)
    (copy / "README.md").touch()
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-v", "-w", "dist"]
    run = subprocess.run(
        command,
        cwd=copy,
        env={**os.environ, "CPT_BUILD_CUDA": cuda},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    (wheel,) = (copy / "dist").glob("*.whl")
    return wheel, run.stdout
