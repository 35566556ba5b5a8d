"""Tests of evaluation/win_rate.py: win rates, intervals, and length control on data with known parameters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from cpt_kernels.evaluation.win_rate import (
    Bootstrap,
    LengthPrior,
    interval,
    length_controlled_win_rate,
    win_rate,
)

FLAT = LengthPrior(0, 100)  # the preferences alone decide


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


def test_equal_outcomes_have_a_wide_interval():
    """Resampling shows no spread. With probability 0.975 or more, at most 1 - 0.025^(1 / n) of values are unlike."""
    for n, value in ((1, 0.5), (1, 0.2), (3, 0.5), (40, 0.75)):
        found, unseen = win_rate(np.full(n, value)), 1 - 0.025 ** (1 / n)
        assert found[:3] == pytest.approx((value, (1 - unseen) * value, value + unseen * (1 - value)))
        of_prompt = win_rate([value - 0.1, value + 0.1] * n, prompts=np.repeat(np.arange(n), 2))
        assert of_prompt[:3] == pytest.approx(found[:3]), "the values of a prompt are one draw"
    assert win_rate([0.5]).low < 0.02 and win_rate([0.5]).high > 0.98


@pytest.mark.parametrize("n", [2, 3, 5, 20])
def test_intervals_of_few_prompts_have_their_stated_coverage(n):
    random = np.random.default_rng(0)
    covered = 0
    for seed in range(300):
        low, high = interval(random.normal(3, 2, n), bootstrap=Bootstrap(200, seed=seed))
        covered += low <= 3 <= high
    assert 0.9 <= covered / 300 <= 0.99


def test_one_prompt_has_no_interval_without_bounds():
    assert np.isnan(interval([3.0])).all()
    assert np.isnan(interval([3.0, 4.0], prompts=[7, 7])).all()
    ends = interval([[0.5, 3.0]], bounds=([0, -np.inf], [1, np.inf]))
    assert ends[:, 0] == pytest.approx([0.0125, 0.9875]) and np.isnan(ends[:, 1]).all()


@pytest.mark.parametrize(
    ("wins", "message"), [([], "at least one"), ([0.5, 1.5], r"wins\[1\] is 1.5"), ([math.nan], r"wins\[0\] is nan")]
)
def test_bad_outcomes(wins, message):
    with pytest.raises(ValueError, match=message):
        win_rate(wins)


@pytest.mark.parametrize("theta", [-1.0, 0.0, 0.7])
@pytest.mark.parametrize(("phi", "prior"), [(1.0, LengthPrior()), (0.0, FLAT), (2.0, FLAT), (-1.5, FLAT)])
def test_length_control_recovers_the_parameters(theta, phi, prior):
    found = length_controlled_win_rate(*judged(4000, theta, phi), bootstrap=Bootstrap(100), prior=prior)
    assert found.rate == pytest.approx(logistic(theta), abs=0.03)
    assert found.length_effect == pytest.approx(phi, abs=0.25)
    assert found.length_effect_without_prior == pytest.approx(phi, abs=0.25)
    assert found.low < logistic(theta) + 0.01 and found.high > logistic(theta) - 0.01 and found.high - found.low < 0.08


def leaderboard(theta: float, shift: float, seed: int):
    """Samples preferences as AlpacaEval's model describes its weak models, and the rate at equal length.

    The length effect of 1.85 and the factor 1 of the difficulty are typical of its published fits. Where the
    baseline's answer is short, the prompt is easy and the model's answer is about as long. With shift = -0.9, 2 % of
    the outputs are longer than the baseline's.
    """
    random = np.random.default_rng(seed)
    size, noise, spread = random.normal(size=(3, 805))
    baseline = np.exp(7.3 + 0.7 * size)
    lengths = np.exp(7.3 + 0.52 * size + 0.4 * spread + shift)
    differences = lengths - baseline
    quality = theta - 0.7 * size + math.sqrt(0.51) * noise
    chances = logistic(quality + 1.85 * np.tanh(differences / differences.std(ddof=1)))
    return ((random.random(805) < chances).astype(float), lengths, baseline), logistic(quality).mean()


def test_length_control_agrees_with_alpaca_evals_model():
    """On weak models with short outputs, preferences alone give rates that are much too high. The prior corrects this.

    `python -m bench win_rate` shows the same on the public annotations.
    """
    models = [(-3.7, -0.9), (-3, -0.9), (-2, -0.9), (-1.3, -0.6), (0.8, 0.0)]
    errors = {"prior": [], "flat": []}
    for seed in range(8):
        for theta, shift in models:
            given, expected = leaderboard(theta, shift, seed)
            for name, prior in (("prior", LengthPrior()), ("flat", FLAT)):
                found = length_controlled_win_rate(*given, bootstrap=Bootstrap(1), prior=prior)
                errors[name].append(found.rate - expected)
    errors = {name: np.reshape(values, (8, len(models))) for name, values in errors.items()}
    assert np.abs(errors["prior"].mean(axis=0)).max() < 0.015 and np.abs(errors["prior"]).mean() < 0.012
    assert errors["flat"][:, :3].mean() > 0.06


@pytest.mark.parametrize(("theta", "shift"), [(-1.5, -0.5), (0.0, 0.0), (0.7, 0.6)])
def test_the_length_controlled_interval_has_its_stated_coverage(theta, shift):
    """The judge's length effect is drawn from the prior, whose uncertainty the interval contains."""
    random = np.random.default_rng(0)
    for n in (20, 200):
        samples = [judged(n, theta, random.normal(1, 0.1), shift, seed) for seed in range(100)]
        made = [length_controlled_win_rate(*given, bootstrap=Bootstrap(200, seed=n)) for given in samples]
        found = [each for each in made if each is not None]  # of 20 outputs, all may be shorter
        assert len(found) > 80
        covered = np.mean([each.low <= logistic(theta) <= each.high for each in found])
        assert covered >= 0.88, "0.95 within three standard deviations of 100 trials"
        assert np.mean([each.rate for each in found]) == pytest.approx(logistic(theta), abs=0.03)


