"""Gather of rows whose gradient is summed by segments: deterministic, in fp32, without atomics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Rounds = Sequence[tuple[Tensor, Tensor]]


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, rounds: Rounds) -> Tensor:
        ctx.rows, ctx.rounds = x.shape[0], rounds
        return x[index]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        dtype = torch.promote_types(grad.dtype, torch.float32)
        total = grad.new_zeros(ctx.rows, *grad.shape[1:], dtype=dtype)
        for turn, (rows, sources) in enumerate(ctx.rounds):
            part = grad[sources].to(dtype)
            total[rows] = part if turn == 0 else total[rows] + part
        return total.to(grad.dtype), None, None


def gather_rows(
    x: Tensor,  # (T, ...)
    index: Tensor,  # (M,) int64
    rounds: Rounds,  # of (rows, sources), see data.packing.scatter_rounds
) -> Tensor:
    """``x[index]``, (M, ...); a row that occurs several times gets the fp32 sum of its gradients, in a fixed order."""
    return _GatherRows.apply(x, index, rounds)


class _SegmentSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: Tensor, offsets: Tensor) -> Tensor:
        ctx.save_for_backward(offsets)
        ctx.length = values.shape[0]
        return torch.segment_reduce(values.double(), "sum", offsets=offsets, initial=0).to(values.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        (offsets,) = ctx.saved_tensors
        return grad.repeat_interleave(offsets.diff(), output_size=ctx.length), None


def segment_sum(
    values: Tensor,  # (N,) fp32 or fp64
    offsets: Tensor,  # (S+1,) int64, from 0 to N
) -> Tensor:
    """Sums of S consecutive segments, (S,): accumulated in fp64 in order, returned in the dtype of ``values``."""
    return _SegmentSum.apply(values, offsets)
