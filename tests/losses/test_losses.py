"""Tests of the table of losses and of ``Loss``: what it needs, separability, sums of losses, user losses."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from cpt_kernels.losses import LOSSES, Loss, PairLogps, build_loss, loss_options, user_loss
from tests.helpers.pairs import PAIRS, random_pairs


@pytest.mark.parametrize("name", LOSSES)
def test_builtin_losses_know_what_they_need(name):
    loss = build_loss(name)
    assert loss.name == name and loss.options == {}
    if loss.separable:
        loss.check_separable()
    numbers = random_pairs()
    bare = PairLogps(*(getattr(numbers, field.name) for field in fields(PairLogps)[:6]), tokens_per_pair=2.0)
    for need, given in {
        "needs_reference": {"ref_chosen": numbers.ref_chosen, "ref_rejected": numbers.ref_rejected},
        "needs_gap": {"gap": numbers.gap},
    }.items():
        if getattr(loss, need):
            with pytest.raises((TypeError, AttributeError)):
                loss(bare)
            bare = replace(bare, **given)
    loss(bare)
    if not loss.needs_rejected:
        loss(replace(bare, rejected=None, rejected_length=None))


@pytest.mark.parametrize("name", [name for name, row in LOSSES.items() if not row.separable])
def test_losses_that_sort_the_batch_are_not_separable(name):
    assert name in ("aot", "aot_unpaired")
    for loss in (build_loss(name), build_loss(["sigmoid", name], [1.0, 0.5]), build_loss(name, ld_alpha=0.5)):
        assert not loss.separable
        with pytest.raises(ValueError, match="declared separable"):
            loss.check_separable()


@pytest.mark.parametrize("change", [{"ld_alpha": 0.4}, {"use_weighting": True}, {"f_divergence_type": "forward_kl"}])
def test_changed_losses_stay_separable(change):
    build_loss("sigmoid", **change).check_separable()
    build_loss(["ipo", "sft"], [2.0, 0.1], **change).check_separable()


def test_options_and_defaults():
    assert loss_options("sigmoid") == ["beta", "label_smoothing"] and loss_options("sft") == []
    assert loss_options("slic") == ["slic_delta", "slic_lambda", "slic_length_normalize"]
    pairs = random_pairs()
    torch.testing.assert_close(build_loss("slic")(pairs), build_loss("slic", slic_delta=1.0, slic_lambda=1.0)(pairs))
    torch.testing.assert_close(
        build_loss("sigmoid")(pairs), build_loss("sigmoid", beta=0.1, label_smoothing=0.0)(pairs)
    )


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="loss_type='dpo' is unknown: choose one of sigmoid, sigmoid_norm, hinge, "):
        build_loss("dpo")
    with pytest.raises(ValueError, match="loss_type='kto' is unknown"):
        build_loss(["sigmoid", "kto"])
    with pytest.raises(TypeError, match="loss 'hinge' has no option 'label_smoothing'; its options are beta"):
        build_loss("hinge", beta=0.1, x=1, label_smoothing=0.2)
    with pytest.raises(TypeError, match=r"loss 'hinge \+ sft' has no option 'slic_delta'; its options are beta"):
        build_loss(["hinge", "sft"], slic_delta=0.1)
    with pytest.raises(ValueError, match="loss_weights has 1 weights for the 2 losses"):
        build_loss(["hinge", "sft"], [1.0])
    with pytest.raises(ValueError, match="0 losses"):
        build_loss([])


# --- Sums of several ---


def test_a_sum_of_losses_is_a_loss():
    pairs = random_pairs()
    loss = build_loss(["sigmoid", "slic", "sft"], [0.8, 0.2, 1.0], beta=0.3, label_smoothing=0.1, slic_delta=2.0)
    expected = (
        0.8 * build_loss("sigmoid", beta=0.3, label_smoothing=0.1)(pairs)
        + 0.2 * build_loss("slic", slic_delta=2.0)(pairs)
        + build_loss("sft")(pairs)
    )
    torch.testing.assert_close(loss(pairs), expected)
    assert loss.name == "0.8 sigmoid + 0.2 slic + sft" and loss.options is None
    assert (loss.needs_reference, loss.needs_rejected, loss.needs_gap, loss.separable) == (True, True, False, True)
    torch.testing.assert_close(build_loss(["ipo", "sft"])(pairs), build_loss("ipo")(pairs) + build_loss("sft")(pairs))


def test_a_sum_needs_what_its_parts_need():
    free = build_loss(["slic", "sft"])
    assert not free.needs_reference and free.needs_rejected
    assert build_loss(["slic", "odpo"]).needs_gap and build_loss(["slic", "odpo"]).needs_reference
    assert not build_loss(["sft", "sft"]).needs_rejected


def test_a_list_of_one():
    pairs = random_pairs()
    assert build_loss(["sigmoid"], beta=0.2).options == {"beta": 0.2}  # so that a kernel can compute it
    half = build_loss(["sigmoid"], [0.5], beta=0.2)
    assert half.options is None
    torch.testing.assert_close(half(pairs), 0.5 * build_loss("sigmoid", beta=0.2)(pairs))


# --- A user's own ---


@pytest.mark.parametrize(
    "function",
    [
        lambda p: p.chosen - p.chosen.mean(),
        lambda p: torch.relu(1 - p.chosen.sort().values + p.rejected.sort().values),
        lambda p: p.chosen / len(p.chosen),
        lambda p: (p.chosen - p.rejected).softmax(0),
        lambda p: p.chosen * p.gap.mean(),
    ],
    ids=["mean", "sorted", "count", "softmax", "gap"],
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
    assert user_loss(lambda p: p.gap * p.chosen_tail, needs_gap=True, needs_tails=True, separable=True).needs_tails


# --- The numbers ---


def test_log_ratios():
    chosen, rejected = PAIRS.log_ratios()
    assert chosen.tolist() == [2, -1.5] and rejected.tolist() == [-1, 0.5]
    assert PAIRS.log_ratio_difference().tolist() == [3, -2]


def test_some_of_the_pairs():
    pairs = random_pairs()
    for index in (torch.tensor([3, 1]), slice(2, 5), torch.arange(16) % 3 == 0):
        some = pairs[index]
        for field in fields(PairLogps):
            whole, part = getattr(pairs, field.name), getattr(some, field.name)
            assert part == whole if field.name == "tokens_per_pair" else torch.equal(part, whole[index])
    supervised = replace(pairs, rejected=None, rejected_length=None, tokens_per_pair=torch.tensor(3.0))[:2]
    assert supervised.rejected is None and supervised.tokens_per_pair == 3.0


def test_losses_that_average_over_tokens():
    assert [name for name in LOSSES if build_loss(name).averages_over_tokens()] == ["aot", "aot_unpaired", "cpo", "sft"]
