"""Attention of all segments in one variable-length call on CUDA: what a kernel is, what it can do, and PyTorch's own.

Causal masks are aligned at the ends of queries and keys (bottom-right), as in all flash kernels since 2.1. A window
(left, right) of theirs lets the query that is aligned with key i see keys i - left to i + right. "The last W keys,
itself included" is therefore (W - 1, 0). PyTorch documents (W, 0) for the same, but passes it to the same kernels.

PyTorch's kernel is called by the two operators that ``torch.nn.attention.varlen.varlen_attn`` is made of, for three
reasons: they have scale, window and grouped heads in every torch that we support (``varlen_attn`` got them one by one
until 2.12), their backward can be made deterministic, and sinks need both halves (:class:`_FlashAttention`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..backends import autocast_dtype

HALF = (torch.float16, torch.bfloat16)
_ALIGNMENT = 8  # flash kernels need head sizes in multiples of 16 bytes


@dataclass(frozen=True)
class Call:
    """Segments of an attention call, and what happens to their scores; see ``shared_prompt_attention``."""

    cu_seqlens_q: Tensor  # (G+1,) int32
    cu_seqlens_k: Tensor  # (G+1,) int32
    max_q: int  # queries of the longest segment
    max_k: int
    scale: float
    window: int | None = None
    softcap: float | None = None
    dropout: float = 0.0
    deterministic: bool = True


@dataclass(frozen=True)
class Need:
    """What a call needs of a kernel."""

    device: str
    architecture: tuple[int, int]  # compute capability; (0, 0) without CUDA
    dtype: torch.dtype
    head_size: int  # the larger of the keys' and the values'
    gqa: bool = False
    window: bool = False
    softcap: bool = False
    sinks: bool = False
    dropout: bool = False
    deterministic: bool = True
    blocks: bool = False

    @classmethod
    def of(
        cls,
        query: Tensor,  # (T, Hq, D)
        key: Tensor,  # (K, Hk, D)
        value: Tensor,  # (K, Hk, Dv)
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
        dropout: float,
        *,
        deterministic: bool = True,
        blocks: bool = False,
    ) -> Need:
        """Returns the needs of a call with these arguments, which are those of ``shared_prompt_attention``."""
        return cls(
            device=query.device.type,
            architecture=torch.cuda.get_device_capability(query.device) if query.is_cuda else (0, 0),
            dtype=compute_dtype(query),
            head_size=max(query.shape[-1], value.shape[-1]),
            gqa=query.shape[1] != key.shape[1],
            window=window is not None,
            softcap=softcap is not None,
            sinks=sinks is not None,
            dropout=dropout > 0,
            deterministic=deterministic,
            blocks=blocks,
        )


_WORDS = {
    "gqa": "grouped heads",
    "window": "windows",
    "softcap": "soft-cap",
    "sinks": "sinks",
    "dropout": "dropout",
    "deterministic": "deterministic gradients",
    "blocks": "images that attend in both directions",
}


@dataclass(frozen=True)
class Abilities:
    """A row of the capability table. The defaults are what plain PyTorch can do: everything."""

    gqa: bool = True
    window: bool = True
    softcap: bool = True
    sinks: bool = True
    dropout: bool = True
    deterministic: bool = True
    blocks: bool = False  # queries that see later keys, see `segments.Blocks`
    dropout_alone: bool = False  # dropout works only without soft-cap and sinks
    head_size: int | None = None  # the largest; smaller keys or values are padded to the size of the others
    dtypes: tuple[torch.dtype, ...] | None = None
    device: str | None = None
    architectures: tuple[int, ...] | None = None  # major compute capabilities

    def lacks(self, need: Need) -> list[str]:
        """Returns, in words, the needs that are not met; empty if all are."""
        if self.device not in (None, need.device):
            return [f"tensors on {need.device}"]
        missing = []
        if self.architectures is not None and need.architecture[0] not in self.architectures:
            missing.append("compute capability {}.{}".format(*need.architecture))
        if self.dtypes is not None and need.dtype not in self.dtypes:
            missing.append(str(need.dtype).removeprefix("torch."))
        if self.head_size is not None and need.head_size > self.head_size:
            missing.append(f"head size {need.head_size}")
        for name, word in _WORDS.items():
            if getattr(need, name) and not getattr(self, name):
                missing.append(word)
        if need.dropout and self.dropout and self.dropout_alone and (need.softcap or need.sinks):
            missing.append("dropout together with soft-cap or sinks")
        return missing


class Kernel(Protocol):
    """A variable-length attention. Tensors are (tokens, heads, head size), log-sum-exps (Hq, tokens) fp32."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    @property
    def abilities(self) -> Abilities: ...

    @property
    def is_trusted(self) -> bool:
        """Whether its masks are known to be aligned at the ends; if not, ``trial`` runs it before it is chosen."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """Returns differentiable attention without sinks."""
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        """Returns (output, log-sum-exp of each query's scores)."""
        ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of q, k and v, given the outputs of the forward."""
        ...


# --- The call ---


def varlen_attention(
    kernel: Kernel,
    query: Tensor,  # (T, Hq, D)
    key: Tensor,  # (K, Hk, D)
    value: Tensor,  # (K, Hk, Dv)
    call: Call,
    sinks: Tensor | None = None,  # (Hq,)
) -> Tensor:
    """Runs ``kernel`` once for all segments, (T, Hq, Dv), in autocast's dtype where autocast is on."""
    dtype, size = compute_dtype(query), value.shape[-1]
    # Kernels take one head size for q, k and v.
    padded = -(-max(query.shape[-1], size) // _ALIGNMENT) * _ALIGNMENT
    q, k, v = (_pad(x.to(dtype), padded) for x in (query, key, value))
    if sinks is None:
        out = kernel.attend(q, k, v, call)
    else:
        out = _FlashAttention.apply(q, k, v, sinks, kernel, call)
    return out[..., :size]


def _pad(x: Tensor, size: int) -> Tensor:
    """Appends zeros to each head. Those of queries and keys change no score; those of values are cut off again."""
    return F.pad(x, (0, size - x.shape[-1])) if x.shape[-1] < size else x


def compute_dtype(x: Tensor) -> torch.dtype:
    """Returns the dtype that autocast would choose: flash kernels are not among the operators that it casts."""
    return autocast_dtype(x) or x.dtype


class _FlashAttention(torch.autograd.Function):
    """A kernel's own forward and backward, with sinks around them.

    A sink s is one more key with score s and value 0. With z the log-sum-exp over the real keys and P their softmax,

        z' = logaddexp(z, s),   P' = P exp(z - z') = P sigmoid(z - s),   O' = P' V = O sigmoid(z - s).

    A flash backward computes everything from the z and O that it gets: P = exp(S - z), D = rowsum(dO * O),
    dV = P^T dO, dS = P * (dO V^T - D). The gradient of any softmax has that form. With z' and O' in place of z and O it
    is therefore the gradient of the softmax with the sink, for the real keys. The sink's own column of it is

        ds = sum_t p_t (dO_t . 0 - D'_t) = - sum_t p_t (dO_t . O'_t),   p = exp(s - z') = sigmoid(s - z).

    Hazard: multiplying the output of a flash attention by sigmoid(z - s) with autograd would need the gradient of z,
    which flash backwards ignore: gradients would be silently wrong.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, kernel: Kernel, call: Call) -> Tensor:
        out, lse = kernel.forward(q, k, v, call)
        if sinks is not None:
            column = sinks.to(lse.dtype)[:, None]  # (Hq, 1)
            out = (out * torch.sigmoid(lse - column).t()[..., None]).to(out.dtype)
            lse = torch.logaddexp(lse, column)
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.kernel, ctx.call = kernel, call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # -> gradients of q, k, v, sinks, kernel, call
        q, k, v, out, lse, sinks = ctx.saved_tensors
        grads = ctx.kernel.backward(grad.contiguous(), q, k, v, out, lse, ctx.call)
        grad_sinks = None
        if sinks is not None and ctx.needs_input_grad[3]:
            # The saved lse and out are z' and O'.
            weights = torch.exp(sinks.to(lse.dtype)[:, None] - lse)  # (Hq, T)
            products = (grad.to(lse.dtype) * out.to(lse.dtype)).sum(-1).t()
            grad_sinks = -(weights * products).sum(1).to(sinks.dtype)
        return *grads, grad_sinks, None, None


# --- PyTorch's kernel ---


@dataclass(frozen=True)
class TorchKernel:
    """PyTorch's own flash attention, through its operators."""

    operators: Any = torch.ops.aten
    abilities: Abilities = Abilities(
        softcap=False,
        dropout=False,
        head_size=256,
        dtypes=HALF,
        device="cuda",
        architectures=(8, 9, 10, 11, 12),
    )
    name: str = "varlen"
    version: str = torch.__version__
    is_trusted: bool = True

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        return _FlashAttention.apply(q, k, v, None, self, call)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        arguments = {**self._arguments(call), "return_debug_mask": False}
        out, lse, *_ = self.operators._flash_attention_forward(q, k, v, **arguments)
        return out, lse

    def backward(self, grad, q, k, v, out, lse, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        # The operator requires the state of the random generator. Abilities exclude dropout, so it is not read.
        no_dropout = {
            "rng_state": torch.zeros(2, dtype=torch.uint64, device=q.device),
            "unused": torch.empty(0, device=q.device),
        }
        arguments = {**self._arguments(call), **no_dropout}
        is_set = torch.are_deterministic_algorithms_enabled()
        with _deterministic() if call.deterministic and not is_set else contextlib.nullcontext():
            return self.operators._flash_attention_backward(grad, q, k, v, out, lse, **arguments)

    def _arguments(self, call: Call) -> dict[str, Any]:
        return {
            "cum_seq_q": call.cu_seqlens_q,
            "cum_seq_k": call.cu_seqlens_k,
            "max_q": call.max_q,
            "max_k": call.max_k,
            "dropout_p": call.dropout,
            # The operators take a causal mask or a window. A window (left, 0) is causal by itself.
            "is_causal": call.window is None,
            "scale": call.scale,
            "window_size_left": -1 if call.window is None else call.window - 1,
            "window_size_right": 0,
        }


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Asks the process for deterministic algorithms, without which PyTorch's flash backward sums dq with atomics.

    The operator has no argument for it. The setting lasts for one call: during a whole backward it would make cuBLAS
    raise, unless CUBLAS_WORKSPACE_CONFIG is set. Where the process is deterministic anyway nothing changes. Setting and
    resetting take 1.6 us. An operator that another thread runs in between sees the setting, too.
    """
    settings: Any = torch.utils.deterministic
    mode, fill = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    settings.fill_uninitialized_memory = False  # it would fill every new tensor, one write more each
    torch.set_deterministic_debug_mode("error")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = fill


# --- cuDNN ---


@dataclass(frozen=True)
class CudnnKernel:
    """cuDNN's attention over segments, through PyTorch's operators.

    PyTorch asks cuDNN for a causal mask and does not name its alignment, and for no deterministic backward.
    """

    operators: Any = torch.ops.aten
    abilities: Abilities = Abilities(
        gqa=False,
        window=False,
        softcap=False,
        sinks=False,
        dropout=False,
        deterministic=False,
        head_size=128,
        dtypes=HALF,
        device="cuda",
        architectures=(8, 9, 10, 11, 12),
    )
    name: str = "cudnn"
    version: str = torch.__version__
    is_trusted: bool = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        return _FlashAttention.apply(q, k, v, None, self, call)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        arguments = {**self._arguments(q, k, v, call), "compute_log_sumexp": True, "return_debug_mask": False}
        out, lse, *_ = self.operators._cudnn_attention_forward(**arguments)
        return out, lse[..., 0].t()  # of (T, Hq, 1)

    def backward(self, grad, q, k, v, out, lse, call: Call) -> tuple[Tensor, Tensor, Tensor]:
        no_dropout = torch.zeros((), dtype=torch.int64, device=q.device)  # the seed and the offset are not read
        return self.operators._cudnn_attention_backward(
            **self._arguments(q, k, v, call),
            grad_out=grad,
            out=out,
            logsumexp=lse.t()[..., None].contiguous(),
            philox_seed=no_dropout,
            philox_offset=no_dropout,
        )

    def _arguments(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> dict[str, Any]:
        return {
            # cuDNN takes rows whose heads lie one after another.
            "query": q.contiguous(),
            "key": k.contiguous(),
            "value": v.contiguous(),
            "attn_bias": None,
            "cum_seq_q": call.cu_seqlens_q,
            "cum_seq_k": call.cu_seqlens_k,
            "max_q": call.max_q,
            "max_k": call.max_k,
            "dropout_p": 0.0,
            "is_causal": True,
            "scale": call.scale,
        }
