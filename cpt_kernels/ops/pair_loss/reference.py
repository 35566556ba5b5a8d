"""The definition of ``pair_loss`` in PyTorch, for any loss, and its implementation on any device without a kernel.

Completion log-probs are sums over a completion's tokens; the loss is a function of a few of them per pair
(``losses.py``); a completion's weight is the derivative of the sum of all losses by its log-prob.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...losses import PairLogps


class PairLossOutput(NamedTuple):
    """For S completions in P pairs; dtype of the token log-probs."""

    completion_logps: Tensor  # (S,)
    losses: Tensor  # (P,)
    weights: Tensor  # (S,) d losses.sum() / d completion_logps


def pair_loss_reference(
    token_logps: Tensor,  # (N,) fp32 or fp64
    cu_completions: Tensor,  # (S+1,) int32 or int64
    chosen: Tensor,  # (P,) int64, as the next two
    rejected: Tensor | None,
    targets: Tensor | None,  # y_ref of the regulariser; None: the chosen completions
    ref_logps: Tensor | None,  # (S,)
    loss: Callable[[PairLogps], Tensor],
    tokens_per_pair: float = 1.0,
) -> PairLossOutput:
    """Losses and weights by autograd over a few (P,) numbers."""
    dtype = token_logps.dtype
    sums = torch.segment_reduce(token_logps.double(), "sum", offsets=cu_completions.long(), initial=0)
    logps = sums.to(dtype)
    lengths = cu_completions.diff().to(dtype)

    def of(values: Tensor | None, index: Tensor | None) -> Tensor | None:
        return None if values is None or index is None else values[index]

    def losses_of(chosen_logps: Tensor, target_logps: Tensor, rejected_logps: Tensor | None = None) -> Tensor:
        return loss(
            PairLogps(
                chosen=chosen_logps,
                rejected=rejected_logps,
                target=target_logps,
                chosen_length=lengths[chosen],
                rejected_length=of(lengths, rejected),
                target_length=lengths[target],
                ref_chosen=of(ref_logps, chosen),
                ref_rejected=of(ref_logps, rejected),
                tokens_per_pair=tokens_per_pair,
            )
        )

    target = chosen if targets is None else targets
    sides = [chosen, target] if rejected is None else [chosen, target, rejected]
    # Not torch.autograd.grad, which fails inside an operator.
    losses, pullback = torch.func.vjp(losses_of, *(logps[side] for side in sides))
    gradients = pullback(torch.ones_like(losses))
    # Sorted by index on CUDA, so in a fixed order; index_add_ would be atomic.
    weights = torch.zeros_like(logps).index_put_((torch.cat(sides),), torch.cat(gradients), accumulate=True)
    return PairLossOutput(logps, losses, weights)
