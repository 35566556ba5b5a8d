"""The ``eager`` backend of ``pair_loss``: losses and their derivatives in closed form, without autograd.

Autograd does not work inside a custom operator, and a closed form is faster. The arrays have one value per completion
or pair, so fp64 throughout costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import PairLossInput, PairLossOutput, completion_sums


@dataclass(frozen=True)
class KernelLoss:
    """A loss that the kernels know, with the options of all such losses, which ``cpt_kernels.losses`` explains."""

    name: str  # a key of ``KERNEL_LOSSES``
    tokens_per_pair: Tensor | float  # the normaliser of ``sft``; a tensor only in eager PyTorch
    beta: float
    label_smoothing: float
    slic_delta: float
    slic_lambda: float
    slic_length_normalize: bool


class _Completions(NamedTuple):
    """Per-completion inputs of the losses, fp64."""

    logps: Tensor  # (S,)
    ratios: Tensor | None  # (S,) log-prob minus the reference's
    lengths: Tensor  # (S,)


# A side's completions (P,) and the derivatives of the losses by their log-probs (P,).
_Slope = tuple[Tensor, Tensor]


def pair_loss_closed_form(inputs: PairLossInput, loss: KernelLoss) -> PairLossOutput:
    """Computes losses and weights as ``pair_loss_reference`` does, for the losses that the kernels know."""
    sums, lengths = completion_sums(inputs.token_logps, inputs.cu_completions)
    # Losses see the log-probs as the caller gets them: rounded to the dtype of the tokens.
    logps = sums.to(inputs.token_logps.dtype)
    sums, ratios = logps.double(), None if inputs.ref_logps is None else logps.double() - inputs.ref_logps.double()

    target = inputs.chosen if inputs.targets is None else inputs.targets
    sides = _Completions(sums, ratios, lengths)
    losses, slopes = _losses_and_slopes(loss, sides, inputs.chosen, inputs.rejected, target)
    indices, values = (torch.cat(parts) for parts in zip(*slopes))
    # On CUDA index_put_ sorts by index and adds in a fixed order; index_add_ would use atomics.
    weights = torch.zeros_like(sums).index_put_((indices,), values, accumulate=True)
    return PairLossOutput(logps, losses.to(logps.dtype), weights.to(logps.dtype))


def _losses_and_slopes(
    loss: KernelLoss,
    sides: _Completions,
    w: Tensor,  # (P,) chosen
    x: Tensor | None,  # (P,) rejected
    y: Tensor,  # (P,) of the regulariser
) -> tuple[Tensor, list[_Slope]]:
    """Returns losses (P,) and slopes: d loss / d log-prob per side; absent sides are omitted."""
    # Losses without a rejected side.
    if loss.name == "sft":
        tokens = loss.tokens_per_pair
        return -sides.logps[w] / tokens, [(w, torch.full_like(sides.logps[w], -1) / tokens)]
    # Losses of a pair without a reference.
    assert x is not None, f"{loss.name} has a rejected side"
    if loss.name == "slic":
        lengths = sides.lengths if loss.slic_length_normalize else torch.ones_like(sides.lengths)
        losses, active = _relu(loss.slic_delta - sides.logps[w] / lengths[w] + sides.logps[x] / lengths[x])
        slopes = [(w, -active / lengths[w]), (x, active / lengths[x]), (y, -loss.slic_lambda / lengths[y])]
        return losses - loss.slic_lambda * (sides.logps[y] / lengths[y]), slopes
    # Losses of a pair with a reference; h is the margin, of mean log-ratios minus its target for ipo.
    assert sides.ratios is not None, f"{loss.name} has a reference"
    if loss.name == "ipo":
        h = sides.ratios[w] / sides.lengths[w] - sides.ratios[x] / sides.lengths[x] - 1 / (2 * loss.beta)
        return h * h, [(w, 2 * h / sides.lengths[w]), (x, -2 * h / sides.lengths[x])]
    h = loss.beta * (sides.ratios[w] - sides.ratios[x])
    if loss.name == "hinge":
        losses, active = _relu(1 - h)
        slope = -loss.beta * active
    else:
        assert loss.name == "sigmoid", loss.name
        e = loss.label_smoothing
        losses = -(1 - e) * F.logsigmoid(h) - e * F.logsigmoid(-h)
        slope = loss.beta * (e - torch.sigmoid(-h))
    return losses, [(w, slope), (x, -slope)]


def _relu(margin: Tensor) -> tuple[Tensor, Tensor]:
    """Returns relu and its derivative, which is 1 at NaN, as in PyTorch."""
    return torch.relu(margin), (~(margin <= 0)).to(margin.dtype)
