"""What changes the log-probs that a loss sees, or weighs its pairs; pure functions of :class:`PairLogps`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .logps import PairLogps

_LARGEST_EXPONENT = 80.0  # exp stays finite in fp32; TRL's


def _forward_kl(log_ratio: Tensor) -> Tensor:
    return 1 - torch.exp(-log_ratio)


def _js_divergence(log_ratio: Tensor) -> Tensor:
    return math.log(2) + F.logsigmoid(log_ratio)


def _alpha_divergence(log_ratio: Tensor, coef: float) -> Tensor:
    if abs(coef - 1) < 1e-6:  # the limit
        return log_ratio
    return (torch.exp(torch.clamp((coef - 1) * log_ratio, max=_LARGEST_EXPONENT)) - 1) / (coef - 1)


# f_divergence_type -> f'(exp d) of a log-ratio d. reverse_kl is DPO itself: d, up to a constant that cancels.
F_DIVERGENCES: dict[str, Callable[..., Tensor] | None] = {
    "reverse_kl": None,
    "forward_kl": _forward_kl,
    "js_divergence": _js_divergence,
    "alpha_divergence": _alpha_divergence,
}


def f_divergence(logps: PairLogps, kind: str, alpha_coef: float = 0.5) -> PairLogps:
    """Log-ratios ``d`` replaced by ``f'(exp d)``, f the generator of the divergence that takes the place of the KL
    divergence from the reference: Wang et al., arXiv 2309.16240.

    Forward KL ``1 - exp(-d)``, Jensen-Shannon ``log 2 + log s(d)``, alpha ``(exp((a-1) d) - 1) / (a-1)``. Only for
    losses of the *difference* of the two: each alone lacks a term of the prompt that is unknown.

    Forward KL's value for a chosen ratio below about -88 is beyond fp32: the loss is inf, as TRL's is.
    """
    derivative = F_DIVERGENCES[kind]
    if derivative is None:
        return logps
    coef = (alpha_coef,) if kind == "alpha_divergence" else ()
    chosen, rejected = logps.log_ratios()
    if kind == "forward_kl":  # the loss is flat long before a rejected side's exp(-d) is inf, and 0 times inf is NaN
        limits = torch.finfo(rejected.dtype)
        rejected = rejected.clamp(min=-math.log(limits.max) * (1 - limits.eps))
    chosen, rejected = (derivative(ratio, *coef) for ratio in (chosen, rejected))
    zero = torch.zeros_like(chosen)
    return replace(logps, chosen=chosen, rejected=rejected, ref_chosen=zero, ref_rejected=zero)


def desensitize(logps: PairLogps, alpha: float | None) -> PairLogps:
    """LD-DPO: tokens beyond the length of the pair's other side weigh ``alpha``, for policy and reference. Liu et al.,
    arXiv 2409.06411. Lengths stay as they are.
    """
    if alpha is None:
        return logps
    names = ("chosen", "rejected") + (() if logps.ref_chosen is None else ("ref_chosen", "ref_rejected"))
    return replace(logps, **{n: getattr(logps, n) - (1 - alpha) * getattr(logps, f"{n}_tail") for n in names})


def wpo_weights(logps: PairLogps) -> Tensor:
    """WPO: how likely the policy is to say what the pair says, (P,) without gradient, ``w(yw) w(yl)`` with
    ``w(y) = exp mean_t (log p(y_t) - log sum_v p(v)^2)``: Zhou et al., arXiv 2406.11827, eq. 2; not clamped, as TRL's.
    """
    chosen = (logps.chosen - logps.chosen_log_sum_sq) / logps.chosen_length
    rejected = (logps.rejected - logps.rejected_log_sum_sq) / logps.rejected_length
    return torch.exp(chosen + rejected).detach()
