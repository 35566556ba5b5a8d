"""Reads rows of every accepted dataset form as one prompt with its completions, still as text or chat messages.

The columns of a dataset decide its form (`detect_form`); whether a row is text or a conversation is decided row by row
(`parse_row`). Pure Python, without tokenizer and `datasets`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, time
from enum import Enum
from typing import Any, Literal, cast, get_args

from ..errors import UserError

Text = str | list  # plain text, or chat messages: a list of {"role": ..., "content": ...}
RankedPairs = Literal["all", "adjacent", "extremes"]

# Reasons why a row is dropped: the keys of `PreparationReport.dropped`.
PROMPT_FILLS = "prompt fills max_length"
EMPTY = "empty completion"
IDENTICAL = "identical sides"
TIED = "tied scores"
NO_ASSISTANT = "no assistant turn"
MALFORMED = "malformed row"
NO_PROMPT = "no prompt"

# Arguments that tokenize.py passes to the chat template itself. A row must not change them.
_RESERVED_TEMPLATE_KWARGS = {"conversation", "add_generation_prompt", "tokenize", "return_dict"}


class RowError(UserError):
    """A row that cannot be used. `reason` is one of this module's constants, `detail` names the field."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


class Form(str, Enum):
    """The form of a dataset's rows, known from its columns."""

    GROUP = "prompt groups"  # written by `preparation.prepare`
    TOKENS = "tokenised pairs"  # written by TRL
    PREFERENCE = "preference"
    RANKED = "ranked"
    SUPERVISED = "prompt and completion"
    MESSAGES = "messages"


# The first form whose columns are all present counts: prompt groups also have `chosen` and `rejected`, and a preference
# dataset often has a `messages` column.
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
    """Returns the form of a dataset with these columns.

    Raises:
        UserError: the columns hold images or unpaired preferences, or have no known form; the message names the columns
            found and expected.
    """
    columns = set(columns)
    if images := columns & {"image", "images"}:
        raise UserError(f"the dataset has the column {_names(images)}: images are not supported: remove the column")
    form = next((form for form, required in FORM_COLUMNS.items() if columns.issuperset(required)), None)
    if form is None:
        expected = "; ".join(_names(required) for required in FORM_COLUMNS.values())
        raise UserError(f"the dataset has the columns {_names(sorted(columns))}; expected one of: {expected}")
    if form is Form.SUPERVISED and "label" in columns:
        raise UserError(
            "the dataset has the columns `prompt`, `completion`, `label`: unpaired preferences are not supported, and "
            "training on all completions would ignore `label`; build pairs (`chosen`, `rejected`), or remove `label`"
        )
    return form


@dataclass(frozen=True)
class Example:
    """One parsed row. `completions` are the ranked ones, best first, then the target (y_ref) if there is one."""

    prompt: Text
    completions: list[Text]
    scores: list[float]  # rating of each ranked completion, descending; two with equal ratings make no pair
    has_target: bool = False
    tools: list | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    pairs: list[tuple[int, int]] | None = None  # (better, worse) completions; None leaves the choice to `ranked_pairs`
    asked: list = field(default_factory=list)  # `pairs` if given, else `scores`, before empty completions were removed

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str)

    def count_pairs(self, mode: RankedPairs) -> int:
        """Returns how many pairs the row asks for, including those lost because a completion is empty."""
        return len(ranked_pairs(self.asked, mode) if self.pairs is None else self.asked)


def parse_row(
    row: Mapping[str, Any], form: Form, target_column: str | None = None, gap_column: str | None = None
) -> Example:
    """Parses one row of the form PREFERENCE, RANKED, SUPERVISED or MESSAGES.

    Empty completions (null, no text, no messages) are removed from a ranked row; rows of other forms must have none.
    With `gap_column`, the ratings of a pair are that column's value and 0.

    Raises:
        RowError: the row cannot be used; its reason and detail say why.
    """
    # The ranked completions. `names` are what errors call them.
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
    names, scores = [names[i] for i in filled], [scores[i] for i in filled]
    completions = cast("list[Text]", [sides[i] for i in filled])
    pairs = _read_pairs(row, names) if form is Form.RANKED else None
    asked = all_scores if pairs is None else row["pairs"]

    # The target, a further completion.
    if target_column is not None:
        target = _read_text_or_messages(target_column, row.get(target_column))
        if target is None or _is_empty(target):
            raise RowError(EMPTY, f"`{target_column}` without text")
        names.append(target_column)
        completions.append(target)
    if len({isinstance(completion, str) for completion in completions}) > 1:
        raise RowError(MALFORMED, f"{_names(names)} mix text and messages")

    # The prompt: explicit, or what the completions have in common.
    given = None if form is Form.MESSAGES else _read_text_or_messages("prompt", row.get("prompt"))
    if given is None and form in (Form.RANKED, Form.SUPERVISED):
        raise RowError(MALFORMED, "`prompt` is null")
    prompt, completions = _split_prompt(given, names, completions, ranked=len(scores))
    for name, completion in zip(names, completions):
        if _is_empty(completion):  # for instance a conversation whose last message has no content
            raise RowError(EMPTY, f"`{name}` without text after the prompt")
    tools, template_kwargs = _read_tools(row), _read_template_kwargs(row)
    return Example(prompt, completions, scores, target_column is not None, tools, template_kwargs, pairs, asked)


