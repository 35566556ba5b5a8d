"""The options of the losses: the fields that :class:`ContrastiveConfig` inherits.

The flags of ``cpt-train``, their help, and the tables of ``docs/losses.md`` derive from these fields. An option of a
loss is a field under the name, and with the default, of a keyword of the loss's function.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, field, fields
from typing import Any

from ..errors import UserError
from .build import Loss, build_loss, loss_names
from .functions import LOSSES, loss_options
from .ranges import RANGES, check_option
from .transforms import F_DIVERGENCES

# Option -> its letter in the equations of the table of losses. The metadata of the fields cannot hold it, because
# HfArgumentParser passes metadata to argparse.
SYMBOLS = {
    "beta": "β",
    "label_smoothing": "ε",
    "slic_delta": "δ",
    "slic_lambda": "λ",
    "simpo_gamma": "γ",
    "cpo_alpha": "α",
    "dpop_lambda": "λ",
    "odpo_alpha": "α",
    "discopop_tau": "τ",
}


def option(default: Any, help: str) -> Any:
    """Declares a dataclass field with the help that a command shows."""
    metadata = {"help": help}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def default_of(f: Field) -> Any:
    """Returns the default of a dataclass field."""
    return f.default if f.default_factory is MISSING else f.default_factory()


@dataclass
class LossOptions:
    """The loss and its options.

    Raises:
        UserError: from its methods, for an unknown value of an option.
    """

    loss_type: list[str] = option(["sigmoid"], f"Loss over pairs, or several to add up: {', '.join(LOSSES)}.")
    loss_weights: list[float] | None = option(None, "Weights of several losses. Default: 1 each.")
    beta: float = option(0.1, "Weight of the reference: beta of DPO, tau of IPO, lambda of ORPO.")
    label_smoothing: float = option(0.0, "Probability that a label is flipped (conservative and robust DPO, EXO).")
    ld_alpha: float | None = option(None, "Weight of tokens beyond the other side's length (LD-DPO). Default: 1.")
    use_weighting: bool = option(False, "Weight pairs by their probability under the policy (WPO).")
    f_divergence_type: str = option("reverse_kl", f"Divergence from the reference: {', '.join(F_DIVERGENCES)}.")
    f_alpha_divergence_coef: float = option(0.5, "Alpha of alpha_divergence.")
    slic_delta: float = option(1.0, "Margin of SLiC, in nats.")
    slic_lambda: float = option(1.0, "Weight of SLiC's regularizer, -log p(y_ref).")
    slic_length_normalize: bool = option(False, "SLiC on log-probs per token in place of log-probs per completion.")
    simpo_gamma: float = option(0.5, "Margin of SimPO.")
    cpo_alpha: float = option(1.0, "Weight of CPO's likelihood term.")
    dpop_lambda: float = option(50.0, "Weight of DPO-Positive's penalty where chosen becomes less likely.")
    odpo_alpha: float = option(1.0, "Weight of ODPO's offset, log gap.")
    discopop_tau: float = option(0.05, "Temperature of discopop.")

    def build_loss(self) -> Loss:
        """Builds the configured loss, or sum of losses, with its options bound."""
        names = loss_names(self.loss_type)
        taken = [name for loss in names if loss in LOSSES for name in loss_options(loss)]
        return build_loss(
            names,
            self.loss_weights,
            ld_alpha=self.ld_alpha,
            f_divergence_type=self.f_divergence_type,
            f_alpha_divergence_coef=self.f_alpha_divergence_coef,
            use_weighting=self.use_weighting,
            **{name: getattr(self, name) for name in taken},
        )

    def check_loss(self) -> Loss:
        """Builds the loss after checking its options.

        Raises:
            UserError: a value out of range, an option without effect on the loss, or options that exclude each other.
        """
        names = loss_names(self.loss_type)
        for name in RANGES:
            if (value := getattr(self, name)) is not None:
                check_option(name, value)
        if self.label_smoothing == 0.5:
            raise UserError("label_smoothing=0.5: a flip probability must lie in [0, 0.5), at 0.5 labels say nothing")
        loss = self.build_loss()
        if ignored := self._changed(self._options_of(LOSSES) - self._options_of(names) - {"beta"}):
            # beta is exempt: it also is the factor of the rewards that every loss logs.
            raise UserError(f"{ignored[0]} has no effect on loss_type '{loss.name}': leave it out")
        if self.f_divergence_type != "alpha_divergence" and self._changed(["f_alpha_divergence_coef"]):
            raise UserError("f_alpha_divergence_coef has no effect without f_divergence_type=alpha_divergence")
        return loss

    def _options_of(self, losses: Iterable[str]) -> set[str]:
        return {name for loss in losses for name in loss_options(loss)} & {f.name for f in fields(self)}

    def _changed(self, names: Iterable[str]) -> list[str]:
        """Returns those of the options ``names`` that differ from their default, in alphabetical order."""
        defaults = {f.name: default_of(f) for f in fields(self) if f.name in set(names)}
        return sorted(name for name, default in defaults.items() if getattr(self, name) != default)

    def _require_positive(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name}={value}: must be positive, or not set")

    def _require_not_negative(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"{name}={value}: must not be negative")

    def _require_share(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{name}={value}: must lie in [0, 1]")
