"""Attention over a packed row whose completions share their prompt.

Keys and values are gathered so that each segment holds everything its queries see. Then any bottom-right causal
attention over segments of different lengths computes the result. ``select`` chooses which one, from two tables:

``varlen``     one call of a variable-length kernel for all segments, PyTorch's own or one of ``flash`` (CUDA)
``segments``   segment by segment, by ``scaled_dot_product_attention`` or eager PyTorch (any device)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from torch import Tensor

from ..gather import Rounds, gather_rows
from .segments import SegmentKernel, segment_attention
from .select import choose_attention
from .varlen import Call, Need, varlen_attention

__all__ = ["AttentionLayout", "shared_prompt_attention"]


@dataclass  # not frozen: torch.compile (2.11) traces into frozen dataclasses, and recompiles a layer for other lengths
class AttentionLayout:
    """Segments of a packed row of T tokens; fields as in ``data.collate.PackedBatch``."""

    cu_seqlens_q: Tensor  # (G+1,) int32
    cu_seqlens_k: Tensor  # (G+1,) int32
    kv_index: Tensor  # (K,) int64
    kv_rounds: Rounds
    segment_lengths: Sequence[tuple[int, int]]  # G times (queries, keys)
    shared: bool  # False: every segment's keys are its own tokens, in order, and nothing is gathered

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> AttentionLayout:
        """Returns the layout of a ``PackedBatch``."""
        return cls(**{field.name: batch[field.name] for field in fields(cls)})


def shared_prompt_attention(
    query: Tensor,  # (T, Hq, D)
    key: Tensor,  # (T, Hk, D), Hk divides Hq
    value: Tensor,  # (T, Hk, Dv)
    layout: AttentionLayout,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,  # (Hq,)
    dropout: float = 0.0,
    backend: str = "auto",
    deterministic: bool = True,
) -> Tensor:
    """Returns causal attention of every completion to its prompt and itself, (T, Hq, Dv).

    Args:
        scale: factor on the scores, default ``D ** -0.5``.
        window: a query sees the last ``window`` keys, itself included.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        sinks: one more logit per head that takes part in the softmax and adds nothing to the output.
        dropout: probability, on the attention weights.
        backend: ``auto``, ``flash_attn``, ``varlen`` (PyTorch's kernel), ``sdpa`` or ``eager``; or one generation, as
            ``flash_attn_2``. ``ops.attention.select.capabilities()`` says what each can do.
        deterministic: variable-length kernels sum the queries' gradients in a fixed order, which takes time.

    Raises:
        ValueError: the backend is unknown, or asked for by name and lacks what this call needs.
        RuntimeError: the backend is not available here.
    """
    if layout.shared:
        key = gather_rows(key, layout.kv_index, layout.kv_rounds)
        value = gather_rows(value, layout.kv_index, layout.kv_rounds)
    kernel = choose_attention(backend, Need.of(query, key, value, window, softcap, sinks, dropout))
    longest_query, longest_key = (max(lengths) for lengths in zip(*layout.segment_lengths))
    call = Call(
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        longest_query,
        longest_key,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        window=window,
        softcap=softcap,
        dropout=dropout,
        deterministic=deterministic,
    )
    if isinstance(kernel, SegmentKernel):
        return segment_attention(kernel, query, key, value, layout.segment_lengths, call, sinks)
    return varlen_attention(kernel, query, key, value, call, sinks)
