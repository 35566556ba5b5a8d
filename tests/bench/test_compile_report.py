"""Tests of the compile report: no kernel spills registers or has a stack frame."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from bench.compile_report import (
    CSRC,
    Usage,
    broken_triton_rules,
    cuda_usages,
    instructions_per_element,
    template_arguments,
    unmasked_loops,
    usage_table,
)
from tests.helpers import ROOT


def report(*arguments: str) -> dict:
    """Runs the report in its own process, because this process may have defined kernels for Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "compile_report", "--quick", *arguments]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def check(found: dict, kernels: set[tuple[str, str]]) -> None:
    assert found["ok"]
    assert {(usage["kernel"], usage["architecture"]) for usage in found["kernels"]} == kernels
    assert all(usage["registers"] > 0 and usage["stack"] == usage["spills"] == 0 for usage in found["kernels"])


def test_triton():
    names = ("vocab_score_kernel", "pair_loss_kernel", "rescale_kernel")
    found = report("--only", "triton")
    check(found, {(name, f"sm_{arch}") for name in names for arch in (80, 90, 100)})
    wide = [usage["wide"] for usage in found["kernels"] if "head's tile" in usage["case"]]
    # With an odd vocabulary, the first pass loads 16 bytes at a time, and the second loads and stores 16 bytes.
    assert len(wide) == 3 and all(count >= 6 for count in wide)
    scores = [usage for usage in found["kernels"] if usage["kernel"] == "vocab_score_kernel"]
    counts = {usage["case"]: usage["per_element"] for usage in scores if usage["architecture"] == "sm_90"}
    assert len(scores) == 3 * len(counts) and not any(usage["broken"] for usage in scores)
    assert 8 < counts["V=128256 bf16"] <= 14 and 8 < counts["V=128256 bf16, statistics"] <= 18


def test_rules_for_triton():
    """Machine code of two loops over whole vectors and one over the row's end, and the faults that rules name."""
    load, store, more = "LDG.E.128 R4, desc[UR4][R2.64]", "STG.E.128 desc[UR4][R2.64], R4", ["FADD R4, R5, R6"] * 60
    first, second = [load, *more], [load, *more, store]

    def broken(*loops: list[str]) -> str:
        code = [line for i, loop in enumerate(loops) for line in (f".L_x_{i}:", *loop, f"@P0 BRA `(.L_x_{i})")]
        found = unmasked_loops(code, biased=False)
        return " ".join(broken_triton_rules("statistics", found, instructions_per_element(found, 2)))

    assert not broken(first, second, [f"@!P1 {load}", *more, f"@!P1 {store}"])
    assert "16 bytes" in broken(first, [load, *more, *["STG.E.U16 desc[UR4][R2.64], R4"] * 8])
    assert "16 bytes" in broken(first, [*second, store]) and "16 bytes" in broken(second)
    assert "instructions per element" in broken([*first, *more], second)


def test_cuda():
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    found = report("--only", "cuda")
    check(found, {("vocab_score", "sm_90a"), ("pair_loss", "sm_90a")})
    scores = [usage for usage in found["kernels"] if usage["kernel"] == "vocab_score"]
    assert len(scores) == 24 and not any(usage["broken"] for usage in scores)
    assert all(usage["blocks"] >= 3 for usage in scores)
    counts = {usage["case"]: usage["per_element"] for usage in scores}
    assert 8 < counts["bf16, resident"] <= 14 and 8 < counts["bf16, resident, statistics"] <= 18


FAULTS = {
    "four 4-byte stores": (
        "vectors.cuh",
        "__stwb(reinterpret_cast<uint4*>(address), bits);",
        "*reinterpret_cast<uint4*>(address) = bits;",
        "16 bytes",
    ),
    "a test of each column": ("vocab_score.cu", "if (n == 1 && !inside(", "if (!inside(", "instructions per element"),
    "twice the blocks planned": ("vocab_score.cu", "kBlocks = 3;", "kBlocks = 6;", "local memory"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_fail(fault, tmp_path):
    """The old store, the old loop, and a launch bound that makes registers spill: the report names each."""
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    file, right, wrong, message = FAULTS[fault]
    for path in CSRC.iterdir():
        text = path.read_text()
        if path.name == file:
            assert text.count(right) == 1
            text = text.replace(right, wrong)
        if path.name == "vocab_score.cu":  # two of 24 kernels
            text = re.sub(r"\(adjusted \? launch<(__half|float),.*;", ";", text)
            text = text.replace("adjusted ? launch<__nv_bfloat16, true> : ", "")
            text = re.sub(r"\(statistics \? launch<T, false, .*;", ";", text)
        if path.name not in ("pair_loss.cu", "releases.cu"):
            (tmp_path / path.name).write_text(text)
    usages = [usage for usage in cuda_usages(quick=True, folder_of_sources=tmp_path) if "bf16, resident" in usage.case]
    assert len(usages) == 2
    assert any(message in " ".join(usage.broken) and not usage.clean for usage in usages)


def test_spills_fail():
    usage = Usage("nvcc", "sm_90a", "kernel", "", 255, 0, stack=8, spills=0)
    assert not usage.clean and "255" in usage_table([usage])
    assert (
        template_arguments("_ZN18vocab_score_kernelI6__halfLb1ELb0ELb1EEEvNS_6ParamsE")
        == "fp16, resident, bias and cap"
    )
