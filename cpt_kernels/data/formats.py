"""Every accepted dataset form -> one prompt with its completions, still as text or chat messages.

The form is a property of the columns (`detect_form`), text or conversation a property of the row (`parse_row`). Pure
Python: no tokenizer and no dataset here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal, get_args

from ..errors import UserError

Text = str | list  # plain text, or chat messages: a list of {"role": ..., "content": ...}
RankedPairs = Literal["all", "adjacent", "extremes"]

# Why a row is dropped. These are keys of the preparation report.
PROMPT_FILLS = "prompt fills max_length"
EMPTY = "empty completion"
IDENTICAL = "identical sides"
TIED = "tied scores"
NO_ASSISTANT = "no assistant turn"
MALFORMED = "malformed row"
NO_PROMPT = "no prompt"

# The renderer is called with these by us; from the data they would change what is tokenised.
_RESERVED_TEMPLATE_KWARGS = {"conversation", "add_generation_prompt", "tokenize", "return_dict"}


class RowError(UserError):
    """A row that cannot be trained on: `reason` is one of this module's constants, `detail` names the field."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class Form(str, Enum):
    """What a dataset's columns say about its rows."""

    GROUP = "prompt groups"  # our own output
    TOKENS = "tokenised pairs"  # TRL's output
    PREFERENCE = "preference"
    RANKED = "ranked"
    SUPERVISED = "prompt and completion"
    MESSAGES = "messages"


# In this order: a preference dataset often has a `messages` column too, our own output has `chosen` and `rejected`.
FORM_COLUMNS = {
    Form.GROUP: ("prompt_ids", "completion_ids", "chosen", "rejected", "targets"),
    Form.TOKENS: ("prompt_ids", "chosen_ids", "rejected_ids"),
    Form.PREFERENCE: ("chosen", "rejected"),
    Form.RANKED: ("prompt", "completions"),
    Form.SUPERVISED: ("prompt", "completion"),
    Form.MESSAGES: ("messages",),
}

READ_COLUMNS = {"prompt", "scores", "pairs", "tools", "chat_template_kwargs", "row"}.union(*FORM_COLUMNS.values())


def detect_form(columns: Iterable[str]) -> Form:
    """The form that these column names have.

    Raises:
        UserError: images, unpaired preferences, or no known form; the message says what was found and expected.
    """
    columns = set(columns)
    if images := columns & {"image", "images"}:
        raise UserError(f"the dataset has the column {_names(images)}: images are not supported; remove the column")
    form = next((form for form, required in FORM_COLUMNS.items() if columns.issuperset(required)), None)
    if form is None:
        expected = "; ".join(_names(required) for required in FORM_COLUMNS.values())
        raise UserError(f"the dataset has the columns {_names(sorted(columns))}; expected one of: {expected}")
    if form is Form.SUPERVISED and "label" in columns:
        raise UserError(
            "the dataset has the columns `prompt`, `completion`, `label`: unpaired preferences would be trained on as "
            "if every completion were good; build pairs (`chosen`, `rejected`), or remove `label` if it is no verdict"
        )
    return form


@dataclass(frozen=True)
class Example:
    """One parsed row. `completions` are the ranked ones, best first, then the target (y_ref) if there is one."""

    prompt: Text
    completions: list[Text]
    scores: list[float]  # one for each ranked completion, descending; equal scores make no pair
    has_target: bool = False
    tools: list | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    pairs: list[tuple[int, int]] | None = None  # (better, worse) completions; None: what `ranked_pairs` gives
    asked: list = field(default_factory=list)  # as `pairs`, or else as `scores`, with empty completions

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str)

    def count_pairs(self, mode: RankedPairs) -> int:
        """Pairs that the row asks for, also those that an empty completion takes away."""
        return len(ranked_pairs(self.asked, mode) if self.pairs is None else self.asked)