def parse_prompt(row: Mapping[str, Any], column: str) -> Example:
    """Parses the prompt of a row without completions. A conversation in `messages` loses the assistant's last turn.

    Raises:
        RowError: the prompt is empty or cannot be used; its reason and detail say why.
    """
    prompt = _read_text_or_messages(column, row.get(column))
    if column == "messages" and isinstance(prompt, list) and prompt and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    if prompt is None or _is_empty(prompt):
        raise RowError(NO_PROMPT, f"`{column}` without text")
    return Example(prompt, [], [], tools=_read_tools(row), template_kwargs=_read_template_kwargs(row))


def check_ranked_pairs(mode: str) -> None:
    """Raises a UserError that names the option unless `ranked_pairs` accepts the mode."""
    if mode not in get_args(RankedPairs):
        raise UserError(f"ranked_pairs={mode!r} is unknown: choose one of {', '.join(get_args(RankedPairs))}")


def ranked_pairs(scores: Sequence[float], mode: RankedPairs) -> list[tuple[int, int]]:
    """Returns the pairs of a ranked row as (better, worse) positions in `scores`, which must be descending.

    `all` pairs every two completions, `adjacent` each with the next, `extremes` the first with the last. Two with equal
    scores are no pair.
    """
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
    """Returns a message without null values: Arrow adds the keys of all messages of a column to each of them."""
    return {name: value for name, value in turn.items() if value is not None}


def one_turn_as_text(text: Text, role: str) -> Text:
    """Returns the content of a conversation that is one turn of `role` and has only text.

    Text is returned as it is, and any other conversation without null values.

    This is the identity of prompts (role "user") and of responses (role "assistant"): two are the same if this function
    returns the same for both. So a prompt as text and the same prompt as one user message are one prompt.
    """
    if isinstance(text, str):
        return text
    turns = [without_nulls(turn) for turn in text]
    content = turns[0].get("content") if len(turns) == 1 else None
    return content if isinstance(content, str) and turns[0] == {"role": role, "content": content} else turns


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


def read_gap(row: Mapping[str, Any], column: str) -> float:
    """Returns by how much the chosen side of a row's pair is better than the rejected one.

    Raises:
        RowError: the value is not a positive number.
    """
    gap = read_number(row.get(column))
    if gap is None or not 0 < gap < math.inf:
        given = row.get(column)
        raise RowError(MALFORMED, f"`{column}` is {given!r}; expected a number above 0: by how much chosen is better")
    return gap


def _read_sides(row: Mapping[str, Any], form: Form) -> tuple[list[str], list[Text | None], list[float]]:
    """Returns names (for errors), values and ratings of the row's ranked completions, best first."""
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
        return ["messages"], [messages], [0.0]  # `_split_prompt` cuts before the last turn
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
    numbers = [number for number in map(read_number, scores) if number is not None and math.isfinite(number)]
    if len(numbers) < len(scores):
        raise RowError(MALFORMED, f"`scores` holds a value that is not a finite number: {scores}")
    order = sorted(range(len(scores)), key=lambda i: -numbers[i])  # stable: ties keep the row's order
    return [names[i] for i in order], [sides[i] for i in order], [numbers[i] for i in order]


