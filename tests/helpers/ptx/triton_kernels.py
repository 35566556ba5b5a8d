"""Runs the Triton kernels as Triton compiles them, without a GPU: ``python -m tests.helpers.ptx.triton_kernels 90``.

A process of its own, because Triton decides between its compiler and its interpreter when it is imported.
"""

from __future__ import annotations

import dataclasses
import re
import sys

import numpy as np
import pytest
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from cpt_kernels.losses import build_loss
from cpt_kernels.ops.pair_loss import PairLossInput, kernel_loss
from cpt_kernels.ops.pair_loss.triton import pair_loss_triton
from cpt_kernels.ops.vocab_score import TileOptions
from cpt_kernels.ops.vocab_score.triton import vocab_score_triton
from tests.ops import test_pair_loss, test_vocab_score

from . import CudaTorch
from .machine import Machine
from .memory import Range
from .order import Launch
from .program import TYPES, PtxError, parse

# Planted faults of vocab_score: (what the PTX has, in a regular expression, what it gets, the error).
FAULTS = [
    (r"bar\.sync\s+0;", "", "no barrier lies between|nothing has been written to"),
    (r"(?s)bar\.sync\s+0;(?!.*bar\.sync)", "", "no barrier lies between"),  # before the target's element is written
    (r"(st\.global\.v4\S+ \[ %rd\d+ \+) 0", r"\1 8", "misaligned"),
    (r"(st\.global\.v4\S+ \[ %rd\d+ \+) 0", r"\1 16", "out of bounds|no barrier lies between"),
]
KINDS = {"i32": "s32", "i64": "s64", "fp32": "f32", "fp64": "f64"}


@dataclasses.dataclass
class Device:
    """Stands for the driver of a GPU for which Triton compiles."""

    architecture: int

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def launch(kernel: JITFunction, grid: tuple[int], arguments: tuple, options: dict, fault: tuple | None) -> None:
    """Compiles a kernel for its arguments, as a launch does, and executes the PTX, perhaps with a planted fault."""
    compiled = kernel.warmup(*arguments, grid=grid, **options)
    text = compiled.asm["ptx"]
    if fault is not None:
        text, count = re.subn(*fault, text)
        assert count, f"nothing in the PTX matches {fault[0]}"
    program = parse(text, compiled.metadata.name)
    ranges, values = [], []
    for name, value in zip(kernel.arg_names, arguments):
        kind = compiled.src.signature[name]
        if kind.startswith("*"):
            ranges += rows_of(name, value)
            values.append(np.uint64(value.data_ptr()))
        elif kind != "constexpr":
            values.append(TYPES[KINDS[kind]].type(value))
    values += [np.uint64(0)] * (len(program.parameters) - len(values))  # scratch memory, which these kernels lack
    packed = bytearray(program.parameter_bytes)
    for start, value in zip(program.parameters.values(), values):
        packed[start : start + value.itemsize] = value.tobytes()
    shape = Launch(grid[0], 32 * compiled.metadata.num_warps, compiled.metadata.shared)
    Machine(program, shape, ranges, bytes(packed)).run()


def rows_of(name: str, tensor: torch.Tensor) -> list[Range]:
    """The memory of a tensor of one or two dimensions; between the rows there is none.

    Several threads load each of the last logits of a row, and one of them stores the result. The other threads may load
    after that store, because they use the value for nothing.
    """
    rows = tensor if tensor.ndim == 2 else tensor[None]
    size = rows.shape[1] * rows.element_size()
    access = {"writable": True, "racy_reads": name == "logits"}
    return [Range(f"{name}, row {i}", row.data_ptr(), size, **access) for i, row in enumerate(rows) if size]


def score(tile, targets, *, backend, **options):
    return vocab_score_triton(tile, targets, TileOptions(**options))


def weigh(*, loss, tokens_per_pair=1.0, **arguments):
    names = PairLossInput._fields
    bound = build_loss(loss, **{name: value for name, value in arguments.items() if name not in names})
    return pair_loss_triton(
        PairLossInput(**{name: arguments[name] for name in names}), kernel_loss(bound, tokens_per_pair)
    )


def main() -> None:
    driver.set_active(Device(int(sys.argv[1])))
    launches, fault = [], None

    def get(kernel: JITFunction, grid: tuple[int]):
        launches.append(kernel)
        return lambda *arguments, **options: launch(kernel, grid, arguments, options, fault)

    JITFunction.__getitem__ = get
    patch = pytest.MonkeyPatch()
    patch.setattr("cpt_kernels.ops.vocab_score.reference.torch", CudaTorch())
    cases = test_vocab_score.CASES if "all" in sys.argv else test_vocab_score.CASES[3:5]
    for case in cases:
        test_vocab_score.check(case, "triton", run=score)
    batches = test_pair_loss.BATCHES if "all" in sys.argv else ["pairs share completions"]
    for batch in batches:
        for loss, options in test_pair_loss.LOSS_OPTIONS if "all" in sys.argv else test_pair_loss.LOSS_OPTIONS[1:2]:
            test_pair_loss.check(test_pair_loss.make(batch), loss, options, weigh)
    print(f"{len(launches)} launches")
    for pattern, replacement, message in FAULTS:
        fault = (pattern, replacement)
        with pytest.raises(PtxError, match=message):
            test_vocab_score.check(test_vocab_score.CASES[3], "triton", run=score)
    print(f"{len(FAULTS)} faults found")


if __name__ == "__main__":
    main()
