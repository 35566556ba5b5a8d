"""Runs the CUDA kernels as nvcc compiles them, without a GPU: their PTX is interpreted.

The emulation of ``tests/helpers/emulation`` runs the host's code: it checks arguments, plans the launch and fills the
kernel's parameters. In place of the emulated kernel, :class:`~tests.helpers.ptx.machine.Machine` executes the PTX.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.emulation import build, emulated, sources

from .arithmetic import ex2, fma, rcp
from .machine import Machine
from .memory import Range
from .order import Launch
from .program import END, PtxError, parse

__all__ = ["PtxError", "compiled", "executed"]


def nvcc() -> str:
    """Returns the path of nvcc, or skips the test."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    path = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    return path or pytest.skip("nvcc is neither on the PATH nor in CUDA_HOME: there is no PTX to execute")


@functools.cache
def compiled(architecture: str, kernel: str) -> str:
    """Returns the PTX of ``csrc/<kernel>.cu`` for an architecture such as ``sm_90a``."""
    version = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True).stdout
    files = {name: text for name, text in sources().items() if name.endswith("h") or name == f"{kernel}.cu"}
    command = (nvcc(), "-std=c++17", "-O3", "-ptx", f"-arch={architecture.replace('sm', 'compute')}", f"{kernel}.cu")
    return build(f"{kernel}_{architecture}.ptx", command, files, version).read_text()


@contextlib.contextmanager
def executed(
    monkeypatch, architecture: str = "sm_90a", fault: tuple[str, str] | None = None, **device
) -> Iterator[list]:
    """Makes backend ``cuda`` execute PTX on CPU tensors, on a device as :func:`emulated` has it.

    Eager PyTorch gets CUDA's ``tanh``, which errs more than a CPU's: the rule compares with eager on the same device.

    Args:
        fault: (regular expression, replacement) that changes the PTX text of the kernel, at least at one place.

    Yields:
        A list to which every launch is added: (mangled name of the kernel, :class:`Launch`).
    """
    from cpt_kernels.ops import backends

    nvcc()
    major = int(re.sub(r"\D", "", architecture)) // 10
    with emulated(monkeypatch, major=major, **device) as library, monkeypatch.context() as patch:
        extension = Extension(backends.load_extension(), library, architecture, fault)
        patch.setattr(backends, "load_extension", lambda: extension)
        patch.setattr("cpt_kernels.ops.vocab_score.reference.torch", CudaTorch())
        yield extension.launches


def cuda_tanh(x: torch.Tensor) -> torch.Tensor:
    """fp32 ``tanh`` as nvcc compiles it; PyTorch's for other types."""
    if x.dtype != torch.float32:
        return torch.tanh(x)
    x = x.numpy()
    two_thirds = rcp(ex2(np.abs(x) * np.float32(2.885390043)) + np.float32(1))
    large = np.copysign(np.where(np.abs(x) >= np.float32(9.010913849), 1, 1 - 2 * np.float64(two_thirds)), x)
    square = x * x
    small = np.full_like(x, 0.015739683)
    for coefficient in (-0.0523039624, 0.133152977, -0.333327687):
        small = fma(small, square, np.float32(coefficient))
    small = fma(small * square, x, x)
    return torch.from_numpy(np.where(np.abs(x) >= np.float32(0.6), large.astype(np.float32), small))


class CudaTorch:
    """The module torch, with the ``tanh`` that it has on a GPU."""

    tanh = staticmethod(cuda_tanh)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