def parse_row(
    row: Mapping[str, Any], form: Form, target_column: str | None = None, gap_column: str | None = None
) -> Example:
    """Text or messages of one row of form PREFERENCE, RANKED, SUPERVISED or MESSAGES.

    Empty completions (null, no text, no messages) leave a ranked row; any other row needs all of its own. The scores of
    a pair are `gap_column`'s value and 0.

    Raises:
        RowError: the row cannot be used; the error says why.
    """
    names, sides, scores = _read_sides(row, form)
    if gap_column is not None:
        scores = [read_gap(row, gap_column), 0.0]
    filled = [i for i, side in enumerate(sides) if not _is_empty(side)]
    needed = 2 if form in (Form.PREFERENCE, Form.RANKED) else 1
    if len(sides) < needed:
        raise RowError(MALFORMED, f"`completions` holds {len(sides)}, but a pair needs two")
    if len(filled) < needed:
        empty = [f"`{names[i]}`" for i in range(len(sides)) if i not in filled]
        raise RowError(EMPTY, f"{', '.join(empty)} without text")
    all_scores = scores
    names, sides, scores = ([values[i] for i in filled] for values in (names, sides, scores))
    pairs = _read_pairs(row, names) if form is Form.RANKED else None
    asked = all_scores if pairs is None else row["pairs"]
    if target_column is not None:
        names.append(target_column)
        sides.append(_read_text_or_messages(target_column, row.get(target_column)))
        if _is_empty(sides[-1]):
            raise RowError(EMPTY, f"`{target_column}` without text")
    if len({isinstance(side, str) for side in sides}) > 1:
        raise RowError(MALFORMED, f"{_names(names)} mix text and messages")
    prompt = None if form is Form.MESSAGES else _read_text_or_messages("prompt", row.get("prompt"))
    if prompt is None and form in (Form.RANKED, Form.SUPERVISED):
        raise RowError(MALFORMED, "`prompt` is null")
    prompt, sides = _split_prompt(prompt, names, sides, ranked=len(scores))
    for name, side in zip(names, sides):
        if _is_empty(side):  # a conversation whose last turn says nothing
            raise RowError(EMPTY, f"`{name}` without text after the prompt")
    tools, template_kwargs = _read_tools(row), _read_template_kwargs(row)
    return Example(prompt, sides, scores, target_column is not None, tools, template_kwargs, pairs, asked)


def parse_prompt(row: Mapping[str, Any], column: str) -> Example:
    """A prompt without completions; of a whole conversation all but the assistant's last turn.

    Raises:
        RowError: there is none, or it cannot be used; the error says why.
    """
    prompt = _read_text_or_messages(column, row.get(column))
    if column == "messages" and isinstance(prompt, list) and prompt and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    if _is_empty(prompt):
        raise RowError(NO_PROMPT, f"`{column}` without text")
    return Example(prompt, [], [], tools=_read_tools(row), template_kwargs=_read_template_kwargs(row))


def check_ranked_pairs(mode: str) -> None:
    """Raise ValueError, naming the option, unless `ranked_pairs` knows the mode."""
    if mode not in get_args(RankedPairs):
        raise UserError(f"ranked_pairs={mode!r} is unknown; it is one of {', '.join(get_args(RankedPairs))}")


def ranked_pairs(scores: Sequence[float], mode: RankedPairs) -> list[tuple[int, int]]:
    """(better, worse) positions in `scores`, which are descending. `all`: every two; `adjacent`: each with the next;
    `extremes`: the first with the last. Two with equal scores are no pair."""
    check_ranked_pairs(mode)
    last = len(scores) - 1
    if mode == "all":
        candidates = [(i, j) for i in range(last) for j in range(i + 1, last + 1)]
    elif mode == "adjacent":
        candidates = [(i, i + 1) for i in range(last)]
    else:
        candidates = [(0, last)] if last > 0 else []
    return [(i, j) for i, j in candidates if scores[i] > scores[j]]


