"""Exchanges between the ranks of a sequence group, which run one packed row together.

This is sequence parallelism in the form of DeepSpeed Ulysses (Jacobs et al., arXiv 2309.14509). Layers that treat every
token alone run on a rank's own tokens. Attention treats every head alone: before it, each rank gets the tokens of all
ranks for its own heads, and after it all heads of its own tokens. Between both, attention runs on the whole row.

Rank r of n holds the tokens r, r + n, r + 2n, ... of the row. So all ranks hold equally many tokens, and equally many
predictor rows, wherever the prompts lie.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..errors import UserError


@dataclass  # not frozen, for the same reason as AttentionLayout
class SequenceGroup:
    """Ranks that run one packed row together, as one of them sees it."""

    process_group: dist.ProcessGroup | None
    rank: int  # within the group
    size: int

    def count(self, tokens: int, rank: int | None = None) -> int:
        """Returns how many tokens of a row of ``tokens`` a rank holds, by default this one."""
        return len(range(self.rank if rank is None else rank, tokens, self.size))

    def take(self, rows: Tensor, dim: int = 0) -> Tensor:
        """Returns a copy of this rank's part of a tensor of the whole row.

        A rank without tokens takes the first one, so that no module runs on an empty tensor. Its results are not used.
        """
        return rows[(slice(None),) * dim + (self.own(rows.shape[dim]),)].contiguous()

    def own(self, tokens: int) -> slice:
        """Returns which tokens of a row of ``tokens`` this rank takes, see :meth:`take`."""
        return slice(self.rank, None, self.size) if self.rank < tokens else slice(1)

    def sum(self, values: Tensor) -> Tensor:
        """Returns the sum of the ranks' values. Gradients do not pass."""
        values = values.detach().clone()
        dist.all_reduce(values, group=self.process_group)
        return values

    def to_rows(self, parts: Sequence[Tensor], shape: tuple[int, ...]) -> Tensor:
        """Sends ``parts[r]``, (own tokens, ...), to rank r; returns what was sent here as one whole row, ``shape``."""
        counts = [self.count(shape[0], rank) for rank in range(self.size)]
        whole = parts[0].new_empty(shape)
        for rank, part in enumerate(self._swap(parts, [(count, *shape[1:]) for count in counts])):
            whole[rank :: self.size] = part
        return whole

    def to_ranks(self, whole: Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        """Sends each rank its tokens of ``whole``, (T, ...); returns the parts of ``shapes`` that ranks sent here."""
        return self._swap([whole[rank :: self.size] for rank in range(self.size)], shapes)

    def _swap(self, parts: Sequence[Tensor], shapes: Sequence[tuple[int, ...]]) -> list[Tensor]:
        sent = parts[0].new_empty(sum(part.numel() for part in parts))
        sizes = [part.numel() for part in parts], [math.prod(shape) for shape in shapes]
        for part, place in zip(parts, sent.split(sizes[0])):
            place.view(part.shape).copy_(part)
        received = sent.new_empty(sum(sizes[1]))
        dist.all_to_all_single(received, sent, sizes[1], sizes[0], group=self.process_group)
        return [part.view(shape) for part, shape in zip(received.split(sizes[1]), shapes)]


class Heads(NamedTuple):
    """Heads of one rank."""

    queries: slice
    keys: tuple[slice, ...]  # ranges of key heads, repeated where this rank's query heads are not in even groups

    @property
    def key_count(self) -> int:
        return sum(some.stop - some.start for some in self.keys)


@functools.cache
def heads_of_ranks(heads: int, key_heads: int, ranks: int) -> tuple[Heads, ...]:
    """Deals query heads to ranks in order, as evenly as possible, and to each rank the key heads that these need.

    Raises:
        UserError: there are fewer query heads than ranks.
    """
    if heads < ranks:
        raise UserError(
            f"attention has {heads} heads, fewer than the {ranks} ranks of a sequence group: set sp_size to {heads} or"
            " less"
        )
    dealt = []
    for rank in range(ranks):
        queries = range(heads * rank // ranks, heads * (rank + 1) // ranks)
        groups = [query * key_heads // heads for query in queries]
        if len(set(Counter(groups).values())) == 1:
            keys = [slice(groups[0], groups[-1] + 1)]
        else:
            keys = [slice(group, group + 1) for group in groups]  # one key head for each query head
        dealt.append(Heads(slice(queries.start, queries.stop), tuple(keys)))
    return tuple(dealt)


def tokens_for_heads(
    query: Tensor,  # (own tokens, Hq, D)
    key: Tensor,  # (own tokens, Hk, D)
    value: Tensor,  # (own tokens, Hk, Dv)
    group: SequenceGroup,
    tokens: int,  # T, of the whole row
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns query, key and value of the whole row for this rank's heads, (T, heads of this rank, D or Dv)."""
    return _TokensForHeads.apply(query, key, value, group, tokens)


def heads_for_tokens(
    out: Tensor,  # (T, heads of this rank, Dv)
    group: SequenceGroup,
    heads: int,  # Hq
) -> Tensor:
    """Returns all heads of this rank's tokens, (own tokens, Hq, Dv): the way back from :func:`tokens_for_heads`."""
    return _HeadsForTokens.apply(out, group, heads)


class _TokensForHeads(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, group, tokens):
        dealt = heads_of_ranks(query.shape[1], key.shape[1], group.size)
        own, count = dealt[group.rank], group.count(tokens)
        ctx.group, ctx.dealt, ctx.shapes = group, dealt, (query.shape, key.shape, value.shape)
        # Queries, keys and values travel together.
        parts = []
        for other in dealt:
            sides = [
                query[:count, other.queries],
                *(side[:count, some] for side in (key, value) for some in other.keys),
            ]
            parts.append(torch.cat([side.flatten(1) for side in sides], 1))
        sizes = (own.queries.stop - own.queries.start, own.key_count, own.key_count)
        widths = [heads * side.shape[2] for heads, side in zip(sizes, (query, key, value))]
        whole = group.to_rows(parts, (tokens, sum(widths)))
        # Copies, because kernels may need rows whose heads lie one after another.
        return tuple(part.contiguous().unflatten(1, (n, -1)) for part, n in zip(whole.split(widths, 1), sizes))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):  # -> gradients of query, key, value, group, tokens
        group, (query, key, value) = ctx.group, ctx.shapes
        count = group.count(len(grads[0]))
        whole = torch.cat([grad.flatten(1) for grad in grads], 1)
        widths = [
            [(h.queries.stop - h.queries.start) * query[2], h.key_count * key[2], h.key_count * value[2]]
            for h in ctx.dealt
        ]
        parts = group.to_ranks(whole, [(count, sum(each)) for each in widths])
        # A key head that went to several ranks gets the sum of their gradients, in fp32 and in the order of ranks.
        wide = torch.promote_types(whole.dtype, torch.float32)
        totals = [whole.new_zeros(query), whole.new_zeros(key, dtype=wide), whole.new_zeros(value, dtype=wide)]
        for part, each, heads in zip(parts, widths, ctx.dealt):
            for side, (total, grad) in enumerate(zip(totals, part.split(each, 1))):
                grad, at = grad.unflatten(1, (-1, total.shape[2])), 0
                for some in (heads.queries,) if side == 0 else heads.keys:
                    total[:count, some] += grad[:, at : at + some.stop - some.start]
                    at += some.stop - some.start
        return totals[0], totals[1].to(whole.dtype), totals[2].to(whole.dtype), None, None


class _HeadsForTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, group, heads):
        dealt = heads_of_ranks(heads, heads, group.size)  # query heads do not depend on the number of key heads
        ctx.group, ctx.dealt, ctx.shape = group, dealt, out.shape
        count = group.count(len(out))
        shapes = [(count, other.queries.stop - other.queries.start, out.shape[2]) for other in dealt]
        own = torch.cat(group.to_ranks(out, shapes), 1)
        return own if count else own.new_zeros(1, *own.shape[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # -> gradients of out, group, heads
        count = ctx.group.count(ctx.shape[0])
        return ctx.group.to_rows([grad[:count, other.queries] for other in ctx.dealt], ctx.shape), None, None


def whole_tokens(
    values: Tensor,  # (own predictor rows,) or (fields, own predictor rows)
    index: Tensor,  # (own predictor rows,) int64, their places among all
    total: int,  # N
    group: SequenceGroup,
) -> Tensor:
    """Returns the values of all ranks' predictor rows, (N,) or (fields, N), equal on every rank.

    Every rank computes the same loss of them, and its gradient continues on the rank's own rows, times the size of the
    group. So the *mean* of a parameter's gradients over the ranks is the gradient of the loss. Engines that average
    over all ranks (DDP, FSDP, ZeRO) then treat a group as one data rank.
    """
    return _WholeTokens.apply(values, index, total, group)


class _WholeTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, index, total, group):
        ctx.save_for_backward(index)
        ctx.size = group.size
        whole = values.new_zeros(*values.shape[:-1], total)
        whole[..., index] = values
        dist.all_reduce(whole, group=group.process_group)
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # -> gradients of values, index, total, group
        (index,) = ctx.saved_tensors
        return grad[..., index] * ctx.size, None, None, None
