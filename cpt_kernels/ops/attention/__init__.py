"""Attention over a packed row whose completions share their prompt.

Keys and values are gathered so that each segment holds everything its queries see. Then any bottom-right causal
attention over segments of different lengths computes the result. ``select`` chooses which one, from two tables:

``varlen``     one call of a variable-length kernel for all segments, PyTorch's own, cuDNN's or one of ``flash`` (CUDA)
``trial``      the check of a kernel on the device, before it is chosen
``segments``   segment by segment, by ``scaled_dot_product_attention`` or eager PyTorch (any device)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ...errors import UserError
from ..exchange import SequenceGroup, heads_for_tokens, heads_of_ranks, tokens_for_heads
from ..gather import Rounds, gather_rows
from .segments import SegmentKernel, segment_attention
from .select import choose_attention
from .varlen import Call, Need, compute_dtype, varlen_attention

__all__ = ["AttentionLayout", "shared_prompt_attention"]


@dataclass  # not frozen: torch.compile (2.11) traces into frozen dataclasses, and recompiles a layer for other lengths
class AttentionLayout:
    """Segments of a packed row of T tokens; fields as in ``data.collate.PackedBatch``.

    With ``group``, the row is cut over the ranks of a sequence group, and the fields still describe the whole row.

    Raises:
        UserError: the segments of the fields differ. On a GPU only their numbers are compared, because reading the
            offsets would cost a synchronisation.
    """

    cu_seqlens_q: Tensor  # (G+1,) int32
    cu_seqlens_k: Tensor  # (G+1,) int32
    kv_index: Tensor  # (K,) int64
    kv_rounds: Rounds
    segment_lengths: Sequence[tuple[int, int]]  # G times (queries, keys)
    shared: bool  # False: every segment's keys are its own tokens, in order, and nothing is gathered
    group: SequenceGroup | None = None
    blocks: Sequence[tuple[int, int]] = ()  # (first, end) tokens of images that attend to each other in both directions

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():
            return
        self._check_sides()
        rows = sum(len(sources) for _, sources in self.kv_rounds)
        if self.shared and not len(self.kv_index) == rows == sum(keys for _, keys in self.segment_lengths):
            raise UserError(
                f"kv_index has {len(self.kv_index)} rows, kv_rounds {rows}, and segment_lengths"
                f" {sum(keys for _, keys in self.segment_lengths)} keys: they must be equal"
            )

    def _check_sides(self) -> None:
        # Lengths of the segments, (queries,) and (keys,). On a GPU reading offsets would cost a synchronisation.
        queries, keys = ([segment[side] for segment in self.segment_lengths] for side in (0, 1))
        sides = ("cu_seqlens_q", self.cu_seqlens_q, queries), ("cu_seqlens_k", self.cu_seqlens_k, keys)
        for name, offsets, lengths in sides:
            if len(offsets) != len(lengths) + 1:
                raise UserError(f"{name} has {len(offsets) - 1} segments, but segment_lengths has {len(lengths)}")
            if offsets.device.type == "cpu" and offsets.tolist() != [0, *accumulate(lengths)]:
                raise UserError(f"{name} does not start at 0 or has other lengths than segment_lengths")

    @classmethod
    def of(cls, batch: Mapping[str, Any], group: SequenceGroup | None = None) -> AttentionLayout:
        """Returns the layout of a ``PackedBatch``."""
        return cls(**{name: batch[name] for name in cls.__annotations__ if name in batch}, group=group)


del AttentionLayout.__dataclass_fields__  # FSDP2 would copy a dataclass among the inputs of every layer


def shared_prompt_attention(
    query: Tensor,  # (T, Hq, D); with a sequence group the T are this rank's tokens
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
        backend: ``auto``, ``flash_attn``, ``varlen`` (PyTorch's kernel), ``cudnn``, ``sdpa`` or ``eager``; or one
            generation, as ``flash_attn_2``. ``ops.attention.select.capabilities()`` says what each can do.
        deterministic: variable-length kernels sum the queries' gradients in a fixed order, which takes time.

    Raises:
        UserError: shapes, dtypes or devices do not fit together, or a number is out of range; the backend is unknown,
            or asked for by name and lacks what this call needs.
        UnavailableError: the backend is not available here.
    """
    heads, group = query.shape[1], layout.group
    if group is not None:  # from here on the whole row, and this rank's heads
        tokens = sum(queries for queries, _ in layout.segment_lengths)
        query, key, value = (x.to(compute_dtype(x)) for x in (query, key, value))
        query, key, value = tokens_for_heads(query, key, value, group, tokens)
        sinks = None if sinks is None else sinks[heads_of_ranks(heads, heads, group.size)[group.rank].queries]
    if not torch.compiler.is_compiling():
        _check_call(query, key, value, sinks, layout)
        _check_numbers(scale, window, softcap, dropout)
    if layout.shared:
        key = gather_rows(key, layout.kv_index, layout.kv_rounds)
        value = gather_rows(value, layout.kv_index, layout.kv_rounds)
    need = Need.of(
        query, key, value, window, softcap, sinks, dropout, deterministic=deterministic, blocks=bool(layout.blocks)
    )
    kernel = choose_attention(backend, need)
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
        out = segment_attention(kernel, query, key, value, layout.segment_lengths, call, sinks, blocks=layout.blocks)
    else:
        out = varlen_attention(kernel, query, key, value, call, sinks)
    return out if group is None else heads_for_tokens(out, group, heads)


