"""The definition of ``pair_loss`` in PyTorch, and its implementation for losses that the kernels do not know.

Completion log-probs are sums over a completion's tokens; the loss is a function of a few of them per pair
(``cpt_kernels.losses``); a completion's weight is the derivative of the sum of all losses by its log-prob.
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
    tokens_per_pair: Tensor | float = 1.0,
) -> PairLossOutput:
    """Losses and weights by autograd over a few (P,) numbers."""
    logps, lengths = (x.to(token_logps.dtype) for x in completion_sums(token_logps, cu_completions))

    def of(values: Tensor | None, index: Tensor | None) -> Tensor | None:
        return None if values is None or index is None else values[index]

    target = chosen if targets is None else targets
    with torch.enable_grad():
        leaf = logps.detach().requires_grad_()
        losses = loss(
            PairLogps(
                chosen=leaf[chosen],
                rejected=of(leaf, rejected),
                target=leaf[target],
                chosen_length=lengths[chosen],
                rejected_length=of(lengths, rejected),
                target_length=lengths[target],
                ref_chosen=of(ref_logps, chosen),
                ref_rejected=of(ref_logps, rejected),
                tokens_per_pair=tokens_per_pair,
            )
        )
        (weights,) = torch.autograd.grad(losses.sum(), leaf)
    return PairLossOutput(logps, losses.detach(), weights)


def completion_sums(token_logps: Tensor, cu_completions: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over completions and their lengths, (S,) fp64 each."""
    sums = torch.segment_reduce(token_logps.double(), "sum", offsets=cu_completions.long(), initial=0)
    return sums, cu_completions.diff().double()
