"""Every option of every loss: a value is either right, and the loss finite, or it is refused in words."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import numpy as np
import pytest
import torch

from cpt_kernels.errors import UserError
from cpt_kernels.losses import F_DIVERGENCES, LOSSES, PairLogps, build_loss, loss_options, user_loss
from cpt_kernels.ops.pair_loss import pair_loss
from tests.helpers.pairs import PAIRS

_NUMBERS = [-math.inf, -1.0, -1e-9, 0, 0.0, 1e-300, 1e-30, 1e-3, 0.25, 0.5, 0.75, 1, 1.0, 2.0, 1e30, 1e300, math.inf,
            math.nan]  # fmt: skip
_OTHERS = ["0.1", None, True, [0.1], {}, torch.tensor(0.1), 1j]
_SHARED = {"ld_alpha": 0.5, "f_alpha_divergence_coef": 0.5, "use_weighting": False, "f_divergence_type": "reverse_kl"}


def _takes(option: str, loss: str) -> dict:
    """Returns the further options with which ``option`` has an effect on a loss; none if it never has."""
    entry = LOSSES[loss]
    known = {
        "ld_alpha": {} if entry.needs_reference else None,
        "f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence"} if entry.of_difference else None,
        "use_weighting": {} if entry.needs_rejected and entry.separable else None,
        "f_divergence_type": {} if entry.of_difference else None,
    }
    return known.get(option, {} if option in loss_options(loss) else None)


_CASES = [
    (loss, option, others)
    for loss in LOSSES
    for option in (*loss_options(loss), *_SHARED)
    if (others := _takes(option, loss)) is not None
]


@pytest.mark.parametrize(("loss", "option", "others"), _CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_every_value_of_every_option(loss, option, others):
    built, refusals = 0, []
    single = PairLogps(**{f.name: _single(getattr(PAIRS, f.name)) for f in fields(PairLogps)})
    for value in [*_NUMBERS, *_OTHERS, *F_DIVERGENCES]:
        try:
            bound = build_loss(loss, **others, **{option: value})
        except UserError as error:
            refusals.append(str(error))
            continue
        losses = bound(single)
        assert losses.isfinite().all(), f"{option}={value}: {losses}"
        built += 1
    assert all(option in message for message in refusals), refusals
    assert built == 1 if option in ("use_weighting", "slic_length_normalize") else built >= 2


def _single(value):
    return value.float() if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        ("robust", {"label_smoothing": 0.5}, r"label_smoothing=0.5: a flip probability must lie in \[0, 0.5\)"),
        ("robust", {"label_smoothing": 0.7}, r"label_smoothing=0.7: a flip probability must lie in \[0, 0.5\]"),
        ("exo_pair", {"label_smoothing": 0}, r"label_smoothing=0: .*'exo_pair' needs .* in \(0, 0.5\]"),
        (["sigmoid", "exo_pair"], {"label_smoothing": 0.0}, "'exo_pair' needs label_smoothing above 0"),
        ("ipo", {"beta": 0.0}, "beta=0.0: must be positive and finite"),
        ("ipo", {"beta": 1e-30}, "loss 'ipo' is not finite in fp32 with beta=1e-30"),
        ("sigmoid", {"beta": math.nan}, "beta=nan: must be positive and finite"),
        ("sigmoid", {"beta": "0.1"}, "beta='0.1': must be a number, not str"),
        ("sigmoid", {"beta": True}, "beta=True: must be a number, not bool"),
        ("slic", {"slic_length_normalize": 1}, "slic_length_normalize=1: must be True or False"),
        ("sigmoid", {"use_weighting": "yes"}, "use_weighting='yes': must be True or False"),
        ("sigmoid", {"ld_alpha": 1.5}, r"ld_alpha=1.5: must lie in \[0, 1\]"),
        ("sigmoid", {"f_divergence_type": ["js"]}, "f_divergence_type=.* is unknown"),
        ("sigmoid", {"f_alpha_divergence_coef": math.inf}, "f_alpha_divergence_coef=inf: must be finite"),
        (["sigmoid", "sft"], {"weights": [1.0, math.nan]}, "loss_weights=nan: must be finite"),
        (["sigmoid", "sft"], {"weights": [1.0, "2"]}, "loss_weights='2': must be a number"),
        (["sigmoid", "sft"], {"weights": 2.0}, "loss_weights=2.0: must be a list"),
        (None, {}, "loss_type=None: must be the name of a loss"),
        ([1], {}, r"loss_type=\[1\]: must be the name of a loss"),
    ],
)  # fmt: skip
def test_messages(loss, options, message):
    with pytest.raises(UserError, match=message):
        build_loss(loss, **options)


def test_numbers_of_other_types():
    for value in (np.float32(0.25), np.float64(0.25), np.int64(1), 1):
        expected = build_loss("sigmoid", beta=float(value))(PAIRS)
        assert torch.equal(build_loss("sigmoid", beta=value)(PAIRS), expected)


def test_the_operator_and_user_losses_refuse_too():
    with pytest.raises(UserError, match="beta=-1: must be positive"):
        pair_loss(torch.zeros(2), torch.arange(3), torch.tensor([0]), torch.tensor([1]), None, torch.zeros(2), beta=-1)
    with pytest.raises(UserError, match="loss='sigmoid': must be a function"):
        user_loss("sigmoid")


# --- Extreme log-probs ---

_RATIOS = [0.0, *(sign * size for size in (1.0, 30.0, 79.0, 81.0, 90.0, 300.0, 1e3, 1e4) for sign in (1, -1))]


def _extreme(dtype: torch.dtype) -> PairLogps:
    """Every combination of two log-ratios up to 1e4, with references that make log-probs of the policy negative."""
    chosen, rejected = (x.flatten() for x in torch.meshgrid(*[torch.tensor(_RATIOS, dtype=dtype)] * 2, indexing="ij"))
    lengths = torch.full_like(chosen, 4.0)
    logps = {"chosen": chosen.clamp(max=0) - 4, "rejected": rejected.clamp(max=0) - 4}
    tails = {f"{name}_tail": value / 2 for name, value in logps.items()}
    return PairLogps(
        **logps,
        target=logps["chosen"],
        chosen_length=lengths,
        rejected_length=lengths,
        target_length=lengths,
        ref_chosen=logps["chosen"] - chosen,
        ref_rejected=logps["rejected"] - rejected,
        **tails,
        ref_chosen_tail=(logps["chosen"] - chosen) / 2,
        ref_rejected_tail=(logps["rejected"] - rejected) / 2,
        chosen_log_sum_sq=logps["chosen"],
        rejected_log_sum_sq=logps["rejected"],
        gap=torch.ones_like(chosen),
        tokens_per_pair=4.0,
    )


_DIVERGENCES = [
    ("forward_kl", 0.5),
    ("js_divergence", 0.5),
    *(("alpha_divergence", coef) for coef in (0.0, 0.5, 0.999, 2.0)),
]
_VARIANTS = {
    **{name: {} for name in LOSSES},
    **{f"{name}, beta 5": {"beta": 5.0} for name in LOSSES if "beta" in loss_options(name)},
    **{f"{name}, LD": {"ld_alpha": 0.5} for name in LOSSES if LOSSES[name].needs_reference},
    **{f"{name}, WPO": {"use_weighting": True} for name, entry in LOSSES.items() if entry.separable and name != "sft"},
    **{
        f"{name}, {kind} {coef}": {"f_divergence_type": kind, "f_alpha_divergence_coef": coef}
        for name in LOSSES
        if LOSSES[name].of_difference
        for kind, coef in _DIVERGENCES
    },
}


@pytest.mark.parametrize("variant", _VARIANTS)
def test_log_ratios_up_to_ten_thousand(variant):
    """In fp32 losses and gradients are those of fp64. Beyond fp32 they have its sign, and they are never NaN."""
    loss = build_loss(variant.split(",")[0], **_VARIANTS[variant])
    results = []
    for dtype in (torch.float32, torch.float64):
        pairs = _extreme(dtype)
        leaves = [getattr(pairs, side).clone().requires_grad_() for side in ("chosen", "rejected")]
        losses = loss(replace(pairs, chosen=leaves[0], rejected=leaves[1], target=leaves[0]))
        grads = torch.autograd.grad(losses.sum(), leaves, allow_unused=True)
        results.append([losses.detach(), *(g for g in grads if g is not None)])
    for found, exact in zip(*results):
        assert not found.isnan().any() and exact.isfinite().all()
        beyond = exact.abs() > (1e30 if "ipo" in variant else torch.finfo(torch.float32).max)
        assert "ipo" in variant or not beyond.any()  # ipo squares e^80
        assert torch.equal(found[beyond].sign(), exact[beyond].sign())
        kept = ~beyond
        torch.testing.assert_close(found[kept].double(), exact[kept], rtol=2e-4, atol=1e-5)
