"""Losses with their options bound: a built-in loss, a weighted sum of several, or a user's function."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, describe_failure
from .functions import LOSSES, loss_options
from .logps import PairLogps
from .ranges import check_option
from .transforms import F_DIVERGENCES, desensitize, f_divergence, wpo_weights

# Names of losses in other trainers -> the name here.
_OTHER_NAMES = {"dpo": "sigmoid", "dpo_norm": "sigmoid_norm", "cdpo": "sigmoid", "rso": "hinge", "nll": "sft"}


@dataclass(frozen=True)
class Loss:
    """A loss with its options bound, and what the trainer must know about it.

    Attributes:
        name: as given to ``loss_type``.
        function: ``PairLogps -> (P,)``.
        needs_reference: ``ref_chosen`` and ``ref_rejected`` are read.
        needs_rejected: pairs must have a rejected side.
        separable: the loss of a subset of pairs is the subset of the losses, so gradients may be taken tile by tile.
        options: the options of one built-in loss without changes, which a kernel may compute in closed form; ``None``
            for any other loss.
        needs_tails, needs_log_sum_sq, needs_gap, needs_hard: the fields of :class:`PairLogps` of that name are read.
        per_token: rewards are of log-probs per token, as the loss compares them, and not of sums.
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
    per_token: bool = False
    needs_hard: bool = False

    def __call__(self, logps: PairLogps) -> Tensor:
        return self.function(logps)

    def check_finite(self, options: dict[str, Any]) -> None:
        """Checks on moderate log-probs that the loss is a finite number in fp32.

        Raises:
            UserError: it is not; the message names ``options``.
        """
        ratios = torch.tensor([0.0, 1.0, -1.0, 0.5])
        one, logps = torch.ones(4), torch.tensor([-3.0, -2.0, -5.0, -4.0])
        values = dict.fromkeys((f.name for f in fields(PairLogps)), -0.5 * one)
        values |= {"chosen": logps, "rejected": logps.flip(0), "target": logps, "gap": one}
        values |= {"ref_chosen": logps - ratios, "ref_rejected": logps.flip(0) + 2 * ratios}
        values |= {name: 2 * one for name in values if name.endswith("_length")} | {"hard": one < 0}
        if not self(replace(PairLogps(**values), tokens_per_pair=2.0)).isfinite().all():
            given = ", ".join(f"{name}={value}" for name, value in options.items()) or "its options"
            raise UserError(
                f"loss '{self.name}' is not finite in fp32 with {given}: take values nearer to the defaults"
            )

    def check_separable(self) -> None:
        """Checks on random log-probs that a loss which is declared separable is.

        Raises:
            UserError: the losses of some pairs change when other pairs leave the batch.
        """
        logps = _random_logps()
        some = torch.tensor([1, 4, 6])
        if not torch.allclose(self(logps)[some], self(logps[some])):
            raise UserError(
                f"loss '{self.name}' is declared separable, but the losses of a subset of pairs are not the subset of"
                " the losses: declare it separable=False"
            )

    def check_output(self) -> None:
        """Calls the loss on random log-probs of 8 pairs.

        Raises:
            UserError: the function raises an exception, or returns something else than one number per pair.
        """
        logps = _random_logps()
        try:
            values = self(logps)
        except Exception as error:
            raise UserError(f"loss '{self.name}' failed on a trial with 8 pairs: {describe_failure(error)}") from error
        if not isinstance(values, Tensor):
            raise UserError(f"loss '{self.name}' returned {type(values).__name__}: return a tensor, one loss per pair")
        if values.shape != logps.chosen.shape:
            raise UserError(
                f"loss '{self.name}' returned a tensor of shape {tuple(values.shape)} for 8 pairs: return one loss per"
                " pair, shape (8,), without a mean or sum over pairs"
            )

    def check_weights(self) -> None:
        """Checks that weights of pairs are defined.

        Raises:
            UserError: the losses are not known to be those of single pairs; for instance ``aot`` sorts them.
        """
        if not self.separable:
            raise UserError(
                f"loss '{self.name}' has no weights of pairs, because it is not known to be one of single pairs: leave"
                " out weight_column, take another loss, or declare yours by user_loss(..., separable=True)"
            )

    def averages_over_tokens(self) -> bool:
        """Whether the losses of pairs may depend on ``tokens_per_pair``; measured for separable losses."""
        if not self.separable:
            return True
        logps = _random_logps()
        return not torch.equal(self(logps), self(replace(logps, tokens_per_pair=2 * logps.tokens_per_pair)))


