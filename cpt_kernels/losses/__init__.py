"""Preference losses: the table of them by name, and what a trainer must know of the one it trains with.

The functions themselves, ``PairLogps -> (P,)``, are in ``functions.py``; ``transforms.py`` changes what they see.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import UserError
from . import functions
from .logps import PairLogps
from .transforms import F_DIVERGENCES, desensitize, f_divergence, wpo_weights

__all__ = [
    "F_DIVERGENCES",
    "LOSSES",
    "Builtin",
    "Loss",
    "PairLogps",
    "build_loss",
    "loss_names",
    "loss_options",
    "user_loss",
]


@dataclass(frozen=True)
class Loss:
    """A loss with its options bound, and what the trainer must know about it.

    Attributes:
        name: as given to ``loss_type``.
        function: ``PairLogps -> (P,)``.
        needs_reference: ``ref_chosen`` and ``ref_rejected`` are read.
        needs_rejected: pairs must have a rejected side.
        separable: the loss of a subset of pairs is the subset of the losses, so gradients may be taken tile by tile.
        options: those of a built-in loss by itself, whose closed form a kernel may have; ``None`` for any other.
        needs_tails, needs_log_sum_sq, needs_gap: the fields of :class:`PairLogps` of that name are read.
    """

    name: str
    function: Callable[[PairLogps], Tensor] = field(repr=False)
    needs_reference: bool
    needs_rejected: bool = True
    separable: bool = True
    options: dict[str, float] | None = None
    needs_tails: bool = False
    needs_log_sum_sq: bool = False
    needs_gap: bool = False

    def __call__(self, logps: PairLogps) -> Tensor:
        return self.function(logps)

    def check_separable(self) -> None:
        """Hold a declared ``separable`` to its meaning on random numbers.

        Raises:
            UserError: the losses of some pairs change when other pairs leave the batch.
        """
        generator = torch.Generator().manual_seed(0)
        logps = -20 * torch.rand(5, 8, generator=generator, dtype=torch.float64)
        tails = 0.5 * logps[[0, 1, 3, 4]]
        others = torch.rand(3, 8, generator=generator, dtype=torch.float64)
        lengths = torch.arange(1, 9, dtype=torch.float64)
        numbers = PairLogps(*logps[:3], lengths, lengths.flip(0), lengths, *logps[3:], 4.0, *tails, *others)
        some = torch.tensor([1, 4, 6])
        if not torch.allclose(self(numbers)[some], self(numbers[some])):
            raise UserError(
                f"loss '{self.name}' is declared separable, but the losses of a subset of pairs are not the subset of"
                " the losses: declare it separable=False"
            )


@dataclass(frozen=True)
class Builtin:
    """A row of the table of losses.

    Attributes:
        function: ``PairLogps, options -> (P,)``; its keywords are the loss's options, their defaults the options'.
        source: the paper.
        trl: what TRL 1.16 calls it, or ``None``.
        needs_reference, needs_rejected, needs_gap, separable: see :class:`Loss`.
        of_difference: sees log-ratios as their difference only, so that another f-divergence may stand in for KL.
    """

    function: Callable[..., Tensor]
    source: str
    trl: str | None
    needs_reference: bool = True
    needs_rejected: bool = True
    needs_gap: bool = False
    separable: bool = True
    of_difference: bool = False


LOSSES: dict[str, Builtin] = {
    "sigmoid": Builtin(functions.sigmoid, "DPO, arXiv 2305.18290", "sigmoid", of_difference=True),
    "sigmoid_norm": Builtin(functions.sigmoid_norm, "Tulu 3, arXiv 2411.15124", "sigmoid_norm", of_difference=True),
    "hinge": Builtin(functions.hinge, "RSO, arXiv 2309.06657", "hinge", of_difference=True),
    "ipo": Builtin(functions.ipo, "IPO, arXiv 2310.12036", "ipo", of_difference=True),
    "exo_pair": Builtin(functions.exo_pair, "EXO, arXiv 2402.00856", "exo_pair", of_difference=True),
    "robust": Builtin(functions.robust, "Robust DPO, arXiv 2403.00409", "robust", of_difference=True),
    "discopop": Builtin(functions.discopop, "DiscoPOP, arXiv 2406.08414", "discopop", of_difference=True),
    "odpo": Builtin(functions.odpo, "ODPO, arXiv 2402.10571", None, needs_gap=True, of_difference=True),
    "dpop": Builtin(functions.dpop, "Smaug, arXiv 2402.13228", None),
    "nca_pair": Builtin(functions.nca_pair, "NCA, arXiv 2402.05369", "nca_pair"),
    "bco_pair": Builtin(functions.bco_pair, "BCO, arXiv 2404.04656", "bco_pair"),
    "sppo_hard": Builtin(functions.sppo_hard, "SPPO, arXiv 2405.00675", "sppo_hard"),
    "apo_zero": Builtin(functions.apo_zero, "APO, arXiv 2408.06266", "apo_zero"),
    "apo_down": Builtin(functions.apo_down, "APO, arXiv 2408.06266", "apo_down"),
    "aot": Builtin(functions.aot, "AOT, arXiv 2406.05882", "aot", separable=False),
    "aot_unpaired": Builtin(functions.aot_unpaired, "AOT, arXiv 2406.05882", "aot_unpaired", separable=False),
    "slic": Builtin(functions.slic, "SLiC, arXiv 2305.10425, 2310.02263", None, needs_reference=False),
    "simpo": Builtin(functions.simpo, "SimPO, arXiv 2405.14734", "CPOTrainer, simpo", needs_reference=False),
    "cpo": Builtin(functions.cpo, "CPO, arXiv 2401.08417", "CPOTrainer, sigmoid", needs_reference=False),
    "orpo": Builtin(functions.orpo, "ORPO, arXiv 2403.07691", "ORPOTrainer", needs_reference=False),
    "sft": Builtin(functions.sft, "maximum likelihood", "sft", needs_reference=False, needs_rejected=False),
}


def loss_options(name: str) -> list[str]:
    """Names of the options that loss ``name`` takes."""
    parameters = inspect.signature(LOSSES[name].function).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]


def loss_names(loss_type: str | Sequence[str]) -> list[str]:
    """``loss_type`` as a list: one name, or several to be added up."""
    return [loss_type] if isinstance(loss_type, str) else list(loss_type)


def build_loss(
    name: str | Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    ld_alpha: float | None = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    use_weighting: bool = False,
    **options,
) -> Loss:
    """The built-in loss ``name`` with its options bound, or the weighted sum of several, each with its own options.

    Args:
        weights: of the names; default 1 each.
        ld_alpha: weight of tokens beyond the length of the pair's other side (LD-DPO), for losses with a reference.
        f_divergence_type, f_alpha_divergence_coef: the divergence from the reference, one of ``F_DIVERGENCES``.
        use_weighting: weigh pairs by how likely the policy is to say them (WPO); ``sft`` has no pairs to weigh.

    Raises:
        UserError: an unknown name, another number of weights, or a change that is not defined for the loss.
        TypeError: an option is none of these losses' (see :func:`loss_options`).
    """
    names = loss_names(name)
    weights = [1.0] * len(names) if weights is None else list(weights)
    for unknown in set(names) - set(LOSSES):
        raise UserError(f"loss_type='{unknown}' is unknown: choose one of {', '.join(LOSSES)}")
    if not names or len(weights) != len(names):
        raise UserError(f"loss_weights has {len(weights)} weights for the {len(names)} losses of loss_type")
    taken = {option for one in names for option in loss_options(one)}
    if unknown := set(options) - taken:
        raise TypeError(f"loss '{' + '.join(names)}' takes {sorted(taken)}, not {sorted(unknown)}")
    if f_divergence_type not in F_DIVERGENCES:
        raise UserError(f"f_divergence_type='{f_divergence_type}' is unknown: choose one of {', '.join(F_DIVERGENCES)}")
    divergence = (f_divergence_type, f_alpha_divergence_coef)
    parts = [
        _build_one(one, ld_alpha, divergence, use_weighting, {k: options[k] for k in loss_options(one) if k in options})
        for one in names
    ]
    loss = parts[0] if len(parts) == 1 and weights[0] == 1 else _weighted_sum(parts, weights)
    ignored = {
        "ld_alpha": ld_alpha is not None and not loss.needs_tails,
        "f_divergence_type": f_divergence_type != "reverse_kl" and not loss.needs_reference,
        "use_weighting": use_weighting and not loss.needs_log_sum_sq,
    }
    if True in ignored.values():
        option = next(option for option, is_ignored in ignored.items() if is_ignored)
        raise UserError(f"{option} has no meaning for loss '{loss.name}': leave it out")
    return loss


def _build_one(
    name: str, ld_alpha: float | None, divergence: tuple[str, float], use_weighting: bool, options: dict[str, float]
) -> Loss:
    builtin = LOSSES[name]
    diverges = builtin.needs_reference and divergence[0] != "reverse_kl"
    weighted = use_weighting and builtin.needs_rejected
    desensitized = builtin.needs_reference and ld_alpha is not None
    if diverges and not builtin.of_difference:
        known = ", ".join(other for other, row in LOSSES.items() if row.of_difference)
        raise UserError(
            f"f_divergence_type='{divergence[0]}' is not defined for loss '{name}': it needs one of {known}, whose"
            " unknown terms cancel, or leave it at reverse_kl"
        )
    if weighted and not builtin.separable:
        raise UserError(f"use_weighting weighs pairs, and loss '{name}' sorts them apart: leave it out")

    def function(logps: PairLogps) -> Tensor:
        seen = desensitize(logps, ld_alpha) if desensitized else logps
        losses = builtin.function(f_divergence(seen, *divergence) if diverges else seen, **options)
        return wpo_weights(logps) * losses if weighted else losses

    return Loss(
        name,
        function,
        builtin.needs_reference,
        builtin.needs_rejected,
        builtin.separable,
        options=None if diverges or weighted or desensitized else options,
        needs_tails=desensitized,
        needs_log_sum_sq=weighted,
        needs_gap=builtin.needs_gap,
    )


def _weighted_sum(parts: Sequence[Loss], weights: Sequence[float]) -> Loss:
    def function(logps: PairLogps) -> Tensor:
        return torch.stack([weight * part(logps) for part, weight in zip(parts, weights)]).sum(0)

    needs = ("needs_reference", "needs_rejected", "needs_tails", "needs_log_sum_sq", "needs_gap")
    return Loss(
        " + ".join(part.name if weight == 1 else f"{weight:g} {part.name}" for part, weight in zip(parts, weights)),
        function,
        separable=all(part.separable for part in parts),
        **{need: any(getattr(part, need) for part in parts) for need in needs},
    )


def user_loss(
    function: Callable[[PairLogps], Tensor],
    *,
    needs_reference: bool = True,
    needs_rejected: bool = True,
    separable: bool = False,
    name: str | None = None,
    **needs: bool,
) -> Loss:
    """A user's own function of log-probs, ``PairLogps -> (P,)``, as a :class:`Loss`; ``needs`` are its further flags.

    ``separable=True`` (each pair's loss depends on that pair alone) saves one of four matrix products in the head; it
    is checked here, once.

    Raises:
        UserError: declared separable, but it is not.
    """
    name = name or getattr(function, "__name__", "user")
    loss = Loss(name, function, needs_reference, needs_rejected, separable, **needs)
    if separable:
        loss.check_separable()
    return loss
