"""Which implementation of an operator runs: ``eager`` PyTorch, ``triton`` or ``cuda``. Explicit; nothing falls back.

``auto`` is eager on a CPU, and on a GPU the CUDA extension where it is built and runs, else Triton; it says once which.
A backend asked for by name and not there raises, with the mend.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "eager", "triton", "cuda")

_CAPABILITY = (8, 0)  # the least that the extension has machine code for; see setup.py

BUILD_HINT = "build it with nvcc on the PATH: CPT_BUILD_CUDA=1 pip install --no-build-isolation ."


def resolve(backend: str, tensor: Tensor, kernel_dtypes: tuple[torch.dtype, ...]) -> str:
    """The backend that an operator runs on ``tensor``: ``eager``, ``triton`` or ``cuda``.

    Args:
        backend: what the caller asked for, one of ``BACKENDS``.
        kernel_dtypes: dtypes of ``tensor`` that the kernels take. For others (fp64) ``auto`` is eager.

    Raises:
        ValueError: unknown backend, or one that does not take this dtype.
        RuntimeError: the backend is not available here, or not for this device.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend '{backend}': choose one of {', '.join(BACKENDS)}")
    if backend == "auto":
        if tensor.dtype not in kernel_dtypes:
            return "eager"
        backend, reason = automatic(tensor.device)
        _announce(tensor.device.type, f"kernels on {tensor.device.type}: {reason}")
    if backend == "eager":
        return backend
    if tensor.dtype not in kernel_dtypes:
        raise ValueError(f"backend '{backend}' takes {', '.join(map(str, kernel_dtypes))}, not {tensor.dtype}")
    if backend == "triton":
        _check_triton(tensor)
    else:
        _check_cuda(tensor)
    return backend


@functools.cache
def automatic(device: torch.device) -> tuple[str, str]:
    """The backend that ``auto`` is on a device, and in words what that is, and why."""
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
    """What the compiled extension needs and a GPU and its driver do not have, in words."""
    if (capability := torch.cuda.get_device_capability(device)) < _CAPABILITY:
        return "compute capability {}.{}, and {} has {}.{}".format(*_CAPABILITY, device, *capability)
    runtime, driver = load_extension().cuda_releases()
    if driver < runtime:
        return f"a driver for CUDA {runtime}, and this one is for CUDA {driver}: build it with that CUDA's nvcc"
    return None


@functools.cache  # once
def _announce(device_type: str, message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        logger.warning(message)


def _check_triton(tensor: Tensor) -> None:
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError("backend 'triton' needs the triton package: pip install triton, or take backend='eager'")
    if tensor.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RuntimeError(
            f"backend 'triton' needs CUDA tensors, not {tensor.device}; on a CPU take backend='eager', or, to test,"
            " set TRITON_INTERPRET=1 before the kernels are imported"
        )


def _check_cuda(tensor: Tensor) -> None:
    load_extension()
    if tensor.device.type != "cuda":
        raise RuntimeError(f"backend 'cuda' needs CUDA tensors, not {tensor.device}; take backend='eager' on a CPU")
    if missing := extension_misses(tensor.device):
        raise RuntimeError(f"backend 'cuda' needs {missing}; or take backend='triton'")


def has_extension() -> bool:
    """Whether this installation carries the compiled CUDA kernels."""
    return importlib.util.find_spec("cpt_kernels._C") is not None


@functools.cache
def load_extension():
    """The compiled CUDA kernels, ``cpt_kernels._C``.

    Raises:
        RuntimeError: they were not built.
    """
    try:
        return importlib.import_module("cpt_kernels._C")
    except ImportError as error:
        raise RuntimeError(f"backend 'cuda' needs the compiled extension cpt_kernels._C; {BUILD_HINT}") from error


def stream_of(tensor: Tensor) -> int:
    """The current CUDA stream of a tensor's device as an integer; 0 for a CPU tensor (the tests' emulation)."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def on_device_of(tensor: Tensor):
    """A context in which a launch goes to the tensor's GPU rather than to whichever one is current."""
    return torch.cuda.device_of(tensor)
