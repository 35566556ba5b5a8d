"""Win rates with their intervals, and what they would be at equal lengths. Pure numpy.

Every interval is a percentile bootstrap over prompts (Efron, 1979): prompts are drawn with replacement, and a prompt
takes all that belongs to it along. The same seed and number of prompts draw the same prompts, so that two models
that answered the same prompts can be compared pair by pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UserError

RESAMPLES = 2000
CONFIDENCE = 0.95
# Weights of theta^2 / 2 and phi^2 / 2: normal priors with standard deviations of 3.2 and 100 in log-odds.
_RIDGE = np.array([0.1, 1e-4])
_CHUNK = 4_000_000  # resampled values held at once
_ITERATIONS = 100
_TOLERANCE = 1e-9  # of a gradient per prompt


class WinRate(NamedTuple):
    """The mean of n outcomes in [0, 1], and the ends of its confidence interval."""

    rate: float
    low: float
    high: float
    n: int


def win_rate(
    wins: ArrayLike,
    *,
    prompts: ArrayLike | None = None,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> WinRate:
    """The mean of outcomes: 1 a win, 0 a loss, 1/2 a tie, or anything between.

    Where all outcomes are wins, or all are losses, resampling shows no spread; the interval is then the exact binomial
    one (Clopper and Pearson, 1934): from ``((1 - confidence) / 2) ** (1 / n)`` to 1 where all n prompts are won.

    Args:
        wins: (n,) in [0, 1].
        prompts: (n,) which prompt each outcome belongs to, where a prompt has several; default one each.

    Raises:
        UserError: no outcome, or one outside of [0, 1].
    """
    wins = _outcomes(wins, "wins")
    low, high = interval(wins, prompts=prompts, resamples=resamples, confidence=confidence, seed=seed)
    n = len(wins) if prompts is None else len(np.unique(prompts))
    bound = ((1 - confidence) / 2) ** (1 / n)
    if (wins == 1).all():
        low = bound
    elif (wins == 0).all():
        high = 1 - bound
    return WinRate(float(wins.mean()), float(low), float(high), len(wins))


def interval(
    values: ArrayLike,
    *,
    prompts: ArrayLike | None = None,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> NDArray[np.float64]:
    """Bootstrap interval of a mean, (2,), or of the mean of each column, (2, M).

    Args:
        values: (n,) or (n, M).
        prompts: (n,) which prompt each value belongs to; a prompt's values are drawn together.
    """
    values = np.asarray(values, np.float64)
    index = _index(prompts, len(values))
    counts = np.bincount(index).astype(np.float64)
    sums = np.zeros((len(counts), *values.shape[1:]))
    np.add.at(sums, index, values)
    means = [(drawn @ sums).T / (drawn @ counts) for drawn in _draws(len(counts), resamples, seed)]
    return _ends(np.concatenate(means, axis=-1), confidence)


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
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> LengthControlled | None:
    r"""What the win rate would be if every output were as long as the baseline's (Dubois et al., arXiv 2404.04475).

    Their model of the preference for model m over baseline b on prompt x is

        q(x) = logistic(theta + phi tanh((len_m(x) - len_b(x)) / s) + psi gamma_x),

    s the standard deviation of the length differences over the prompts, theta the difference in quality, gamma_x the
    prompt's difficulty. The length-controlled win rate is the mean of q with the length term set to 0.

    Here it is fitted to one model alone. gamma_x is left out: it is a property of the prompt that they estimate once
    from all models of a leaderboard, and one model's single preference on x cannot tell it from chance. Then q at
    equal length is the same for every prompt, and the rate is logistic(theta). So the figure differs from that of
    ``alpaca_eval``, which has gamma_x of its own 805 prompts, and two verbose and concise baselines in the fit.

    theta and phi minimise the summed cross-entropy with the preferences plus theta^2 / 20 + phi^2 / 20000, which
    matters only where they would be infinite otherwise: where length alone decides, phi becomes large and theta small.
    (Were phi held back as much as theta, theta would have to explain what length did.) Swapping model and baseline
    turns the rate r into 1 - r. Where all preferences are 0, or all are 1, length explains nothing, and the rate is the
    win rate's. Where nearly all outputs are longer, there is little to go by, and the interval is wide.

    Args:
        preferences: (n,) in [0, 1], for the model.
        lengths, baseline_lengths: (n,) of the outputs in any unit; theirs is characters.
        prompts: as for :func:`win_rate`.

    Returns:
        ``None`` where the rate is not identified: all outputs are longer than the baseline's, or all are shorter, so
        that a better model and a preference for length look the same.

    Raises:
        UserError: no preference, one outside of [0, 1], or lengths of another number.
    """
    wins = _outcomes(preferences, "preferences")
    lengths, baseline_lengths = (np.asarray(each, np.float64) for each in (lengths, baseline_lengths))
    if not wins.shape == lengths.shape == baseline_lengths.shape:
        raise UserError(
            f"{len(wins)} preferences, {len(lengths)} lengths and {len(baseline_lengths)} baseline lengths: one of"
            " each is needed for every prompt"
        )
    differences = lengths - baseline_lengths
    longer = float((differences > 0).mean())
    if differences.min() > 0 or differences.max() < 0:
        return None
    spread = differences.std(ddof=1) if len(differences) > 1 else 0.0
    features = np.tanh(differences / spread) if spread else np.zeros(len(differences))
    theta, phi = _fit(features, wins, np.ones((1, len(wins))))[0]
    if np.unique(wins).tolist() in ([0.0], [1.0]):
        plain = win_rate(wins, prompts=prompts, resamples=resamples, confidence=confidence, seed=seed)
        return LengthControlled(*plain, float(phi), longer)
    index = _index(prompts, len(wins))
    draws = _draws(int(index.max()) + 1, resamples, seed)
    thetas = [_fit(features, wins, drawn[:, index])[:, 0] for drawn in draws]
    low, high = _ends(_logistic(np.concatenate(thetas)), confidence)
    return LengthControlled(float(_logistic(theta)), float(low), float(high), len(wins), float(phi), longer)


def _fit(features: NDArray, wins: NDArray, weights: NDArray) -> NDArray[np.float64]:
    """(theta, phi) for each of B weightings of the n prompts, (B, 2): Newton's method, halving steps that go too far.

    Args:
        features, wins: (n,)
        weights: (B, n)
    """
    design = np.stack([np.ones_like(features), features])  # (2, n)

    def objective(coefficients: NDArray) -> NDArray:
        scores = coefficients @ design
        return ((np.logaddexp(0, scores) - wins * scores) * weights).sum(1) + coefficients**2 @ _RIDGE / 2

    coefficients = np.zeros((len(weights), 2))
    value = objective(coefficients)
    for _ in range(_ITERATIONS):
        chances = _logistic(coefficients @ design)
        gradient = (weights * (chances - wins)) @ design.T + _RIDGE * coefficients
        if np.abs(gradient).max() <= _TOLERANCE * len(features):
            break
        curvature = weights * chances * (1 - chances)
        hessian = np.einsum("bn,in,jn->bij", curvature, design, design, optimize=True) + np.diag(_RIDGE)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        for _ in range(_ITERATIONS):
            trial = objective(coefficients - step)
            if not (worse := trial > value + _TOLERANCE).any():
                break
            step[worse] /= 2
        coefficients, value = coefficients - step, trial
    return coefficients


def _index(prompts: ArrayLike | None, n: int) -> NDArray[np.int64]:
    """(n,) number of each value's prompt, from 0."""
    return np.arange(n) if prompts is None else np.unique(prompts, return_inverse=True)[1]


def _draws(n: int, resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """How often each of n prompts is drawn in each resampling, in parts of (B, n)."""
    random = np.random.default_rng(seed)
    at_once = max(1, _CHUNK // n)
    for start in range(0, resamples, at_once):
        drawn = [np.bincount(random.integers(n, size=n), minlength=n) for _ in range(min(at_once, resamples - start))]
        yield np.stack(drawn).astype(np.float64)


def _ends(means: NDArray, confidence: float) -> NDArray[np.float64]:
    tail = (1 - confidence) / 2
    return np.quantile(means, [tail, 1 - tail], axis=-1)


def _logistic(scores: NDArray | float) -> NDArray:
    return np.exp(-np.logaddexp(0, -scores))


def _outcomes(values: ArrayLike, name: str) -> NDArray[np.float64]:
    outcomes = np.asarray(values, np.float64)
    if outcomes.ndim != 1 or not len(outcomes):
        raise UserError(f"{name} must be a list of at least one outcome, not of shape {outcomes.shape}")
    if len(outside := np.flatnonzero(~((outcomes >= 0) & (outcomes <= 1)))):
        raise UserError(f"{name}[{outside[0]}] is {outcomes[outside[0]]}: an outcome lies between 0 and 1")
    return outcomes
