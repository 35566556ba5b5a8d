"""What the kernels of ``pair_loss`` compute, in PyTorch: losses and their derivatives, without autograd.

Autograd does not work inside of an operator, and a closed form is faster. There are few numbers, so all is fp64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import PairLossOutput, completion_sums


class _Side(NamedTuple):
    """One side of P pairs."""

    index: Tensor  # (P,) completions
    logp: Tensor  # (P,) fp64, as the next two
    ratio: Tensor | None  # log-prob minus the reference's
    length: Tensor


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

    def side(index: Tensor) -> _Side:
        return _Side(index, sums[index], None if ratios is None else ratios[index], lengths[index])

    losses, slopes = _losses(
        loss,
        side(chosen),
        None if rejected is None else side(rejected),
        side(chosen if targets is None else targets),
        tokens_per_pair,
        **options,
    )
    indices, values = (torch.cat(parts) for parts in zip(*slopes))
    # Sorted by index on CUDA, so in a fixed order; index_add_ would be atomic.
    weights = torch.zeros_like(sums).index_put_((indices,), values, accumulate=True)
    return PairLossOutput(logps, losses.to(logps.dtype), weights.to(logps.dtype))


def _losses(
    loss: str,
    w: _Side,
    x: _Side | None,
    y: _Side,
    tokens_per_pair: Tensor | float,
    *,
    beta: float,
    label_smoothing: float,
    slic_delta: float,
    slic_lambda: float,
    slic_length_normalize: bool,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """The kernels' losses, and (completions, derivatives by their log-probs) of each side that has any.

    Sides are w, chosen; x, rejected; and y, the regulariser's.
    """
    if loss == "sft":
        return -w.logp / tokens_per_pair, [(w.index, torch.full_like(w.logp, -1) / tokens_per_pair)]
    if loss == "slic":
        one = torch.ones_like(w.logp)
        nw, nx, ny = (w.length, x.length, y.length) if slic_length_normalize else (one, one, one)
        margin = slic_delta - w.logp / nw + x.logp / nx
        losses, active = _relu(margin)
        slopes = [(w.index, -active / nw), (x.index, active / nx), (y.index, -slic_lambda / ny)]
        return losses - slic_lambda * (y.logp / ny), slopes
    if loss == "ipo":
        h = w.ratio / w.length - x.ratio / x.length - 1 / (2 * beta)
        return h * h, [(w.index, 2 * h / w.length), (x.index, -2 * h / x.length)]
    h = beta * (w.ratio - x.ratio)
    if loss == "hinge":
        losses, active = _relu(1 - h)
        slope = -beta * active
    else:
        assert loss == "sigmoid", loss
        e = label_smoothing
        losses = -(1 - e) * F.logsigmoid(h) - e * F.logsigmoid(-h)
        slope = beta * (e * torch.sigmoid(h) - (1 - e) * torch.sigmoid(-h))
    return losses, [(w.index, slope), (x.index, -slope)]


def _relu(margin: Tensor) -> tuple[Tensor, Tensor]:
    """relu and its derivative, which is 1 at NaN, as in PyTorch."""
    return torch.relu(margin), (~(margin <= 0)).to(margin.dtype)
