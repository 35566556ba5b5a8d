"""Tests of evaluation/win_rate.py: win rates, intervals, and length control on data with known parameters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cpt_kernels.evaluation.win_rate import Bootstrap, interval, length_controlled_win_rate, win_rate


def logistic(x):
    return 1 / (1 + np.exp(-x))


def judged(n: int, theta: float, phi: float, shift: float = 0.3, seed: int = 0):
    """Samples preferences from the paper's model with quality theta and length effect phi."""
    random = np.random.default_rng(seed)
    baseline = random.lognormal(5, 0.5, n)
    lengths = baseline * np.exp(random.normal(shift, 0.5, n))
    differences = lengths - baseline
    chances = logistic(theta + phi * np.tanh(differences / differences.std(ddof=1)))
    return (random.random(n) < chances).astype(float), lengths, baseline


def test_rate_counts_ties_half():
    found = win_rate([1, 1, 0, 0.5])
    assert found.rate == 0.625 and found.n == 4
    assert found.low < found.rate < found.high
    assert win_rate([1, 1, 0, 0.5]) == found
    assert win_rate([1, 1, 0, 0.5] * 40, bootstrap=Bootstrap(seed=1)) != win_rate(
        [1, 1, 0, 0.5] * 40, bootstrap=Bootstrap(seed=2)
    )


def test_interval_is_that_of_the_normal_approximation():
    wins = np.arange(1000) % 10 < 3
    found = win_rate(wins, bootstrap=Bootstrap(4000))
    half = 1.96 * math.sqrt(0.3 * 0.7 / 1000)
    assert found.low == pytest.approx(0.3 - half, abs=0.003) and found.high == pytest.approx(0.3 + half, abs=0.003)
    narrower = win_rate(wins, bootstrap=Bootstrap(4000, confidence=0.5))
    assert found.low < narrower.low < narrower.high < found.high


def test_the_interval_has_its_stated_coverage():
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(200):
        found = win_rate(random.random(100) < 0.7, bootstrap=Bootstrap(400, seed=seed))
        covered += found.low <= 0.7 <= found.high
    assert 0.88 <= covered / 200 <= 0.99  # 0.95 within three standard deviations of 200 trials with n = 100


def test_values_of_a_prompt_are_drawn_together():
    """Ten copies of every value carry no more information than one."""
    values = np.random.default_rng(0).normal(size=60)
    copies, prompts = np.repeat(values, 10), np.repeat(np.arange(60), 10)
    np.testing.assert_allclose(interval(copies, prompts=prompts), interval(values))
    low, high = interval(copies)
    assert high - low < 0.5 * np.diff(interval(values))[0]


def test_columns_are_resampled_alike():
    values = np.random.default_rng(0).normal(size=(50, 2))
    ends = interval(values)
    assert ends.shape == (2, 2)
    np.testing.assert_allclose(ends[:, 1], interval(values[:, 1]))
    shifted = interval(np.stack([values[:, 0], values[:, 0] + 1], axis=1))
    np.testing.assert_allclose(shifted[:, 1], shifted[:, 0] + 1)


def test_unanimous_outcomes_have_an_exact_interval():
    for n in (1, 5, 100):
        found = win_rate(np.ones(n))
        assert found.rate == found.high == 1 and found.low == pytest.approx(0.025 ** (1 / n))
        assert win_rate(np.zeros(n))[1:3] == (0, pytest.approx(1 - found.low))


@pytest.mark.parametrize(
    ("wins", "message"), [([], "at least one"), ([0.5, 1.5], r"wins\[1\] is 1.5"), ([math.nan], r"wins\[0\] is nan")]
)
def test_bad_outcomes(wins, message):
    with pytest.raises(ValueError, match=message):
        win_rate(wins)


@pytest.mark.parametrize("theta", [-1.0, 0.0, 0.7])
@pytest.mark.parametrize("phi", [0.0, 2.0, -1.5])
def test_length_control_recovers_the_parameters(theta, phi):
    found = length_controlled_win_rate(*judged(4000, theta, phi), bootstrap=Bootstrap(100))
    assert found.rate == pytest.approx(logistic(theta), abs=0.03)
    assert found.length_effect == pytest.approx(phi, abs=0.25)
    assert found.low < logistic(theta) + 0.01 and found.high > logistic(theta) - 0.01 and found.high - found.low < 0.08


