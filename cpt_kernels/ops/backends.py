"""Backends of operators: which implementation runs, eager PyTorch, Triton or CUDA.

An operator has a table, ``BACKENDS``: name -> :class:`Backend`, an implementation and what it needs. A new backend is
one more entry. A backend that is asked for by name runs, or raises an error that names the mend; there is no fall-back.
``auto`` takes the first backend that runs: in the order of the table on a CPU, from its end on a GPU. So a table lists
eager PyTorch first, and last the one with the fewest instructions and bytes on a GPU. The choice is logged once.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ..errors import UnavailableError, UserError

logger = logging.getLogger(__name__)

_CAPABILITY = (8, 0)  # the lowest compute capability that the extension has machine code for; see setup.py

BUILD_HINT = "build it with nvcc on the PATH: CPT_BUILD_CUDA=1 pip install --no-build-isolation ."
_NOT_BUILT = f"backend 'cuda' needs the compiled extension cpt_kernels._C; {BUILD_HINT}"


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator."""

    function: str  # where it is, ``"module:name"``. It is imported when it first runs, so that kernels stay lazy.
    dtypes: tuple[torch.dtype, ...] | None = None  # those that the operator's first tensor may have; ``None`` for any
    # raises ``UnavailableError``, with the mend, if a package, a build or a device is missing for a tensor
    check: Callable[[Tensor], None] | None = None

    def load(self) -> Callable[..., Any]:
        """Imports the implementation."""
        return _import(self.function)


@functools.cache  # the head looks its kernels up for every tile
def _import(function: str) -> Callable[..., Any]:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def resolve(
    backend: str,
    tensor: Tensor,
    table: Mapping[str, Backend],
    other: Mapping[str, Backend] | None = None,
) -> str:
    """Returns the name in ``table`` of the backend that runs an operator on ``tensor``; eager if it has no values.

    Args:
        backend: what the caller asked for: ``auto``, or a name in ``table`` or ``other``.
        table: the operator's backends.
        other: backends of an operator that the same caller runs. A name that only this table has stands for ``auto``.

    Raises:
        UserError: the backend is unknown, or does not take this dtype.
        UnavailableError: the backend is not available here, or not for this device.
    """
    other = other or {}
    if isinstance(tensor, FakeTensor):
        return "eager"
    if backend == "auto" or (backend not in table and backend in other):
        name, reasons = automatic(tensor, table)
        # Where no kernel takes the dtype (fp64), there is no choice to announce.
        if any(entry.dtypes and tensor.dtype in entry.dtypes for entry in table.values()):
            _announce_choice("; ".join([f"kernels on {tensor.device.type}: {name}", *reasons]))
        return name
    if backend not in table:
        raise UserError(f"unknown backend '{backend}': choose one of {', '.join({'auto': None, **table, **other})}")
    entry = table[backend]
    if entry.dtypes is not None and tensor.dtype not in entry.dtypes:
        raise UserError(f"backend '{backend}' takes {', '.join(map(str, entry.dtypes))}, not {tensor.dtype}")
    if entry.check is not None:
        entry.check(tensor)
    return backend


def automatic(tensor: Tensor, table: Mapping[str, Backend]) -> tuple[str, list[str]]:
    """Returns the name of the backend that ``auto`` takes for a tensor, and why those before it cannot run.

    Raises:
        UnavailableError: no backend of the table runs on this tensor.
    """
    reasons: list[str] = []
    for name in reversed([*table]) if tensor.device.type == "cuda" else table:
        entry = table[name]
        if entry.dtypes is not None and tensor.dtype not in entry.dtypes:
            continue
        # `auto` skips an entry that cannot run here, and names the reason in its log line.
        try:
            if entry.check is not None:
                entry.check(tensor)
        except UnavailableError as error:
            reasons.append(str(error))
        else:
            return name, reasons
    raise UnavailableError(f"no backend takes {tensor.dtype} on {tensor.device}{'; '.join(['', *reasons])}")


@functools.cache
def extension_misses(device: torch.device) -> str | None:
    """Returns, in words, what the compiled extension needs and this GPU or its driver lacks; ``None`` if nothing."""
    if (capability := torch.cuda.get_device_capability(device)) < _CAPABILITY:
        text = "compute capability {}.{}, and {} has {}.{}; take backend='triton'"
        return text.format(*_CAPABILITY, device, *capability)
    runtime, driver = load_extension().cuda_releases()
    if driver < runtime:
        return f"a driver for CUDA {runtime}, and this one is for CUDA {driver}: build it with that CUDA's nvcc"
    return None


@functools.cache  # logs each text once
def _announce_choice(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        logger.warning(message)


def check_triton(tensor: Tensor) -> None:
    """Raises ``UnavailableError`` if Triton is not installed or cannot run on the tensor's device."""
    if importlib.util.find_spec("triton") is None:
        raise UnavailableError("backend 'triton' needs the triton package: pip install triton, or take backend='eager'")
    if tensor.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UnavailableError(
            f"backend 'triton' needs CUDA tensors, not {tensor.device}; on a CPU take backend='eager', or, to test,"
            " set TRITON_INTERPRET=1 before the kernels are imported"
        )


def check_extension(tensor: Tensor) -> None:
    """Raises ``UnavailableError`` if the CUDA extension is not built or cannot run on the tensor's device."""
    if torch.version.hip is not None:
        raise UnavailableError("backend 'cuda' needs an NVIDIA GPU; take backend='triton' on AMD's")
    if not has_extension():
        raise UnavailableError(_NOT_BUILT)
    if tensor.device.type != "cuda":
        raise UnavailableError(f"backend 'cuda' needs CUDA tensors, not {tensor.device}; take backend='eager' on a CPU")
    if missing := extension_misses(tensor.device):
        raise UnavailableError(f"backend 'cuda' needs {missing}")


@functools.cache  # `auto` asks for every tile, and a search of the path costs more than a small tile
def has_extension() -> bool:
    """Whether this installation carries the compiled CUDA kernels."""
    return importlib.util.find_spec("cpt_kernels._C") is not None


@functools.cache
def load_extension() -> Any:
    """Imports the compiled CUDA kernels, ``cpt_kernels._C``.

    Raises:
        UnavailableError: they were not built.
    """
    try:
        return importlib.import_module("cpt_kernels._C")
    except ImportError as error:
        raise UnavailableError(_NOT_BUILT) from error


def autocast_dtype(*tensors: Tensor) -> torch.dtype | None:
    """Returns the dtype to which autocast casts tensors of one device; None if it is off, or one is fp64."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or any(tensor.dtype == torch.float64 for tensor in tensors):
        return None
    return torch.get_autocast_dtype(device)


def stream_of(tensor: Tensor) -> int:
    """Returns the current CUDA stream of a tensor's device as an integer; 0 on a CPU (the tests' emulation)."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Makes the tensor's GPU the current one, because kernels are launched on the current GPU."""
    return torch.cuda.device_of(tensor)
