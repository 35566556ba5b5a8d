"""Tests every loss in the head, tile by tile and in one tile: values and gradients by the tolerance rule."""

from __future__ import annotations

import pytest
import torch

from cpt_kernels.losses import LOSSES, Loss, build_loss
from tests.helpers.heads import FROZEN, FUSED, GENERAL, CountProducts, Head, check
from tests.numerics import assert_close

FP64, FP32 = torch.float64, torch.float32
# Options for which the pairs of `heads.BLOCKS` lie on both sides of every kink, and no loss is nearly flat.
_OPTIONS = {
    "exo_pair": {"label_smoothing": 0.1},
    "robust": {"label_smoothing": 0.2},
    "sigmoid_norm": {"beta": 2.0},
    "simpo": {"beta": 2.0},
    "slic": {"slic_delta": 20.0},
    "dpop": {"beta": 0.01, "dpop_lambda": 5.0},
    "orpo": {"beta": 1.0},
}
CASES: dict[str, Loss] = {name: build_loss(name, **_OPTIONS.get(name, {})) for name in LOSSES} | {
    "sigmoid, ld_alpha": build_loss("sigmoid", ld_alpha=0.3),
    "ipo, ld_alpha 0": build_loss("ipo", ld_alpha=0.0),
    "sigmoid, WPO": build_loss("sigmoid", use_weighting=True),
    "simpo, WPO": build_loss("simpo", use_weighting=True),
    "ipo, forward KL": build_loss("ipo", f_divergence_type="forward_kl"),
    "hinge, JS": build_loss("hinge", f_divergence_type="js_divergence"),
    "sigmoid, alpha": build_loss("sigmoid", f_divergence_type="alpha_divergence"),
    "sigmoid + sft": build_loss(["sigmoid", "sft"], [1.0, 0.2]),
    "odpo + slic, ld_alpha, WPO": build_loss(["odpo", "slic"], [0.5, 2.0], ld_alpha=0.5, use_weighting=True),
    "aot + sft, ld_alpha": build_loss(["aot", "sft"], ld_alpha=0.5),
}
_DRAWS = {"ipo": 40}  # its largest gradient depends on one log-prob, whose rounding dominates
SEPARABLE = [name for name, loss in CASES.items() if loss.separable]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("mode", [FROZEN, FUSED, GENERAL])
def test_by_the_tolerance_rule(mode, name):
    check(Head(CASES[name], scale=0.3, near=True).tile(25, 4), mode, FP32, draws=_DRAWS.get(name, 6))


@pytest.mark.parametrize("rows", [1, 7, 25])
@pytest.mark.parametrize("name", SEPARABLE)
def test_tile_by_tile_is_the_whole(name, rows):
    """Pair blocks smaller and larger than a tile give the result of one tile for all."""
    head = Head(CASES[name], scale=0.3, near=True)
    found, whole = head.tile(rows, 8).run(FP64), head.tile(10_000, 8).run(FP64)
    for key in whole:
        assert_close(found[key], whole[key], whole[key], f"{name} {key}", 1e-13)


@pytest.mark.parametrize("name", CASES)
def test_separable_losses_save_a_product(name):
    head = Head(CASES[name]).tile(25, 8)
    forward = sum(head.lengths) * head.columns * head.width
    with CountProducts() as products:
        head.run(FP64)
    assert products.count == (3 if CASES[name].separable else 4) * forward