def _random_logps() -> PairLogps:
    """Returns log-probs of 8 pairs, on the CPU in fp64, with every field."""
    generator = torch.Generator().manual_seed(0)
    values = {f.name: torch.rand(8, generator=generator, dtype=torch.float64) for f in fields(PairLogps)}
    lengths = torch.arange(1, 9, dtype=torch.float64)
    for name in values:
        if name.endswith("_length"):
            values[name] = lengths.flip(0) if name == "rejected_length" else lengths
        elif not name.endswith("_log_sum_sq") and name not in ("gap", "hard"):
            values[name] *= -10 if name.endswith("_tail") else -20
    values["hard"] = lengths % 2 == 0
    return replace(PairLogps(**values), tokens_per_pair=4.0)


def loss_names(loss_type: str | Sequence[str]) -> list[str]:
    """Returns ``loss_type`` as a list: one name, or several that are added up.

    Raises:
        UserError: it is neither a name nor names.
    """
    names = [loss_type] if isinstance(loss_type, str) else loss_type
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise UserError(f"loss_type={loss_type!r}: must be the name of a loss, or a list of names")
    return list(names)


def build_loss(
    name: str | Sequence[str],
    weights: Sequence[float] | None = None,
    *,
    ld_alpha: float | None = None,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    use_weighting: bool = False,
    **options: float,
) -> Loss:
    """Binds the options of a built-in loss, or of the weighted sum of several.

    Args:
        name: of one loss or of several, keys of ``LOSSES``.
        weights: one for each name. Default: 1 each.
        ld_alpha: weight of tokens beyond the length of the pair's other side (LD-DPO), for losses with a reference.
        f_divergence_type, f_alpha_divergence_coef: the divergence from the reference, one of ``F_DIVERGENCES``.
        use_weighting: weight pairs by their probability under the policy (WPO); ``sft`` has no pairs to weight.
        options: each goes to the losses that take it, see :func:`loss_options`.

    Raises:
        UserError: an unknown name, another number of weights, a value out of the range of its option, or a change that
            is not defined for the loss.
        TypeError: none of the losses takes an option.
    """
    names = loss_names(name)
    if weights is not None and not isinstance(weights, (list, tuple)):
        raise UserError(f"loss_weights={weights!r}: must be a list of numbers, one for each loss")
    weights = [1.0] * len(names) if weights is None else list(weights)
    for unknown in sorted(set(names) - set(LOSSES)):
        close = _OTHER_NAMES.get(unknown.lower()) or next(iter(get_close_matches(unknown.lower(), LOSSES, n=1)), None)
        hint = f"; did you mean {close}?" if close else ""
        raise UserError(f"loss_type='{unknown}' is unknown: choose one of {', '.join(LOSSES)}{hint}")
    for weight in weights:
        check_option("loss_weights", weight)
    if not names or len(weights) != len(names):
        raise UserError(f"loss_weights has {len(weights)} weights for the {len(names)} losses of loss_type")
    taken = {option for one in names for option in loss_options(one)}
    if foreign := set(options) - taken:
        known = f"its options are {', '.join(sorted(taken))}" if taken else "it has none"
        raise TypeError(f"loss '{' + '.join(names)}' has no option '{min(foreign)}'; {known}")
    if not isinstance(f_divergence_type, str) or f_divergence_type not in F_DIVERGENCES:
        raise UserError(f"f_divergence_type='{f_divergence_type}' is unknown: choose one of {', '.join(F_DIVERGENCES)}")
    check_option("f_alpha_divergence_coef", f_alpha_divergence_coef)
    check_option("use_weighting", use_weighting, default=False)
    if ld_alpha is not None:
        check_option("ld_alpha", ld_alpha)
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
    for option, is_ignored in ignored.items():
        if is_ignored:
            raise UserError(f"{option} has no effect on loss '{loss.name}': leave it out")
    if not torch.compiler.is_compiling():
        divergences = {"f_divergence_type": f_divergence_type, "f_alpha_divergence_coef": f_alpha_divergence_coef}
        loss.check_finite({**options, **(divergences if f_divergence_type != "reverse_kl" else {})})
    return loss


