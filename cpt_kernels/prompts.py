"""What is asked of a model: prompts, how to sample, and what makes two requests the same.

No tokenizer and no model here, so that an endpoint can be asked without them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from xxhash import xxh3_64_intdigest, xxh3_128_hexdigest

Text = str | list  # plain text, or chat messages: a list of {"role": ..., "content": ...}


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. The seed of each is made from ``seed``, its prompt and its number alone, so that it
    does not depend on what else is asked.

    Raises:
        ValueError: a value out of its range; the message names it.
    """

    max_new_tokens: int = 512
    temperature: float = 1.0  # 0: the likeliest token each time
    top_p: float = 1.0
    top_k: int = 0  # 0: of all tokens
    stop: tuple[str, ...] = ()  # texts that end a response and are no part of it
    seed: int | None = 0  # None leaves the seed to an endpoint
    chat: bool = False  # a text prompt is a user's turn in the chat template; messages always go through it
    system_prompt: str | None = None  # for conversations that do not start with one of their own

    def __post_init__(self) -> None:
        for name, valid, wanted in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "0 (greedy) or more"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 (all tokens) or more"),
            ("stop", all(self.stop), "texts that are not empty"),
        ):
            if not valid:
                raise ValueError(f"{name}={getattr(self, name)} must be {wanted}")

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
        """32 hex digits: the same for the same prompt, wherever it comes from."""
        parts = [self.content, self.tools, dict(self.template_kwargs)]
        return xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, ensure_ascii=False).encode())

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
