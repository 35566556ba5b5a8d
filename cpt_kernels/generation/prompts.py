"""Requests to a model: the prompts of a dataset, the sampling options, and the identity of a request.

This module needs neither a tokenizer nor a model, because an endpoint is asked without them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from xxhash import xxh3_64_intdigest, xxh3_128_hexdigest

from ..data.formats import is_record, one_turn_as_text, parse_prompt, parse_row
from ..data.forms import FORM_COLUMNS, Form, Roles, find_prompt, image_column, match_roles, read_by
from ..data.messages import RowError, Text, has_images, text_as_turns, with_images
from ..errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

    from ..data.preparation import Drop


@dataclass(frozen=True)
class Sampling:
    """How responses are sampled.

    Each response has its own seed, which depends only on ``seed``, the prompt and the number of the response. It does
    not depend on the other requests.

    Raises:
        UserError: a value is out of range; the message names it.
    """

    max_new_tokens: int = 512
    temperature: float | None = 1.0  # 0: greedy decoding; None: an endpoint's own value, the request has none
    top_p: float | None = 1.0  # None: as for the temperature
    top_k: int = 0  # 0: all tokens
    stop: tuple[str, ...] = ()  # texts that end a response; the response does not include them
    seed: int | None = 0  # None: no seed, so that responses cannot be reproduced
    chat: bool = False  # a text prompt becomes a user turn in the chat template; messages always use the template
    system_prompt: str | None = None  # for conversations that do not start with a system prompt
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)  # for the chat template; those of a row override

    def __post_init__(self) -> None:
        for name, valid, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature is None or 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("stop", all(self.stop), "non-empty texts"),
        ):
            if not valid:
                raise UserError(f"{name}={getattr(self, name)} must be {wanted}")

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0


@dataclass(frozen=True)
class Prompt:
    """A prompt as the data gives it, with the arguments of its chat template and its images."""

    content: Text
    tools: list | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    images: tuple[str | bytes, ...] = ()  # paths, URLs, or the bytes of files
    image_digests: str = ""  # hex digits that identify the images, see `data.image_files.with_digests`

    @cached_property
    def key(self) -> str:
        """32 hex digits, equal for equal prompts (see ``one_turn_as_text``) with equal tools, arguments and images."""
        content = self.messages() if self.images else self.content
        parts = [one_turn_as_text(content, "user"), self.tools, dict(self.template_kwargs)]
        parts += [self.image_digests] if self.images else []
        return xxh3_128_hexdigest(json.dumps(parts, sort_keys=True).encode())

    def messages(self, system_prompt: str | None = None) -> list[dict]:
        """Returns the prompt as a conversation, in which a text prompt is a user turn, as in training.

        If it has images, the contents are lists of parts, with {"type": "image"} for each image.

        Raises:
            RowError: the conversation has such parts for another number of images.
        """
        turns = text_as_turns(self.content, [])[0] if isinstance(self.content, str) else list(self.content)
        turns = with_images(turns, len(self.images)) if self.images or has_images(turns) else turns
        has_own = turns and turns[0]["role"] in ("system", "developer")
        return turns if system_prompt is None or has_own else [{"role": "system", "content": system_prompt}, *turns]


class Request(NamedTuple):
    """A request for one response to a prompt; ``sample`` numbers the responses to the same prompt from 0."""

    prompt: Prompt
    sample: int = 0

    def seed(self, sampling: Sampling) -> int | None:
        """Returns a seed of 31 bits, or None for greedy decoding and for sampling without a seed."""
        if sampling.is_greedy or sampling.seed is None:
            return None
        return xxh3_64_intdigest(f"{sampling.seed} {self.sample} {self.prompt.key}".encode()) >> 33


class Answer(NamedTuple):
    """A response. The numbers of tokens are None if the endpoint does not report them."""

    text: str
    finish_reason: str | None  # "stop", or "length" if max_new_tokens ended the response
    prompt_tokens: int | None = None
    response_tokens: int | None = None


class Failure(NamedTuple):
    """The reason why there is no response."""

    reason: str  # short; failures are counted by reason
    detail: str  # about this request; shown for one example


# A function that is called with the results of finished requests: (position in the list of requests, result).
RecordAnswers = Callable[[Sequence[tuple[int, Answer | Failure]]], None]


# --- Prompts of a dataset ---

_OURS = {"completion", "completions"}


def read_prompts(
    dataset: Dataset, column: str | None = None, name: str = "the dataset"
) -> tuple[list[Prompt | None], dict[str, Drop]]:
    """Reads the prompt of every row, in the same way as training does.

    Args:
        dataset: rows with a prompt, with completions as for training or without.
        column: the column of the prompts, to which other columns then add nothing. By default the prompt is the part
            before the completions if the rows have `chosen` and `rejected`, `completion` or `completions`, else what
            ``data.forms.find_prompt`` finds.
        name: what errors call the dataset.

    Returns:
        The prompt of each row, None if it has none; and the rows without a prompt by reason.

    Raises:
        UserError: the column does not exist, or none of the default columns does; or an image is missing or damaged.
    """
    from ..data.image_files import DIGESTS, image_source, with_digests
    from ..data.preparation import Drop
    from ..data.rows import drop_nulls, find_null_places, visible_rows

    dataset = visible_rows(dataset)
    names = set(dataset.column_names)
    form, roles = _find_roles(names, column)
    if (of_images := image_column(names)) is not None:
        dataset, roles = with_digests(dataset, name), {**roles, "images": of_images, "digests": DIGESTS}
        names.add(DIGESTS)
    prompts: list[Prompt | None] = []
    dropped: dict[str, Drop] = {}
    nulls = find_null_places(dataset.features, names)
    for number, given in enumerate(dataset.select_columns(sorted(names & read_by(form, roles)))):
        row = {name: drop_nulls(value, nulls.get(name)) for name, value in given.items()}
        try:
            is_alone = form is Form.MESSAGES
            example = parse_prompt(row, roles["prompt"], roles) if is_alone else parse_row(row, form, roles=roles)
            images, digests = tuple(map(image_source, example.images)), (row.get(DIGESTS) or b"").hex()
            prompt = Prompt(example.prompt, example.tools, example.template_kwargs, images, digests)
            prompt.messages()  # checks the number of images
            prompts.append(prompt)
        except RowError as error:
            prompts.append(None)
            dropped.setdefault(error.reason, Drop(detail=error.detail)).add(number)
    return prompts, dropped


def _find_roles(names: set[str], column: str | None) -> tuple[Form, Roles]:
    """Returns the form in which a row's prompt is read, and the column of each role.

    The form is MESSAGES for rows of which only the prompt is read.
    """
    if column is None:
        form, roles = match_roles(names) or (Form.MESSAGES, {})
        # The prompt may be the common start of the completions.
        if form is Form.PREFERENCE or _OURS & {roles.get("completion"), roles.get("completions")}:
            return form, roles
        roles = find_prompt(names)
    else:
        roles = {"prompt": column} if column in names else {}
    if "prompt" not in roles:
        wanted = f"`{column}`" if column else "`chosen` and `rejected`, `prompt`, `instruction` or `messages`"
        raise UserError(f"the dataset has the columns {', '.join(sorted(names))}; prompts are expected in {wanted}")
    return Form.MESSAGES, roles


def single_instruction(content: Text) -> str | None:
    """Returns a text prompt, or the text of the only turn of a conversation; None for several turns.

    A system prompt does not count as a turn.
    """
    if isinstance(content, str):
        return content
    turns = [turn for turn in content if turn["role"] != "system"]
    return turns[0]["content"] if len(turns) == 1 and isinstance(turns[0].get("content"), str) else None


def as_completion(row: Mapping[str, Any], prompt: Prompt, text: str) -> Text:
    """Returns a response in the form of the row's completions, for a new column beside them."""
    form, roles = match_roles(row) or (Form.MESSAGES, {})
    given = None if form is Form.MESSAGES else row.get(roles[FORM_COLUMNS[form][0]])
    sides = [side for side in given or () if not is_record(side)] if form is Form.RANKED else [given]
    side = next((side for side in sides if side is not None), None)
    is_chat = not isinstance(prompt.content if side is None else side, str)
    own: Text = [{"role": "assistant", "content": text}] if is_chat else text
    given = row.get(roles.get("prompt", "prompt"))
    # Completions include the prompt if the row has no prompt, or has a text prompt beside completions of messages.
    is_whole = side is not None and (given is None or isinstance(given, str) == is_chat)
    return prompt.content + own if is_whole else own