def test_a_judge_of_length_alone_has_no_length_controlled_preference():
    rates, covered = [], 0
    for seed in range(10):
        _, lengths, baseline = judged(500, 0, 0, seed=seed)
        wins = (lengths > baseline).astype(float)
        found = length_controlled_win_rate(wins, lengths, baseline, bootstrap=Bootstrap(100))
        assert 0.65 < wins.mean() == found.longer < 0.8 and found.length_effect > 50
        rates.append(found.rate)
        covered += found.low <= 0.5 <= found.high
    assert covered >= 7
    assert np.mean(rates) == pytest.approx(0.5, abs=0.07) and np.std(rates) < 0.15


def test_without_a_length_effect_the_rate_stays():
    wins, lengths, baseline = judged(3000, 0.5, 0.0, shift=1.0)
    found = length_controlled_win_rate(wins, lengths, baseline, bootstrap=Bootstrap(10))
    assert found.rate == pytest.approx(wins.mean(), abs=0.03)
    equal = length_controlled_win_rate(wins, baseline, baseline, bootstrap=Bootstrap(10))
    assert equal.rate == pytest.approx(wins.mean(), abs=1e-4) and equal.longer == 0


def test_swapping_model_and_baseline():
    wins, lengths, baseline = judged(300, 0.4, 1.0)
    found = length_controlled_win_rate(wins, lengths, baseline, bootstrap=Bootstrap(50))
    swapped = length_controlled_win_rate(1 - wins, baseline, lengths, bootstrap=Bootstrap(50))
    assert swapped.rate == pytest.approx(1 - found.rate, abs=1e-9)
    assert (swapped.low, swapped.high) == (pytest.approx(1 - found.high), pytest.approx(1 - found.low))


def test_length_control_draws_a_prompts_values_together():
    wins, lengths, baseline = judged(60, 0.4, 1.0)
    once = length_controlled_win_rate(wins, lengths, baseline, bootstrap=Bootstrap(200))
    copied = [np.repeat(values, 10) for values in (wins, lengths, baseline)]
    found = length_controlled_win_rate(*copied, prompts=np.repeat(np.arange(60), 10), bootstrap=Bootstrap(200))
    assert found.rate == pytest.approx(once.rate, abs=0.01)
    assert found.high - found.low == pytest.approx(once.high - once.low, rel=0.1)
    apart = length_controlled_win_rate(*copied, bootstrap=Bootstrap(200))
    assert apart.high - apart.low < 0.5 * (once.high - once.low)


def test_fit_is_the_minimum():
    """Another optimizer finds the same minimum on graded preferences."""
    random = np.random.default_rng(3)
    _, lengths, baseline = judged(200, 0, 0)
    wins = random.random(200)
    found = length_controlled_win_rate(wins, lengths, baseline, bootstrap=Bootstrap(10))
    x = torch.tanh(torch.from_numpy((lengths - baseline) / (lengths - baseline).std(ddof=1)))
    coefficients = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([coefficients], max_iter=200, tolerance_grad=1e-12, tolerance_change=1e-16)

    def loss():
        optimizer.zero_grad()
        scores = coefficients[0] + coefficients[1] * x
        value = torch.nn.functional.binary_cross_entropy_with_logits(scores, torch.from_numpy(wins), reduction="sum")
        value = value + coefficients[0] ** 2 / 20 + coefficients[1] ** 2 / 20000
        value.backward()
        return value

    optimizer.step(loss)
    theta, phi = coefficients.tolist()
    assert found.rate == pytest.approx(logistic(theta), abs=1e-7)
    assert found.length_effect == pytest.approx(phi, abs=1e-6)


def test_length_control_needs_lengths_on_both_sides():
    assert length_controlled_win_rate([1, 0, 1], [5, 6, 7], [1, 2, 3]) is None
    assert length_controlled_win_rate([1, 0, 1], [1, 2, 3], [5, 6, 7]) is None
    unanimous = length_controlled_win_rate(np.ones(10), np.arange(10), np.full(10, 5))
    assert unanimous[:4] == win_rate(np.ones(10))
    with pytest.raises(ValueError, match="3 preferences, 2 lengths and 3 baseline lengths"):
        length_controlled_win_rate([1, 0, 1], [5, 6], [1, 2, 3])
