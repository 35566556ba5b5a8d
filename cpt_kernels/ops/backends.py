"""Backends of operators: which implementation runs, eager PyTorch, Triton or CUDA.

An operator has a table, ``BACKENDS``: name -> :class:`Backend`, an implementation and what it needs. A new backend is
one more entry. A backend that is asked for by name runs, or raises an error that names the mend; there is no fall-back.
``auto`` is eager on a CPU; on a GPU it is the CUDA extension where that is built and runs, else Triton. The choice is
logged once.
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

from ..errors import UnavailableError, UserError

logger = logging.getLogger(__name__)

_CAPABILITY = (8, 0)  # the lowest compute capability that the extension has machine code for; see setup.py

BUILD_HINT = "build it with nvcc on the PATH: CPT_BUILD_CUDA=1 pip install --no-build-isolation ."


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    Attributes:
        function: where it is, ``"module:name"``. It is imported when it first runs, so that kernels stay lazy.
        dtypes: those that the operator's first tensor may have; ``None`` for any.
        check: raises ``UnavailableError``, with the mend, if a package, a build or a device is missing for a tensor.
    """

    function: str
    dtypes: tuple[torch.dtype, ...] | None = None
    check: Callable[[Tensor], None] | None = None

    def load(self) -> Callable[..., Any]:
        """Imports the implementation."""
        return _import(self.function)


@functools.cache  # the head looks its kernels up for every tile
def _import(function: str) -> Callable[..., Any]:
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def resolve(backend: str, tensor: Tensor, table: Mapping[str, Backend]) -> str:
    """Returns the name in ``table`` of the backend that runs an operator on ``tensor``.

    Args:
        backend: what the caller asked for, ``auto`` or a name in ``table``.
        table: the operator's backends.

    Raises:
        UserError: the backend is unknown, or does not take this dtype.
        UnavailableError: the backend is not available here, or not for this device.
    """
    if backend == "auto":
        if not any(entry.dtypes and tensor.dtype in entry.dtypes for entry in table.values()):
            return "eager"  # no kernel takes this dtype (fp64), so there is no choice to announce
        backend, reason = automatic(tensor.device)
        _announce_choice(tensor.device.type, f"kernels on {tensor.device.type}: {reason}")
    if backend not in table:
        raise UserError(f"unknown backend '{backend}': choose one of {', '.join(('auto', *table))}")
    entry = table[backend]
    if entry.dtypes is not None and tensor.dtype not in entry.dtypes:
        raise UserError(f"backend '{backend}' takes {', '.join(map(str, entry.dtypes))}, not {tensor.dtype}")
    if entry.check is not None:
        entry.check(tensor)
    return backend


@functools.cache
def automatic(device: torch.device) -> tuple[str, str]:
    """Returns the backend that ``auto`` stands for on a device, and a text that names it and the reason."""
    if device.type != "cuda":
        return "eager", "eager PyTorch"
    if torch.version.hip is not None:
        return "triton", "Triton"
    if not has_extension():
        return "triton", f"Triton; the CUDA extension is not built ({BUILD_HINT})"
    if missing := extension_misses(device):
        return "triton", f"Triton; the CUDA extension needs {missing}"
    return "cuda", "the CUDA extension"


@functools.cache
def extension_misses(device: torch.device) -> str | None:
    """Returns, in words, what the compiled extension needs and this GPU or its driver lacks; ``None`` if nothing."""
    if (capability := torch.cuda.get_device_capability(device)) < _CAPABILITY:
        return "compute capability {}.{}, and {} has {}.{}".format(*_CAPABILITY, device, *capability)
    runtime, driver = load_extension().cuda_releases()
    if driver < runtime:
        return f"a driver for CUDA {runtime}, and this one is for CUDA {driver}: build it with that CUDA's nvcc"
    return None


@functools.cache  # logs each text once
def _announce_choice(device_type: str, message: str) -> None:
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
    load_extension()
    if tensor.device.type != "cuda":
        raise UnavailableError(f"backend 'cuda' needs CUDA tensors, not {tensor.device}; take backend='eager' on a CPU")
    if missing := extension_misses(tensor.device):
        raise UnavailableError(f"backend 'cuda' needs {missing}; or take backend='triton'")


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
        raise UnavailableError(f"backend 'cuda' needs the compiled extension cpt_kernels._C; {BUILD_HINT}") from error


def stream_of(tensor: Tensor) -> int:
    """Returns the current CUDA stream of a tensor's device as an integer; 0 on a CPU (the tests' emulation)."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def on_device_of(tensor: Tensor) -> AbstractContextManager[None]:
    """Makes the tensor's GPU the current one, because kernels are launched on the current GPU."""
    return torch.cuda.device_of(tensor)
