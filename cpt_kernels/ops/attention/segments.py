"""Attention segment by segment, on any device: the fall-back where no variable-length kernel runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .varlen import Abilities, Call

Blocks = Sequence[tuple[int, int]]  # (first, end) of queries that also see each other's later keys


@dataclass(frozen=True)
class SegmentKernel:
    """Attention of one segment.

    Attributes:
        function: of queries (1, H, Q, D), keys (1, H, K, D), values (1, H, K, Dv), the call, sinks (H,) and, if
            its abilities say so, blocks within the segment, to the output (1, H, Q, Dv).
    """

    name: str
    function: Callable[..., Tensor]
    abilities: Abilities


def segment_attention(
    kernel: SegmentKernel,
    query: Tensor,  # (T, Hq, D)
    key: Tensor,  # (K, Hk, D)
    value: Tensor,  # (K, Hk, Dv)
    segment_lengths: Sequence[tuple[int, int]],  # (queries, keys)
    call: Call,
    sinks: Tensor | None = None,  # (Hq,)
    *,
    blocks: Blocks = (),  # in the row; each lies in a segment whose queries are its keys
) -> Tensor:
    """Runs ``kernel`` on each segment, (T, Hq, Dv)."""
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    queries = [q for q, _ in segment_lengths]
    keys = [k for _, k in segment_lengths]
    # (1, H, length, D) views, as scaled_dot_product_attention takes them. One split per tensor and not a slice per
    # segment: the backward of a split is one concatenation.
    segments = zip(
        *(x.transpose(0, 1)[None].split(n, dim=2) for x, n in ((query, queries), (key, keys), (value, keys)))
    )
    within: list[Blocks] = [()] * len(queries)
    if blocks:
        stops = list(accumulate(queries, initial=0))
        within = [[(a - at, b - at) for a, b in blocks if at <= a < end] for at, end in pairwise(stops)]
    outputs = [kernel.function(*qkv, call, sinks, *([inner] if inner else ())) for qkv, inner in zip(segments, within)]
    return torch.cat(outputs, dim=2).squeeze(0).transpose(0, 1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, call: Call, sinks: Tensor | None, blocks: Blocks = ()) -> Tensor:
    # Without a mask PyTorch may take its fastest kernel; its causal mask is aligned at the start, which is right only
    # if there are as many queries as keys.
    causal = not blocks and q.shape[2] == k.shape[2] and (call.window is None or k.shape[2] <= call.window)
    mask = None if causal else _mask(q, k, call.window, blocks)
    return F.scaled_dot_product_attention(q, k, v, mask, call.dropout, is_causal=causal, scale=call.scale)


def _eager(q: Tensor, k: Tensor, v: Tensor, call: Call, sinks: Tensor | None, blocks: Blocks = ()) -> Tensor:
    # Scores (1, H, Q, K), with the sink as one more column.
    scores = q @ k.mT * call.scale
    if call.softcap is not None:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    scores = scores.masked_fill(~_mask(q, k, call.window, blocks), -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(-1, -1, scores.shape[2], 1)
        scores = torch.cat([scores, column], dim=-1)
    # Softmax in fp32 over keys and sink. The sink has no value, so its column is cut off.
    dtype = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(dim=-1, dtype=dtype).to(v.dtype)[..., : k.shape[2]]
    return F.dropout(weights, call.dropout) @ v


def _mask(q: Tensor, k: Tensor, window: int | None, blocks: Blocks) -> Tensor:
    """(Q, K) bool, True where a query sees a key; the last query is aligned with the last key."""
    at = torch.arange(k.shape[2] - q.shape[2], k.shape[2], device=q.device)[:, None]
    of = torch.arange(k.shape[2], device=q.device)
    seen = of <= at
    seen = seen if window is None else seen & (of > at - window)
    for first, end in blocks:
        seen[first:end, first:end] = True
    return seen


# In the order in which `auto` tries them.
SEGMENTWISE: dict[str, SegmentKernel] = {
    "sdpa": SegmentKernel("sdpa", _sdpa, Abilities(softcap=False, sinks=False, blocks=True)),
    "eager": SegmentKernel("eager", _eager, Abilities(blocks=True)),
}
