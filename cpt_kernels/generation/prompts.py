"""What is asked of a model: the prompts of a dataset, how to sample, and what makes two requests the same.

No tokenizer and no model here, so that an endpoint can be asked without them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from xxhash import xxh3_64_intdigest, xxh3_128_hexdigest

from ..data.formats import (
    FORM_COLUMNS,
    READ_COLUMNS,
    Form,
    RowError,
    Text,
    one_turn_as_text,
    parse_prompt,
    parse_row,
)
from ..data.preparation import Drop
from ..data.response_columns import PROMPT_NAMES
from ..errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. The seed of each is made from ``seed``, its prompt and its number alone, so that it
    does not depend on what else is asked.

    Raises:
        UserError: a value out of its range; the message names it.
    """

    max_new_tokens: int = 512
    temperature: float = 1.0  # 0: the likeliest token each time
    top_p: float = 1.0
    top_k: int = 0  # 0: of all tokens
    stop: tuple[str, ...] = ()  # texts that end a response and are no part of it
    seed: int | None = 0  # None leaves the seed to an endpoint
    chat: bool = False  # a text prompt is a user's turn in the chat template; messages always go through it
    system_prompt: str | None = None  # for conversations that do not start with one of their own
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # for the chat template; a row's own come first

    def __post_init__(self) -> None:
        for name, valid, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("stop", all(self.stop), "texts that are not empty"),
        ):
            if not valid:
                raise UserError(f"{name}={getattr(self, name)} must be {wanted}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class Prompt:
    """A prompt as the data has it, with what its chat template is called with."""

    content: Text
    tools: list | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        """32 hex digits, equal for equal prompts (see ``one_turn_as_text``) with equal tools and template arguments."""
        parts = [one_turn_as_text(self.content, "user"), self.tools, dict(self.template_kwargs)]
        return xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())

    def messages(self, system_prompt: str | None = None) -> list[dict]:
        """The prompt as a conversation; text is a user's turn."""
        turns = [{"role": "user", "content": self.content}] if isinstance(self.content, str) else list(self.content)
        has_own = turns and turns[0]["role"] in ("system", "developer")
        return turns if system_prompt is None or has_own else [{"role": "system", "content": system_prompt}, *turns]


class Request(NamedTuple):
    """One response that is wanted: the ``sample``-th to this prompt, counted from 0."""

    prompt: Prompt
    sample: int = 0

    def seed(self, sampling: Sampling) -> int | None:
        """31 bits, or None where nothing is drawn or the seed is left open."""
        if sampling.is_greedy or sampling.seed is None:
            return None
        return xxh3_64_intdigest(f"{sampling.seed} {self.sample} {self.prompt.key}".encode()) >> 33


class Answer(NamedTuple):
    """A response. The tokens are None where an endpoint does not tell them."""

    text: str
    finish_reason: str | None  # "stop", or "length" where max_new_tokens ended it
    prompt_tokens: int | None = None
    response_tokens: int | None = None


class Failure(NamedTuple):
    """Why there is no response: what is counted, and what is said of one example."""

    reason: str
    detail: str


# Called with finished requests, by their position among those asked, as they come.
Record = Callable[[Sequence[tuple[int, Answer | Failure]]], None]


# --- Prompts of a dataset ---

# The completions of these forms tell what the prompt is: it may be their common start.
_WITH_COMPLETIONS = {form: FORM_COLUMNS[form] for form in (Form.PREFERENCE, Form.RANKED, Form.SUPERVISED)}
_ALONE = (*PROMPT_NAMES, "messages")


def read_prompts(dataset: Dataset, column: str | None = None) -> tuple[list[Prompt | None], dict[str, Drop]]:
    """The prompt of every row, as training reads it; and the rows that have none, by reason.

    Args:
        dataset: rows with a column of text or messages, or with completions as for training.
        column: where the prompts are. None: what comes before the completions; else ``prompt``, ``instruction`` or
            ``messages``.

    Raises:
        UserError: no such column, or none in which prompts are to be expected.
    """
    names = set(dataset.column_names)
    form = None if column else next((form for form, has in _WITH_COMPLETIONS.items() if names.issuperset(has)), None)
    if form is None:
        column = _find_column(names, column)
    prompts: list[Prompt | None] = []
    dropped: dict[str, Drop] = {}
    for number, row in enumerate(dataset.select_columns(sorted(names & {*READ_COLUMNS, column, "input"}))):
        if column == "instruction" and row.get("input"):
            raise UserError(
                f"row {number}: the column `input` adds to `instruction`: join them into a column `prompt` first"
            )
        try:
            example = parse_row(row, form) if form else parse_prompt(row, column)
            prompts.append(Prompt(example.prompt, example.tools, example.template_kwargs))
        except RowError as error:
            prompts.append(None)
            dropped.setdefault(error.reason, Drop(detail=error.detail)).add(number)
    return prompts, dropped


def _find_column(names: Iterable[str], column: str | None) -> str:
    found = next((name for name in ([column] if column else _ALONE) if name in names), None)
    if found is None:
        wanted = f"`{column}`" if column else "`chosen` and `rejected`, `prompt`, `instruction` or `messages`"
        raise UserError(f"the dataset has the columns {', '.join(sorted(names))}; prompts are expected in {wanted}")
    return found


def as_completion(row: Mapping[str, Any], prompt: Prompt, text: str) -> Text:
    """A response in the form of the row's completions, so that it can stand in a column beside them."""
    sides = [row.get("chosen"), row.get("completion"), *(row.get("completions") or ())]
    side = next((side for side in sides if side is not None), None)
    is_chat = not isinstance(prompt.content if side is None else side, str)
    own: Text = [{"role": "assistant", "content": text}] if is_chat else text
    given = row.get("prompt")
    # Completions without a prompt beside them, or beside one that only repeats their start, hold the whole of it.
    is_whole = side is not None and (given is None or isinstance(given, str) == is_chat)
    return prompt.content + own if is_whole else own