def without_nulls(turn: Mapping[str, Any]) -> dict[str, Any]:
    """A message as its author wrote it: Arrow gives every message of a column the keys of all."""
    return {name: value for name, value in turn.items() if value is not None}


def one_turn_as_text(text: Text, role: str) -> Text:
    """Returns the content of a conversation that is a single turn of `role` with text alone; any other conversation
    comes back without null values.

    This is the identity of prompts (role "user") and of responses (role "assistant"): two are the same if this function
    returns the same for both. So a prompt as text and the same prompt as one user message are one prompt.
    """
    if isinstance(text, str):
        return text
    turns = [without_nulls(turn) for turn in text]
    content = turns[0].get("content") if len(turns) == 1 else None
    is_plain = isinstance(content, str) and turns[0] == {"role": role, "content": content}
    return content if is_plain else turns


def read_gap(row: Mapping[str, Any], column: str) -> float:
    """By how much the chosen side of a row's pair is better.

    Raises:
        RowError: it is no positive number.
    """
    gap = row.get(column)
    if isinstance(gap, bool) or not isinstance(gap, (int, float)) or not 0 < gap < math.inf:
        raise RowError(MALFORMED, f"`{column}` is {gap!r}; expected a number above 0, by how much chosen is better")
    return float(gap)


def _read_sides(row: Mapping[str, Any], form: Form) -> tuple[list[str], list[Text | None], list[float]]:
    """Names, values and scores of the row's ranked completions, best first."""
    if form is Form.PREFERENCE:
        names = ["chosen", "rejected"]
        return names, [_read_text_or_messages(name, row.get(name)) for name in names], [1.0, 0.0]
    if form is Form.SUPERVISED:
        return ["completion"], [_read_text_or_messages("completion", row.get("completion"))], [0.0]
    if form is Form.MESSAGES:
        messages = _read_text_or_messages("messages", row.get("messages"))
        if isinstance(messages, str):
            raise RowError(MALFORMED, "`messages` is str; expected a list of {role, content} messages")
        if not messages or messages[-1]["role"] != "assistant":
            raise RowError(NO_ASSISTANT, "`messages` does not end with an assistant turn")
        return ["messages"], [messages], [0.0]  # a lone conversation's implicit prompt is all but its last turn
    return _read_ranked_sides(row)


def _read_ranked_sides(row: Mapping[str, Any]) -> tuple[list[str], list[Text | None], list[float]]:
    completions, scores = row.get("completions"), row.get("scores")
    if not isinstance(completions, list):
        raise RowError(MALFORMED, f"`completions` is {type(completions).__name__}; expected a list of completions")
    names = [f"completions[{i}]" for i in range(len(completions))]
    sides = [_read_text_or_messages(name, side) for name, side in zip(names, completions)]
    if scores is None:
        return names, sides, [float(-i) for i in range(len(sides))]
    if not isinstance(scores, list) or len(scores) != len(sides):
        raise RowError(MALFORMED, f"`scores` is not a list of {len(sides)} numbers, one for each of `completions`")
    if not all(isinstance(score, (int, float)) and math.isfinite(score) for score in scores):
        raise RowError(MALFORMED, f"`scores` holds a value that is no finite number: {scores}")
    order = sorted(range(len(scores)), key=lambda i: -scores[i])  # stable: ties keep the row's order
    return [names[i] for i in order], [sides[i] for i in order], [float(scores[i]) for i in order]


def _read_pairs(row: Mapping[str, Any], names: list[str]) -> list[tuple[int, int]] | None:
    """The row's own pairs of those completions that are left, by their places in `names`."""
    if (pairs := row.get("pairs")) is None:
        return None
    given, place = range(len(row["completions"])), {name: i for i, name in enumerate(names)}
    if not isinstance(pairs, list) or not pairs or not all(_is_edge(pair, given) for pair in pairs):
        raise RowError(MALFORMED, f"`pairs` is no list of [better, worse] positions in the {len(given)} completions")
    found = [tuple(place.get(f"completions[{i}]") for i in pair) for pair in pairs]
    if not (left := [pair for pair in found if None not in pair]):
        raise RowError(EMPTY, "each of `pairs` has a completion without text")
    return left


