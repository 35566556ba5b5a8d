"""The interpreter of PTX: planted faults in the compiled kernels are found, and its arithmetic rounds as PTX says.

The kernels' results are tested beside those of all implementations, in test_vocab_score.py and test_pair_loss.py.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch

from cpt_kernels.ops.pair_loss import pair_loss
from tests.helpers import ROOT
from tests.helpers.ptx import PtxError, cuda_tanh, executed
from tests.helpers.ptx import arithmetic as a
from tests.helpers.ptx.instructions import ELEMENTWISE
from tests.ops import test_pair_loss, test_vocab_score
from tests.ops.test_vocab_score import BF16, FP32, Case

BLOCKS = Case(FP32, 2, 20001, offset=3)  # each row is split over a cluster of 8 blocks of 2 warps
ONE_WARP = Case(BF16, 2, 256, stride=264)  # 32 whole vectors a row
SPREAD = Case(FP32, 67, 1021)

# Fault: (what the PTX has, in a regular expression, what it gets, the error, the case).
SCORE_FAULTS = {
    "asynchronous copies not waited for": (r"cp\.async\.wait_group 0;", "", "nothing has been written to", BLOCKS),
    "no barrier before warps are merged": (r"bar\.sync\s+0;", "", "no barrier lies between|nothing has been", BLOCKS),
    "no cluster barrier before blocks are merged": (
        r"barrier\.cluster\.arrive;\s*barrier\.cluster\.wait;",
        "",
        "no barrier lies between|nothing has been",
        BLOCKS,
    ),
    "a block does not wait for the cluster's barrier": (
        r"(barrier\.cluster\.arrive;\s*)barrier\.cluster\.wait;",
        r"\1",
        "no barrier lies between",
        BLOCKS,
    ),
    "a block leaves while others read it": (r"barrier\.cluster\.wait;(\s*ret;)", r"\1", "may have left", BLOCKS),
    "arrival before the last read of another block": (
        r"(barrier\.cluster\.arrive;\s*barrier\.cluster\.wait;)(.*?)barrier\.cluster\.arrive;",
        r"\1 barrier.cluster.arrive;\2",
        "may have left",
        BLOCKS,
    ),
    "a store past the row's end": (
        r"(st\.global\S*\.v4\.u32\s+\[%rd\d+)(?=\])",
        r"\1+16",
        r"out of bounds, at byte 512 of row \d of the logits \(512 bytes\)",
        ONE_WARP,
    ),
    "a vector store at a misaligned address": (
        r"(st\.global\S*\.v4\.u32\s+\[%rd\d+)(?=\])",
        r"\1+8",
        "misaligned",
        ONE_WARP,
    ),
    "another ln 2": ("0f3F317218", "0f3F317280", "error", SPREAD),
    "a multiply-add without its addend": (
        r"fma\.rn\.f32\s+(%f\d+), (%f\d+), (%f\d+), %f\d+;",
        r"mul.f32 \1, \2, \3;",
        "error",
        SPREAD,
    ),
    "a shuffle by another distance": (
        r"(shfl\.sync\.bfly\.b32[^;]*, )%r\d+, (%r\d+, %r\d+;)",
        r"\g<1>1, \2",
        "error",
        SPREAD,
    ),
    "a lane leaves before a shuffle": (
        r"(\s)(shfl\.sync\.bfly)",
        r"\1setp.eq.u32 %p1, %laneid, 3; @%p1 ret; \2",
        "deadlock",
        ONE_WARP,
    ),
    "an instruction that the interpreter does not know": (
        r"ex2\.approx\.ftz\.f32",
        "tanh.approx.f32",
        r"line \d+: tanh\.approx\.f32 .*does not know this instruction",
        ONE_WARP,
    ),
    "no return": (r"\bret;", "", "past the last instruction", ONE_WARP),
    "a modifier that the interpreter does not know": (
        r"fma\.rn\.f32",
        "fma.rz.f32",
        r"fma\.rz\.f32 .*does not know this",
        ONE_WARP,
    ),
}


@pytest.mark.parametrize("fault", SCORE_FAULTS)
def test_planted_faults_are_found_in_vocab_score(fault, monkeypatch):
    pattern, replacement, message, case = SCORE_FAULTS[fault]
    kind = AssertionError if message == "error" else PtxError
    with executed(monkeypatch, fault=(pattern, replacement), shared_kib=16), pytest.raises(kind, match=message):
        test_vocab_score.check(case, "cuda")


PAIR_FAULTS = {
    "no barrier before partial sums are read": (
        r"bar\.sync\s+0;(.*)bar\.sync\s+0;",
        r"\1bar.sync 0;",
        "no barrier lies between|nothing has been",
    ),
    "no barrier after partial sums were read": (
        r"(bar\.sync\s+0;.*)bar\.sync\s+0;",
        r"\1",
        "read, and no barrier lies",
    ),
    "no barrier of the block after the grid's": (
        r"(barrier\.sync\s+0;.*)barrier\.sync\s+0;",
        r"\1",
        "no barrier lies between|nothing has been",
    ),
    "threads leave before a barrier": (
        r"(setp\.ne\.s32\s+(%p\d+), %r1, 0;\s*)bar\.sync",
        r"\1@\2 ret; bar.sync",
        "deadlock",
    ),
    "a load past the end": (
        r"(ld\.global\.s32\s+%rd\d+, \[%rd\d+)\+4\]",
        r"\1+8]",
        "out of bounds, .* of cu_completions",
    ),
    "a loss of other constants": ("0dBFE62E42FEFA39EF", "0dBFE6200000000000", "error"),
}


@pytest.mark.parametrize("fault", PAIR_FAULTS)
def test_planted_faults_are_found_in_pair_loss(fault, monkeypatch):
    pattern, replacement, message = PAIR_FAULTS[fault]
    kind = AssertionError if message == "error" else PtxError
    arguments = test_pair_loss.make("pairs share completions", wide=False)
    with executed(monkeypatch, fault=(pattern, replacement), multiprocessors=2), pytest.raises(kind, match=message):
        test_pair_loss.check(arguments, "sigmoid", {}, lambda **kw: pair_loss(**kw, backend="cuda"))


@pytest.mark.slow
@pytest.mark.parametrize("case", test_vocab_score.CASES, ids=str)
def test_vocab_score_for_blackwell(case, monkeypatch):
    """nvcc compiles other code for sm_100a; the package ships that for sm_90, which the driver compiles further."""
    with executed(monkeypatch, "sm_100a", shared_kib=16) as launches:
        test_vocab_score.check(case, "cuda")
    assert len(launches) == 1


@pytest.mark.parametrize(
    "arguments",
    [("90",), pytest.param(("80", "all"), marks=pytest.mark.slow), pytest.param(("90", "all"), marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_what_triton_compiles(arguments):
    command = [sys.executable, "-m", "tests.helpers.ptx.triton_kernels", *arguments]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0 and re.search(r"[1-9]\d* launches\n4 faults found", run.stdout), run.stdout + run.stderr


def test_the_interpreter_stays_small():
    modules = ("arithmetic", "instructions", "machine", "memory", "order", "program")
    paths = [ROOT / "tests/helpers/ptx" / f"{name}.py" for name in modules]
    assert sum(len(path.read_text().splitlines()) for path in paths) <= 900


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_multiply_add_is_rounded_once(dtype):
    """Against exact fractions; the sum cancels most digits of the product in a half of the cases."""
    random = np.random.default_rng(0)
    x, y = (random.standard_normal(2000).astype(dtype) for _ in range(2))
    z = np.where(random.random(2000) < 0.5, -x * y, random.standard_normal(2000).astype(dtype))
    exact = [Fraction(float(p)) * Fraction(float(q)) + Fraction(float(r)) for p, q, r in zip(x, y, z)]
    expected = np.array([dtype(float(e)) for e in exact])
    assert (a.fma(x, y, z) == expected).all()
    with np.errstate(invalid="ignore"):
        assert np.isnan(a.fma(dtype([np.inf, 1]), dtype([0, np.nan]), dtype([1, 1]))).all()


def test_approximations_err_as_much_as_ptx_allows():
    x = np.linspace(-20, 20, 100_001, dtype=np.float32)
    error = np.abs(a.ex2(x) / np.exp2(np.float64(x)) - 1).max()
    assert 0.9 < error / 2.0**-22 < 1.3 and a.flushed(a.ex2)(np.float32([0, -130])).tolist() == [1, 0]
    y = x[x != 0]
    assert np.abs(a.rcp(y) * np.float64(y) - 1).max() <= 2.0**-23
    t = torch.from_numpy(x)
    assert (cuda_tanh(t).double() - t.double().tanh()).abs().max() < 2.0**-22


def test_conversions_and_bits():
    def run(opcode, *operands):
        return ELEMENTWISE[opcode][0](*operands)

    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    x[:4] = torch.tensor([float("inf"), -float("inf"), 3.39e38, 1e-41])
    bits = a.to_bf16(x.numpy())
    assert np.array_equal(bits, x.bfloat16().view(torch.int16).numpy().view(np.uint16))
    assert np.array_equal(run("cvt.f32.bf16", bits), x.bfloat16().float().numpy())
    assert a.to_bf16(np.float32([np.nan])) == 0x7FFF
    assert run("cvt.rn.bf16x2.f32", *np.float32([[1], [-2]])) == 0x3F80C000
    assert run("cvt.rn.f16x2.f32", *np.float32([[1], [-2]])) == 0x3C00C000
    one, eight, much = np.uint32([1]), np.uint32([8]), np.uint32([32])
    assert run("shl.b32", one, much) == 0 and run("shl.b32", one, much - one) == 1 << 31
    assert run("shr.s32", np.int32([-8]), much + eight) == -1 and run("shr.u32", one, much) == 0
    assert run("div.s32", np.int32([-7, 7, 8]), np.int32([2, -2, 3])).tolist() == [-3, -3, 2]
    assert run("bfi.b32", np.uint32([0xABCD]), np.uint32([0x11111111]), eight, eight) == 0x1111CD11
    assert run("bfi.b64", np.uint64([0xABCD]), np.uint64([7]), much, much) == 0xABCD_00000007
    assert run("bfe.u32", np.uint32([0x12345678]), eight, eight) == 0x56
    assert run("bfe.s32", np.int32([0b1011_0100] * 4), *np.uint32([[4, 2, 1, 3], [3, 3, 1, 0]])).tolist() == [
        3,
        -3,
        0,
        0,
    ]
    assert run("bfe.s32", np.int32([-8, -8, 7]), *np.uint32([[1, 30, 0], [32, 9, 32]])).tolist() == [-4, -1, 7]
    assert run("neg.f16x2", np.uint32([0x3C00_C000])) == 0xBC00_4000
    assert run("max.f32", np.float32([np.nan]), np.float32([-1])) == -1
    nan = np.float32([np.nan])
    assert not run("setp.ne.f32", nan, nan) and run("setp.neu.f32", nan, nan) and run("setp.nan.f32", nan, nan)
    pairs = np.uint32([0x3F80_BF80]), np.uint32([0x7FC0_C000])  # (1, -1) and (NaN, -2)
    assert run("max.bf16x2", *pairs) == 0x3F80_BF80
    third = np.float32([1, 1, -1]), np.float32([2.0**-25, -(2.0**-25), -(2.0**-24) - 2.0**-30])
    assert run("add.rz.f32", *third).tolist() == [1, 1 - 2.0**-24, -1]
