"""Ranges of the options of the losses, which the configuration and ``build_loss`` check alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

from ..errors import UserError


class Range(NamedTuple):
    """Values that an option may have."""

    holds: Callable[[float], bool]  # of a finite number
    text: str  # what follows the option and its value in a message


_POSITIVE = Range(lambda value: value > 0, "must be positive and finite")
_NOT_NEGATIVE = Range(lambda value: value >= 0, "must not be negative, and must be finite")
_SHARE = Range(lambda value: 0 <= value <= 1, "must lie in [0, 1]")
_FINITE = Range(lambda value: True, "must be finite")

# Option -> its range in every loss. An option that is not here may be any finite number.
RANGES: dict[str, Range] = {
    "beta": _POSITIVE,
    "label_smoothing": Range(lambda value: 0 <= value <= 0.5, "a flip probability must lie in [0, 0.5]"),
    "slic_delta": _NOT_NEGATIVE,
    "slic_lambda": _NOT_NEGATIVE,
    "simpo_gamma": _NOT_NEGATIVE,
    "cpo_alpha": _NOT_NEGATIVE,
    "dpop_lambda": _NOT_NEGATIVE,
    "odpo_alpha": _NOT_NEGATIVE,
    "discopop_tau": _POSITIVE,
    "ld_alpha": _SHARE,
}

# (loss, option) -> a narrower range, where the equation of the loss has a pole at an end of the other.
_OF_LOSS: dict[tuple[str, str], Range] = {
    ("robust", "label_smoothing"): Range(
        lambda value: value < 0.5, "a flip probability must lie in [0, 0.5) for loss 'robust'"
    ),
    ("exo_pair", "label_smoothing"): Range(
        lambda value: value > 0,
        "loss_type 'exo_pair' needs label_smoothing above 0: its paper has 1e-3, and it must lie in (0, 0.5]",
    ),
}


def check_option(name: str, value: Any, default: Any = 0.0, loss: str | None = None) -> None:
    """Checks an option of a loss; ``default`` tells a flag from a number.

    Raises:
        UserError: the value is of another type, not finite or out of range.
    """
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise UserError(f"{name}={value!r}: must be True or False")
        return
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UserError(f"{name}={value!r}: must be a number, not {type(value).__name__}")
    for allowed in (RANGES.get(name, _FINITE), _OF_LOSS.get((str(loss), name), _FINITE)):
        if not (math.isfinite(value) and allowed.holds(float(value))):
            raise UserError(f"{name}={value}: {allowed.text}")
