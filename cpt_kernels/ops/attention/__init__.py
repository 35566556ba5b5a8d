"""Attention over a packed row whose completions share their prompt.

Keys and values are gathered so that each segment holds all that its queries see; then any bottom-right causal attention
over segments of different lengths will do: one call of a variable-length kernel on CUDA, or segment by segment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gather import Rounds, gather_rows
from .select import choose_attention
from .varlen import Call, Need, varlen_attention


@dataclass  # not frozen: torch.compile (2.11) would look into it, and compile a layer again for other lengths
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
        """The layout of a ``PackedBatch``."""
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
    """Causal attention of every completion to its prompt and itself, (T, Hq, Dv).

    Args:
        scale: factor on the scores, default ``D ** -0.5``.
        window: a query sees the last ``window`` keys, itself included.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        sinks: one more logit per head that takes part in the softmax and adds nothing.
        dropout: probability, on the attention weights.
        backend: ``auto``, ``flash_attn``, ``varlen`` (PyTorch's kernel), ``sdpa`` or ``eager``; or one generation:
            ``flash_attn_2``. What each can do is ``attention_backends.capabilities()``.
        deterministic: variable-length kernels sum the queries' gradients in a fixed order, which takes time.

    Raises:
        ValueError: a backend asked for by name lacks what this call needs.
        RuntimeError: it is not available here.
    """
    if layout.shared:
        key = gather_rows(key, layout.kv_index, layout.kv_rounds)
        value = gather_rows(value, layout.kv_index, layout.kv_rounds)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    kernel = choose_attention(backend, Need.of(query, key, value, window, softcap, sinks, dropout))
    if not isinstance(kernel, str):
        longest = [max(lengths) for lengths in zip(*layout.segment_lengths)]
        cumulative = layout.cu_seqlens_q, layout.cu_seqlens_k
        call = Call(*cumulative, *longest, scale, window, softcap, dropout, deterministic)
        return varlen_attention(kernel, query, key, value, call, sinks)
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    queries = [q for q, _ in layout.segment_lengths]
    keys = [k for _, k in layout.segment_lengths]
    outputs = []
    # (1, H, length, D) views, as scaled_dot_product_attention takes them. One split: its backward is one concatenation.
    for q, k, v in zip(
        *(x.transpose(0, 1)[None].split(n, dim=2) for x, n in ((query, queries), (key, keys), (value, keys)))
    ):
        if kernel == "sdpa":
            causal = q.shape[2] == k.shape[2] and (window is None or k.shape[2] <= window)
            mask = None if causal else _mask(q, k, window)
            out = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal, scale=scale)
        else:
            out = _eager(q, k, v, _mask(q, k, window), scale, softcap, sinks, dropout)
        outputs.append(out)
    return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1)


def _mask(q: Tensor, k: Tensor, window: int | None) -> Tensor:
    """(Q, K) bool, True where a query sees a key; the last query is aligned with the last key."""
    at = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)[:, None]
    of = torch.arange(k.shape[2], device=q.device)
    seen = of <= at
    return seen if window is None else seen & (of > at - window)


def _eager(
    q: Tensor,  # (1, H, Q, D)
    k: Tensor,  # (1, H, K, D)
    v: Tensor,  # (1, H, K, Dv)
    mask: Tensor,  # (Q, K)
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(-1, -1, scores.shape[2], 1)
        scores = torch.cat([scores, column], dim=-1)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=dtype).to(v.dtype)[..., : k.shape[2]]
    return F.dropout(weights, dropout) @ v