def _read_pairs(row: Mapping[str, Any], names: list[str]) -> list[tuple[int, int]] | None:
    """Returns the row's `pairs` as positions in `names`, without pairs of removed completions; None without `pairs`."""
    if (pairs := row.get("pairs")) is None:
        return None
    given, position = range(len(row["completions"])), {name: i for i, name in enumerate(names)}
    if not isinstance(pairs, list) or not pairs or not all(_is_edge(pair, given) for pair in pairs):
        raise RowError(MALFORMED, f"`pairs` is not a list of [better, worse] positions in the {len(given)} completions")
    found = [(position.get(f"completions[{better}]"), position.get(f"completions[{worse}]")) for better, worse in pairs]
    left = [(better, worse) for better, worse in found if better is not None and worse is not None]
    if not left:
        raise RowError(EMPTY, "each of `pairs` has a completion without text")
    return left


def _is_edge(pair: Any, given: range) -> bool:
    inside = isinstance(pair, list) and all(type(i) is int and i in given for i in pair)
    return inside and len(pair) == 2 and pair[0] != pair[1]


def _split_prompt(prompt: Text | None, names: list[str], sides: list[Text], ranked: int) -> tuple[Text, list[Text]]:
    """Splits sides into the prompt and the completions that follow it.

    An explicit prompt of the sides' own kind (text or messages) is returned with the sides as they are. Otherwise the
    prompt is the common start of the first `ranked` sides. This includes a text prompt beside whole conversations: it
    only repeats their first turn.
    """
    is_chat = not isinstance(sides[0], str)
    if prompt is not None and is_chat == isinstance(prompt, list):
        if is_chat and not prompt:
            raise RowError(MALFORMED, "`prompt` holds no message")
        return prompt, sides
    if isinstance(prompt, list):
        raise RowError(MALFORMED, f"`prompt` is a list of messages, but `{names[0]}` is text")
    # Arrow adds null keys to messages, and not the same ones in every column.
    bare = [list(map(without_nulls, side)) for side in sides] if is_chat else sides
    cut = _shared_length(bare[:ranked])
    if is_chat and cut == 0:
        raise RowError(MALFORMED, f"no turn comes before the completion in {_names(names[:ranked])}: no prompt")
    if any(side[:cut] != bare[0][:cut] for side in bare[ranked:]):
        raise RowError(MALFORMED, f"`{names[-1]}` does not start with the prompt that the other sides share")
    return sides[0][:cut], [side[cut:] for side in sides]


def _shared_length(sides: Sequence[Text]) -> int:
    """Returns the length of the common start of `sides`, in characters or turns, by TRL's rules.

    A side that is a prefix of the others keeps its last character or turn as its completion. A space just before the
    first difference of texts belongs to the completions.
    """
    shortest = min(len(side) for side in sides)
    for cut in range(shortest):
        if any(side[cut] != sides[0][cut] for side in sides):
            # At cut 0 TRL looks at position -1, the end of the text, for the space. That is a bug, not copied here.
            return cut - 1 if cut > 0 and sides[0][cut - 1] == " " else cut
    return shortest - 1


def _read_text_or_messages(field: str, value: Any) -> Text | None:
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value):
        # `datasets` guesses types when it reads JSON; `load_data` does not.
        is_guessed = isinstance(value, (date, time))
        hint = "; `datasets` made it from text: read the file with cpt_kernels.data.sources.load_data" * is_guessed
        raise RowError(
            MALFORMED, f"`{field}` is {_type_name(value)}; expected text or a list of {{role, content}} messages{hint}"
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
            raise RowError(MALFORMED, f"`tools` is text that is not JSON: {error}") from error
    if tools is not None and not isinstance(tools, list):
        raise RowError(MALFORMED, f"`tools` is {_type_name(tools)}; expected a list or its JSON")
    return tools or None  # templates write a heading for an empty list, as TRL's authors found with Llama 3


def _read_template_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    kwargs = row.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise RowError(MALFORMED, f"`chat_template_kwargs` is {_type_name(kwargs)}; expected a dict")
    if kwargs and (reserved := _RESERVED_TEMPLATE_KWARGS & kwargs.keys()):
        raise RowError(MALFORMED, f"`chat_template_kwargs` may not set {_names(sorted(reserved))}")
    return kwargs or {}


def _is_empty(side: Text | None) -> bool:
    """Returns whether a side has nothing to train on. White space counts as text, and so do tool calls of a message."""
    if side is None or isinstance(side, str):
        return not side
    return not any(value for message in side for key, value in message.items() if key != "role")


def _type_name(value: Any) -> str:
    if isinstance(value, list):
        return f"a list of {'/'.join(sorted({type(item).__name__ for item in value}))}"
    return type(value).__name__


def _names(fields: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in fields)
