"""Changes of the log-probs that a loss sees, and weights of its pairs: pure functions of :class:`PairLogps`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .logps import PairLogps

_LARGEST_EXPONENT = 80.0  # as in TRL, which stops there: losses of e^80 are finite in fp32


def _expm1(exponent: Tensor) -> Tensor:
    """Returns ``exp(x) - 1``, beyond x = 80 continued smoothly by a logarithm: finite, and with a slope above 0."""
    beyond = torch.relu(exponent - _LARGEST_EXPONENT)
    x = exponent.clamp(max=_LARGEST_EXPONENT)
    # expm1 is exact near 0. Its gradient, which PyTorch computes as the result plus 1, loses its digits far below 0.
    inside = torch.where(x > -0.5, torch.expm1(x), torch.exp(x) - 1)
    return inside + math.exp(_LARGEST_EXPONENT) * torch.log1p(beyond)


def _forward_kl(log_ratio: Tensor) -> Tensor:
    return -_expm1(-log_ratio)


def _js_divergence(log_ratio: Tensor) -> Tensor:
    return math.log(2) + F.logsigmoid(log_ratio)


def _alpha_divergence(log_ratio: Tensor, coef: float) -> Tensor:
    if abs(coef - 1) < 1e-6:  # the limit of the expression below
        return log_ratio
    return _expm1((coef - 1) * log_ratio) / (coef - 1)


# f_divergence_type -> Δ ↦ f'(exp Δ). For reverse_kl that is Δ itself, up to a constant that cancels: plain DPO.
F_DIVERGENCES: dict[str, Callable[..., Tensor] | None] = {
    "reverse_kl": None,
    "forward_kl": _forward_kl,
    "js_divergence": _js_divergence,
    "alpha_divergence": _alpha_divergence,
}


def f_divergence(logps: PairLogps, kind: str, alpha_coef: float = 0.5) -> PairLogps:
    """Replaces log-ratios ``Δ`` by ``f'(exp Δ)``, where f generates the divergence that takes the place of the KL
    divergence from the reference: Wang et al., arXiv 2309.16240.

    Forward KL is ``1 - exp(-Δ)``, Jensen-Shannon ``log 2 + log(σ(Δ))``, alpha ``(exp((a-1)·Δ) - 1) / (a-1)``. The
    result holds for losses of the *difference* of the log-ratios only: an unknown term of the prompt cancels there.

    Beyond an exponent of 80 exponentials are continued by a logarithm, because they exceed fp32 soon after. TRL has
    inf there (forward KL), or a constant without gradient (alpha).
    """
    derivative = F_DIVERGENCES[kind]
    if derivative is None:
        return logps
    coef = (alpha_coef,) if kind == "alpha_divergence" else ()
    chosen, rejected = logps.log_ratios()
    chosen, rejected = (derivative(ratio, *coef) for ratio in (chosen, rejected))
    zero = torch.zeros_like(chosen)
    return replace(logps, chosen=chosen, rejected=rejected, ref_chosen=zero, ref_rejected=zero)


def desensitize(logps: PairLogps, alpha: float | None) -> PairLogps:
    """Weights tokens beyond the length of the pair's other side by ``alpha``, for policy and reference: LD-DPO, Liu et
    al., arXiv 2409.06411. The lengths do not change.
    """
    if alpha is None:
        return logps
    names = ("chosen", "rejected") + (() if logps.ref_chosen is None else ("ref_chosen", "ref_rejected"))
    return replace(logps, **{n: getattr(logps, n) - (1 - alpha) * getattr(logps, f"{n}_tail") for n in names})


def wpo_weights(logps: PairLogps) -> Tensor:
    """Returns WPO's weights of the pairs, (P,) without gradient: the probability of both completions under the policy.

    ``w(chosen)·w(rejected)`` with ``w(y) = exp(mean_t (log p(y_t) - log sum_v p(v)²))``: Zhou et al., arXiv 2406.11827,
    eq. 2, without a bound, as in TRL.
    """
    chosen = (logps.chosen - logps.chosen_log_sum_sq) / logps.chosen_length
    rejected = (logps.rejected - logps.rejected_log_sum_sq) / logps.rejected_length
    return torch.exp(chosen + rejected).detach()
