"""Flash attention's own packages, 2.x, 3 and 4, as kernels of ``varlen.py``."""

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


@dataclass(frozen=True)
class FlashKernel:
    """``flash_attn_varlen_func`` of a generation of flash attention; options go by the names that it has for them.

    Args:
        function: the public function.
        inner: the forward and the backward that it is made of, for sinks; ``None`` where there are none.
        no_window: what its windows have for "no limit": -1, or None (4).
        limits: what it can do, but for what its signatures tell.
    """

    name: str
    version: str
    function: Callable
    inner: tuple[Callable | None, ...]
    no_window: int | None
    limits: Abilities
    abilities: Abilities = field(init=False)

    def __post_init__(self) -> None:
        if missing := {"cu_seqlens_q", "causal", "window_size", "deterministic"} - set(_parameters(self.function)):
            raise ImportError(f"{self.name} {self.version} is too old: no {', '.join(sorted(missing))}")
        names = _parameters(self.function)
        found = {
            "softcap": "softcap" in names,
            "dropout": "dropout_p" in names,
            "dropout_alone": True,
            "sinks": all(self._callable(function) for function in self.inner),
        }
        object.__setattr__(self, "abilities", dataclasses.replace(self.limits, **found))

    def _callable(self, function: Callable | None) -> bool:
        """Whether all that an inner function must be given, and segments and windows at least, goes by known names."""
        if function is None:
            return False
        parameters = _parameters(function)
        known = {*self._values(), "q", "k", "v", "out", "dout", "lse", "softmax_lse", "dq", "dk", "dv"}
        required = {name for name, optional in parameters.items() if not optional}
        return required <= known and {"cu_seqlens_q", "window_size_left"} <= set(parameters)

    def _values(self, call: Call | None = None) -> dict[str, Any]:
        """Arguments under every name that some version has for them."""
        call = call or Call(None, None, 0, 0, 1.0)
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

    def _run(self, function: Callable, call: Call, **tensors: Tensor):
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
        found = self._run(
            self.inner[1],
            call,
            **{"dout": grad, "q": q, "k": k, "v": v, "out": out, "lse": lse, "softmax_lse": lse},
            **{"dq": dq, "dk": dk, "dv": dv},
        )
        # 4 returns the gradients; 2 and 3 write them and return a by-product, alone or after the gradients.
        return tuple(found[:3]) if isinstance(found, tuple) and len(found) >= 3 else (dq, dk, dv)


@functools.cache
def _parameters(function: Callable) -> dict[str, bool]:
    """Names of a function's parameters, and whether each may be left out."""
    operator = getattr(function, "_opoverload", None)  # a torch.library.custom_op hides its signature
    if operator is not None:
        return {a.name: a.has_default_value() for a in operator._schema.arguments}
    return {p.name: p.default is not p.empty for p in inspect.signature(function).parameters.values()}


@dataclass(frozen=True)
class Generation:
    """Where the functions of a generation of flash attention are, and what it does not do."""

    module: str
    distribution: str
    forward: str  # what its public function is made of
    backward: str
    no_window: int | None
    limits: Abilities


def _limits(head_size: int, *architectures: int) -> Abilities:
    return Abilities(head_size=head_size, dtypes=HALF, device="cuda", architectures=architectures)


FLASH = {  # in the order of preference
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


def flash_kernel(name: str, module: Any, version: str = "", limits: Abilities | None = None) -> FlashKernel:
    """The kernel of a generation ("flash_attn_2", ...), from the module that holds its functions.

    Raises:
        ImportError: the functions are not there, or too old.
    """
    generation = FLASH[name]
    if not hasattr(module, "flash_attn_varlen_func"):
        raise ImportError(f"{name} has no flash_attn_varlen_func")
    inner = tuple(getattr(module, function, None) for function in (generation.forward, generation.backward))
    limits = limits or generation.limits
    return FlashKernel(name, version, module.flash_attn_varlen_func, inner, generation.no_window, limits)
