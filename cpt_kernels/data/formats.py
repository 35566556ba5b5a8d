"""Reads rows of every accepted dataset form as one prompt with its completions, still as text or chat messages.

The columns of a dataset decide its form (:mod:`.forms`); whether a row is text or a conversation is decided row by row
(`parse_row`). Pure Python, without tokenizer and `datasets`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from ..errors import UserError
from .forms import Form, Roles, in_backticks
from .messages import (
    MALFORMED,
    RowError,
    Text,
    as_list,
    read_history,
    read_text_or_messages,
    text_as_turns,
    transcript_prompt,
    type_name,
)
from .response_columns import RESPONSE_NAMES
from .weights import first_scored, read_number, read_train_on, read_weight, take_weights

RankedPairs = Literal["all", "adjacent", "extremes"]
PromptFormat = Literal["auto", "chat", "text"]  # chat: text becomes turns of the chat template; text: no conversations

# Reasons why a row is dropped, with MALFORMED: the keys of `PreparationReport.dropped`.
PROMPT_FILLS = "prompt fills max_length"
EMPTY = "empty completion"
IDENTICAL = "identical sides"
UNSCORED = "completion without a scored token"
TIED = "tied scores"
IMAGE_CUT = "max_length would cut an image"
NO_PROMPT = "no prompt"

# Arguments of `apply_chat_template` that do not reach the template, or that tokenize.py gives. A row must not set them.
_RESERVED_TEMPLATE_KWARGS = {
    *("conversation", "tools", "add_generation_prompt", "continue_final_message", "tokenize", "padding", "truncation"),
    *("max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask", "sanitize_control_tokens"),
    "tokenizer_kwargs",
}


# The keys that may hold the rating of an item of `completions`.
_RATINGS = ("overall_score", "rating", "score", "fine-grained_score")


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
    images: list = field(default_factory=list)  # of the prompt, as the row holds them
    asked: list = field(default_factory=list)  # `pairs` if given, else `scores`, before empty completions were removed
    # For each completion the weights of its turns, None for 1 on the assistant's; None: the row does not say so
    train_on: list[list[float] | None] | None = None
    weights: list[float] | float = 1.0  # of all pairs, or of each of `pairs`
    beginning: str = ""  # the text with which all completions begin, which belongs to the prompt
    is_open: bool = False  # the completions are steps, after which an answer goes on

    @property
    def is_chat(self) -> bool:
        return not isinstance(self.prompt, str)

    def count_pairs(self, mode: RankedPairs) -> int:
        """Returns how many pairs the row asks for, including those lost because a completion is empty."""
        return len(ranked_pairs(self.asked, mode) if self.pairs is None else self.asked)


def parse_row(
    row: Mapping[str, Any],
    form: Form,
    target_column: str | None = None,
    gap_column: str | None = None,
    roles: Roles | None = None,
    prompt_format: PromptFormat = "auto",
    *,
    weight_column: str | None = None,
    all_turns: bool = False,
) -> Example:
    """Parses one row of the form PREFERENCE, RANKED, SUPERVISED or MESSAGES.

    Empty completions (null, no text, no messages) are removed from a ranked row; rows of other forms must have none.
    With `gap_column`, the ratings of a pair are that column's value and 0. `roles` names the columns that do not have
    our names. A row with a system prompt or a history is a conversation; see `PromptFormat` for other rows. With
    `all_turns`, the completion of a row of MESSAGES begins with the assistant's first turn, else with its last. With
    `train_on`, or a `weight` in a message, it begins with the first turn that is scored.

    Raises:
        RowError: the row cannot be used; its reason and detail say why.
    """
    # The ranked completions. `names` are what errors call them.
    roles = roles or {}
    if of_tokens := [name for name in ("completion_mask", "token_weights") if row.get(name) is not None]:
        mend = "give token ids (`prompt_ids`, ...), or `train_on`, a number per turn of messages"
        raise RowError(MALFORMED, f"`{of_tokens[0]}` is for tokens, and the row is not tokenized: {mend}")
    names, sides, scores = _read_sides(row, form, roles)
    train_on = read_train_on(row, form, names, sides)
    sides, in_messages = take_weights(names, sides)
    if train_on is not None and in_messages is not None:
        raise RowError(MALFORMED, "`train_on` and a `weight` in messages both say which turns are scored: give one")
    train_on = in_messages if train_on is None else train_on
    if gap_column is not None:
        scores = [read_gap(row, gap_column), 0.0]
    filled = [i for i, side in enumerate(sides) if not _is_empty(side)]
    needed = 2 if form in (Form.PREFERENCE, Form.RANKED) else 1
    if len(sides) < needed:
        raise RowError(MALFORMED, f"`{_column(roles, 'completions')}` holds {len(sides)}, but a pair needs two")
    if len(filled) < needed:
        empty = [f"`{names[i]}`" for i in range(len(sides)) if i not in filled]
        raise RowError(EMPTY, f"{', '.join(empty)} without text")
    beginning, is_open = "", False
    if "initial" in roles:
        beginning, is_open, sides = _read_steps(row, roles, names, sides, form)
    all_scores = scores
    names, scores = [names[i] for i in filled], [scores[i] for i in filled]
    completions = cast("list[Text]", [sides[i] for i in filled])
    pairs, weights = _read_pairs(row, names, _column(roles, "completions"), weight_column, form)
    asked = all_scores if pairs is None else row["pairs"]
    flags: list = [None] * len(filled) if train_on is None else [train_on[i] for i in filled]

    # The target, a further completion.
    if target_column is not None:
        target = read_text_or_messages(target_column, row.get(target_column), "images" in roles)
        if target is None or _is_empty(target):
            raise RowError(EMPTY, f"`{target_column}` without text")
        ([target], of_target) = cast("Any", take_weights([target_column], [target]))
        names.append(target_column)
        completions += _after_beginning([target], beginning, row, roles) if "initial" in roles else [target]
        flags += of_target or [None]
        train_on = flags if of_target else train_on
    if len({isinstance(completion, str) for completion in completions}) > 1:
        raise RowError(MALFORMED, f"{in_backticks(names)} mix text and messages")

    # The prompt: explicit, or what the completions have in common.
    given = None if form is Form.MESSAGES else _read_prompt(row, roles)
    if given is None and form is not Form.MESSAGES:
        column = _column(roles, "prompt")
        if form is not Form.PREFERENCE or (column in row and not are_whole(completions)):
            raise RowError(NO_PROMPT, f"`{column}` is null")
    is_whole = form is Form.MESSAGES
    first = first_scored(completions[0], flags[0], all_turns, names[0]) if is_whole else None
    prompt, completions = _split_prompt(given, names, completions, ranked=len(scores), cut=first)
    flags = [turns if turns is None else turns[-len(side) :] for turns, side in zip(flags, completions)]
    for name, completion in zip(names, completions):
        if _is_empty(completion):  # for instance a conversation whose last message has no content
            raise RowError(EMPTY, f"`{name}` without text after the prompt")
    prompt, completions = _in_format(prompt, completions, prompt_format, row, roles)
    if is_open and any(isinstance(side, list) and len(side) != 1 for side in completions):
        raise RowError(MALFORMED, f"{in_backticks(names)} hold several turns, so they are no steps of one answer")
    tools, template_kwargs = _read_tools(row, roles), _read_template_kwargs(row)
    return Example(
        *(prompt, completions, scores, target_column is not None, tools, template_kwargs, pairs),
        images=_read_images(row, roles),
        asked=asked,
        train_on=None if train_on is None else flags,
        weights=weights,
        beginning=beginning,
        is_open=is_open,
    )


def parse_prompt(
    row: Mapping[str, Any], column: str, roles: Roles | None = None, prompt_format: PromptFormat = "auto"
) -> Example:
    """Parses the prompt of a row without completions. A conversation in `messages` loses the assistant's last turn.

    `roles` names the columns that add to the prompt: see `forms.find_prompt`.

    Raises:
        RowError: the prompt is empty or cannot be used; its reason and detail say why.
    """
    roles = {**(roles or {}), "prompt": column}
    prompt = _read_prompt(row, roles)
    is_whole = column in ("messages", "conversations")
    if is_whole and isinstance(prompt, list) and prompt and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    if prompt is None or _is_empty(prompt):
        raise RowError(NO_PROMPT, f"`{column}` without text")
    prompt, _ = _in_format(prompt, [], prompt_format, row, roles)
    tools, template_kwargs = _read_tools(row, roles), _read_template_kwargs(row)
    return Example(prompt, [], [], tools=tools, template_kwargs=template_kwargs, images=_read_images(row, roles))


def whole_prompt(row: Mapping[str, Any], roles: Roles) -> Text | None:
    """Returns the prompt of a row, with what `roles` adds to it, or None if it is null.

    Raises:
        RowError: the prompt cannot be used.
    """
    prompt = _read_prompt(row, roles)
    return None if prompt is None else _in_format(prompt, [], "auto", row, roles)[0]


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


def _column(roles: Roles, role: str) -> str:
    return roles.get(role, role)


def _read_sides(row: Mapping[str, Any], form: Form, roles: Roles) -> tuple[list[str], list[Text | None], list[float]]:
    """Returns names (for errors), values and ratings of the row's ranked completions, best first."""
    if form is Form.PREFERENCE:
        names = [_column(roles, side) for side in ("chosen", "rejected")]
        chosen, rejected = (read_text_or_messages(name, row.get(name), "images" in roles) for name in names)
        if names[0] == "messages" and chosen and isinstance(rejected, str):
            # ms-swift: the rejected text stands in place of the conversation's last turn.
            rejected = [*chosen[:-1], {"role": "assistant", "content": rejected}]
        return names, [chosen, rejected], [1.0, 0.0]
    if form is Form.SUPERVISED:
        name = _column(roles, "completion")
        return [name], [read_text_or_messages(name, row.get(name), "images" in roles)], [0.0]
    if form is Form.MESSAGES:
        name = _column(roles, "messages")
        messages = read_text_or_messages(name, row.get(name), "images" in roles)
        if isinstance(messages, str):
            raise RowError(MALFORMED, f"`{name}` is str; expected a list of {{role, content}} messages")
        return [name], [messages], [0.0]  # `_split_prompt` cuts before a turn
    return _read_ranked_sides(row, roles)


