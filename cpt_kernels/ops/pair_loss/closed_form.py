"""What the kernels of ``pair_loss`` compute, in PyTorch: losses and their derivatives, without autograd.

Autograd does not work inside of an operator, and a closed form is faster. There are few numbers, so all is fp64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import PairLossOutput, completion_sums


class _Completions(NamedTuple):
    """What losses are made of, (S,) fp64."""

    logps: Tensor
    ratios: Tensor | None  # log-prob minus the reference's
    lengths: Tensor


def pair_loss_closed_form(
    token_logps: Tensor,  # (N,) fp32 or fp64
    cu_completions: Tensor,  # (S+1,) int32 or int64
    chosen: Tensor,  # (P,) int64, as the next two
    rejected: Tensor | None,
    targets: Tensor | None,
    ref_logps: Tensor | None,  # (S,)
    loss: str,
    tokens_per_pair: Tensor | float,
    **options,
) -> PairLossOutput:
    """Losses and weights; arguments as ``pair_loss``, with every option of every loss that the kernels know."""
    sums, lengths = completion_sums(token_logps, cu_completions)
    logps = sums.to(token_logps.dtype)  # rounded, as whoever is given them sees them
    sums, ratios = logps.double(), None if ref_logps is None else logps.double() - ref_logps.double()

    losses, slopes = _losses(
        loss,
        _Completions(sums, ratios, lengths),
        chosen,
        rejected,
        chosen if targets is None else targets,
        tokens_per_pair,
        **options,
    )
    indices, values = (torch.cat(parts) for parts in zip(*slopes))
    # Sorted by index on CUDA, so in a fixed order; index_add_ would be atomic.
    weights = torch.zeros_like(sums).index_put_((indices,), values, accumulate=True)
    return PairLossOutput(logps, losses.to(logps.dtype), weights.to(logps.dtype))


def _losses(
    loss: str,
    of: _Completions,
    w: Tensor,  # (P,) chosen
    x: Tensor | None,  # rejected
    y: Tensor,  # the regulariser's
    tokens_per_pair: Tensor | float,
    *,
    beta: float,
    label_smoothing: float,
    slic_delta: float,
    slic_lambda: float,
    slic_length_normalize: bool,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The kernels' losses, and (completions, derivatives by their log-probs) of each side that has any."""
    if loss == "sft":
        return -of.logps[w] / tokens_per_pair, [(w, torch.full_like(of.logps[w], -1) / tokens_per_pair)]
    if loss == "slic":
        lengths = of.lengths if slic_length_normalize else torch.ones_like(of.lengths)
        margin = slic_delta - of.logps[w] / lengths[w] + of.logps[x] / lengths[x]
        losses, active = _relu(margin)
        slopes = [(w, -active / lengths[w]), (x, active / lengths[x]), (y, -slic_lambda / lengths[y])]
        return losses - slic_lambda * (of.logps[y] / lengths[y]), slopes
    if loss == "ipo":
        h = of.ratios[w] / of.lengths[w] - of.ratios[x] / of.lengths[x] - 1 / (2 * beta)
        return h * h, [(w, 2 * h / of.lengths[w]), (x, -2 * h / of.lengths[x])]
    h = beta * (of.ratios[w] - of.ratios[x])
    if loss == "hinge":
        losses, active = _relu(1 - h)
        slope = -beta * active
    else:
        assert loss == "sigmoid", loss
        e = label_smoothing
        losses = -(1 - e) * F.logsigmoid(h) - e * F.logsigmoid(-h)
        slope = beta * (e - torch.sigmoid(-h))
    return losses, [(w, slope), (x, -slope)]


def _relu(margin: Tensor) -> tuple[Tensor, Tensor]:
    """relu and its derivative, which is 1 at NaN, as in PyTorch."""
    return torch.relu(margin), (~(margin <= 0)).to(margin.dtype)
