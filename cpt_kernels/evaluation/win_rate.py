"""Win rates and length-controlled win rates with bootstrap confidence intervals, in numpy alone.

Every interval is a percentile bootstrap over prompts (Efron, 1979): prompts are drawn with replacement, and all values
of a drawn prompt count. The same seed and the same number of prompts give the same draws, so the difference between two
models that answered the same prompts is computed pair by pair. Deviations are scaled so that an interval of few prompts
is as wide as Student's t interval. One prompt shows no spread: its interval follows from the bounds of the values.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UserError

_THETA_SD = math.sqrt(10)  # of the normal prior on theta, in log-odds; keeps theta finite
_MOST_PROMPTS = 805  # AlpacaEval's; the fit gives more prompts the same total weight against the priors
_CHUNK = 4_000_000  # resampled values in memory at one time
_ITERATIONS = 100  # of Newton's method, and step halvings per iteration
_TOLERANCE = 1e-9  # of the gradient, per prompt
_EQUAL = 1e-12  # means of prompts that differ by less are the same up to rounding


@dataclass(frozen=True)
class Bootstrap:
    """How confidence intervals are computed.

    Raises:
        UserError: a value is out of range.
    """

    resamples: int = 2000  # number of bootstrap resamples of the prompts
    confidence: float = 0.95  # probability mass between the two ends of an interval, in (0, 1)
    seed: int = 0  # seed of the resampling

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1 or self.resamples < 1:
            raise UserError(
                f"confidence={self.confidence} must lie between 0 and 1, and resamples={self.resamples} must be at"
                " least 1"
            )
        if self.seed < 0:
            raise UserError(f"seed={self.seed}: must not be negative")

    def draw(self, n: int) -> Iterator[NDArray[np.float64]]:
        """Yields how often each of n prompts is drawn in each resample, in chunks of shape (B, n)."""
        random = np.random.default_rng(self.seed)
        at_once = max(1, _CHUNK // n)
        for start in range(0, self.resamples, at_once):
            count = min(at_once, self.resamples - start)
            drawn = [np.bincount(random.integers(n, size=n), minlength=n) for _ in range(count)]
            yield np.stack(drawn).astype(np.float64)

    def ends(self, estimate: ArrayLike, resampled: NDArray, n: int) -> NDArray[np.float64]:
        """Returns the lower and upper end, (2, ...), for estimates from n prompts.

        The spread among few prompts underestimates the true one by chance. Each resample's deviation is therefore
        multiplied by sqrt(n / chi2) with its own draw of chi2 from n - 1 degrees of freedom. If resampled means are
        normal, the interval is then Student's t interval; for many prompts the factor tends to 1.

        Args:
            estimate: (...) estimates from all prompts.
            resampled: (..., B) estimates from the resamples.
            n: number of prompts. NaN is returned for n = 1, which shows no spread.
        """
        estimate = np.asarray(estimate, np.float64)
        if n == 1:
            return np.full((2, *estimate.shape), np.nan)
        chi2 = np.random.default_rng((self.seed, 1)).chisquare(n - 1, resampled.shape[-1])
        deviations = (resampled - estimate[..., None]) * np.sqrt(n / chi2)
        return estimate + np.quantile(deviations, [self.tail, 1 - self.tail], axis=-1)

    @property
    def tail(self) -> float:
        """Probability mass below an interval, which equals that above it."""
        return (1 - self.confidence) / 2


DEFAULT_BOOTSTRAP = Bootstrap()


class WinRate(NamedTuple):
    """The mean of n outcomes in [0, 1] and the ends of its confidence interval."""

    rate: float
    low: float
    high: float
    n: int


def win_rate(wins: ArrayLike, *, prompts: ArrayLike | None = None, bootstrap: Bootstrap = DEFAULT_BOOTSTRAP) -> WinRate:
    """Computes the mean of outcomes, where 1 is a win, 0 a loss and 1/2 a tie, with the interval of `interval`.

    Args:
        wins: (n,) outcomes in [0, 1].
        prompts: (n,) the prompt of each outcome, for prompts with several outcomes. By default each outcome has its own
            prompt.

    Raises:
        UserError: there is no outcome, or one lies outside [0, 1].
    """
    wins = _check_outcomes(wins, "wins")
    low, high = interval(wins, prompts=prompts, bootstrap=bootstrap, bounds=(0, 1))
    return WinRate(float(wins.mean()), float(low), float(high), len(wins))


def interval(
    values: ArrayLike,
    *,
    prompts: ArrayLike | None = None,
    bootstrap: Bootstrap = DEFAULT_BOOTSTRAP,
    bounds: tuple[ArrayLike, ArrayLike] = (-math.inf, math.inf),
    weights: ArrayLike | None = None,
) -> NDArray[np.float64]:
    """Computes the bootstrap interval of a mean, (2,), or of the mean of each column, (2, M).

    If all N prompts have the same mean v, resampling shows no spread, but values that were not seen may differ. With
    t = (1 - confidence) / 2, a value differs from v with probability at most q = 1 - t^(1/N), else N equal values have
    a probability below t. The interval is then from v - q (v - lower) to v + q (upper - v). For outcomes that are all
    wins or all losses it is the exact binomial one (Clopper and Pearson, 1934).

    Args:
        values: (n,) or (n, M).
        prompts: (n,) the prompt of each value. All values of a prompt are drawn together.
        bounds: lower and upper bound of all values, or (M,) of those of each column. Without finite bounds, the
            interval of one prompt is (NaN, NaN), and that of several prompts with the same mean has no width.
        weights: (n,) positive weight of each value in the mean; default 1.
    """
    values = np.asarray(values, np.float64)
    weights = np.ones(len(values)) if weights is None else np.asarray(weights, np.float64)
    index = _prompt_index(prompts, len(values))
    counts = np.bincount(index, weights)
    sums = np.zeros((len(counts), *values.shape[1:]))
    np.add.at(sums, index, (values.T * weights).T)
    means = np.concatenate([(drawn @ sums).T / (drawn @ counts) for drawn in bootstrap.draw(len(counts))], axis=-1)
    mean = np.average(values, axis=0, weights=weights)
    ends = bootstrap.ends(mean, means, len(counts))
    lower, upper = (np.asarray(bound, np.float64) for bound in bounds)
    unseen = 1 - bootstrap.tail ** (1 / len(counts))
    of_equal = np.stack([mean - unseen * (mean - lower), mean + unseen * (upper - mean)])
    is_equal = _all_equal((sums.T / counts).T) & np.isfinite(upper - lower)
    return np.where(is_equal, of_equal, np.clip(ends, lower, upper))


@dataclass(frozen=True)
class LengthPrior:
    """Normal prior on the length effect phi of :func:`length_controlled_win_rate`, in log-odds.

    The default is firm because the preferences of one model do not identify phi where nearly all outputs are shorter
    than the baseline's. Prompts with short answers are easy, so a weak model loses less often where its output is
    nearly as long as the baseline's, and phi absorbs this difficulty of the prompts. Among 56 public models of
    AlpacaEval the median of phi without a prior is 2.1. For the five models that are longer on 40 to 60 % of the
    prompts, where quality and length do not mix, phi lies between 0.77 and 0.99.

    The default stands for GPT-4 as judge. A judge that ignores length needs ``LengthPrior(0, 0.1)``. With
    ``LengthPrior(0, 100)`` the preferences alone decide, which is sound if about half of the outputs are longer.

    Raises:
        UserError: a value is not finite, or the standard deviation is not positive.
    """

    mean: float = 1.0
    sd: float = 0.1

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and 0 < self.sd < math.inf):
            raise UserError(f"length_prior={self.mean} {self.sd}: expected a finite mean and a positive deviation")


DEFAULT_LENGTH_PRIOR = LengthPrior()
_NO_PRIOR = LengthPrior(0, 100)  # keeps phi finite if length alone decides


class LengthControlled(NamedTuple):
    """Result of :func:`length_controlled_win_rate`."""

    rate: float
    low: float
    high: float
    n: int
    length_effect: float  # phi: log-odds per unit of tanh(length difference / its standard deviation)
    longer: float  # share of outputs that are longer than the baseline's
    length_effect_without_prior: float  # phi from the preferences alone


def length_controlled_win_rate(
    preferences: ArrayLike,
    lengths: ArrayLike,
    baseline_lengths: ArrayLike,
    *,
    prompts: ArrayLike | None = None,
    bootstrap: Bootstrap = DEFAULT_BOOTSTRAP,
    prior: LengthPrior = DEFAULT_LENGTH_PRIOR,
) -> LengthControlled | None:
    r"""Estimates the win rate if every output were as long as the baseline's (after Dubois et al., arXiv 2404.04475).

    The paper models the preference for model m over baseline b on prompt x as

        q(x) = logistic(theta + phi tanh((len_m(x) - len_b(x)) / s) + psi gamma_x),

    where s is the standard deviation of the length differences over the prompts, theta the difference in quality, and
    gamma_x the difficulty of the prompt. The length-controlled win rate is the mean of q with the length term set to 0.

    This function has no gamma_x, which the paper estimates from all models of a leaderboard for its own 805 prompts;
    the rate is then logistic(theta). For phi it has a prior, where ``alpaca_eval`` adds comparisons of the baseline
    with a verbose and a concise version of itself, with 0.2 of the weight. Over 56 public models of AlpacaEval the
    rates differ from the published ones by 0.9 points on average and 3.8 at most.

    Only the length effect of the prior is removed, so a judge of length alone is not corrected to 50 %. The interval
    contains the uncertainty of the prior. Swapping model and baseline turns the rate r into 1 - r. If all preferences
    are 0, or all are 1, length explains nothing, and the rate and its interval are those of :func:`win_rate`.

    Args:
        preferences: (n,) preferences for the model, in [0, 1].
        lengths, baseline_lengths: (n,) lengths of the outputs in any unit; the paper uses characters.
        prompts: as for :func:`win_rate`.
        prior: what is known about the judge's preference for length.

    Returns:
        ``None`` if all outputs are longer than the baseline's, or all are shorter: the rate at equal length would be
        an extrapolation.

    Raises:
        UserError: there is no preference, one lies outside [0, 1], or the three arrays differ in length.
    """
    wins = _check_outcomes(preferences, "preferences")
    features = _length_features(wins, lengths, baseline_lengths)
    if features is None:
        return None
    index = _prompt_index(prompts, len(wins))
    once = np.ones((1, int(index.max()) + 1))
    theta, phi = _fit(features, wins, index, once, prior)[0]
    _, phi_alone = _fit(features, wins, index, once, _NO_PRIOR)[0]
    if set(wins) in ({0.0}, {1.0}):
        rate, low, high, _ = win_rate(wins, prompts=prompts, bootstrap=bootstrap)
    else:
        rate = float(_sigmoid(theta))
        low, high = _length_controlled_ends((theta, phi), features, wins, index, bootstrap, prior)
    longer = float((features > 0).mean())
    return LengthControlled(rate, low, high, len(wins), float(phi), longer, float(phi_alone))


def _length_features(wins: NDArray, lengths: ArrayLike, baseline_lengths: ArrayLike) -> NDArray[np.float64] | None:
    """Returns (n,) the length term of each comparison, or None if all outputs are longer, or all are shorter."""
    lengths, baseline_lengths = (np.asarray(each, np.float64) for each in (lengths, baseline_lengths))
    if not wins.shape == lengths.shape == baseline_lengths.shape:
        raise UserError(
            f"{len(wins)} preferences, {len(lengths)} lengths and {len(baseline_lengths)} baseline lengths: one of"
            " each is needed for every prompt"
        )
    differences = lengths - baseline_lengths
    if differences.min() > 0 or differences.max() < 0:
        return None
    return np.tanh(differences / differences.std(ddof=1)) if differences.any() else differences


def _length_controlled_ends(
    fitted: tuple[float, float],  # theta, phi
    features: NDArray,  # (n,)
    wins: NDArray,  # (n,)
    index: NDArray,  # (n,) prompt of each comparison
    bootstrap: Bootstrap,
    prior: LengthPrior,
) -> tuple[float, float]:
    """Computes the interval of logistic(theta).

    Each resample is a fit in which a comparison weighs as often as its prompt was drawn, and in which the prior's mean
    is drawn from the prior. If errors are normal, with the preferences' information H and the prior's information P,
    the variance of the fitted coefficients is then (H + P)^-1 (H + P) (H + P)^-1, which is the posterior's.
    """
    theta, phi = fitted
    if _all_equal(np.bincount(index, wins) / np.bincount(index)):
        # Resampling shows no spread: take the interval of the plain rate, and remove the mean length effect from its
        # odds.
        ends = interval(wins, prompts=index, bootstrap=bootstrap, bounds=(0, 1))
        low, high = ends / (ends + (1 - ends) * np.exp(phi * features.mean()))
    else:
        random = np.random.default_rng((bootstrap.seed, 2))
        n = int(index.max()) + 1
        thetas = [
            _fit(features, wins, index, drawn, prior, random.normal(prior.mean, prior.sd, len(drawn)))[:, 0]
            for drawn in bootstrap.draw(n)
        ]
        low, high = _sigmoid(bootstrap.ends(theta, np.concatenate(thetas), n))
    return float(low), float(high)


def _fit(
    features: NDArray,  # (n,)
    wins: NDArray,  # (n,)
    index: NDArray,  # (n,) prompt of each comparison
    drawn: NDArray,  # (B, N) how often each prompt counts
    prior: LengthPrior,
    means: ArrayLike | None = None,  # (B,) the prior's mean in each fit; by default prior.mean
) -> NDArray[np.float64]:
    """Fits (theta, phi), (B, 2), for each of B weightings of the N prompts by Newton's method.

    The minimized objective is the summed cross-entropy with the preferences, plus theta^2 / (2 _THETA_SD^2), plus
    (phi - mean)^2 / (2 sd^2) for the prior of phi. The n comparisons together weigh as much as N, at most 805: neither
    more comparisons on a prompt nor more prompts tell the length effect from the difficulty of the prompts, and the
    prior was chosen for 805 prompts.
    """
    weights = drawn[:, index] * (min(drawn.shape[1], _MOST_PROMPTS) / len(index))  # (B, n)
    design = np.stack([np.ones_like(features), features])  # (2, n)
    center = np.zeros((len(weights), 2))
    center[:, 1] = prior.mean if means is None else means
    precision = np.array([_THETA_SD, prior.sd]) ** -2.0

    def objective(coefficients: NDArray) -> NDArray:  # (B, 2) -> (B,)
        log_odds = coefficients @ design
        cross_entropy = np.logaddexp(0, log_odds) - wins * log_odds
        return (cross_entropy * weights).sum(1) + (coefficients - center) ** 2 @ precision / 2

    coefficients = center
    value = objective(coefficients)
    for _ in range(_ITERATIONS):
        chances = _sigmoid(coefficients @ design)
        gradient = (weights * (chances - wins)) @ design.T + precision * (coefficients - center)
        if np.abs(gradient).max() <= _TOLERANCE * len(features):
            break
        curvature = weights * chances * (1 - chances)
        hessian = np.einsum("bn,in,jn->bij", curvature, design, design, optimize=True) + np.diag(precision)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        # A full Newton step may overshoot where the curvature is small: halve it until no objective grows.
        for _ in range(_ITERATIONS):
            trial = objective(coefficients - step)
            if not (worse := trial > value + _TOLERANCE).any():
                break
            step[worse] /= 2
        coefficients, value = coefficients - step, trial
    return coefficients


def _all_equal(means: NDArray) -> NDArray[np.bool_]:
    """Returns whether the means of all prompts, (N, ...), are equal up to rounding."""
    return np.ptp(means, axis=0) < _EQUAL


def _prompt_index(prompts: ArrayLike | None, n: int) -> NDArray[np.int64]:
    """Returns (n,) an integer from 0 for the prompt of each value."""
    return np.arange(n) if prompts is None else np.unique(prompts, return_inverse=True)[1]


def _sigmoid(log_odds: NDArray | float) -> NDArray:
    return np.exp(-np.logaddexp(0, -log_odds))


def _check_outcomes(values: ArrayLike, name: str) -> NDArray[np.float64]:
    outcomes = np.asarray(values, np.float64)
    if outcomes.ndim != 1 or not len(outcomes):
        raise UserError(f"{name} must be a list of at least one outcome, but has the shape {outcomes.shape}")
    if len(outside := np.flatnonzero(~((outcomes >= 0) & (outcomes <= 1)))):
        raise UserError(f"{name}[{outside[0]}] is {outcomes[outside[0]]}: an outcome lies between 0 and 1")
    return outcomes
