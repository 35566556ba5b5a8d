"""Preference losses: pure functions of completion log-probs, one loss per pair.

Every function takes a :class:`PairLogps` and returns a (P,) tensor. Notation in the docstrings: ``lw, ll`` are the
policy's summed log-probs of the chosen and the rejected completion, ``rw, rl`` the reference's, ``nw, nl`` the
completions' lengths in tokens, ``dw = lw - rw``, ``dl = ll - rl`` and ``h = dw - dl``; ``s`` is the logistic function,
``b`` is ``beta`` and ``e`` is ``label_smoothing``.

A trainer averages over the pairs of an optimizer step, so a loss with a normaliser of its own (``sft``: tokens) divides
by the known ratio of the two, ``tokens_per_pair``. That keeps all but the two ``aot`` losses *separable*: a sum over
pairs of a function of that pair's numbers and of constants. Separable losses let the head finish its backward while
the logits are still there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .logps import PairLogps


def _smoothed(x: Tensor, label_smoothing: float) -> Tensor:
    """``-(1-e) log s(x) - e log s(-x)``: the mean over a label that is flipped with probability e."""
    return -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)


# --- Of the difference of the log-ratios ---


def sigmoid(logps: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO, ``-(1-e) log s(b h) - e log s(-b h)``. With e = ``label_smoothing`` = 0: Rafailov et al., arXiv 2305.18290,
    eq. 7; else conservative DPO, e the flip probability (E. Mitchell, "A note on DPO with noisy preferences", 2023).
    """
    return _smoothed(beta * logps.log_ratio_difference(), label_smoothing)


