"""Tests f-divergences, LD-DPO and WPO's weights by hand, by definition and by finite differences."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
import torch

from cpt_kernels.losses import F_DIVERGENCES, LOSSES, build_loss
from cpt_kernels.losses.transforms import desensitize, f_divergence, wpo_weights
from tests.helpers.pairs import PAIRS, random_pairs

OF_DIFFERENCE = [name for name, row in LOSSES.items() if row.of_difference]

# The generators f(u). The transform is f'(u) at u = exp(log-ratio), up to a constant that cancels.
GENERATORS = {
    "reverse_kl": lambda u: u * u.log(),
    "forward_kl": lambda u: -u.log(),
    "js_divergence": lambda u: u * u.log() - (u + 1) * ((u + 1) / 2).log(),
    "alpha_divergence": lambda u: (u**0.3 - 0.3 * u - 0.7) / (0.3 * (0.3 - 1)),
}


@pytest.mark.parametrize("kind", F_DIVERGENCES)
def test_f_divergence_is_the_derivative_of_its_generator(kind):
    pairs = random_pairs(scale=6.0)
    ratios = torch.cat(pairs.log_ratios())
    u = ratios.exp().requires_grad_()
    (derivative,) = torch.autograd.grad(GENERATORS[kind](u).sum(), u)
    found = torch.cat(f_divergence(pairs, kind, 0.3).log_ratios())
    constants = derivative - found
    torch.testing.assert_close(constants, constants[:1].expand_as(constants))


def test_the_alpha_divergence_has_limits():
    pairs = random_pairs(scale=6.0)
    for ours, theirs in zip(f_divergence(pairs, "alpha_divergence", 1.0).log_ratios(), pairs.log_ratios()):
        assert torch.equal(ours, theirs)
    forward = torch.cat(f_divergence(pairs, "forward_kl").log_ratios())
    torch.testing.assert_close(torch.cat(f_divergence(pairs, "alpha_divergence", 0.0).log_ratios()), forward)
    far = replace(pairs, chosen=pairs.ref_chosen.float() - 1e4, ref_chosen=pairs.ref_chosen.float())
    assert f_divergence(far, "alpha_divergence", 0.5).chosen.isfinite().all()


@pytest.mark.parametrize("kind", [kind for kind in F_DIVERGENCES if kind != "reverse_kl"])
@pytest.mark.parametrize("name", OF_DIFFERENCE)
def test_losses_of_another_divergence(name, kind):
    """The loss is that of the transformed log-ratios, and gradients pass through the transform."""
    pairs = random_pairs(6, scale=4.0)
    loss = build_loss(name, beta=0.3, f_divergence_type=kind, f_alpha_divergence_coef=0.4)
    torch.testing.assert_close(loss(pairs), build_loss(name, beta=0.3)(f_divergence(pairs, kind, 0.4)))
    assert loss.options is None and loss.separable
    leaves = [side.clone().requires_grad_() for side in (pairs.chosen, pairs.rejected)]
    assert torch.autograd.gradcheck(lambda w, x: loss(replace(pairs, chosen=w, rejected=x)), leaves)


@pytest.mark.parametrize("name", [name for name in OF_DIFFERENCE if name != "ipo"])  # ipo grows without bound
def test_forward_kl_of_a_rejected_side_that_has_become_unlikely(name):
    """fp32, where exp(-Δ) overflows, gives the result of fp64, where it does not."""
    loss, pairs = build_loss(name, beta=0.1, f_divergence_type="forward_kl"), random_pairs(4, scale=4.0)
    pairs = replace(pairs, rejected=pairs.ref_rejected - torch.tensor([88.0, 90.0, 200.0, 600.0]))
    results = {}
    for dtype in (torch.float32, torch.float64):
        given = {f.name: v.to(dtype) for f in fields(pairs) if isinstance(v := getattr(pairs, f.name), torch.Tensor)}
        leaves = [given[side].requires_grad_() for side in ("chosen", "rejected")]
        losses = loss(replace(pairs, **given))
        results[dtype] = [losses, *torch.autograd.grad(losses.sum(), leaves)]
    for found, expected in zip(results[torch.float32], results[torch.float64]):
        torch.testing.assert_close(found.double(), expected)
    far = replace(pairs, rejected=pairs.ref_rejected - 1e4)
    assert loss(far).isfinite().all()


@pytest.mark.parametrize(
    "name", [name for name, row in LOSSES.items() if row.needs_reference and not row.of_difference]
)
def test_losses_that_have_no_other_divergence(name):
    with pytest.raises(
        ValueError, match=f"not defined for loss '{name}': leave it at reverse_kl, or take one of sigmoid, "
    ):
        build_loss(name, f_divergence_type="js_divergence")
    with pytest.raises(ValueError, match="not defined"):
        build_loss(["sigmoid", name], f_divergence_type="js_divergence")


def test_an_unknown_divergence():
    with pytest.raises(ValueError, match="f_divergence_type='kl' is unknown: choose one of reverse_kl, forward_kl"):
        build_loss("sigmoid", f_divergence_type="kl")


def test_desensitized_numbers_by_hand():
    half = desensitize(PAIRS, 0.5)
    assert half.chosen.tolist() == [-8.5, -5.5] and half.rejected.tolist() == [-15, -6]
    assert half.ref_chosen.tolist() == [-10, -5] and half.ref_rejected.tolist() == [-14, -6.5]
    assert torch.equal(half.chosen_length, PAIRS.chosen_length) and torch.equal(half.target, PAIRS.target)
    assert desensitize(PAIRS, None) is PAIRS
    assert torch.equal(desensitize(PAIRS, 1.0).chosen, PAIRS.chosen)
    softplus = math.log1p(math.exp(-0.5 * ((-8.5 + 10) - (-15 + 14))))
    assert build_loss("sigmoid", beta=0.5, ld_alpha=0.5)(PAIRS)[0].item() == pytest.approx(softplus)


@pytest.mark.parametrize("name", [name for name, row in LOSSES.items() if row.needs_reference])
def test_every_loss_with_a_reference_can_be_desensitized(name):
    pairs = random_pairs(8)
    loss = build_loss(name, ld_alpha=0.3)
    assert loss.needs_tails and loss.options is None
    torch.testing.assert_close(loss(pairs), build_loss(name)(desensitize(pairs, 0.3)))


def test_wpo_weights_by_hand():
    """Means over tokens of log p - log sum p²: (-10 + 7.5) / 5 = -1/2 and (-15 + 12) / 3 = -1; -2/4 and -1/2."""
    assert wpo_weights(PAIRS).tolist() == pytest.approx([math.exp(-1.5), math.exp(-1.0)])


@pytest.mark.parametrize("name", [name for name, row in LOSSES.items() if row.separable and row.needs_rejected])
def test_wpo_weighs_pairs_and_takes_no_gradient_through_the_weight(name):
    pairs = random_pairs(8)
    chosen = pairs.chosen.clone().requires_grad_()
    pairs = replace(pairs, chosen=chosen)
    loss, plain = build_loss(name, use_weighting=True), build_loss(name)
    assert loss.needs_log_sum_sq and loss.options is None
    torch.testing.assert_close(loss(pairs), wpo_weights(pairs) * plain(pairs))
    (found,) = torch.autograd.grad(loss(pairs).sum(), chosen)
    (expected,) = torch.autograd.grad(plain(pairs), chosen, wpo_weights(pairs))
    torch.testing.assert_close(found, expected)


def test_wpo_sees_whole_completions_beside_ld_alpha():
    """As in TRL, ld_alpha changes the loss and not WPO's weight, which counts all tokens in full."""
    pairs = random_pairs(8)
    found = build_loss("sigmoid", ld_alpha=0.2, use_weighting=True)(pairs)
    torch.testing.assert_close(found, wpo_weights(pairs) * build_loss("sigmoid", ld_alpha=0.2)(pairs))


