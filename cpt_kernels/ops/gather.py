"""Gathers and segment sums whose gradients are deterministic: summed in a fixed order, without atomics.

PyTorch's ``index_select`` and ``index_add_`` use atomics on CUDA. They matter here because a prompt's rows are gathered
once for every completion, and a prediction that completions share once for each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Conflict-free rounds of (rows, sources), see data.packing.scatter_rounds: rows are unique within a round.
Rounds = Sequence[tuple[Tensor, Tensor]]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, rounds: Rounds) -> Tensor:
        ctx.rows, ctx.rounds = x.shape[0], rounds
        return x[index]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # -> gradients of x, index, rounds
        # Rows are unique within a round, so that indexed writes do not collide; the order of rounds fixes each sum.
        dtype = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros(ctx.rows, *grad.shape[1:], dtype=dtype)
        for turn, (rows, sources) in enumerate(ctx.rounds):
            part = grad[sources].to(dtype)
            # The first round reaches every row that occurs at all, so it writes and need not add.
            total[rows] = part if turn == 0 else total[rows] + part
        return total.to(grad.dtype), None, None


def gather_rows(
    x: Tensor,  # (T, ...)
    index: Tensor,  # (M,) int64
    rounds: Rounds,  # of index, see data.packing.scatter_rounds
) -> Tensor:
    """Returns ``x[index]``, (M, ...). The gradients of a row that occurs several times are summed in fp32, in order."""
    return _GatherRows.apply(x, index, rounds)


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.length = values.shape[0]
        return torch.segment_reduce(values.double(), "sum", offsets=offsets, initial=0).to(values.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # -> gradients of values, offsets
        (offsets,) = ctx.saved_tensors
        return grad.repeat_interleave(offsets.diff(), output_size=ctx.length), None


def segment_sum(
    values: Tensor,  # (N,) fp32 or fp64
    offsets: Tensor,  # (S+1,) int64, ascending from 0 to N
) -> Tensor:
    """Returns the sums of S consecutive segments, (S,), accumulated in fp64 in order, in the dtype of ``values``."""
    return _SegmentSum.apply(values, offsets)


class TokenMap(NamedTuple):
    """Which of N predictions each of the M tokens of completions is, if completions have tokens in common."""

    row: Tensor  # (M,) int64, the prediction of each token
    order: Tensor  # (M,) int64, tokens sorted by their prediction
    offsets: Tensor  # (N+1,) int64, where the tokens of each prediction begin in ``order``

    def part(self, predictions: slice, tokens: slice) -> TokenMap:
        """Returns the map of consecutive predictions, which are those of consecutive tokens."""
        offsets = self.offsets[predictions.start : predictions.stop + 1] - tokens.start
        return TokenMap(self.row[tokens] - predictions.start, self.order[tokens] - tokens.start, offsets)

    def sums(self, values: Tensor) -> Tensor:  # (M,) -> (N,)
        """Returns the sums of tokens' values by prediction, accumulated in fp64 in order."""
        return segment_sum(values[self.order], self.offsets)


class _TokenValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(*parts)
        return values[parts[0]]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):  # -> gradients of values and of the map's parts
        return TokenMap(*ctx.saved_tensors).sums(grad), None, None, None


def token_values(values: Tensor, token_map: TokenMap | None) -> Tensor:  # (N,) -> (M,)
    """Returns the values of completion tokens from those of predictions, in fp32 or fp64 where they are differentiable.

    Gradients are summed in order.
    """
    return values if token_map is None else _TokenValues.apply(values, *token_map)