class Extension:
    """The extension module whose kernels are interpreted."""

    def __init__(self, module, library: ctypes.CDLL, architecture: str, fault: tuple[str, str] | None):
        self.module, self.library, self.architecture, self.fault = module, library, architecture, fault
        self.launches: list[tuple[str, Launch]] = []

    def vocab_score(self, **arguments: Any) -> None:
        self.call("vocab_score", arguments, vocab_score_ranges(arguments))

    def pair_loss(self, **arguments: Any) -> None:
        self.call("pair_loss", arguments, pair_loss_ranges(arguments))

    def call(self, kernel: str, arguments: dict[str, Any], ranges: list[Range]) -> None:
        text = compiled(self.architecture, kernel)
        symbols = kernel_symbols(self.module.__file__)
        base = ctypes.cast(self.library.configure, ctypes.c_void_p).value - symbols["configure"]
        failures: list[Exception] = []

        def launch(address, blocks, threads, shared_bytes, cluster, cooperative, parameters, size) -> None:
            try:
                (name,) = [name for name, offset in symbols.items() if base + offset == address]
                suffix = name[name.index(f"{kernel}_kernel") :]
                program = parse(self.damaged(text, suffix), suffix)
                shape = Launch(blocks, threads, shared_bytes, cluster, bool(cooperative))
                self.launches.append((program.name, shape))
                if program.parameter_bytes != size:
                    raise PtxError(f"the host passes {size} bytes of arguments, {name} takes {program.parameter_bytes}")
                Machine(program, shape, ranges, ctypes.string_at(parameters, size)).run()
            except Exception as error:  # an exception cannot pass through the C++ code between here and `call`
                failures.append(error)

        callback = INTERCEPTOR(launch)
        self.library.intercept_launches(callback)
        try:
            getattr(self.module, kernel)(**arguments)
        finally:
            self.library.intercept_launches(None)
        if failures:
            raise failures[0]

    def damaged(self, text: str, suffix: str) -> str:
        """Returns the PTX with the planted fault in the kernel that runs."""
        if self.fault is None:
            return text
        kernel = re.search(rf"\.entry \w*{re.escape(suffix)}\(.*?{END}\n", text, re.DOTALL)
        changed, count = re.subn(*self.fault, kernel[0], flags=re.DOTALL)
        assert count, f"nothing in the PTX matches {self.fault[0]}"
        return text.replace(kernel[0], changed)


INTERCEPTOR = ctypes.CFUNCTYPE(
    None, ctypes.c_void_p, *[ctypes.c_int] * 5, ctypes.c_void_p, ctypes.c_size_t
)  # see `interceptor` in emulation.h


@functools.cache
def kernel_symbols(library: str) -> dict[str, int]:
    """Returns mangled name -> offset of the kernels in a shared library, and of its function ``configure``."""
    table = subprocess.run(["nm", library], capture_output=True, text=True, check=True).stdout
    return {
        name: int(at, 16) for at, name in re.findall(r"^(\w+) [tT] (configure|\w+_kernel\w*)$", table, re.MULTILINE)
    }


def vocab_score_ranges(arguments: dict[str, Any]) -> list[Range]:
    """The memory that ``vocab_score`` may access by ``csrc/kernels.h``; between the rows there is none."""
    rows, columns, size = arguments["rows"], arguments["columns"], 4 if arguments["dtype"] == "float32" else 2
    start, stride = arguments["logits"], arguments["row_stride"] * size
    ranges = [
        Range(f"row {r} of the logits", start + r * stride, columns * size, writable=arguments["score"])
        for r in range(rows)
    ]
    ranges += inputs(arguments, {"targets": 8 * rows, "bias": 4 * columns})
    fp32 = ("logps", "lse", "entropy", "mean_logit", "log_sum_sq")
    return ranges + outputs(arguments, {**dict.fromkeys(fp32, 4 * rows), "correct": rows})


def pair_loss_ranges(arguments: dict[str, Any]) -> list[Range]:
    completions, pairs = arguments["completions"], arguments["pairs"]
    read = {
        "token_logps": 4 * arguments["tokens"],
        "cu_completions": (8 if arguments["wide"] else 4) * (completions + 1),
        **dict.fromkeys(("chosen", "rejected", "targets"), 8 * pairs),
        "ref_logps": 4 * completions,
    }
    written = {"completion_logps": 4 * completions, "losses": 4 * pairs, "weights": 4 * completions}
    return inputs(arguments, read) + outputs(arguments, written)


def inputs(arguments: dict[str, Any], sizes: dict[str, int]) -> list[Range]:
    return [Range(name, arguments[name], size) for name, size in sizes.items() if arguments[name] and size]


def outputs(arguments: dict[str, Any], sizes: dict[str, int]) -> list[Range]:
    """Ranges that hold nothing at the start."""
    return [r._replace(readable=False, writable=True) for r in inputs(arguments, sizes)]
