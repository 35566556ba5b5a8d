"""The file of responses: one JSON object per line and response, appended as they come.

One process at a time writes a file. What a killed one leaves is at most half a line, which the next one removes. Each
row says how it was drawn, so that nothing is ever mixed up: a model's responses in one file are all drawn alike.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..data.response_columns import RESPONSE_COLUMNS
from ..errors import UserError
from .prompts import Answer, Prompt, Request, Sampling

logger = logging.getLogger(__name__)

_START = b'{"prompt": '  # of every line written here
_SYNC_EVERY = 1.0  # seconds: what a power cut may cost; a killed process loses nothing that was added

Row = dict[str, Any]


class ResponseFile:
    """Rows of ``prompt, model, response``, of one model added to those that are there. A context manager.

    Args:
        path: the JSONL file; it is made if need be, its folder too, and beside it the file of a lock, ``.NAME.lock``.
        model: the name in the column ``model``.
        sampling: how this model's responses are drawn.
        origin: what else they depend on: the weights, or what an endpoint is sent besides.

    Raises:
        UserError: on entering, where another process writes the file, it holds something else than responses, or
            responses of this model that were drawn in another way.
    """

    def __init__(self, path: Path, model: str, sampling: Sampling, origin: Mapping[str, Any]) -> None:
        self.path, self.model, self.sampling = path, model, sampling
        self.settings = {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": float(sampling.temperature),
            "top_p": float(sampling.top_p),
            "top_k": sampling.top_k,
            "stop": list(sampling.stop),
            "seed": sampling.seed,
            "chat": sampling.chat,
            "system_prompt": sampling.system_prompt,
            "chat_template_kwargs": json.dumps(dict(sampling.template_kwargs), sort_keys=True),
            **origin,
        }
        self.answered: set[tuple[str, int]] = set()  # (key of the prompt, sample)
        # Beside the file, as Windows lets no one read a locked one.
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        self._synced = 0.0

    def __enter__(self) -> ResponseFile:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
            self._file = self.path.open("ab", buffering=0)
        except Timeout as error:
            raise UserError(
                f"{self.path} is being written by another process: wait for it to end, or choose another file"
            ) from error
        except OSError as error:
            self._lock.release()
            raise UserError(f"{self.path} cannot be written to ({error.strerror})") from error
        try:
            self._read()
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(self, *_) -> None:
        os.fsync(self._file.fileno())
        self._close()

    def _close(self) -> None:
        self._file.close()
        self._lock.release()

    def add(self, answers: Sequence[tuple[Request, Answer]]) -> None:
        """Append rows.

        Raises:
            UserError: they cannot be written (a full disk); the file is as before.
        """
        lines = memoryview(b"".join(self._line(request, answer) for request, answer in answers))
        size = os.fstat(self._file.fileno()).st_size
        try:
            while lines:
                lines = lines[self._file.write(lines) :]
            if time.monotonic() - self._synced > _SYNC_EVERY:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            self._file.truncate(size)
            raise UserError(f"{self.path} cannot be written to ({error.strerror})") from error
        self.answered.update((request.prompt.key, request.sample) for request, _ in answers)

    def rows(self) -> Iterator[Row]:
        """This model's rows, as the file has them."""
        for _, _, row in self._lines():
            if row is not None and row["model"] == self.model:
                yield row

    def _line(self, request: Request, answer: Answer) -> bytes:
        prompt = request.prompt
        own = {"tools": prompt.tools, "chat_template_kwargs": dict(prompt.template_kwargs)}
        row = {
            "prompt": prompt.content,
            **{name: value for name, value in own.items() if value},
            "model": self.model,
            "response": answer.text,
            "sample": request.sample,
            "seed": request.seed(self.sampling),
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
            "response_tokens": answer.response_tokens,
            "settings": self.settings,
        }
        # An endpoint may end a text in the middle of a surrogate pair, which is no UTF-8.
        return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"

    # --- What is there already ---

    def _read(self) -> None:
        is_whole = True
        for start, line, row in self._lines():
            is_whole = line.endswith(b"\n")
            if row is None:
                self._file.truncate(start)
                logger.warning("%s: its last line was cut off by a run that was killed; it is removed", self.path)
                return
            if row["model"] == self.model:
                self._check_settings(row)
                self.answered.add((prompt_of(row).key, row.get("sample", 0)))
        if not is_whole:
            self._file.write(b"\n")

    def _lines(self) -> Iterator[tuple[int, bytes, Row | None]]:
        """Every line that is not empty, with the position where it starts and its row; None for a torn last one."""
        with self.path.open("rb") as file:
            end = 0
            for number, line in enumerate(file, start=1):
                start, end = end, end + len(line)
                if not line.strip():
                    continue
                row = _parse(line)
                if row is None and not _is_torn(line):
                    raise UserError(
                        f"{self.path}, line {number}: not a response (an object with {', '.join(RESPONSE_COLUMNS)}):"
                        " is this the file to add to?"
                    )
                yield start, line, row

    def _check_settings(self, row: Row) -> None:
        theirs = row.get("settings") or {}
        changed = {name for name, value in self.settings.items() if name in theirs and theirs[name] != value}
        if changed:
            ways = "; ".join(f"{name} was {theirs[name]!r} and is {self.settings[name]!r}" for name in sorted(changed))
            raise UserError(
                f"{self.path} has responses of {self.model} that were drawn in another way ({ways}): choose another"
                " file, or with cpt generate another --model_label"
            )


def prompt_of(row: Row) -> Prompt:
    """The prompt that a row answers."""
    return Prompt(row["prompt"], row.get("tools"), row.get("chat_template_kwargs") or {})


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:  # also bytes that are no UTF-8
        return None
    if not isinstance(row, dict) or not all(row.get(name) is not None for name in RESPONSE_COLUMNS):
        return None
    return row


def _is_torn(line: bytes) -> bool:
    """Whether a killed run may have left this; after a power cut the file may end in zeros."""
    line = line.rstrip(b"\0")
    return not line.endswith(b"\n") and line[: len(_START)] == _START[: len(line)]