def _check_call(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, layout: AttentionLayout) -> None:
    tensors = {"query": query, "key": key, "value": value}
    if any(x.dim() != 3 for x in tensors.values()) or query.shape[2] != key.shape[2]:
        shapes = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise UserError(f"query, key (tokens, heads, D) and value (tokens, heads, Dv) do not fit: {shapes}")
    heads, key_heads = query.shape[1], key.shape[1]
    if value.shape[:2] != key.shape[:2] or len(key) != len(query) or heads % key_heads:
        raise UserError(
            f"key and value must have the {len(query)} tokens of query and a number of heads that divides its {heads},"
            f" not {tuple(key.shape[:2])} and {tuple(value.shape[:2])}"
        )
    queries, keys = (sum(lengths) for lengths in zip(*layout.segment_lengths))
    if queries != len(query) or not (layout.shared or keys == len(key)):
        raise UserError(f"the layout has {queries} queries and {keys} keys, but query has {len(query)} tokens")
    # Autocast casts the operands of an attention, but not fp64.
    if len({compute_dtype(x) for x in tensors.values()}) > 1:
        dtypes = ", ".join(f"{name} {x.dtype}" for name, x in tensors.items())
        raise UserError(f"query, key and value differ in dtype ({dtypes}): cast them, or run under torch.autocast")
    if any(x.device != query.device for x in (key, value, layout.cu_seqlens_q, layout.cu_seqlens_k, layout.kv_index)):
        raise UserError(f"key, value and layout must be on the device of query, {query.device}")
    if sinks is not None and (sinks.shape != (heads,) or sinks.device != query.device):
        raise UserError(f"sinks must have shape ({heads},) on {query.device}, not {tuple(sinks.shape)}")


def _check_numbers(scale: float | None, window: int | None, softcap: float | None, dropout: float) -> None:
    if scale is not None and not math.isfinite(scale):
        raise UserError(f"scale={scale}: must be finite, or None for the default")
    if window is not None and not window >= 1:
        raise UserError(f"window={window}: must be 1 or more, or None for no window")
    if softcap is not None and not 0 < softcap < math.inf:
        raise UserError(f"softcap={softcap}: must be positive and finite, or None for no cap")
    if not 0 <= dropout < 1:
        raise UserError(f"dropout={dropout}: must lie in [0, 1)")
