"""Responses of an OpenAI-compatible endpoint, through the ``openai`` client.

Retries are made here and not in the client: a reply that is no JSON is retried, too, and when the endpoint asks one
request to wait, all of them do. The key is read from the environment, and is in no message.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import random
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..data.formats import without_nulls
from ..errors import UserError
from .prompts import Answer, Failure, Record, Request, Sampling

if TYPE_CHECKING:
    from openai import AsyncOpenAI

logger = logging.getLogger(__name__)

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0  # seconds between two tries, where the endpoint asks for none
_WORTH_SAYING = 60.0  # seconds of waiting
_GIVE_UP = 20  # requests in a row that failed for good: no answer is to be expected any more
_LONGEST_DETAIL = 300  # characters of the endpoint's own words
_OPENAI = "api.openai.com"


@dataclass(frozen=True)
class EndpointOptions:
    """Which endpoint, and how it is treated.

    Raises:
        UserError: a value out of its range; the message names it.
    """

    model: str
    base_url: str | None = None  # of $OPENAI_BASE_URL, or OpenAI's
    api_key_env: str = "OPENAI_API_KEY"  # the variable that holds the key
    concurrency: int = 16  # requests at a time
    requests_per_minute: float | None = None
    max_retries: int = 8
    timeout: float = 600.0  # seconds for one try
    extra_body: Mapping[str, Any] = field(default_factory=dict)  # sent with every request, under these names

    def __post_init__(self) -> None:
        for name, valid in (
            ("concurrency", self.concurrency >= 1),
            ("requests_per_minute", self.requests_per_minute is None or self.requests_per_minute > 0),
            ("max_retries", self.max_retries >= 0),
            ("timeout", self.timeout > 0),
        ):
            if not valid:
                raise UserError(f"{name}={getattr(self, name)} is too small")


ENDPOINT_DEFAULTS = {name: value for name, value in vars(EndpointOptions("")).items() if name != "model"}


class Endpoint:
    """Answers requests, each on its own and many at a time.

    Raises:
        UserError: the openai package or the key is missing.
    """

    def __init__(self, options: EndpointOptions, sampling: Sampling) -> None:
        if find_spec("openai") is None:
            raise UserError("an endpoint is asked through the openai package: pip install 'cpt-kernels[openai]'")
        self.options, self.sampling = options, sampling
        base_url = options.base_url or os.environ.get("OPENAI_BASE_URL")
        self._key = os.environ.get(options.api_key_env)
        if not self._key and base_url is None:
            raise UserError(f"there is no key: set {options.api_key_env} in the environment, or give a base_url")
        self._client_options = {"api_key": self._key or "none", "base_url": base_url, "max_retries": 0}
        self._not_before = 0.0  # when the next request may be sent, on the clock of time.monotonic
        self._in_vain = 0
        self._has_answered = False

    def answer(self, requests: Sequence[Request], record: Record, answered: Container[int] = ()) -> None:
        """Answer the requests that are not ``answered``, in their order but as the replies come.

        Raises:
            UserError: the endpoint refuses the key or knows no such model, or does not answer any more. What was
                recorded stands.
        """
        asyncio.run(self._answer(requests, record, answered))

    async def _answer(self, requests: Sequence[Request], record: Record, answered: Container[int]) -> None:
        from openai import AsyncOpenAI

        pending = (index for index in range(len(requests)) if index not in answered)
        async with AsyncOpenAI(timeout=self.options.timeout, **self._client_options) as client:
            workers = [
                asyncio.create_task(self._work(client, requests, pending, record))
                for _ in range(min(self.options.concurrency, len(requests)))
            ]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _work(
        self, client: AsyncOpenAI, requests: Sequence[Request], pending: Iterator[int], record: Record
    ) -> None:
        for index in pending:
            record([(index, await self._ask(client, requests[index]))])

    async def _ask(self, client: AsyncOpenAI, request: Request) -> Answer | Failure:
        from openai import APIConnectionError, APIResponseValidationError, APIStatusError, APITimeoutError

        failure = None
        for attempt in range(self.options.max_retries + 1):
            if failure is not None:
                await asyncio.sleep(min(_FIRST_WAIT * 2 ** (attempt - 1), _LONGEST_WAIT) * random.uniform(0.5, 1))
            await self._wait_for_turn()
            try:
                answer = await asyncio.wait_for(self._send(client, request), self.options.timeout)
            except APIStatusError as error:
                failure = Failure(f"HTTP {error.status_code}", self._describe(error))
                self._check_fatal(error, failure)
                if not (error.status_code in (408, 409, 425, 429) or error.status_code >= 500):
                    return self._count_failure(failure, refused=True)
                self._hold_back(_retry_after(error.response.headers))
            except (_MalformedError, APIResponseValidationError, json.JSONDecodeError) as error:
                failure = Failure("malformed reply", self._describe(error))
            except (asyncio.TimeoutError, APITimeoutError):
                failure = Failure("timeout", f"no reply within timeout={self.options.timeout:g} s")
            except APIConnectionError as error:
                failure = Failure("connection", f"{self._describe(error)} ({self._describe(error.__cause__ or error)})")
            else:
                if isinstance(answer, Failure):
                    return self._count_failure(answer, refused=True)
                self._has_answered, self._in_vain = True, 0
                return answer
        return self._count_failure(failure, refused=False)

    async def _send(self, client: AsyncOpenAI, request: Request) -> Answer | Failure:
        sampling, prompt = self.sampling, request.prompt
        if prompt.tools or prompt.template_kwargs:
            return Failure("tools", "tools and chat_template_kwargs of a row cannot be sent to an endpoint")
        limit = "max_completion_tokens" if client.base_url.host == _OPENAI else "max_tokens"
        arguments: dict[str, Any] = {
            "model": self.options.model,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "extra_body": ({"top_k": sampling.top_k} if sampling.top_k else {}) | dict(self.options.extra_body),
        }
        if not {"max_tokens", "max_completion_tokens"} & arguments["extra_body"].keys():
            arguments[limit] = sampling.max_new_tokens
        if (seed := request.seed(sampling)) is not None:
            arguments["seed"] = seed
        if sampling.stop:
            arguments["stop"] = list(sampling.stop)
        if isinstance(prompt.content, str) and not sampling.chat:
            reply = await client.completions.create(prompt=prompt.content, **arguments)
        else:
            turns: Any = [without_nulls(turn) for turn in prompt.messages(sampling.system_prompt)]
            reply = await client.chat.completions.create(messages=turns, **arguments)
        return _read(reply)

    # --- When a request may be sent ---

    async def _wait_for_turn(self) -> None:
        interval = 60 / self.options.requests_per_minute if self.options.requests_per_minute else 0.0
        while (wait := self._not_before - time.monotonic()) > 0:  # it may be put off while we sleep
            await asyncio.sleep(wait)
        self._not_before = time.monotonic() + interval

    def _hold_back(self, seconds: float | None) -> None:
        if seconds is None:
            return
        now = time.monotonic()
        if now + seconds > max(self._not_before, now) + _WORTH_SAYING:
            logger.warning("the endpoint asks to be left alone for %.0f s", seconds)
        self._not_before = max(self._not_before, now + seconds)

    # --- What went wrong ---

    def _count_failure(self, failure: Failure, refused: bool) -> Failure:
        """Between answers a refusal is about its prompt; before any it may be about the options."""
        if not refused or not self._has_answered:
            self._in_vain += 1
        if self._in_vain >= _GIVE_UP:
            raise UserError(
                f"the last {_GIVE_UP} requests to the endpoint failed, the last one by {failure.reason}:"
                f" {failure.detail}; stopped, and what was answered is kept"
            )
        return failure

    def _check_fatal(self, error: Any, failure: Failure) -> None:
        if error.status_code == 401:
            raise UserError(
                f"the endpoint refuses the key of {self.options.api_key_env} ({failure.reason}: {failure.detail})"
            )
        if error.status_code == 404 and not self._has_answered:
            raise UserError(
                f"the endpoint has no model {self.options.model!r}, or its base_url is wrong (it often ends in /v1):"
                f" {failure.reason}: {failure.detail}"
            )
        if error.code == "insufficient_quota":
            raise UserError(f"the endpoint's quota is used up: {failure.detail}")

    def _describe(self, error: BaseException) -> str:
        body = getattr(error, "body", None)
        said = body.get("message") if isinstance(body, dict) else None
        text = " ".join(str(said or error).split())
        if self._key:  # some endpoints repeat the key that they refuse
            text = text.replace(self._key, "***")
        return text if len(text) <= _LONGEST_DETAIL else f"{text[:_LONGEST_DETAIL]} ..."


class _MalformedError(Exception):
    """A reply that holds no answer."""


def _read(reply: Any) -> Answer | Failure:
    """The client lets any JSON through, so nothing of its types can be relied on here."""
    choices = getattr(reply, "choices", None)
    if not isinstance(choices, list) or not choices:
        said = getattr(reply, "error", None) or (reply if isinstance(reply, str) else "a reply without choices")
        raise _MalformedError(said)
    message, reason = getattr(choices[0], "message", None), getattr(choices[0], "finish_reason", None)
    text = getattr(choices[0], "text", None) if message is None else getattr(message, "content", None)
    if not isinstance(text, str):
        if not isinstance(reason, str):
            raise _MalformedError("a choice without text")
        return Failure(f"no text, {reason}", getattr(message, "refusal", None) or f"finish_reason={reason}")
    usage = getattr(reply, "usage", None)
    counts = (getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
    return Answer(text, reason, *(count if isinstance(count, int) else None for count in counts))


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that a reply asks to wait, by ``retry-after-ms``, or by ``retry-after`` in seconds or as a date."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with suppress(ValueError):
            seconds = float(headers.get(name, "")) * unit
            if math.isfinite(seconds):
                return max(0.0, seconds)
    try:
        date = parsedate_to_datetime(headers.get("retry-after", ""))
    except (ValueError, TypeError):
        return None
    return max(0.0, date.timestamp() - time.time())
