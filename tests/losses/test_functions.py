"""Tests every loss against values computed by hand, its gradient against finite differences, and overflow."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from cpt_kernels.losses import LOSSES, PairLogps, build_loss
from tests.helpers.pairs import PAIRS, random_pairs


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def kl(x: float, smoothing: float) -> float:
    return s(x) * math.log(s(x) / (1 - smoothing)) + s(-x) * math.log(s(-x) / smoothing)


def log_odds(mean: float) -> float:
    return mean - math.log(1 - math.exp(mean))


HAND_WRITTEN = [
    ("sigmoid", {"beta": 0.5}, [softplus(-1.5), softplus(1.0)]),
    ("sigmoid", {}, [softplus(-0.3), softplus(0.2)]),
    (
        "sigmoid",
        {"beta": 1.0, "label_smoothing": 0.2},
        [0.8 * softplus(-3) + 0.2 * softplus(3), 0.8 * softplus(2) + 0.2 * softplus(-2)],
    ),
    ("sigmoid", {"beta": 0.5, "label_smoothing": 0.5}, [softplus(-1.5) + 0.75, softplus(1.0) - 0.5]),
    ("sigmoid_norm", {"beta": 5.0}, [softplus(-5 * (2 / 5 + 1 / 3)), softplus(-5 * (-1.5 / 4 - 0.5))]),
    (
        "sigmoid_norm",
        {"beta": 12.0, "label_smoothing": 0.1},
        [0.9 * softplus(-8.8) + 0.1 * softplus(8.8), 0.9 * softplus(10.5) + 0.1 * softplus(-10.5)],
    ),
    ("hinge", {"beta": 0.5}, [0.0, 2.0]),
    ("hinge", {"beta": 0.1}, [0.7, 1.2]),
    ("ipo", {"beta": 0.5}, [(2 / 5 + 1 / 3 - 1) ** 2, (-1.5 / 4 - 0.5 - 1) ** 2]),
    ("exo_pair", {"beta": 0.5}, [kl(1.5, 1e-3), kl(-1.0, 1e-3)]),
    ("exo_pair", {"beta": 1.0, "label_smoothing": 0.1}, [kl(3.0, 0.1), kl(-2.0, 0.1)]),
    ("robust", {"beta": 0.5}, [softplus(-1.5), softplus(1.0)]),
    (
        "robust",
        {"beta": 1.0, "label_smoothing": 0.25},
        [1.5 * softplus(-3) - 0.5 * softplus(3), 1.5 * softplus(2) - 0.5 * softplus(-2)],
    ),
    (
        "discopop",
        {"beta": 0.5, "discopop_tau": 2.0},
        [
            s(-0.75) * softplus(-1.5) + s(0.75) * math.exp(-1.5),
            s(0.5) * softplus(1.0) + s(-0.5) * math.exp(1.0),
        ],
    ),
    ("discopop", {}, [s(-6) * softplus(-0.3) + s(6) * math.exp(-0.3), s(4) * softplus(0.2) + s(-4) * math.exp(0.2)]),
    ("odpo", {"beta": 0.5}, [softplus(-1.5 - math.log(2)), softplus(1.0 + math.log(3))]),
    ("odpo", {"beta": 0.5, "odpo_alpha": 2.0}, [softplus(-1.5 - math.log(4)), softplus(1.0 + math.log(9))]),
    ("dpop", {"beta": 0.5}, [softplus(-1.5), softplus(1.0 + 0.5 * 50 * 1.5)]),
    ("dpop", {"beta": 1.0, "dpop_lambda": 2.0}, [softplus(-3.0), softplus(2.0 + 3.0)]),
    (
        "nca_pair",
        {"beta": 0.5},
        [
            softplus(-1) + 0.5 * softplus(1) + 0.5 * softplus(-0.5),
            softplus(0.75) + 0.5 * softplus(-0.75) + 0.5 * softplus(0.25),
        ],
    ),
    ("bco_pair", {"beta": 0.5}, [softplus(-1) + softplus(-0.5), softplus(0.75) + softplus(0.25)]),
    ("sppo_hard", {"beta": 0.5}, [1.0 + 0.0, 2.5**2 + 1.5**2]),
    ("apo_zero", {"beta": 0.5}, [1 - s(1) + s(-0.5), 1 - s(-0.75) + s(0.25)]),
    ("apo_down", {"beta": 0.5}, [s(1) + 1 - s(1.5), s(-0.75) + 1 - s(-1.0)]),
    # lw - ll = 5, -2 sorts to -2, 5; rw - rl = 2, 0 to 0, 2; Δw = 2, -1.5 to -1.5, 2; Δl = -1, 0.5 is sorted.
    ("aot", {"beta": 0.5}, [softplus(1.0), softplus(-1.5)]),
    ("aot", {"beta": 0.5, "label_smoothing": 0.5}, [softplus(1.0) - 0.5, softplus(-1.5) + 0.75]),
    ("aot_unpaired", {"beta": 2.0}, [softplus(1.0), softplus(-3.0)]),
    ("aot_unpaired", {"beta": 2.0, "label_smoothing": 0.5}, [softplus(1.0) - 0.5, softplus(-3.0) + 1.5]),
    ("slic", {}, [0 + 10.0, 3.0 + 4.0]),
    ("slic", {"slic_delta": 6.0, "slic_lambda": 0.1}, [1 + 1.0, 8.0 + 0.4]),
    ("slic", {"slic_lambda": 0.0}, [0.0, 3.0]),
    ("slic", {"slic_length_normalize": True}, [0 + 2.0, max(0.0, 1 + 2 - 6) + 2.0]),
    ("slic", {"slic_delta": 5.0, "slic_length_normalize": True}, [5 + 2 - 5 + 2.0, 5 + 2 - 6 + 2.0]),
    ("simpo", {"beta": 2.0}, [softplus(-6 + 0.5), softplus(-8 + 0.5)]),
    (
        "simpo",
        {"beta": 2.0, "simpo_gamma": 1.0, "label_smoothing": 0.1},
        [0.9 * softplus(-5) + 0.1 * softplus(5), 0.9 * softplus(-7) + 0.1 * softplus(7)],
    ),
    ("cpo", {}, [softplus(-0.5) + 10 / 4.5, softplus(0.2) + 8 / 4.5]),
    ("cpo", {"cpo_alpha": 0.0}, [softplus(-0.5), softplus(0.2)]),
    (
        "cpo",
        {"beta": 1.0, "cpo_alpha": 0.5, "label_smoothing": 0.25},
        [0.75 * softplus(-5) + 0.25 * softplus(5) + 5 / 4.5, 0.75 * softplus(2) + 0.25 * softplus(-2) + 4 / 4.5],
    ),
    (
        "orpo",
        {"beta": 0.5},
        [
            2 + 0.5 * softplus(log_odds(-5) - log_odds(-2)),
            2 + 0.5 * softplus(log_odds(-6) - log_odds(-2)),
        ],
    ),
    ("sft", {}, [10 / 4.5, 8 / 4.5]),
]


@pytest.mark.parametrize(("name", "options", "expected"), HAND_WRITTEN, ids=lambda v: v if isinstance(v, str) else "")
def test_hand_written_numbers(name, options, expected):
    losses = build_loss(name, **options)(PAIRS)
    assert losses.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_every_loss_is_covered():
    assert [name for name in LOSSES if name not in {name for name, *_ in HAND_WRITTEN}] == []


def test_sft_is_trls_mean_over_tokens():
    """TRL computes -per_token_logps[chosen_mask].mean(), which is the mean over pairs of -lw / (tokens per pair)."""
    generator = torch.Generator().manual_seed(0)
    tokens = [-torch.rand(n, generator=generator, dtype=torch.float64) for n in (3, 1, 7, 5)]
    lengths = torch.tensor([float(len(t)) for t in tokens], dtype=torch.float64)
    sums = torch.stack([t.sum() for t in tokens])
    pairs = PairLogps(sums, None, sums, lengths, None, lengths, tokens_per_pair=lengths.mean())
    torch.testing.assert_close(build_loss("sft")(pairs).mean(), -torch.cat(tokens).mean())


def _flipped(pairs: PairLogps) -> PairLogps:
    names = ("", "_length", "_tail")
    flip = {f"{a}{name}": getattr(pairs, f"{b}{name}") for name in names for a, b in
            (("chosen", "rejected"), ("rejected", "chosen"))}  # fmt: skip
    return replace(pairs, ref_chosen=pairs.ref_rejected, ref_rejected=pairs.ref_chosen, **flip)


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
@pytest.mark.parametrize("name", ["sigmoid", "sigmoid_norm"])
def test_label_smoothing_is_the_mean_over_flips(name, smoothing):
    pairs, plain = random_pairs(), build_loss(name, beta=0.2)
    expected = (1 - smoothing) * plain(pairs) + smoothing * plain(_flipped(pairs))
    torch.testing.assert_close(build_loss(name, beta=0.2, label_smoothing=smoothing)(pairs), expected)


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_the_robust_loss_of_noisy_labels_is_dpos_of_clean_ones(smoothing):
    pairs, robust = random_pairs(), build_loss("robust", beta=0.2, label_smoothing=smoothing)
    noisy = (1 - smoothing) * robust(pairs) + smoothing * robust(_flipped(pairs))
    torch.testing.assert_close(noisy, build_loss("sigmoid", beta=0.2)(pairs))


def test_slic_is_the_papers_with_y_ref_the_chosen_one():
    """Xu et al. 2023, eq. 3: max(0, δ - lw + ll) - λ·lw where y_ref is the chosen completion."""
    pairs = random_pairs()
    pairs = replace(pairs, target=pairs.chosen, target_length=pairs.chosen_length)
    expected = torch.clamp(1.0 - pairs.chosen + pairs.rejected, min=0) - 0.5 * pairs.chosen
    torch.testing.assert_close(build_loss("slic", slic_lambda=0.5)(pairs), expected)
    without_reference = replace(pairs, ref_chosen=None, ref_rejected=None)
    torch.testing.assert_close(build_loss("slic", slic_lambda=0.5)(without_reference), expected)


@pytest.mark.parametrize("shift", [500.0, -500.0])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_overflows_in_fp32(name, shift):
    """Every loss and its gradient are finite for log-ratios of 500 nats."""
    chosen = torch.tensor([min(shift, 0.0) - 1], requires_grad=True)
    one = torch.ones(1)
    ref_chosen = chosen.detach() - shift
    pairs = PairLogps(chosen, -one, chosen, one, one, one, ref_chosen, -one, gap=one)
    loss = build_loss(name, **({} if name == "sft" or name == "slic" else {"beta": 1.0}))(pairs)
    loss.sum().backward()
    assert loss.isfinite().all() and chosen.grad.isfinite().all()
    if name == "sigmoid":
        assert loss.item() == pytest.approx(max(0.0, -shift))


def test_a_certain_completion_has_finite_odds():
    chosen = torch.zeros(1, requires_grad=True)
    one = torch.ones(1)
    loss = build_loss("orpo")(PairLogps(chosen, -one, chosen, one, one, one))
    loss.sum().backward()
    assert loss.isfinite().all() and chosen.grad.isfinite().all()


OPTIONS = [(name, options) for name, options, _ in HAND_WRITTEN]
_ids = {"argvalues": OPTIONS, "ids": [f"{name}-{'-'.join(options)}" for name, options in OPTIONS]}
# The indices in (chosen, rejected, target) of what a loss reads. Default: chosen and rejected.
_SEES = {"sft": [0], "slic": [0, 1, 2]}


@pytest.mark.parametrize(("name", "options"), **_ids)
def test_gradients(name, options):
    pairs, loss = random_pairs(6), build_loss(name, **options)

    def function(chosen, rejected, target):
        return loss(replace(pairs, chosen=chosen, rejected=rejected, target=target))

    leaves = [getattr(pairs, side).clone().requires_grad_() for side in ("chosen", "rejected", "target")]
    assert torch.autograd.gradcheck(function, leaves)
    function(*leaves).sum().backward()
    seen = [0, 1] if options.get("slic_lambda") == 0 else _SEES.get(name, [0, 1])
    assert [i for i in range(3) if leaves[i].grad is not None and leaves[i].grad.any()] == seen


# Losses that a better chosen or a worse rejected side can increase: squares beyond their margin (ipo, sppo), apo_down,
# which makes chosen less likely, losses with a regularizer or smoothed labels (nca, exo), and discopop.
_NOT_MONOTONE = {"ipo", "sppo_hard", "apo_down", "nca_pair", "exo_pair", "discopop"}
_MONOTONE = [(name, o) for name, o in OPTIONS if name not in _NOT_MONOTONE and not o.get("label_smoothing")]


@pytest.mark.parametrize(("name", "options"), _MONOTONE, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_a_better_chosen_and_a_worse_rejected_never_cost(name, options):
    pairs, loss = random_pairs(), build_loss(name, **options)
    better = replace(pairs, chosen=pairs.chosen + 0.5, target=pairs.target + 0.5)
    worse = replace(pairs, rejected=pairs.rejected - 0.5)
    assert (loss(better) <= loss(pairs)).all() and (loss(worse) <= loss(pairs)).all()