def _is_edge(pair: Any, given: range) -> bool:
    inside = isinstance(pair, list) and all(type(i) is int and i in given for i in pair)
    return inside and len(pair) == 2 and pair[0] != pair[1]


def _split_prompt(prompt: Text | None, names: list[str], sides: list[Text], ranked: int) -> tuple[Text, list[Text]]:
    """The explicit prompt, or the common start of the ranked sides, with what each side adds to it.

    A text prompt next to sides that are whole conversations only repeats their first turn, so these are split too.
    """
    is_chat = not isinstance(sides[0], str)
    if prompt is not None and is_chat == isinstance(prompt, list):
        if is_chat and not prompt:
            raise RowError(MALFORMED, "`prompt` holds no message")
        return prompt, sides
    if isinstance(prompt, list):
        raise RowError(MALFORMED, f"`prompt` is a list of messages, but `{names[0]}` is text")
    bare = [list(map(without_nulls, side)) for side in sides] if is_chat else sides  # columns may have different keys
    cut = _shared_length(bare[:ranked])
    if is_chat and cut == 0:
        raise RowError(MALFORMED, f"no turn comes before the completion in {_names(names[:ranked])}: no prompt")
    if any(side[:cut] != bare[0][:cut] for side in bare[ranked:]):
        raise RowError(MALFORMED, f"`{names[-1]}` does not start with the prompt that the other sides share")
    return sides[0][:cut], [side[cut:] for side in sides]


def _shared_length(sides: Sequence[Text]) -> int:
    """Length of the common start of `sides`, in characters or turns, as TRL counts it: one that is wholly contained
    keeps its last item as completion, and a space before the place where texts part belongs to the completion."""
    shortest = min(len(side) for side in sides)
    for cut in range(shortest):
        if any(side[cut] != sides[0][cut] for side in sides):
            # TRL also looks one back from position 0, at the text's *end*: an oversight that we do not repeat.
            return cut - 1 if cut > 0 and sides[0][cut - 1] == " " else cut
    return shortest - 1


def _read_text_or_messages(field: str, value: Any) -> Text | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value):
        raise RowError(
            MALFORMED, f"`{field}` is {_type_name(value)}; expected text or a list of {{role, content}} messages"
        )
    parts = (part for m in value if isinstance(m.get("content"), list) for part in m["content"])
    if any(isinstance(part, dict) and part.get("type") in ("image", "image_url", "video", "audio") for part in parts):
        raise RowError(MALFORMED, f"`{field}` holds a part that is not text")
    return value


def _read_tools(row: Mapping[str, Any]) -> list | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise RowError(MALFORMED, f"`tools` is text that is no JSON: {error}") from error
    if tools is not None and not isinstance(tools, list):
        raise RowError(MALFORMED, f"`tools` is {_type_name(tools)}; expected a list or its JSON")
    return tools


def _read_template_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    kwargs = row.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise RowError(MALFORMED, f"`chat_template_kwargs` is {_type_name(kwargs)}; expected a dict")
    if kwargs and (reserved := _RESERVED_TEMPLATE_KWARGS & kwargs.keys()):
        raise RowError(MALFORMED, f"`chat_template_kwargs` may not set {_names(sorted(reserved))}")
    return kwargs or {}


def _is_empty(side: Text | None) -> bool:
    """No text at all (white space is text). A message counts by anything besides its role: content, tool calls, ..."""
    if side is None or isinstance(side, str):
        return not side
    return not any(value for message in side for key, value in message.items() if key != "role")


def _type_name(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {'/'.join(sorted({type(item).__name__ for item in value}))}"
    return type(value).__name__


def _names(fields: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in fields)