def _build_one(
    name: str, ld_alpha: float | None, divergence: tuple[str, float], use_weighting: bool, options: dict[str, float]
) -> Loss:
    builtin = LOSSES[name]
    parameters = inspect.signature(builtin.function).parameters
    for option, value in options.items():
        check_option(option, value, parameters[option].default, name)
    # In a sum, a change applies to the losses that it is defined for.
    diverges = builtin.needs_reference and divergence[0] != "reverse_kl"
    weighted = use_weighting and builtin.needs_rejected
    desensitized = builtin.needs_reference and ld_alpha is not None
    if diverges and not builtin.of_difference:
        known = ", ".join(other for other, entry in LOSSES.items() if entry.of_difference)
        raise UserError(
            f"f_divergence_type='{divergence[0]}' is not defined for loss '{name}': leave it at reverse_kl, or take one"
            f" of {known}"
        )
    if weighted and not builtin.separable:
        raise UserError(
            f"use_weighting is not defined for loss '{name}', which sorts the two sides of a pair apart: leave it out"
        )

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
        per_token=builtin.per_token or bool(options.get("slic_length_normalize", False)),
    )


def _weighted_sum(parts: Sequence[Loss], weights: Sequence[float]) -> Loss:
    def function(logps: PairLogps) -> Tensor:
        return torch.stack([weight * part(logps) for part, weight in zip(parts, weights)]).sum(0)

    # The rewards are those of the first loss of pairs; one with a reference goes before one without.
    ranked = sorted(parts, key=lambda part: (not part.needs_rejected, not part.needs_reference))
    return Loss(
        " + ".join(part.name if weight == 1 else f"{weight:g} {part.name}" for part, weight in zip(parts, weights)),
        function,
        needs_reference=any(part.needs_reference for part in parts),
        needs_rejected=any(part.needs_rejected for part in parts),
        separable=all(part.separable for part in parts),
        needs_tails=any(part.needs_tails for part in parts),
        needs_log_sum_sq=any(part.needs_log_sum_sq for part in parts),
        needs_gap=any(part.needs_gap for part in parts),
        per_token=ranked[0].per_token,
    )


def with_hard_pairs(loss: Loss, hard: Loss | None, weight: float) -> Loss:
    """Returns a loss that is ``weight * hard`` for the hard pairs of a curriculum, and ``loss`` for all others.

    Args:
        hard: default ``loss`` itself.

    Raises:
        UserError: one of the losses depends on other pairs of the batch.
    """
    other = loss if hard is None else hard
    if batchwise := [each for each in (loss, other) if not each.separable]:
        raise UserError(
            f"curriculum: hard pairs have a loss of their own, but loss '{batchwise[0].name}' is not known to be one of"
            " single pairs: take another loss, or declare yours by user_loss(..., separable=True)"
        )
    fields_read = ("needs_reference", "needs_rejected", "needs_tails", "needs_log_sum_sq", "needs_gap")
    return replace(
        loss,
        name=f"{loss.name}; hard pairs: {weight:g} {other.name}",
        function=lambda logps: torch.where(logps.hard, weight * other(logps), loss(logps)),
        options=None,
        needs_hard=True,
        **{name: getattr(loss, name) or getattr(other, name) for name in fields_read},
    )


def user_loss(
    function: Callable[[PairLogps], Tensor],
    *,
    needs_reference: bool = True,
    needs_rejected: bool = True,
    separable: bool = False,
    name: str | None = None,
    needs_tails: bool = False,
    needs_log_sum_sq: bool = False,
    needs_gap: bool = False,
    per_token: bool = False,
) -> Loss:
    """Makes a :class:`Loss` of a user's own function of log-probs, ``PairLogps -> (P,)``.

    ``separable=True`` declares that each pair's loss depends on that pair alone. It saves one of the four matrix
    products in the head, and is checked here, once. ``per_token=True`` logs rewards of log-probs per token.

    Raises:
        UserError: it is not a function, fails on a trial, does not return one loss per pair, or is declared separable
            and is not.
    """
    if not callable(function):
        raise UserError(f"loss={function!r}: must be a function of PairLogps, or the result of build_loss or user_loss")
    loss = Loss(
        name or str(getattr(function, "__name__", "user")),
        function,
        needs_reference,
        needs_rejected,
        separable,
        needs_tails=needs_tails,
        needs_log_sum_sq=needs_log_sum_sq,
        needs_gap=needs_gap,
        per_token=per_token,
    )
    loss.check_output()
    if separable:
        loss.check_separable()
    return loss