def _read_steps(
    row: Mapping[str, Any], roles: Roles, names: list[str], sides: list[Text | None], form: Form
) -> tuple[str, bool, list[Text | None]]:
    """Returns the beginning of the answers, whether they go on after the given steps, and the answers from their start.

    An answer is the beginning, a step, and the rest if the row has one. Without a rest the answer is not finished, so
    no end of the answer follows the step.
    """
    beginning, rests = row.get(roles["initial"]) or "", [None] * len(sides)
    if form is Form.PREFERENCE:
        rests = [row.get(roles.get(f"{side}_rest", "")) for side in ("chosen", "rejected")]
    if not all(isinstance(text, str) for text in (beginning, *(rest or "" for rest in rests))) or "images" in roles:
        raise RowError(MALFORMED, f"`{roles['initial']}` and the rests of answers must be text, in rows without images")
    if any(isinstance(side, list) for side in sides):
        raise RowError(MALFORMED, f"{in_backticks(names)} must be text, because they continue `{roles['initial']}`")
    if len({rest is None for rest in rests}) > 1:
        raise RowError(MALFORMED, "one of `chosen_rest` and `rejected_rest` is null: give both, or none")
    whole = [side and f"{side}{rest or ''}" for side, rest in zip(sides, rests)]
    return beginning, None in rests, _after_beginning(whole, beginning, row, roles)


