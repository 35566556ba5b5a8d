"""The built-in losses: pure functions of completion log-probs, each with its entry in the table ``LOSSES``.

Every function takes :class:`PairLogps` and returns a (P,) tensor, one loss per pair. Its keywords are its options,
which are fields of :class:`LossOptions` under the same name and with the same default. The decorator gives the equation
and the source. To add a loss with an option, write the function here, the field and its letter in ``options.py`` and a
test, and run ``python docs/losses.py``.

Notation of the equations, which ``docs/losses.md`` shares and a test evaluates: ``lw, ll`` are the policy's log-probs
of the chosen and of the rejected completion, ``ly`` that of the regularizer's completion, ``rw, rl`` the reference's;
``nw, nl, ny`` the completions' lengths in tokens; ``Δw = lw - rw``, ``Δl = ll - rl``, ``h = Δw - Δl``; ``N`` is
``tokens_per_pair``; ``σ`` the logistic function; ``S(x)`` is ``-log(σ(x))`` smoothed by ``label_smoothing``; and
``odds(m) = m - log(1 - exp(m))``. A Greek letter is the symbol of an option.

A trainer averages losses over the pairs of an optimizer step. ``sft`` and ``cpo`` average their likelihood over tokens
instead, so they divide by ``tokens_per_pair``, which is known before the step. Hence all losses but the two ``aot`` are
*separable*: a sum over pairs of a function of that pair's log-probs and of constants. For a separable loss the head
computes the gradients of a tile while its logits are still in memory.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .logps import PairLogps


@dataclass(frozen=True)
class Builtin:
    """An entry of the table of losses."""

    function: Callable[..., Tensor]  # ``(PairLogps, **options) -> (P,)``
    equation: str  # the loss of a pair, in the notation of this module
    source: str  # the paper
    trl: str | None = None  # the loss's name in TRL 1.16, or ``None``
    needs_reference: bool = True  # see :class:`Loss`
    needs_rejected: bool = True  # likewise
    needs_gap: bool = False  # likewise
    uses_target: bool = False  # the log-prob of y_ref is read, the column that ``target_column`` names
    separable: bool = True  # see :class:`Loss`
    per_token: bool = False  # the loss compares log-probs per token, and so do the rewards that are logged: ``β·lw/nw``
    # log-ratios enter as ``Δw - Δl`` only, so another f-divergence can replace the KL divergence
    of_difference: bool = False


LOSSES: dict[str, Builtin] = {}


def loss_options(name: str) -> list[str]:
    """Returns the names of the options of loss ``name``: the keywords of its function."""
    parameters = inspect.signature(LOSSES[name].function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def _builtin(equation: str, source: str, *, trl: str | None = None, **properties: bool) -> Callable:
    """Enters the decorated function into ``LOSSES`` under its own name."""

    def enter(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        LOSSES[function.__name__] = Builtin(function, equation, source, trl, **properties)
        return function

    return enter


def _smoothed(x: Tensor, label_smoothing: float) -> Tensor:
    """Returns ``S(x) = -(1-ε)·log(σ(x)) - ε·log(σ(-x))``: the mean over a label that is flipped with probability ε."""
    return -(1 - label_smoothing) * F.logsigmoid(x) - label_smoothing * F.logsigmoid(-x)


# --- Losses of the difference of the log-ratios ---


@_builtin("S(β·h)", "DPO, arXiv 2305.18290", trl="sigmoid", of_difference=True)
def sigmoid(logps: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO: Rafailov et al., eq. 7. With ``label_smoothing`` conservative DPO (E. Mitchell, "A note on DPO with noisy
    preferences", 2023).
    """
    return _smoothed(beta * logps.log_ratio_difference(), label_smoothing)


