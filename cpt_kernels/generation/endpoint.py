"""Responses of an OpenAI-compatible endpoint, through the ``openai`` client.

The client retries failed requests. This module adds two things that the client cannot do: it retries a reply that is
not valid JSON or has no answer, and if the endpoint asks one request to wait, all requests wait. The API key is read
from the environment, and no message contains it.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import os
import time
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from ..data.formats import without_nulls
from ..errors import UserError
from .prompts import Answer, Failure, RecordAnswers, Request, Sampling

if TYPE_CHECKING:
    from openai import AsyncOpenAI

logger = logging.getLogger(__name__)

_FIRST_WAIT, _LONGEST_WAIT = 0.5, 8.0  # seconds before a request is sent again after a malformed reply
_LONG_WAIT = 60.0  # seconds; a longer wait that the endpoint asks for is logged
_GIVE_UP = 20  # consecutive requests without an answer after which the run stops
_LONGEST_DETAIL = 300  # characters of an error message of the endpoint
_OPENAI = "api.openai.com"
_OPTIONAL = ("temperature", "top_p")  # fields of a request that some models refuse


@dataclass(frozen=True)
class EndpointOptions:
    """The endpoint, and how requests are sent to it.

    Raises:
        UserError: a value is out of range; the message names it.
    """

    model: str
    base_url: str | None = None  # None: $OPENAI_BASE_URL, or else OpenAI's
    api_key_env: str = "OPENAI_API_KEY"  # environment variable that holds the key
    concurrency: int = 16  # number of requests in flight
    requests_per_minute: float | None = None
    max_retries: int = 8
    timeout: float = 600.0  # seconds without data from the endpoint after which a try fails
    extra_body: Mapping[str, Any] = field(default_factory=dict)  # additional fields of every request

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
    """Answers requests by an endpoint, many at a time.

    Raises:
        UserError: the openai package or the API key is missing.
    """

    def __init__(self, options: EndpointOptions, sampling: Sampling) -> None:
        if find_spec("openai") is None:
            raise UserError("an endpoint needs the openai package: pip install 'cpt-kernels[openai]'")
        self.options, self.sampling = options, sampling
        base_url = options.base_url or os.environ.get("OPENAI_BASE_URL")
        if base_url is not None and not base_url.startswith(("http://", "https://")):
            raise UserError(f"base_url={base_url}: must begin with http:// or https://")
        self._key = os.environ.get(options.api_key_env)
        if not self._key and base_url is None:
            raise UserError(f"the API key is missing: set {options.api_key_env} in the environment, or give a base_url")
        self._client_options = {"api_key": self._key or "none", "base_url": base_url, "timeout": options.timeout}
        self._not_before = 0.0  # earliest time of the next try, as time.monotonic() gives it
        self._failed_in_a_row = 0
        self._has_answered = False

    def answer(self, requests: Sequence[Request], record: RecordAnswers, answered: Container[int] = ()) -> None:
        """Sends the requests whose positions are not in ``answered``, and records each result as soon as it arrives.

        Raises:
            UserError: the endpoint refuses the key, does not have the model, or no longer answers. The results recorded
                before stay valid.
        """
        asyncio.run(self._answer(requests, record, answered))

    async def _answer(self, requests: Sequence[Request], record: RecordAnswers, answered: Container[int]) -> None:
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        pending = (index for index in range(len(requests)) if index not in answered)
        # The hooks run at every try, also when the client retries by itself.
        http = DefaultAsyncHttpxClient(event_hooks={"request": [self._before_try], "response": [self._after_try]})
        async with AsyncOpenAI(http_client=http, **self._client_options) as client:
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

    # Each worker takes the next pending request, so at most `concurrency` requests are in flight.
    async def _work(
        self, client: AsyncOpenAI, requests: Sequence[Request], pending: Iterator[int], record: RecordAnswers
    ) -> None:
        for index in pending:
            record([(index, await self._ask(client, requests[index]))])

    async def _ask(self, client: AsyncOpenAI, request: Request) -> Answer | Failure:
        from openai import APIConnectionError, APIResponseValidationError, APIStatusError, APITimeoutError

        if request.prompt.tools or request.prompt.template_kwargs:
            detail = "tools and chat_template_kwargs of a row cannot be sent to an endpoint"
            return self._count_failure(Failure("tools", detail), refused=True)
        tries = 0  # of this request: those of the client and those after a malformed reply
        while True:
            try:
                left = self.options.max_retries - tries
                reply = await self._send(client.with_options(max_retries=left), request)
                tries += 1 + reply.retries_taken
                answer = _read_reply(reply.parse())
            except (_MalformedError, APIResponseValidationError, json.JSONDecodeError) as error:
                if tries > self.options.max_retries:
                    return self._count_failure(Failure("malformed reply", self._describe(error)))
                await asyncio.sleep(min(_FIRST_WAIT * 2 ** (tries - 1), _LONGEST_WAIT))
            except APIStatusError as error:
                failure = Failure(f"HTTP {error.status_code}", self._describe(error))
                if refused := [n for n in _OPTIONAL if error.status_code in (400, 422) and n in failure.detail]:
                    hint = f" ({refused[0]}=none leaves the field out of the request)"
                    failure = failure._replace(detail=failure.detail + hint)
                self._check_fatal(error, failure)
                was_retried = error.status_code in (408, 409, 429) or error.status_code >= 500
                return self._count_failure(failure, refused=not was_retried)
            except APITimeoutError:
                return self._count_failure(Failure("timeout", f"no reply within timeout={self.options.timeout:g} s"))
            except APIConnectionError as error:
                detail = f"{self._describe(error)} ({self._describe(error.__cause__ or error)})"
                return self._count_failure(Failure("connection", detail))
            else:
                if isinstance(answer, Failure):
                    return self._count_failure(answer, refused=True)
                self._has_answered, self._failed_in_a_row = True, 0
                return answer

    async def _send(self, client: AsyncOpenAI, request: Request) -> Any:
        """Sends one request and returns the raw reply, which knows the number of retries that the client made."""
        sampling, prompt = self.sampling, request.prompt
        limit = "max_completion_tokens" if client.base_url.host == _OPENAI else "max_tokens"
        arguments: dict[str, Any] = {
            "model": self.options.model,
            **{name: value for name in _OPTIONAL if (value := getattr(sampling, name)) is not None},
            "extra_body": ({"top_k": sampling.top_k} if sampling.top_k else {}) | dict(self.options.extra_body),
        }
        # OpenAI renamed max_tokens; many servers know only the old name. extra_body may set either.
        if not {"max_tokens", "max_completion_tokens"} & arguments["extra_body"].keys():
            arguments[limit] = sampling.max_new_tokens
        if (seed := request.seed(sampling)) is not None:
            arguments["seed"] = seed
        if sampling.stop:
            arguments["stop"] = list(sampling.stop)
        if isinstance(prompt.content, str) and not sampling.chat and not prompt.images:
            return await client.completions.with_raw_response.create(prompt=prompt.content, **arguments)
        turns: Any = [without_nulls(turn) for turn in prompt.messages(sampling.system_prompt)]
        if prompt.images:
            images = iter(prompt.images)
            turns = [{**turn, "content": _fill_images(turn.get("content"), images)} for turn in turns]
        return await client.chat.completions.with_raw_response.create(messages=turns, **arguments)

    # --- Hooks of the HTTP client ---

    async def _before_try(self, _: Any) -> None:
        """Waits until the rate limit and the waits that the endpoint asked for allow another try."""
        interval = 60 / self.options.requests_per_minute if self.options.requests_per_minute else 0.0
        while (wait := self._not_before - time.monotonic()) > 0:  # another reply may extend the wait during the sleep
            await asyncio.sleep(wait)
        self._not_before = time.monotonic() + interval

    async def _after_try(self, response: Any) -> None:
        """Makes all requests wait if the endpoint asks this one to wait."""
        if not response.is_error:
            return
        if b"insufficient_quota" in await response.aread():
            response.headers["x-should-retry"] = "false"  # the client would retry this 429, which cannot succeed
        if seconds := _retry_after(response.headers):
            now = time.monotonic()
            if now + seconds > max(self._not_before, now) + _LONG_WAIT:
                logger.warning("the endpoint asks for a wait of %.0f s", seconds)
            self._not_before = max(self._not_before, now + seconds)
        # The wait above covers this request, too. The client must not see the headers: it gives up on long waits.
        for name in ("retry-after", "retry-after-ms"):
            response.headers.pop(name, None)

    # --- Failures ---

    def _count_failure(self, failure: Failure, refused: bool = False) -> Failure:
        """Returns the failure, or raises UserError after ``_GIVE_UP`` requests in a row without an answer.

        A refusal after the first answer concerns only its prompt and does not count. Before the first answer the
        endpoint may refuse the options, and thus every request.
        """
        if not refused or not self._has_answered:
            self._failed_in_a_row += 1
        if self._failed_in_a_row >= _GIVE_UP:
            raise UserError(
                f"the last {_GIVE_UP} requests to the endpoint failed, the last one by {failure.reason}:"
                f" {failure.detail}; stopped, the responses so far are kept"
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
        said = (body.get("message") or body.get("detail")) if isinstance(body, dict) else None
        if isinstance(said, list):  # FastAPI's validation errors: the place and the message of each
            places = ((".".join(map(str, each.get("loc", ()))), each.get("msg", "")) for each in said if each)
            said = "; ".join(f"{place}: {message}" for place, message in places)
        text = " ".join(str(said or error).split())
        if self._key:  # some endpoints repeat a refused key in their message
            text = text.replace(self._key, "***")
        return text if len(text) <= _LONGEST_DETAIL else f"{text[:_LONGEST_DETAIL]} ..."


def _fill_images(content: Any, images: Iterator[str | bytes]) -> Any:
    """Returns the content of a message with the next images in OpenAI's form: an http URL, or the file itself."""
    from ..data.image_files import data_url  # imports datasets, which --help does without

    if not isinstance(content, list):
        return content
    urls = (image if str(image).startswith(("http://", "https://")) else data_url(image) for image in images)
    return [
        {"type": "image_url", "image_url": {"url": next(urls)}} if part.get("type") == "image" else part
        for part in content
    ]