def _after_beginning(sides: list, beginning: str, row: Mapping[str, Any], roles: Roles) -> list:
    """Returns texts, or nulls, behind the beginning of the answer; as messages if the prompt is not text."""
    whole = [side and f"{beginning}{side}" for side in sides]
    if isinstance(row.get(_column(roles, "prompt")), (str, type(None))):
        return whole
    return [side and [{"role": "assistant", "content": side}] for side in whole]


def _read_ranked_sides(row: Mapping[str, Any], roles: Roles) -> tuple[list[str], list[Text | None], list[float]]:
    column, rating = _column(roles, "completions"), _column(roles, "scores")
    completions, scores = row.get(column), row.get(rating)
    if not isinstance(completions, list):
        raise RowError(MALFORMED, f"`{column}` is {type(completions).__name__}; expected a list of completions")
    if completions and all(is_record(item) for item in completions):
        # UltraFeedback: objects with a response and its ratings.
        scores = scores or [_first_of(item, _RATINGS) for item in completions]
        completions = [_first_of(item, RESPONSE_NAMES) for item in completions]
    names = [f"{column}[{i}]" for i in range(len(completions))]
    sides = [read_text_or_messages(name, side, "images" in roles) for name, side in zip(names, completions)]
    if scores is None:
        return names, sides, [float(-i) for i in range(len(sides))]
    if not isinstance(scores, list) or len(scores) != len(sides):
        raise RowError(MALFORMED, f"`{rating}` is not a list of {len(sides)} numbers, one for each of `{column}`")
    numbers = [number for number in map(read_number, scores) if number is not None and math.isfinite(number)]
    if len(numbers) < len(scores):
        raise RowError(MALFORMED, f"`{rating}` holds a value that is not a finite number: {scores}")
    order = sorted(range(len(scores)), key=lambda i: -numbers[i])  # stable: ties keep the row's order
    return [names[i] for i in order], [sides[i] for i in order], [numbers[i] for i in order]