@_builtin("S(β·(Δw/nw − Δl/nl))", "Tulu 3, arXiv 2411.15124", trl="sigmoid_norm", of_difference=True)
def sigmoid_norm(logps: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO on log-ratios per token: Lambert et al."""
    return _smoothed(beta * _difference_per_token(logps), label_smoothing)


@_builtin("max(0, 1 − β·h)", "RSO, arXiv 2309.06657", trl="hinge", of_difference=True)
def hinge(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """RSO's hinge loss on log-ratios: Liu et al."""
    return torch.relu(1 - beta * logps.log_ratio_difference())


@_builtin("(Δw/nw − Δl/nl − 1/(2·β))²", "IPO, arXiv 2310.12036", trl="ipo", of_difference=True)
def ipo(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """IPO: Azar et al., eq. 17, with log-ratios per token as in TRL."""
    return (_difference_per_token(logps) - 1 / (2 * beta)) ** 2


@_builtin(
    "σ(β·h)·log(σ(β·h)/(1−ε)) + σ(−β·h)·log(σ(−β·h)/ε)", "EXO, arXiv 2402.00856", trl="exo_pair", of_difference=True
)
def exo_pair(logps: PairLogps, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """EXO: the reverse KL divergence of the policy's preference from the data's, where ε is above 0. Ji et al., eq. 16
    for two completions.
    """
    x = beta * logps.log_ratio_difference()
    chosen = torch.sigmoid(x) * (F.logsigmoid(x) - math.log1p(-label_smoothing))
    return chosen + torch.sigmoid(-x) * (F.logsigmoid(-x) - math.log(label_smoothing))


@_builtin(
    "(−(1−ε)·log(σ(β·h)) + ε·log(σ(−β·h))) / (1−2·ε)", "Robust DPO, arXiv 2403.00409", trl="robust", of_difference=True
)
def robust(logps: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Robust DPO: unbiased where labels are flipped with probability ε < 1/2. Chowdhury et al."""
    x = beta * logps.log_ratio_difference()
    clean, flipped = (1 - label_smoothing) * F.logsigmoid(x), label_smoothing * F.logsigmoid(-x)
    return (flipped - clean) / (1 - 2 * label_smoothing)


@_builtin(
    "−σ(−β·h/τ)·log(σ(β·h)) + σ(β·h/τ)·exp(−β·h)", "DiscoPOP, arXiv 2406.08414", trl="discopop", of_difference=True
)
def discopop(logps: PairLogps, *, beta: float = 0.1, discopop_tau: float = 0.05) -> Tensor:
    """DiscoPOP: the logistic and the exponential loss, blended by the log-ratio itself. Lu et al., eq. 5."""
    x = beta * logps.log_ratio_difference()
    # σ(x/τ)·exp(-x) as one exponential: as a product it is 0 times infinity for x below -88.
    return torch.exp(F.logsigmoid(x / discopop_tau) - x) - torch.sigmoid(-x / discopop_tau) * F.logsigmoid(x)


@_builtin("−log(σ(β·h − α·log(gap)))", "ODPO, arXiv 2402.10571", needs_gap=True, of_difference=True)
def odpo(logps: PairLogps, *, beta: float = 0.1, odpo_alpha: float = 1.0) -> Tensor:
    """DPO with an offset, which asks for a wider margin where the gap is larger: Amini et al., with the logarithm as
    the scaling function.
    """
    return -F.logsigmoid(beta * logps.log_ratio_difference() - odpo_alpha * logps.gap.log())


@_builtin("−log(σ(β·(h − λ·max(0, rw − lw))))", "Smaug, arXiv 2402.13228")
def dpop(logps: PairLogps, *, beta: float = 0.1, dpop_lambda: float = 50.0) -> Tensor:
    """DPO-Positive: a penalty where chosen is less likely under the policy than under the reference. Pal et al."""
    penalty = dpop_lambda * torch.relu(logps.ref_chosen - logps.chosen)
    return -F.logsigmoid(beta * (logps.log_ratio_difference() - penalty))


def _difference_per_token(logps: PairLogps) -> Tensor:
    chosen, rejected = logps.log_ratios()
    return chosen / logps.chosen_length - rejected / logps.rejected_length


# --- Losses of each log-ratio ---


@_builtin("−log(σ(β·Δw)) − log(σ(−β·Δw))/2 − log(σ(−β·Δl))/2", "NCA, arXiv 2402.05369", trl="nca_pair")
def nca_pair(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """NCA for pairs: Chen et al."""
    chosen, rejected = (beta * ratio for ratio in logps.log_ratios())
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


@_builtin("−log(σ(β·Δw)) − log(σ(−β·Δl))", "BCO, arXiv 2404.04656", trl="bco_pair")
def bco_pair(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """BCO for pairs, without its reward shift: Jung et al."""
    chosen, rejected = (beta * ratio for ratio in logps.log_ratios())
    return -F.logsigmoid(chosen) - F.logsigmoid(-rejected)


@_builtin("(Δw − 1/(2·β))² + (Δl + 1/(2·β))²", "SPPO, arXiv 2405.00675", trl="sppo_hard")
def sppo_hard(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """SPPO with hard labels: Wu et al., eq. 4.7 where chosen wins with probability 1."""
    chosen, rejected = logps.log_ratios()
    return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2


@_builtin("1 − σ(β·Δw) + σ(β·Δl)", "APO, arXiv 2408.06266", trl="apo_zero")
def apo_zero(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """APO-zero, for chosen completions that are better than the model's: D'Oosterlinck et al., eq. 7."""
    chosen, rejected = (beta * ratio for ratio in logps.log_ratios())
    return torch.sigmoid(-chosen) + torch.sigmoid(rejected)


@_builtin("σ(β·Δw) + 1 − σ(β·h)", "APO, arXiv 2408.06266", trl="apo_down")
def apo_down(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """APO-down, for chosen completions that are worse than the model's: D'Oosterlinck et al., eq. 8."""
    chosen, rejected = (beta * ratio for ratio in logps.log_ratios())
    return torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen)


# --- Losses of the distribution over the micro-batch ---


@_builtin("S(β·(sort(lw − ll) − sort(rw − rl)))", "AOT, arXiv 2406.05882", trl="aot", separable=False)
def aot(logps: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """AOT for pairs: the policy's log-prob differences, sorted, exceed the reference's, sorted. Melnyk et al."""
    policy = (logps.chosen - logps.rejected).sort().values
    reference = (logps.ref_chosen - logps.ref_rejected).sort().values
    return _smoothed(beta * (policy - reference), label_smoothing)


@_builtin("S(β·(sort(Δw) − sort(Δl)))", "AOT, arXiv 2406.05882", trl="aot_unpaired", separable=False)
def aot_unpaired(logps: PairLogps, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """AOT without pairs: the sorted log-ratios of chosen exceed those of rejected. Melnyk et al."""
    chosen, rejected = (ratio.sort().values for ratio in logps.log_ratios())
    return _smoothed(beta * (chosen - rejected), label_smoothing)


# --- Losses without a reference ---


@_builtin("max(0, δ − lw + ll) − λ·ly", "SLiC, arXiv 2305.10425, 2310.02263", needs_reference=False, uses_target=True)
def slic(
    logps: PairLogps, *, slic_delta: float = 1.0, slic_lambda: float = 1.0, slic_length_normalize: bool = False
) -> Tensor:
    """SLiC: a hinge loss on log-probs and a regularizer, Zhao et al., eq. 3, as Xu et al. use it.
    ``slic_length_normalize`` takes means over tokens in place of sums.
    """
    chosen, rejected, target = logps.chosen, logps.rejected, logps.target
    if slic_length_normalize:
        chosen = chosen / logps.chosen_length
        rejected = rejected / logps.rejected_length
        target = target / logps.target_length
    return torch.relu(slic_delta - chosen + rejected) - slic_lambda * target


@_builtin(
    "S(β·(lw/nw − ll/nl) − γ)",
    "SimPO, arXiv 2405.14734",
    trl="CPOTrainer, simpo",
    needs_reference=False,
    per_token=True,
)
def simpo(logps: PairLogps, *, beta: float = 0.1, simpo_gamma: float = 0.5, label_smoothing: float = 0.0) -> Tensor:
    """SimPO: Meng et al., who take β of 2 and more; the default is DPO's."""
    margin = logps.chosen / logps.chosen_length - logps.rejected / logps.rejected_length
    return _smoothed(beta * margin - simpo_gamma, label_smoothing)


@_builtin("S(β·(lw − ll)) − α·lw/N", "CPO, arXiv 2401.08417", trl="CPOTrainer, sigmoid", needs_reference=False)
def cpo(logps: PairLogps, *, beta: float = 0.1, cpo_alpha: float = 1.0, label_smoothing: float = 0.0) -> Tensor:
    """CPO: Xu et al., eq. 3, its likelihood a mean over tokens as in TRL. With α = 0, DPO without a reference."""
    preference = _smoothed(beta * (logps.chosen - logps.rejected), label_smoothing)
    return preference - cpo_alpha * logps.chosen / logps.tokens_per_pair


@_builtin(
    "β·(−log(σ(odds(lw/nw) − odds(ll/nl)))) − lw/nw",
    "ORPO, arXiv 2403.07691",
    trl="ORPOTrainer",
    needs_reference=False,
    per_token=True,
)
def orpo(logps: PairLogps, *, beta: float = 0.1) -> Tensor:
    """ORPO: Hong et al., eq. 4 and 7, where β is their λ."""

    def log_odds(mean: Tensor) -> Tensor:
        mean = mean.clamp(max=-torch.finfo(mean.dtype).eps)  # the odds of a certain completion are infinite
        return mean - torch.log(-torch.expm1(mean))

    chosen, rejected = logps.chosen / logps.chosen_length, logps.rejected / logps.rejected_length
    return -beta * F.logsigmoid(log_odds(chosen) - log_odds(rejected)) - chosen


@_builtin("−lw/N", "maximum likelihood", trl="sft", needs_reference=False, needs_rejected=False)
def sft(logps: PairLogps) -> Tensor:
    """Supervised fine-tuning on the chosen completions: the negative log-likelihood, a mean over the step's tokens."""
    return -logps.chosen / logps.tokens_per_pair
