"""Chooses the attention that runs: one call of a variable-length kernel (``KERNELS``), or ``SEGMENTWISE``.

Both are tables by name; a new backend is one more entry in one of them.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import NoReturn

import torch

from ...errors import UnavailableError, UserError
from .flash import FLASH, flash_kernel
from .segments import SEGMENTWISE, SegmentKernel
from .trial import trial_failure
from .varlen import Abilities, CudnnKernel, Kernel, Need, TorchKernel

logger = logging.getLogger(__name__)


def _load_flash(name: str) -> Kernel:
    generation = FLASH[name]
    module, version = importlib.import_module(generation.module), _installed_version(generation.distribution)
    # Generation 2 has been aligned at the ends since 2.1. The others are young, and differ from build to build.
    return flash_kernel(name, module, version, is_trusted=name == "flash_attn_2")


def _load_torch_kernel() -> Kernel:
    if torch.version.hip is not None or not torch.backends.cuda.is_flash_attention_available():
        raise LookupError("this PyTorch has no CUDA flash attention")
    return TorchKernel()


def _load_cudnn() -> Kernel:
    if torch.version.hip is not None or not torch.backends.cudnn.is_available():
        raise LookupError("this PyTorch has no cuDNN")
    if not all(hasattr(torch.ops.aten, f"_cudnn_attention_{way}") for way in ("forward", "backward")):
        raise LookupError("this PyTorch has no cuDNN attention over segments")
    return CudnnKernel()


# Variable-length kernels in the order in which `auto` tries them: name -> a function that returns the kernel. It raises
# if the kernel is not there: LookupError with the reason, or what the import of its package raises.
KERNELS: dict[str, Callable[[], Kernel]] = {
    "flash_attn_3": functools.partial(_load_flash, "flash_attn_3"),
    "flash_attn_4": functools.partial(_load_flash, "flash_attn_4"),
    "cudnn": _load_cudnn,
    "flash_attn_2": functools.partial(_load_flash, "flash_attn_2"),
    "varlen": _load_torch_kernel,
}

# Names that a user may ask for; `flash_attn` is the first generation of FLASH that can do the call.
ATTENTION_BACKENDS = ("auto", *SEGMENTWISE, "flash_attn", *KERNELS)


@functools.cache
def kernels() -> dict[str, Kernel | str]:
    """Returns all variable-length kernels; in place of one that is not there, the reason."""
    found: dict[str, Kernel | str] = {}
    for name, load in KERNELS.items():
        try:
            found[name] = load()
        except LookupError as error:
            found[name] = str(error.args[0])
        except Exception as error:  # a broken optional package must not end a run that never asked for it
            found[name] = _import_failure(error, FLASH[name].module if name in FLASH else name)
    return found


def _import_failure(error: Exception, module: str) -> str:
    # flash-attn-4 alone installs a package `flash_attn` without the modules of 2.
    if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
        return "not installed"
    return f"does not import ({type(error).__name__}: {error})".splitlines()[0]


def _installed_version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:  # built from source under another name
        return "of unknown version"


def capabilities() -> dict[str, Abilities | str]:
    """Returns the capability table: backend -> what it can do, or why it is not there."""
    table = {name: k if isinstance(k, str) else k.abilities for name, k in kernels().items()}
    return table | {name: kernel.abilities for name, kernel in SEGMENTWISE.items()}


def kernels_of(backend: str) -> dict[str, Kernel | str]:
    """Returns the kernels a name stands for: ``auto`` all, ``flash_attn`` any generation, or one by its own name.

    Raises:
        UserError: unknown backend.
    """
    found = {
        name: kernel
        for name, kernel in kernels().items()
        if backend in ("auto", name) or (backend == "flash_attn" and name in FLASH)
    }
    if not found:
        raise UserError(f"unknown attention backend '{backend}': choose one of {', '.join(ATTENTION_BACKENDS)}")
    return found


@functools.cache
def choose_attention(backend: str, need: Need) -> Kernel | SegmentKernel:
    """Returns the attention that runs a call.

    ``auto`` on CUDA takes the first kernel that can do the call. A kernel that is not trusted must first compute it
    right on a few segments (``trial``). The first time, a warning names the kernels that could not, or says that
    attention runs segment by segment.

    Raises:
        UserError: unknown backend.
        UnavailableError: the backend asked for is not available here, or lacks what the call needs.
    """
    # One of the segment-by-segment kernels, by name.
    if backend in SEGMENTWISE:
        if missing := SEGMENTWISE[backend].abilities.lacks(need):
            raise UnavailableError(f"attention backend '{backend}' lacks {', '.join(missing)}: take eager or auto")
        return SEGMENTWISE[backend]

    # Variable-length kernels; a CPU has none, so `auto` does not ask there.
    candidates = {} if backend == "auto" and need.device == "cpu" else kernels_of(backend)
    lacking: dict[str, list[str]] = {}
    for name, kernel in candidates.items():
        if isinstance(kernel, str):
            continue
        missing = kernel.abilities.lacks(need)
        if not missing and not kernel.is_trusted and (failure := trial_failure(kernel, need)):
            missing = [f"results like the reference's: {failure}"]
        if not missing:
            if lacking and backend == "auto":
                _announce(f"attention runs on {name} {kernel.version}: {_sentence(lacking)}")
            return kernel
        lacking[f"{name} {kernel.version}"] = missing
    if backend != "auto":
        _refuse(backend, lacking)

    # Segment by segment.
    fallback = next(kernel for kernel in SEGMENTWISE.values() if not kernel.abilities.lacks(need))
    if need.device != "cpu":
        reasons = _sentence(lacking) or "; ".join(f"{name}: {reason}" for name, reason in candidates.items())
        _announce(f"attention runs segment by segment ({fallback.name}), slow where there are many: {reasons}")
    return fallback


def describe_backend(backend: str, device: str) -> str:
    """Returns one line on what attention will run on, before any call is known.

    Raises:
        UserError, UnavailableError: as :func:`choose_attention`, if the backend cannot run any call here.
    """
    if backend in SEGMENTWISE:
        return f"attention: segment by segment, {backend}"
    candidates = {} if backend == "auto" and device == "cpu" else kernels_of(backend)
    found = {f"{k.name} {k.version}": k for k in candidates.values() if not isinstance(k, str)}
    usable = [name for name, kernel in found.items() if kernel.abilities.device in (None, device)]
    if backend == "auto":
        usable.append(f"segment by segment ({' or '.join(SEGMENTWISE)})")
    elif not usable:
        _refuse(backend, {name: [f"tensors on {device}"] for name in found})
    return f"attention: {', else '.join(usable)}"


def _sentence(lacking: Mapping[str, list[str]]) -> str:
    return "; ".join(f"{name} lacks {', '.join(missing)}" for name, missing in lacking.items())


def _refuse(backend: str, lacking: Mapping[str, list[str]]) -> NoReturn:
    if lacking:
        raise UnavailableError(f"attention backend '{backend}' cannot do this: {_sentence(lacking)}; take auto")
    reasons = "; ".join(f"{name}: {reason}" for name, reason in kernels_of(backend).items())
    raise UnavailableError(f"attention backend '{backend}' is not available ({reasons}): install it, or take auto")


@functools.cache  # logs each text once
def _announce(message: str) -> None:
    logger.warning(message)