def is_record(item: Any) -> bool:
    """Returns whether an item of `completions` is an object that holds a response, and not a message."""
    return isinstance(item, dict) and "role" not in item and "from" not in item


def _first_of(item: Mapping[str, Any], keys: Iterable[str]) -> Any:
    return next((item[key] for key in keys if item.get(key) is not None), None)


def _read_pairs(
    row: Mapping[str, Any], names: list[str], column: str, weight_column: str | None, form: Form
) -> tuple[list[tuple[int, int]] | None, list[float] | float]:
    """Returns the row's `pairs` as positions in `names`, without pairs of removed completions, and the pairs' weights.

    Without `pairs` the first is None, and one weight counts for all pairs.
    """
    weight = 1.0 if weight_column is None else row.get(weight_column)
    if form is not Form.RANKED or (pairs := row.get("pairs")) is None:
        return None, read_weight(weight, str(weight_column))
    given, position = range(len(row[column])), {name: i for i, name in enumerate(names)}
    if not isinstance(pairs, list) or not pairs or not all(is_edge(pair, given) for pair in pairs):
        raise RowError(MALFORMED, f"`pairs` is not a list of [better, worse] positions in the {len(given)} completions")
    found = [(position.get(f"{column}[{better}]"), position.get(f"{column}[{worse}]")) for better, worse in pairs]
    if isinstance(weight, list) and len(weight) != len(pairs):
        raise RowError(MALFORMED, f"`{weight_column}` holds {len(weight)} weights for {len(pairs)} `pairs`")
    each = weight if isinstance(weight, list) else [weight] * len(pairs)
    weights = [read_weight(value, str(weight_column)) for value in each]
    left = [(b, w, weight) for (b, w), weight in zip(found, weights) if b is not None and w is not None]
    if not left:
        raise RowError(EMPTY, "each of `pairs` has a completion without text")
    return [(better, worse) for better, worse, _ in left], [weight for *_, weight in left]


def is_edge(pair: Any, given: range) -> bool:
    """Returns whether a value is a list of two different numbers of ``given``."""
    inside = isinstance(pair, list) and all(type(i) is int and i in given for i in pair)
    return inside and len(pair) == 2 and pair[0] != pair[1]


def _read_prompt(row: Mapping[str, Any], roles: Roles) -> Text | None:
    """Returns the row's explicit prompt, to which Alpaca's `input` adds a line; None if it is null."""
    column = _column(roles, "prompt")
    value = row.get(column)
    if isinstance(value, dict) and isinstance(value.get("messages"), list):
        value = value["messages"]  # OpenAI's `input`
    ([prompt], _) = take_weights([column], [read_text_or_messages(column, value, "images" in roles)])
    more = row.get(roles["input"]) if "input" in roles else None
    if not more:
        return prompt
    if not isinstance(more, str) or isinstance(prompt, list):
        raise RowError(MALFORMED, f"`{column}` and `{roles['input']}` are not both text, so they cannot be joined")
    return f"{prompt}\n{more}" if prompt else more


def _in_format(
    prompt: Text, completions: list[Text], prompt_format: PromptFormat, row: Mapping[str, Any], roles: Roles
) -> tuple[Text, list[Text]]:
    """Returns prompt and completions in the given format, after the row's system prompt and earlier turns."""
    system, history = (row.get(roles[role]) if role in roles else None for role in ("system", "history"))
    if system is not None and not isinstance(system, str):
        raise RowError(MALFORMED, f"`{roles['system']}` is {type_name(system)}; expected text")
    before = read_history(roles["history"], history) if history else []
    if system:
        before = [{"role": "system", "content": system}, *before]
    if prompt_format == "text" and (before or isinstance(prompt, list)):
        why = f"`{roles['system' if system else 'history']}` makes" if before else "messages make"
        raise RowError(MALFORMED, f"{why} it a conversation, which prompt_format=text refuses: set prompt_format=auto")
    if isinstance(prompt, str) and (before or prompt_format == "chat"):
        prompt, turns = text_as_turns(prompt, cast("list[str]", completions))
        completions = [*turns]
    if before and isinstance(prompt, list):
        if system and prompt and prompt[0]["role"] in ("system", "developer"):
            before = before[1:]  # the conversation has its own, which counts in LLaMA-Factory, too
        prompt = [*before, *prompt]
    return prompt, completions