def test_what_a_sum_shares_and_what_it_does_not():
    """sft has no preference, so none of the three changes applies to it."""
    pairs = random_pairs(8, scale=4.0)
    changes = {"ld_alpha": 0.5, "use_weighting": True, "f_divergence_type": "js_divergence"}
    loss = build_loss(["sigmoid", "sft"], [1.0, 0.2], beta=0.3, **changes)
    expected = build_loss("sigmoid", beta=0.3, **changes)(pairs) + 0.2 * build_loss("sft")(pairs)
    torch.testing.assert_close(loss(pairs), expected)


@pytest.mark.parametrize("change", [{"ld_alpha": 0.5}, {"f_divergence_type": "forward_kl"}, {"use_weighting": True}])
def test_changes_that_would_be_ignored_are_refused(change):
    (option,) = change
    with pytest.raises(ValueError, match=f"{option} has no effect on loss 'sft'"):
        build_loss("sft", **change)
    if option != "use_weighting":
        with pytest.raises(ValueError, match=f"{option} has no effect on loss 'slic'"):
            build_loss("slic", **change)


def test_wpo_does_not_weigh_what_is_sorted():
    for name in ("aot", ["sigmoid", "aot_unpaired"]):
        with pytest.raises(ValueError, match="sorts the two sides"):
            build_loss(name, use_weighting=True)