def sigmoid_norm(logps: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO on log-ratios per token, ``-log s(b (dw/nw - dl/nl))``, smoothed as ``sigmoid``: Lambert et al. (Tulu 3),
    arXiv 2411.15124.
    """
    return _smoothed(beta * _difference_per_token(logps), label_smoothing)


def hinge(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """RSO's hinge on the reference ratios, ``max(0, 1 - b h)``: Liu et al., arXiv 2309.06657. TRL's ``hinge``."""
    return torch.relu(1 - beta * logps.log_ratio_difference())


def ipo(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """IPO, ``(h' - 1/(2 b))^2`` with per-token averages, ``h' = dw/nw - dl/nl``: Azar et al., arXiv 2310.12036, eq. 17,
    length-normalised as TRL does.
    """
    return (_difference_per_token(logps) - 1 / (2 * beta)) ** 2


def exo_pair(logps: PairLogps, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """EXO, ``q log(q / (1-e)) + (1-q) log((1-q) / e)`` with ``q = s(b h)`` and e above 0: the reverse KL divergence of
    the policy's preference from the data's. Ji et al., arXiv 2402.00856, eq. 16 for two completions.
    """
    x = beta * logps.log_ratio_difference()
    chosen = torch.sigmoid(x) * (F.logsigmoid(x) - math.log1p(-label_smoothing))
    return chosen + torch.sigmoid(-x) * (F.logsigmoid(-x) - math.log(label_smoothing))


def robust(logps: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Robust DPO, ``(-(1-e) log s(b h) + e log s(-b h)) / (1-2e)``: unbiased where labels are flipped with probability
    e < 1/2. Chowdhury et al., arXiv 2403.00409.
    """
    x = beta * logps.log_ratio_difference()
    clean, flipped = (1 - label_smoothing) * F.logsigmoid(x), label_smoothing * F.logsigmoid(-x)
    return (flipped - clean) / (1 - 2 * label_smoothing)


def discopop(logps: PairLogps, *, beta: float = 0.1, discopop_tau: float = 0.05) -> Tensor:
    """DiscoPOP, ``-(1-m) log s(x) + m exp(-x)`` with ``x = b h`` and ``m = s(x / t)``: Lu et al., arXiv 2406.08414,
    eq. 5.
    """
    x = beta * logps.log_ratio_difference()
    # m exp(-x) as one exponential: apart, 0 times infinity for x below -88.
    return torch.exp(F.logsigmoid(x / discopop_tau) - x) - torch.sigmoid(-x / discopop_tau) * F.logsigmoid(x)


def odpo(logps: PairLogps, *, beta: float = 0.1, odpo_alpha: float = 1.0) -> Tensor:
    """DPO with an offset, ``-log s(b h - a log gap)``: the better chosen is than rejected, the wider the margin that is
    asked for. Amini et al., arXiv 2402.10571, with the logarithm as its scaling function.
    """
    return -F.logsigmoid(beta * logps.log_ratio_difference() - odpo_alpha * logps.gap.log())


def dpop(logps: PairLogps, *, beta: float = 0.1, dpop_lambda: float = 50.0) -> Tensor:
    """DPO-Positive, ``-log s(b (h - l max(0, rw - lw)))``: chosen must not become less likely than it was
    to the reference. Pal et al. (Smaug), arXiv 2402.13228.
    """
    penalty = dpop_lambda * torch.relu(logps.ref_chosen - logps.chosen)
    return -F.logsigmoid(beta * (logps.log_ratio_difference() - penalty))


def _difference_per_token(logps: PairLogps) -> Tensor:
    chosen, rejected = logps.log_ratios()
    return chosen / logps.chosen_length - rejected / logps.rejected_length


# --- Of each log-ratio ---


def nca_pair(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """NCA for pairs, ``-log s(b dw) - 1/2 log s(-b dw) - 1/2 log s(-b dl)``: Chen et al., arXiv 2402.05369."""
    chosen, rejected = (beta * ratio for ratio in logps.log_ratios())
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """BCO for pairs, without its reward shift, ``-log s(b dw) - log s(-b dl)``: Jung et al., arXiv 2404.04656."""
    chosen, rejected = (beta * ratio for ratio in logps.log_ratios())
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


def sppo_hard(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """SPPO with hard labels, ``(dw - 1/(2b))^2 + (dl + 1/(2b))^2``: Wu et al., arXiv 2405.00675, eq. 4.7 with
    probability 1 that chosen wins.
    """
    chosen, rejected = logps.log_ratios()
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


def apo_zero(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """APO-zero, ``1 - s(b dw) + s(b dl)``, where chosen is better than the model: D'Oosterlinck et al.,
    arXiv 2408.06266, eq. 7.
    """
    chosen, rejected = (beta * ratio for ratio in logps.log_ratios())
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


def apo_down(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """APO-down, ``s(b dw) + 1 - s(b h)``, where the model is better than chosen: D'Oosterlinck et al.,
    arXiv 2408.06266, eq. 8.
    """
    chosen, rejected = (beta * ratio for ratio in logps.log_ratios())
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


# --- Of the distribution over the batch ---


def aot(logps: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """AOT for pairs, ``-log s(b (sort(lw - ll) - sort(rw - rl)))``, smoothed as ``sigmoid``: the policy's margins
    dominate the reference's as distributions, so batches are compared and not pairs. Melnyk et al., arXiv 2406.05882.
    """
    policy = (logps.chosen - logps.rejected).sort().values
    reference = (logps.ref_chosen - logps.ref_rejected).sort().values
    return _smoothed(beta * (policy - reference), label_smoothing)


def aot_unpaired(logps: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """AOT without pairs, ``-log s(b (sort(dw) - sort(dl)))``, smoothed as ``sigmoid``. Melnyk et al., as ``aot``."""
    chosen, rejected = (ratio.sort().values for ratio in logps.log_ratios())
    return _smoothed(beta * (chosen - rejected), label_smoothing)


# --- Without a reference ---


def slic(
    logps: PairLogps, *, slic_delta: float = 1.0, slic_lambda: float = 1.0, slic_length_normalize: bool = False
) -> Tensor:
    """SLiC, ``max(0, d - lw + ll) - lambda log p(y_ref)``: Zhao et al., arXiv 2305.10425, eq. 3, as used by Xu et al.,
    arXiv 2310.02263. No reference model. ``slic_length_normalize`` takes per-token means instead of sums.
    """
    chosen, rejected, target = logps.chosen, logps.rejected, logps.target
    if slic_length_normalize:
        chosen = chosen / logps.chosen_length
        rejected = rejected / logps.rejected_length
        target = target / logps.target_length
    return torch.relu(slic_delta - chosen + rejected) - slic_lambda * target


def simpo(logps: PairLogps, *, beta: float = 0.1, simpo_gamma: float = 0.5, label_smoothing: float = 0.0) -> Tensor:
    """SimPO, ``-log s(b (lw/nw - ll/nl) - g)``, smoothed as ``sigmoid``: Meng et al., arXiv 2405.14734, where
    b is 2 and more: ``beta``'s default is DPO's.
    """
    margin = logps.chosen / logps.chosen_length - logps.rejected / logps.rejected_length
    return _smoothed(beta * margin - simpo_gamma, label_smoothing)


def cpo(logps: PairLogps, *, beta: float = 0.1, cpo_alpha: float = 1.0, label_smoothing: float = 0.0) -> Tensor:
    """CPO, ``-log s(b (lw - ll)) - a lw / tokens_per_pair``, smoothed as ``sigmoid``: Xu et al., arXiv 2401.08417,
    eq. 3, its likelihood a mean over tokens as in TRL. With a = ``cpo_alpha`` = 0: DPO without a reference.
    """
    preference = _smoothed(beta * (logps.chosen - logps.rejected), label_smoothing)
    return preference - cpo_alpha * logps.chosen / logps.tokens_per_pair


def orpo(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """ORPO, ``-lw/nw - b log s(o(lw/nw) - o(ll/nl))`` with log-odds ``o(m) = m - log(1 - exp m)``: Hong et al.,
    arXiv 2403.07691, eq. 4 and 7, b its lambda.
    """

    def log_odds(mean: Tensor) -> Tensor:
        mean = mean.clamp(max=-torch.finfo(mean.dtype).eps)  # the odds of a certain completion are infinite
        return mean - torch.log(-torch.expm1(mean))

    chosen, rejected = logps.chosen / logps.chosen_length, logps.rejected / logps.rejected_length
    return -beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected)) - chosen


def sft(logps: PairLogps) -> Tensor:
    """Supervised fine-tuning on the chosen completions: negative log-likelihood, a mean over the step's *tokens*."""
    return -logps.chosen / logps.tokens_per_pair