def are_whole(sides: Sequence[Text]) -> bool:
    """Returns whether the sides are conversations that begin with their prompt."""
    starts = [side[0]["role"] if isinstance(side, list) and side else "assistant" for side in sides]
    return bool(starts) and not {"assistant", "tool"} & {*starts}


def _split_prompt(
    prompt: Text | None, names: list[str], sides: list[Text], ranked: int, cut: int | None = None
) -> tuple[Text, list[Text]]:
    """Splits sides into the prompt and the completions that follow it.

    An explicit prompt of the sides' own kind (text or messages) is returned with the sides as they are. Otherwise the
    prompt is the common start of the first `ranked` sides. This includes a prompt beside whole conversations, which
    only repeats their start. Transcripts are cut before an answer. `cut` is the prompt's number of turns, if known.
    """
    is_chat = not isinstance(sides[0], str)
    # Arrow adds null keys to messages, and not the same ones in every column.
    bare = [list(map(without_nulls, side)) for side in sides] if is_chat else sides
    if prompt is not None and is_chat == isinstance(prompt, list):
        if is_chat and not prompt:
            raise RowError(MALFORMED, "`prompt` holds no message")
        start = list(map(without_nulls, prompt)) if is_chat else []
        if not is_chat or any(side[:1] != start[:1] for side in bare):
            return prompt, sides
        if all(side[: len(start)] == start and len(side) > len(start) for side in bare):
            return prompt, [side[len(start) :] for side in sides]
    elif isinstance(prompt, list):
        raise RowError(MALFORMED, f"`prompt` is a list of messages, but `{names[0]}` is text")
    elif prompt and is_chat and not are_whole(sides):
        raise RowError(
            MALFORMED,
            f"`prompt` is text, but `{names[0]}` is a list of messages, and no turn comes before the completion: give"
            " the prompt as a message of the user, or the sides as text",
        )
    cut = cut if is_chat else transcript_prompt(cast("list[str]", sides[:ranked]))
    cut = _shared_length(bare[:ranked]) if cut is None else cut
    if is_chat and cut == 0:
        raise RowError(MALFORMED, f"no turn comes before the completion in {in_backticks(names[:ranked])}: no prompt")
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


def _read_tools(row: Mapping[str, Any], roles: Roles) -> list | None:
    prompt = row.get(_column(roles, "prompt"))
    tools = prompt.get("tools") if isinstance(prompt, dict) else row.get("tools")  # OpenAI's `input` holds its tools
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise RowError(MALFORMED, f"`tools` is text that is not JSON: {error}") from error
    if tools is not None and not isinstance(tools, list):
        raise RowError(MALFORMED, f"`tools` is {type_name(tools)}; expected a list or its JSON")
    return tools or None  # templates write a heading for an empty list, as TRL's authors found with Llama 3


def _read_template_kwargs(row: Mapping[str, Any]) -> dict[str, Any]:
    kwargs = row.get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, dict):
        raise RowError(MALFORMED, f"`chat_template_kwargs` is {type_name(kwargs)}; expected a dict")
    if kwargs and (reserved := _RESERVED_TEMPLATE_KWARGS & kwargs.keys()):
        raise RowError(MALFORMED, f"`chat_template_kwargs` may not set {in_backticks(sorted(reserved))}")
    return kwargs or {}


def _read_images(row: Mapping[str, Any], roles: Roles) -> list:
    return as_list(row.get(roles["images"])) if "images" in roles else []


def _is_empty(side: Text | None) -> bool:
    """Returns whether a side has nothing to train on. White space counts as text, and so do tool calls of a message."""
    if side is None or isinstance(side, str):
        return not side
    return not any(value for message in side for key, value in message.items() if key != "role")
