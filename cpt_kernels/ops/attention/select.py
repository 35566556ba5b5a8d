"""Which attention runs: one variable-length call of a kernel (``varlen.py``, ``flash.py``), or segment by segment."""

from __future__ import annotations

import functools
import importlib
import logging
from importlib import metadata
from typing import NoReturn

import torch

from ...errors import UnavailableError, UserError
from .flash import FLASH, flash_kernel
from .varlen import Abilities, Kernel, Need, TorchKernel

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "sdpa", "eager", "flash_attn", "varlen")

# What runs segment by segment (``attention.py``), on any device.
SEGMENTWISE = {"sdpa": Abilities(softcap=False, sinks=False), "eager": Abilities()}


@functools.cache
def kernels() -> dict[str, Kernel | str]:
    """All kernels in the order in which ``auto`` tries them; for one that is not there, the reason why."""
    found: dict[str, Kernel | str] = {}
    for name, spec in FLASH.items():
        try:
            found[name] = flash_kernel(name, importlib.import_module(spec.module), _version(spec.distribution))
        except Exception as error:  # an optional package that is broken must not end a run that never asked for it
            found[name] = _why(error, spec.module)
    built = torch.backends.cuda.is_flash_attention_available() and torch.version.hip is None
    found["varlen"] = TorchKernel() if built else "this PyTorch has no CUDA flash attention"
    return found


def _why(error: Exception, module: str) -> str:
    # flash-attn-4 alone makes a package flash_attn in which there is no 2.
    if isinstance(error, ModuleNotFoundError) and f"{module}.".startswith(f"{error.name}."):
        return "not installed"
    return f"does not import ({type(error).__name__}: {error})".splitlines()[0]


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:  # built from source under another name
        return "of unknown version"


def capabilities() -> dict[str, Abilities | str]:
    """The capability table: backend -> what it can do, or why it is not there."""
    return {name: k if isinstance(k, str) else k.abilities for name, k in kernels().items()} | SEGMENTWISE


def kernels_of(backend: str) -> dict[str, Kernel | str]:
    """What a backend's name stands for: ``auto`` all, ``flash_attn`` any generation, or one kernel by its own name.

    Raises:
        UserError: unknown backend.
    """
    found = {
        name: kernel
        for name, kernel in kernels().items()
        if backend in ("auto", name) or (backend == "flash_attn" and name in FLASH)
    }
    if not found:
        raise UserError(f"unknown attention backend '{backend}': choose one of {', '.join(BACKENDS)}")
    return found


@functools.cache
def choose_attention(backend: str, need: Need) -> Kernel | str:
    """The kernel to run, or ``sdpa`` or ``eager``: segment by segment.

    ``auto`` on CUDA takes the first kernel that can do it; one that could not is named in a warning, once.

    Raises:
        UserError: unknown backend, or one asked for by name that lacks something; the message says what.
        UnavailableError: the backend asked for is not available here.
    """
    if backend in SEGMENTWISE:
        if lacking := SEGMENTWISE[backend].lacks(need):
            raise UserError(f"attention backend '{backend}' lacks {', '.join(lacking)}: take eager or auto")
        return backend
    candidates = {} if backend == "auto" and need.device == "cpu" else kernels_of(backend)
    lacking = {}
    for name, kernel in candidates.items():
        if isinstance(kernel, str):
            continue
        if not (missing := kernel.abilities.lacks(need)):
            if lacking and backend == "auto":
                _announce(f"attention runs on {name} {kernel.version}: {_sentence(lacking)}")
            return kernel
        lacking[f"{name} {kernel.version}"] = missing
    if backend != "auto":
        _refuse(backend, lacking)
    fallback = next(name for name, abilities in SEGMENTWISE.items() if not abilities.lacks(need))
    if need.device != "cpu":
        reasons = _sentence(lacking) or "; ".join(f"{name}: {reason}" for name, reason in candidates.items())
        _announce(f"attention runs segment by segment ({fallback}), slow where there are many: {reasons}")
    return fallback


def describe_backend(backend: str, device: str) -> str:
    """One line on what attention will run on, before any call is known.

    Raises:
        UserError, UnavailableError: as :func:`choose_attention`, where the backend cannot run here whatever the call.
    """
    if backend in SEGMENTWISE:
        return f"attention: segment by segment, {backend}"
    candidates = {} if backend == "auto" and device == "cpu" else kernels_of(backend)
    found = {f"{k.name} {k.version}": k for k in candidates.values() if not isinstance(k, str)}
    usable = [name for name, kernel in found.items() if kernel.abilities.device in (None, device)]
    if backend == "auto":
        usable.append("segment by segment (sdpa or eager)")
    elif not usable:
        _refuse(backend, {name: [f"tensors on {device}"] for name in found})
    return f"attention: {', else '.join(usable)}"


def _sentence(lacking: dict[str, list[str]]) -> str:
    return "; ".join(f"{name} lacks {', '.join(missing)}" for name, missing in lacking.items())


def _refuse(backend: str, lacking: dict[str, list[str]]) -> NoReturn:
    if lacking:
        raise UserError(f"attention backend '{backend}' cannot do this: {_sentence(lacking)}; take auto")
    reasons = "; ".join(f"{name}: {reason}" for name, reason in kernels_of(backend).items())
    raise UnavailableError(f"attention backend '{backend}' is not available ({reasons}): install it, or take auto")


@functools.cache
def _announce(message: str) -> None:
    logger.warning(message)
