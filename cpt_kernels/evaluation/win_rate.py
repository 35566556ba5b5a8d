"""Win rates and length-controlled win rates with bootstrap confidence intervals, in numpy alone.

Every interval is a percentile bootstrap over prompts (Efron, 1979): prompts are drawn with replacement, and all values
of a drawn prompt count. The same seed and the same number of prompts give the same draws, so the difference between two
models that answered the same prompts is computed pair by pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UserError

# The fit adds _RIDGE[0] / 2 * theta^2 + _RIDGE[1] / 2 * phi^2: normal priors with standard deviations of 3.2 and 100
# in log-odds.
_RIDGE = np.array([0.1, 1e-4])
_CHUNK = 4_000_000  # resampled values in memory at one time
_ITERATIONS = 100  # of Newton's method, and step halvings per iteration
_TOLERANCE = 1e-9  # of the gradient, per prompt


@dataclass(frozen=True)
class Bootstrap:
    """How confidence intervals are computed.

    Attributes:
        resamples: number of bootstrap resamples of the prompts.
        confidence: probability mass between the two ends of an interval, in (0, 1).
        seed: seed of the resampling.

    Raises:
        UserError: a value is out of range.
    """

    resamples: int = 2000
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1 or self.resamples < 1:
            raise UserError(
                f"confidence={self.confidence} must lie between 0 and 1, and resamples={self.resamples} must be at"
                " least 1"
            )

    def draw(self, n: int) -> Iterator[NDArray[np.float64]]:
        """Yields how often each of n prompts is drawn in each resample, in chunks of shape (B, n)."""
        random = np.random.default_rng(self.seed)
        at_once = max(1, _CHUNK // n)
        for start in range(0, self.resamples, at_once):
            count = min(at_once, self.resamples - start)
            drawn = [np.bincount(random.integers(n, size=n), minlength=n) for _ in range(count)]
            yield np.stack(drawn).astype(np.float64)

    def ends(self, means: NDArray) -> NDArray[np.float64]:
        """Returns the lower and upper end, (2, ...), of resampled means whose last axis is the resample."""
        tail = (1 - self.confidence) / 2
        return np.quantile(means, [tail, 1 - tail], axis=-1)


DEFAULT_BOOTSTRAP = Bootstrap()


class WinRate(NamedTuple):
    """The mean of n outcomes in [0, 1] and the ends of its confidence interval."""

    rate: float
    low: float
    high: float
    n: int


def win_rate(wins: ArrayLike, *, prompts: ArrayLike | None = None, bootstrap: Bootstrap = DEFAULT_BOOTSTRAP) -> WinRate:
    """Computes the mean of outcomes, where 1 is a win, 0 a loss and 1/2 a tie.

    If all outcomes are wins, or all are losses, resampling shows no spread. The interval is then the exact binomial one
    (Clopper and Pearson, 1934): from ``((1 - confidence) / 2) ** (1 / n)`` to 1 if all n prompts are won.

    Args:
        wins: (n,) outcomes in [0, 1].
        prompts: (n,) the prompt of each outcome, for prompts with several outcomes. By default each outcome has its own
            prompt.

    Raises:
        UserError: there is no outcome, or one lies outside [0, 1].
    """
    wins = _check_outcomes(wins, "wins")
    low, high = interval(wins, prompts=prompts, bootstrap=bootstrap)
    n = len(wins) if prompts is None else len(np.unique(prompts))
    bound = ((1 - bootstrap.confidence) / 2) ** (1 / n)
    if (wins == 1).all():
        low = bound
    elif (wins == 0).all():
        high = 1 - bound
    return WinRate(float(wins.mean()), float(low), float(high), len(wins))


def interval(
    values: ArrayLike, *, prompts: ArrayLike | None = None, bootstrap: Bootstrap = DEFAULT_BOOTSTRAP
) -> NDArray[np.float64]:
    """Computes the bootstrap interval of a mean, (2,), or of the mean of each column, (2, M).

    Args:
        values: (n,) or (n, M).
        prompts: (n,) the prompt of each value. All values of a prompt are drawn together.
    """
    values = np.asarray(values, np.float64)
    index = _prompt_index(prompts, len(values))
    counts = np.bincount(index).astype(np.float64)
    sums = np.zeros((len(counts), *values.shape[1:]))
    np.add.at(sums, index, values)
    means = [(drawn @ sums).T / (drawn @ counts) for drawn in bootstrap.draw(len(counts))]
    return bootstrap.ends(np.concatenate(means, axis=-1))


class LengthControlled(NamedTuple):
    """Result of :func:`length_controlled_win_rate`."""

    rate: float
    low: float
    high: float
    n: int
    length_effect: float  # phi: log-odds per unit of tanh(length difference / its standard deviation)
    longer: float  # share of outputs that are longer than the baseline's


def length_controlled_win_rate(
    preferences: ArrayLike,
    lengths: ArrayLike,
    baseline_lengths: ArrayLike,
    *,
    prompts: ArrayLike | None = None,
    bootstrap: Bootstrap = DEFAULT_BOOTSTRAP,
) -> LengthControlled | None:
    r"""Estimates the win rate if every output were as long as the baseline's (Dubois et al., arXiv 2404.04475).

    The paper models the preference for model m over baseline b on prompt x as

        q(x) = logistic(theta + phi tanh((len_m(x) - len_b(x)) / s) + psi gamma_x),

    where s is the standard deviation of the length differences over the prompts, theta the difference in quality, and
    gamma_x the difficulty of the prompt. The length-controlled win rate is the mean of q with the length term set to 0.

    This function fits one model alone, without gamma_x: the paper estimates gamma_x once from all models of a
    leaderboard, and one preference per prompt cannot separate it from chance. At equal length q is then the same for
    every prompt, and the rate is logistic(theta). The result therefore differs from that of ``alpaca_eval``, which uses
    gamma_x of its own 805 prompts and adds a verbose and a concise baseline to the fit.

    theta and phi minimize the summed cross-entropy with the preferences plus theta^2 / 20 + phi^2 / 20000. The penalty
    matters only if theta or phi would be infinite without it. Its weight on phi is smaller: if length alone decides,
    phi becomes large and theta stays small, whereas with equal weights theta would absorb part of the length effect.
    Swapping model and baseline turns the rate r into 1 - r. If all preferences are 0, or all are 1, length explains
    nothing, and the rate is the plain win rate. If nearly all outputs are longer, the interval is wide.

    Args:
        preferences: (n,) preferences for the model, in [0, 1].
        lengths, baseline_lengths: (n,) lengths of the outputs in any unit; the paper uses characters.
        prompts: as for :func:`win_rate`.

    Returns:
        ``None`` if the rate is not identified: if all outputs are longer than the baseline's, or all are shorter, a
        better model and a preference for length cannot be told apart.

    Raises:
        UserError: there is no preference, one lies outside [0, 1], or the three arrays differ in length.
    """
    wins = _check_outcomes(preferences, "preferences")
    lengths, baseline_lengths = (np.asarray(each, np.float64) for each in (lengths, baseline_lengths))
    if not wins.shape == lengths.shape == baseline_lengths.shape:
        raise UserError(
            f"{len(wins)} preferences, {len(lengths)} lengths and {len(baseline_lengths)} baseline lengths: one of"
            " each is needed for every prompt"
        )

    # The length feature of each comparison, and whether it identifies the rate.
    differences = lengths - baseline_lengths
    longer = float((differences > 0).mean())
    if differences.min() > 0 or differences.max() < 0:
        return None
    spread = differences.std(ddof=1) if len(differences) > 1 else 0.0
    features = np.tanh(differences / spread) if spread else np.zeros(len(differences))

    # The estimate, from all comparisons with equal weights.
    theta, phi = _fit(features, wins, np.ones((1, len(wins))))[0]
    if np.unique(wins).tolist() in ([0.0], [1.0]):
        plain = win_rate(wins, prompts=prompts, bootstrap=bootstrap)
        return LengthControlled(*plain, float(phi), longer)

    # The interval: each resample is a fit in which a comparison weighs as often as its prompt was drawn.
    index = _prompt_index(prompts, len(wins))
    thetas = [_fit(features, wins, drawn[:, index])[:, 0] for drawn in bootstrap.draw(int(index.max()) + 1)]
    low, high = bootstrap.ends(_sigmoid(np.concatenate(thetas)))
    return LengthControlled(float(_sigmoid(theta)), float(low), float(high), len(wins), float(phi), longer)


def _fit(features: NDArray, wins: NDArray, weights: NDArray) -> NDArray[np.float64]:
    """Fits (theta, phi) for each of B weightings of the n comparisons by Newton's method.

    Args:
        features, wins: (n,)
        weights: (B, n)

    Returns:
        (B, 2)
    """
    design = np.stack([np.ones_like(features), features])  # (2, n)

    def objective(coefficients: NDArray) -> NDArray:  # (B, 2) -> (B,)
        log_odds = coefficients @ design
        return ((np.logaddexp(0, log_odds) - wins * log_odds) * weights).sum(1) + coefficients**2 @ _RIDGE / 2

    coefficients = np.zeros((len(weights), 2))
    value = objective(coefficients)
    for _ in range(_ITERATIONS):
        chances = _sigmoid(coefficients @ design)
        gradient = (weights * (chances - wins)) @ design.T + _RIDGE * coefficients
        if np.abs(gradient).max() <= _TOLERANCE * len(features):
            break
        curvature = weights * chances * (1 - chances)
        hessian = np.einsum("bn,in,jn->bij", curvature, design, design, optimize=True) + np.diag(_RIDGE)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        # A full Newton step may overshoot where the curvature is small: halve it until no objective grows.
        for _ in range(_ITERATIONS):
            trial = objective(coefficients - step)
            if not (worse := trial > value + _TOLERANCE).any():
                break
            step[worse] /= 2
        coefficients, value = coefficients - step, trial
    return coefficients


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
