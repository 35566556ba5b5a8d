"""Tests of the compile report: no kernel spills registers or has a stack frame."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from bench.compile_report import CSRC, Usage, cuda_usages, template_arguments, usage_table
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


def test_cuda():
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    found = report("--only", "cuda")
    check(found, {("vocab_score", "sm_90a"), ("pair_loss", "sm_90a")})
    assert len(found["kernels"]) == 13
    scores = [usage for usage in found["kernels"] if usage["kernel"] == "vocab_score"]
    assert len(scores) == 12 and not any(usage["broken"] for usage in scores)
    counts = {usage["case"]: usage["per_element"] for usage in scores}
    assert 8 < counts["bf16, resident"] <= 18 and 8 < counts["bf16, resident, statistics"] <= 22


def test_narrow_stores_fail(tmp_path):
    """With a plain assignment, the resident kernels store a vector by four instructions; the report says so."""
    if not shutil.which("nvcc"):
        pytest.skip("no nvcc")
    for path in CSRC.iterdir():
        text = path.read_text()
        if path.name == "vectors.cuh":
            right = "__stwb(reinterpret_cast<uint4*>(at(vector)), x.bits);"
            assert text.count(right) == 1
            text = text.replace(right, "*reinterpret_cast<uint4*>(at(vector)) = x.bits;")
        if path.name != "pair_loss.cu":
            (tmp_path / path.name).write_text(text)
    resident = [usage for usage in cuda_usages(quick=True, folder_of_sources=tmp_path) if "resident" in usage.case]
    assert len(resident) == 6
    assert all(not usage.clean and "16 bytes" in usage.broken[0] for usage in resident)


def test_spills_fail():
    usage = Usage("nvcc", "sm_90a", "kernel", "", 255, 0, stack=8, spills=0)
    assert not usage.clean and "255" in usage_table([usage])
    assert template_arguments("_ZN18vocab_score_kernelI6__halfLb1ELb0EEEvNS_6ParamsE") == "fp16, resident"
