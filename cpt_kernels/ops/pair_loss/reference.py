"""The definition of ``pair_loss`` in PyTorch; it also runs the losses that the kernels do not know.

A completion's log-prob is the sum over its tokens. The loss of a pair is a function of a few completion log-probs
(``cpt_kernels.losses``). The weight of a completion is the derivative of the sum of all losses by its log-prob.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ...losses import PairLogps


class PairLossInput(NamedTuple):
    """N tokens in S completions in P pairs. A completion may be empty, and may be in any number of pairs."""

    token_logps: Tensor  # (N,) fp32 or fp64
    cu_completions: Tensor  # (S+1,) int32 or int64, ascending from 0 to N
    chosen: Tensor  # (P,) int64 indices of completions, as the next two
    rejected: Tensor | None  # None: for losses without a rejected side
    targets: Tensor | None  # y_ref of the regulariser; None: the chosen completions
    ref_logps: Tensor | None  # (S,) reference log-probs of the completions


class PairLossOutput(NamedTuple):
    """Results for S completions in P pairs, in the dtype of the token log-probs."""

    completion_logps: Tensor  # (S,)
    losses: Tensor  # (P,)
    weights: Tensor  # (S,) d losses.sum() / d completion_logps

    @classmethod
    def empty(cls, inputs: PairLossInput) -> PairLossOutput:
        """Allocates results, not initialised."""
        completions = inputs.cu_completions.shape[0] - 1
        new = inputs.token_logps.new_empty
        return cls(new(completions), new(inputs.chosen.shape[0]), new(completions))


def pair_loss_reference(
    inputs: PairLossInput,
    loss: Callable[[PairLogps], Tensor],
    tokens_per_pair: Tensor | float = 1.0,
) -> PairLossOutput:
    """Computes losses and weights by autograd over (P,) values."""
    tokens = inputs.token_logps
    logps, lengths = (x.to(tokens.dtype) for x in completion_sums(tokens, inputs.cu_completions))
    chosen, rejected = inputs.chosen, inputs.rejected
    target = chosen if inputs.targets is None else inputs.targets

    def select(values: Tensor | None, index: Tensor | None) -> Tensor | None:
        return None if values is None or index is None else values[index]

    # Callers run without grad, so it is enabled. The weights are the gradient of the summed losses.
    with torch.enable_grad():
        leaf = logps.detach().requires_grad_()
        losses = loss(
            PairLogps(
                chosen=leaf[chosen],
                rejected=select(leaf, rejected),
                target=leaf[target],
                chosen_length=lengths[chosen],
                rejected_length=select(lengths, rejected),
                target_length=lengths[target],
                ref_chosen=select(inputs.ref_logps, chosen),
                ref_rejected=select(inputs.ref_logps, rejected),
                tokens_per_pair=tokens_per_pair,
            )
        )
        (weights,) = torch.autograd.grad(losses.sum(), leaf)
    return PairLossOutput(logps, losses.detach(), weights)


def completion_sums(token_logps: Tensor, cu_completions: Tensor) -> tuple[Tensor, Tensor]:
    """Returns sums over completions and their lengths, (S,) fp64 each."""
    sums = torch.segment_reduce(token_logps.double(), "sum", offsets=cu_completions.long(), initial=0)
    return sums, cu_completions.diff().double()
