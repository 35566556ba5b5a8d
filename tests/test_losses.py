"""Losses against hand-written numbers, against TRL's formulas, and their gradients against finite differences."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F

from cpt_kernels.losses import LOSSES, Loss, PairLogps, build_loss, loss_options, user_loss

# lw, ll, y, lengths, rw, rl of two pairs. h = (lw - rw) - (ll - rl) = 2 - (-1) = 3 and -1.5 - 0.5 = -2.
PAIRS = PairLogps(
    chosen=torch.tensor([-10.0, -8.0], dtype=torch.float64),
    rejected=torch.tensor([-15.0, -6.0], dtype=torch.float64),
    target=torch.tensor([-10.0, -4.0], dtype=torch.float64),
    chosen_length=torch.tensor([5.0, 4.0], dtype=torch.float64),
    rejected_length=torch.tensor([3.0, 1.0], dtype=torch.float64),
    target_length=torch.tensor([5.0, 2.0], dtype=torch.float64),
    ref_chosen=torch.tensor([-12.0, -6.5], dtype=torch.float64),
    ref_rejected=torch.tensor([-14.0, -6.5], dtype=torch.float64),
    tokens_per_pair=4.5,
)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


HAND_WRITTEN = [
    ("sigmoid", {"beta": 0.5}, [softplus(-1.5), softplus(1.0)]),
    ("sigmoid", {}, [softplus(-0.3), softplus(0.2)]),
    (
        "sigmoid",
        {"beta": 1.0, "label_smoothing": 0.2},
        [0.8 * softplus(-3) + 0.2 * softplus(3), 0.8 * softplus(2) + 0.2 * softplus(-2)],
    ),
    ("sigmoid", {"beta": 0.5, "label_smoothing": 0.5}, [softplus(-1.5) + 0.75, softplus(1.0) - 0.5]),
    ("hinge", {"beta": 0.5}, [0.0, 2.0]),
    ("hinge", {"beta": 0.1}, [0.7, 1.2]),
    ("ipo", {"beta": 0.5}, [(2 / 5 + 1 / 3 - 1) ** 2, (-1.5 / 4 - 0.5 - 1) ** 2]),
    ("slic", {}, [0 + 10.0, 3.0 + 4.0]),
    ("slic", {"slic_delta": 6.0, "slic_lambda": 0.1}, [1 + 1.0, 8.0 + 0.4]),
    ("slic", {"slic_lambda": 0.0}, [0.0, 3.0]),
    ("slic", {"slic_length_normalize": True}, [0 + 2.0, max(0.0, 1 + 2 - 6) + 2.0]),
    ("slic", {"slic_delta": 5.0, "slic_length_normalize": True}, [5 + 2 - 5 + 2.0, 5 + 2 - 6 + 2.0]),
    ("sft", {}, [10 / 4.5, 8 / 4.5]),
]


@pytest.mark.parametrize(("name", "options", "expected"), HAND_WRITTEN, ids=lambda v: v if isinstance(v, str) else "")
def test_hand_written_numbers(name, options, expected):
    losses = build_loss(name, **options)(PAIRS)
    assert losses.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def random_pairs(count: int = 16, scale: float = 40.0, seed: int = 0) -> PairLogps:
    generator = torch.Generator().manual_seed(seed)
    values = -scale * torch.rand(5, count, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, 30, (3, count), generator=generator).double()
    chosen, rejected, target, ref_chosen, ref_rejected = values
    return PairLogps(chosen, rejected, target, *lengths, ref_chosen, ref_rejected, 7.25)


def trl(name: str, p: PairLogps, beta: float) -> torch.Tensor:
    """As `DPOTrainer._compute_loss` of TRL 1.16 writes them (reverse_kl)."""
    chosen_scores, rejected_scores = p.chosen - p.ref_chosen, p.rejected - p.ref_rejected
    delta_score = chosen_scores - rejected_scores
    if name == "sigmoid":
        return -F.logsigmoid(beta * delta_score)
    if name == "hinge":
        return torch.relu(1 - beta * delta_score)
    chosen_avg_score = chosen_scores / p.chosen_length.clamp(min=1.0)
    rejected_avg_score = rejected_scores / p.rejected_length.clamp(min=1.0)
    return (chosen_avg_score - rejected_avg_score - 1 / (2 * beta)) ** 2


@pytest.mark.parametrize("beta", [0.01, 0.1, 2.0])
@pytest.mark.parametrize("name", ["sigmoid", "hinge", "ipo"])
def test_as_trl_has_them(name, beta):
    pairs = random_pairs()
    torch.testing.assert_close(build_loss(name, beta=beta)(pairs), trl(name, pairs, beta), rtol=1e-14, atol=0)


def test_sft_is_trls_mean_over_tokens():
    """TRL: -per_token_logps[chosen_mask].mean(). Here the mean over pairs of loss / (tokens per pair) is the same."""
    generator = torch.Generator().manual_seed(0)
    tokens = [-torch.rand(n, generator=generator, dtype=torch.float64) for n in (3, 1, 7, 5)]
    lengths = torch.tensor([float(len(t)) for t in tokens], dtype=torch.float64)
    sums = torch.stack([t.sum() for t in tokens])
    pairs = PairLogps(sums, None, sums, lengths, None, lengths, tokens_per_pair=lengths.mean())
    torch.testing.assert_close(build_loss("sft")(pairs).mean(), -torch.cat(tokens).mean())


@pytest.mark.parametrize("smoothing", [0.1, 0.3])
def test_label_smoothing_is_the_mean_over_flips(smoothing):
    pairs = random_pairs()
    flipped = replace(
        pairs,
        chosen=pairs.rejected,
        rejected=pairs.chosen,
        ref_chosen=pairs.ref_rejected,
        ref_rejected=pairs.ref_chosen,
    )
    plain = build_loss("sigmoid", beta=0.2)
    expected = (1 - smoothing) * plain(pairs) + smoothing * plain(flipped)
    torch.testing.assert_close(build_loss("sigmoid", beta=0.2, label_smoothing=smoothing)(pairs), expected)


def test_slic_is_the_papers_with_y_ref_the_chosen_one():
    """max(0, d - lw + ll) - l lw, Xu et al. 2023 eq. 3: y_ref may be the chosen completion."""
    pairs = random_pairs()
    pairs = replace(pairs, target=pairs.chosen, target_length=pairs.chosen_length)
    expected = torch.clamp(1.0 - pairs.chosen + pairs.rejected, min=0) - 0.5 * pairs.chosen
    torch.testing.assert_close(build_loss("slic", slic_lambda=0.5)(pairs), expected)
    without_reference = replace(pairs, ref_chosen=None, ref_rejected=None)
    torch.testing.assert_close(build_loss("slic", slic_lambda=0.5)(without_reference), expected)


@pytest.mark.parametrize("shift", [500.0, -500.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_sigmoid_does_not_overflow(shift, smoothing):
    chosen = torch.tensor([shift], requires_grad=True)
    zero = torch.zeros(1)
    pairs = PairLogps(chosen, zero, chosen, zero + 1, zero + 1, zero + 1, zero, zero)
    loss = build_loss("sigmoid", beta=1.0, label_smoothing=smoothing)(pairs)
    loss.backward()
    wrong = 1 - smoothing if shift < 0 else smoothing
    assert loss.item() == pytest.approx(500 * wrong) and chosen.grad.isfinite()


OPTIONS = [
    ("sigmoid", {"beta": 0.3, "label_smoothing": 0.1}),
    ("hinge", {"beta": 0.05}),
    ("ipo", {"beta": 0.2}),
    ("slic", {"slic_delta": 3.0, "slic_lambda": 0.4}),
    ("slic", {"slic_length_normalize": True}),
    ("sft", {}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_gradients(name, options):
    pairs, loss = random_pairs(6), build_loss(name, **options)

    def function(chosen, rejected, target):
        return loss(replace(pairs, chosen=chosen, rejected=rejected, target=target))

    leaves = [getattr(pairs, side).clone().requires_grad_() for side in ("chosen", "rejected", "target")]
    assert torch.autograd.gradcheck(function, leaves)
    function(*leaves).sum().backward()
    used = {"sft": [0], "slic": [0, 1, 2]}.get(name, [0, 1])
    assert [i for i in range(3) if leaves[i].grad is not None and leaves[i].grad.any()] == used


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=lambda v: v if isinstance(v, str) else "-".join(v))
def test_a_better_chosen_and_a_worse_rejected_never_cost(name, options):
    pairs, loss = random_pairs(), build_loss(name, **options)
    if name == "ipo":  # a square: only up to its margin
        pairs = replace(pairs, chosen=pairs.ref_chosen - 5, rejected=pairs.ref_rejected + 5)
    better = replace(pairs, chosen=pairs.chosen + 0.5, target=pairs.target + 0.5)
    worse = replace(pairs, rejected=pairs.rejected - 0.5)
    smoothed = options.get("label_smoothing", 0)
    assert smoothed or ((loss(better) <= loss(pairs)).all() and (loss(worse) <= loss(pairs)).all())


# -- what a trainer asks of a loss ---


@pytest.mark.parametrize("name", LOSSES)
def test_builtin_losses_are_separable_and_know_what_they_need(name):
    loss = build_loss(name)
    loss.check_separable()
    assert loss.separable and loss.name == name
    numbers = random_pairs()
    bare = replace(numbers, ref_chosen=None, ref_rejected=None)
    if loss.needs_reference:
        with pytest.raises(TypeError):
            loss(bare)
    else:
        loss(bare)
        loss(bare if loss.needs_rejected else replace(bare, rejected=None, rejected_length=None))


def test_options_and_defaults():
    assert loss_options("sigmoid") == ["beta", "label_smoothing"] and loss_options("sft") == []
    assert loss_options("slic") == ["slic_delta", "slic_lambda", "slic_length_normalize"]
    pairs = random_pairs()
    torch.testing.assert_close(build_loss("slic")(pairs), build_loss("slic", slic_delta=1.0, slic_lambda=1.0)(pairs))
    torch.testing.assert_close(
        build_loss("sigmoid")(pairs), build_loss("sigmoid", beta=0.1, label_smoothing=0.0)(pairs)
    )


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="unknown loss_type 'dpo': choose one of sigmoid, hinge, ipo, slic, sft"):
        build_loss("dpo")
    with pytest.raises(TypeError, match=r"loss 'hinge' takes \['beta'\], not \['label_smoothing', 'x'\]"):
        build_loss("hinge", beta=0.1, x=1, label_smoothing=0.2)


@pytest.mark.parametrize(
    "function",
    [
        lambda p: p.chosen - p.chosen.mean(),
        lambda p: torch.relu(1 - p.chosen.sort().values + p.rejected.sort().values),
        lambda p: p.chosen / len(p.chosen),
        lambda p: (p.chosen - p.rejected).softmax(0),
    ],
    ids=["mean", "sorted", "count", "softmax"],
)
def test_losses_over_the_batch_are_not_separable(function):
    with pytest.raises(ValueError, match="declared separable"):
        user_loss(function, separable=True)
    assert not user_loss(function).separable


def test_user_losses():
    def squared(p: PairLogps) -> torch.Tensor:
        return (p.log_ratio_difference() - 1) ** 2 / p.target_length

    loss = user_loss(squared, separable=True)
    assert (loss.name, loss.needs_reference, loss.needs_rejected, loss.separable) == ("squared", True, True, True)
    assert loss(PAIRS).tolist() == pytest.approx([4 / 5, 9 / 2])
    named = user_loss(lambda p: -p.chosen, needs_reference=False, needs_rejected=False, name="mine")
    assert isinstance(named, Loss) and named.name == "mine" and not (named.needs_reference or named.needs_rejected)


def test_some_of_the_pairs():
    pairs = random_pairs()
    for index in (torch.tensor([3, 1]), slice(2, 5), torch.arange(16) % 3 == 0):
        some = pairs[index]
        for field in fields(PairLogps):
            whole, part = getattr(pairs, field.name), getattr(some, field.name)
            assert part == whole if field.name == "tokens_per_pair" else torch.equal(part, whole[index])
    supervised = replace(pairs, rejected=None, rejected_length=None, tokens_per_pair=torch.tensor(3.0))[:2]
    assert supervised.rejected is None and supervised.tokens_per_pair == 3.0