def test_the_interval_contains_the_uncertainty_of_the_prior():
    wins, lengths, baseline = judged(20_000, 0, 1.0, shift=-0.8)
    firm, loose = (
        length_controlled_win_rate(wins, lengths, baseline, bootstrap=Bootstrap(100), prior=prior)
        for prior in (LengthPrior(1, 1e-3), LengthPrior(1, 1))
    )
    assert 1.5 * (firm.high - firm.low) < loose.high - loose.low


def test_a_judge_of_length_alone_loses_the_length_effect_of_the_prior_only():
    for seed in range(3):
        _, lengths, baseline = judged(500, 0, 0, seed=seed)
        wins = (lengths > baseline).astype(float)
        found = length_controlled_win_rate(wins, lengths, baseline, bootstrap=Bootstrap(100))
        assert found.length_effect_without_prior > 50 and 1 < found.length_effect < 2
        assert 0.65 < wins.mean() == found.longer < 0.8
        assert wins.mean() - 0.1 < found.rate < wins.mean() - 0.03
        flat = length_controlled_win_rate(wins, lengths, baseline, bootstrap=Bootstrap(100), prior=FLAT)
        assert abs(flat.rate - 0.5) < 0.2 and flat.low < 0.5 < flat.high


def test_a_judge_that_ignores_length_needs_its_own_prior():
    wins, lengths, baseline = judged(3000, 0.5, 0.0, shift=1.0)
    ignoring = LengthPrior(0, 0.1)
    found = length_controlled_win_rate(wins, lengths, baseline, bootstrap=Bootstrap(10), prior=ignoring)
    assert found.rate == pytest.approx(wins.mean(), abs=0.03)
    assert length_controlled_win_rate(wins, lengths, baseline, bootstrap=Bootstrap(10)).rate < found.rate - 0.02
    equal = length_controlled_win_rate(wins, baseline, baseline, bootstrap=Bootstrap(10))
    assert equal.rate == pytest.approx(wins.mean(), abs=1e-4) and equal.longer == 0
    for mean, sd in ((0, 0), (0, -1), (math.nan, 1), (0, math.inf)):
        with pytest.raises(ValueError, match="length_prior="):
            LengthPrior(mean, sd)


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
    prompts = np.repeat(np.arange(60), 10)
    found = length_controlled_win_rate(*copied, prompts=prompts, bootstrap=Bootstrap(200))
    assert found.rate == pytest.approx(once.rate, abs=0.01)
    assert found.high - found.low == pytest.approx(once.high - once.low, rel=0.1)
    apart = length_controlled_win_rate(*copied, bootstrap=Bootstrap(200))
    assert apart.high - apart.low < 0.5 * (once.high - once.low)


def test_more_prompts_do_not_outweigh_the_prior():
    """The preferences overstate the length effect however many prompts there are."""
    given, _ = leaderboard(-2, -0.9, seed=0)
    once, tenfold = (
        length_controlled_win_rate(*(np.tile(values, count) for values in given), bootstrap=Bootstrap(50))
        for count in (1, 10)
    )
    assert tenfold.rate == pytest.approx(once.rate, abs=1e-4)
    assert tenfold.length_effect == pytest.approx(once.length_effect, abs=1e-3)
    assert tenfold.length_effect_without_prior == pytest.approx(once.length_effect_without_prior, abs=1e-2)
    assert tenfold.high - tenfold.low < 0.7 * (once.high - once.low)


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
        value = value + coefficients[0] ** 2 / 20 + (coefficients[1] - 1) ** 2 / 0.02
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
    ties = length_controlled_win_rate(np.full(10, 0.5), np.arange(10), np.full(10, 5))
    assert ties.low < 0.4 < ties.rate < 0.6 < ties.high
    single = length_controlled_win_rate([1, 0, 1], [4, 5, 6], [5, 5, 5], prompts=[2, 2, 2])
    assert single.low < 0.1 and single.high > 0.9
    with pytest.raises(ValueError, match="3 preferences, 2 lengths and 3 baseline lengths"):
        length_controlled_win_rate([1, 0, 1], [5, 6], [1, 2, 3])
