"""Kernels of the flash attention packages, generations 2, 3 and 4; see ``varlen.Kernel``.

Releases differ in the names and the order of parameters. Every argument is therefore passed by name, and only those
that the release has; an option that it lacks is missing in its :class:`Abilities`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .varlen import HALF, Abilities, Call

# Stands for a call where only the names of its arguments matter.
_ANY_CALL = Call(torch.empty(0), torch.empty(0), 0, 0, 1.0)


@dataclass(frozen=True)
class FlashKernel:
    """``flash_attn_varlen_func`` of one generation of flash attention."""

    name: str
    version: str
    function: Callable  # the public function
    # the forward and the backward that it calls, for sinks; ``None`` for one that the package lacks
    inner: tuple[Callable | None, ...]
    no_window: int | None  # its value for a window without limit: -1, or ``None`` in generation 4
    limits: Abilities  # abilities that do not show in signatures
    is_trusted: bool = True  # see :class:`varlen.Kernel`
    abilities: Abilities = field(init=False)  # ``limits`` and what the signatures show

    def __post_init__(self) -> None:
        if missing := {"cu_seqlens_q", "causal", "window_size", "deterministic"} - set(_parameters(self.function)):
            raise ImportError(f"{self.name} {self.version} is too old: no {', '.join(sorted(missing))}")
        names = _parameters(self.function)
        abilities = dataclasses.replace(
            self.limits,
            softcap="softcap" in names,
            dropout="dropout_p" in names,
            dropout_alone=True,
            sinks=all(self._callable(function) for function in self.inner),
        )
        object.__setattr__(self, "abilities", abilities)

    def _callable(self, function: Callable | None) -> bool:
        """Whether every required parameter of an inner function has a known name, and it takes segments and windows."""
        if function is None:
            return False
        parameters = _parameters(function)
        known = {*self._values(_ANY_CALL), "q", "k", "v", "out", "dout", "lse", "softmax_lse", "dq", "dk", "dv"}
        required = {name for name, optional in parameters.items() if not optional}
        return required <= known and {"cu_seqlens_q", "window_size_left"} <= set(parameters)

    def _values(self, call: Call) -> dict[str, Any]:
        """Returns arguments under every name that some release has for them."""
        left, right = (self.no_window, self.no_window) if call.window is None else (call.window - 1, 0)
        return {
            "cu_seqlens_q": call.cu_seqlens_q,
            "cu_seqlens_k": call.cu_seqlens_k,
            "max_seqlen_q": call.max_q,
            "max_seqlen_k": call.max_k,
            "softmax_scale": call.scale,
            "causal": True,
            "is_causal": True,
            "window_size": (left, right),
            "window_size_left": left,
            "window_size_right": right,
            "softcap": call.softcap or 0.0,
            "dropout_p": call.dropout,
            "deterministic": call.deterministic,
            "alibi_slopes": None,
            "return_softmax": False,
            "return_lse": True,
        }

    def _run(self, function: Callable | None, call: Call, **tensors: Tensor) -> Any:
        assert function is not None, "choose_attention checks that the kernel can do this call"
        values = {**self._values(call), **tensors}
        return function(**{name: values[name] for name in _parameters(function) if name in values})

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        out = self._run(self.function, call, q=q, k=k, v=v)
        return out[0] if isinstance(out, tuple) else out

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        out, lse, *_ = self._run(self.inner[0], call, q=q, k=k, v=v)
        return out, lse

    def backward(self, grad, q, k, v, out, lse, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        tensors = {"dout": grad, "q": q, "k": k, "v": v, "out": out, "lse": lse, "softmax_lse": lse}
        found = self._run(self.inner[1], call, **tensors, dq=dq, dk=dk, dv=dv)
        # 4 returns the gradients. 2 and 3 write them to dq, dk, dv, and return a by-product, alone or after them.
        if isinstance(found, tuple) and len(found) >= 3:
            dq, dk, dv = found[:3]
        return dq, dk, dv


@functools.cache
def _parameters(function: Callable) -> dict[str, bool]:
    """Returns the names of a function's parameters, and whether each has a default."""
    operator = getattr(function, "_opoverload", None)  # a torch.library.custom_op hides its Python signature
    if operator is not None:
        return {a.name: a.has_default_value() for a in operator._schema.arguments}
    return {p.name: p.default is not p.empty for p in inspect.signature(function).parameters.values()}


@dataclass(frozen=True)
class Generation:
    """Where the functions of a generation of flash attention are, and its limits."""

    module: str
    distribution: str
    forward: str  # the functions that its public one calls
    backward: str
    no_window: int | None
    limits: Abilities


def _limits(head_size: int, *architectures: int) -> Abilities:
    return Abilities(head_size=head_size, dtypes=HALF, device="cuda", architectures=architectures)


# In the order in which `auto` tries them.
FLASH = {
    "flash_attn_3": Generation(
        "flash_attn_interface",
        "flash_attn_3",
        "_flash_attn_forward",
        "_flash_attn_backward",
        -1,
        _limits(192, 9),  # 256 has no deterministic backward
    ),
    "flash_attn_4": Generation(
        "flash_attn.cute.interface",
        "flash-attn-4",
        "_flash_attn_fwd",
        "_flash_attn_bwd",
        None,
        _limits(128, 9, 10, 11),
    ),
    "flash_attn_2": Generation(
        "flash_attn.flash_attn_interface",
        "flash_attn",
        "_flash_attn_varlen_forward",
        "_flash_attn_varlen_backward",
        -1,
        _limits(256, 8, 9, 10, 11, 12),
    ),
}


def flash_kernel(
    name: str, module: Any, version: str = "", limits: Abilities | None = None, is_trusted: bool = True
) -> FlashKernel:
    """Returns the kernel of a generation ("flash_attn_2", ...), from the module that holds its functions.

    Raises:
        ImportError: the functions are not there, or too old.
    """
    generation = FLASH[name]
    if not hasattr(module, "flash_attn_varlen_func"):
        raise ImportError(f"{name} has no flash_attn_varlen_func")
    inner = tuple(getattr(module, function, None) for function in (generation.forward, generation.backward))
    limits = limits or generation.limits
    return FlashKernel(name, version, module.flash_attn_varlen_func, inner, generation.no_window, limits, is_trusted)