class _MalformedError(Exception):
    """A reply without an answer."""


def _read_reply(reply: Any) -> Answer | Failure:
    """Returns the answer in a parsed reply.

    The client does not validate replies: any attribute may be missing or have another type than declared.
    """
    choices = getattr(reply, "choices", None)
    if not isinstance(choices, list) or not choices:
        said = getattr(reply, "error", None) or (reply if isinstance(reply, str) else "a reply without choices")
        raise _MalformedError(said)
    message, reason = getattr(choices[0], "message", None), getattr(choices[0], "finish_reason", None)
    text = getattr(choices[0], "text", None) if message is None else getattr(message, "content", None)
    if isinstance(text, list):  # parts; those of reasoning are not part of the answer
        parts = (part if isinstance(part, Mapping) else vars(part) for part in text)
        text = "".join(part.get("text") or "" for part in parts if part.get("type") == "text")
    if not isinstance(text, str) and not isinstance(reason, str):
        raise _MalformedError("a choice without text")
    if not text or not text.strip():
        detail = getattr(message, "refusal", None) or f"finish_reason={reason}"
        if reason == "length":
            detail += ": the limit of tokens was reached before the answer began; raise max_new_tokens"
        return Failure(f"no text, {reason}", detail)
    usage = getattr(reply, "usage", None)
    counts = (getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens"))
    return Answer(text, reason, *(count if isinstance(count, int) else None for count in counts))


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """Returns the seconds to wait from ``retry-after-ms``, or from ``retry-after`` in seconds or as a date."""
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
