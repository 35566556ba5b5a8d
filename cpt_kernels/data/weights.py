"""Reads the weights that a row gives to its pairs, and to the turns of its conversations. Pure Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .forms import Form
from .messages import MALFORMED, RowError, Text

_LARGEST = (2 - 2**-23) * 2.0**127  # the largest number of fp32
NO_ASSISTANT = "no assistant turn"  # a reason to drop a row; the others are in formats.py


def read_number(value: Any) -> float | None:
    """Returns a number, or one that is given as text because CSV files hold nothing else; None for other values."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    if isinstance(value, str) and "_" in value:  # Python reads "1_2" as 12
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def read_weight(value: Any, column: str) -> float:
    """Returns the weight of a pair.

    Raises:
        RowError: the value is not a finite number of at least 0, in fp32, in which weights are stored.
    """
    weight = read_number(value)
    if weight is None or not 0 <= weight <= _LARGEST:
        raise RowError(MALFORMED, f"`{column}` is {value!r}; expected a weight: a finite number of at least 0")
    return weight


def read_train_on(
    row: Mapping[str, Any], form: Form, names: list[str], sides: Sequence[Text | None]
) -> list[list[float] | None] | None:
    """Returns the weights of each side's turns by the row's `train_on`; None without it.

    `train_on` holds a list for each side, in the order of the row, with a number of at least 0 per turn; 0 leaves a
    turn out. A row with one side may hold the numbers themselves.
    """
    if (given := row.get("train_on")) is None:
        return None
    if len(sides) == 1 and isinstance(given, list) and not any(isinstance(flags, list) for flags in given):
        given = [given]
    if not isinstance(given, list) or len(given) != len(sides):
        raise RowError(MALFORMED, f"`train_on` is not a list of {len(sides)} lists, one for each of the completions")
    if form is Form.RANKED:  # the sides are sorted
        given = [given[int(name.rpartition("[")[2][:-1])] for name in names]
    for name, flags, side in zip(names, given, sides):
        if isinstance(side, str):
            raise RowError(MALFORMED, f"`train_on` names turns of messages, and `{name}` is text")
        if not isinstance(flags, list) or len(flags) != len(side or ()):
            raise RowError(
                MALFORMED, f"`train_on` does not hold a number for each of the {len(side or ())} turns of `{name}`"
            )
    return [[_turn_weight(flag, "train_on") for flag in flags] for flags in given]


def take_weights(
    names: Sequence[str], sides: Sequence[Text | None]
) -> tuple[list[Text | None], list[list[float] | None] | None]:
    """Returns sides without the key `weight` of their messages, and the weights of their turns.

    As in OpenAI's format, the assistant's turns have weight 1 unless they say otherwise. Other turns have weight 0.
    None for text, and for all sides if no message says a weight.
    """
    if not any(isinstance(side, list) and any("weight" in turn for turn in side) for side in sides):
        return [*sides], None
    bare = [[{k: v for k, v in t.items() if k != "weight"} for t in s] if isinstance(s, list) else s for s in sides]
    weights: list[list[float] | None] = []
    is_said = False
    for name, side in zip(names, sides):
        turns = side if isinstance(side, list) else []
        said = [turn.get("weight") for turn in turns]  # Arrow adds the key to all messages of a column, with null
        is_said |= any(weight is not None for weight in said)
        default = [float(turn["role"] == "assistant") for turn in turns]
        found = [d if w is None else _turn_weight(w, f"{name}: weight") for d, w in zip(default, said)]
        weights.append(found if isinstance(side, list) else None)
    return bare, weights if is_said else None


def _turn_weight(value: Any, column: str) -> float:
    return float(value) if isinstance(value, bool) else read_weight(value, column)


def first_scored(messages: Any, flags: Sequence[float] | None, all_turns: bool, name: str) -> int | None:
    """Returns the first turn of a conversation that is scored; None for its last turn.

    Raises:
        RowError: that is no turn of the assistant's.
    """
    if flags is None:
        flags = [turn["role"] == "assistant" for turn in messages] if all_turns else []
        if not any(flags) and (all_turns or messages[-1]["role"] != "assistant"):
            what = "holds no" if all_turns else "does not end with an"
            raise RowError(NO_ASSISTANT, f"`{name}` {what} assistant turn")
    return next((i for i, flag in enumerate(flags) if flag), None)
