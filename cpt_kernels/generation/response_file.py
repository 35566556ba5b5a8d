"""The file of responses: JSONL with one line per response, appended as responses arrive.

One process at a time writes a file. A killed process leaves at most one incomplete line, which the next process
removes. Each row holds its sampling settings, and all responses of a model in one file have the same settings.
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

_START = b'{"prompt": '  # the first bytes of every line that this module writes
_SYNC_EVERY = 1.0  # seconds between fsyncs: a power cut loses at most these; a killed process loses no added row

ResponseRow = dict[str, Any]


class ResponseFile:
    """Reads and appends rows of ``prompt, model, response`` of one model. A context manager.

    The file may hold responses of other models, which stay as they are.

    Args:
        path: the JSONL file. The file and its folder are created if they do not exist, with a lock file
            ``.NAME.lock`` beside it.
        model: the name in the column ``model``.
        sampling: how the responses of this model are sampled.
        origin: further settings on which they depend: the weights, or extra fields of the request to an endpoint.

    Raises:
        UserError: on entering, if another process writes the file, if the file holds something other than responses, or
            if it holds responses of this model with other settings.
    """

    def __init__(self, path: Path, model: str, sampling: Sampling, origin: Mapping[str, Any]) -> None:
        self.path, self.model, self.sampling = path, model, sampling
        self.settings = {
            "max_new_tokens": sampling.max_new_tokens,
            "temperature": None if sampling.temperature is None else float(sampling.temperature),
            "top_p": None if sampling.top_p is None else float(sampling.top_p),
            "top_k": sampling.top_k,
            "stop": list(sampling.stop),
            "seed": sampling.seed,
            "chat": sampling.chat,
            "system_prompt": sampling.system_prompt,
            # As JSON, because Arrow would give every row of this column the keys of all rows.
            "chat_template_kwargs": json.dumps(dict(sampling.template_kwargs), sort_keys=True),
            **origin,
        }
        self.answered: set[tuple[str, int]] = set()  # (key of the prompt, sample)
        # The lock is a file of its own because Windows denies reading a locked file.
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        self._synced = 0.0

    def __enter__(self) -> ResponseFile:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.open("ab").close()  # on a read-only disk the lock would report another process
            self._lock.acquire(timeout=0)
            self._file = self.path.open("ab", buffering=0)  # unbuffered, so that a kill loses no added row
        except Timeout as error:
            raise UserError(
                f"{self.path} is being written by another process: wait until it ends, or choose another file"
            ) from error
        except OSError as error:
            self._lock.release()
            raise UserError(f"{self.path} cannot be written to ({error.strerror})") from error
        try:
            self._read_existing()
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
        """Appends rows.

        Raises:
            UserError: the rows cannot be written (for example, the disk is full); the file stays as it was.
        """
        lines = memoryview(b"".join(self._line(request, answer) for request, answer in answers))
        size = os.fstat(self._file.fileno()).st_size
        try:
            while lines:  # an unbuffered write may write only a part
                lines = lines[self._file.write(lines) :]
            if time.monotonic() - self._synced > _SYNC_EVERY:
                os.fsync(self._file.fileno())
                self._synced = time.monotonic()
        except OSError as error:
            self._file.truncate(size)
            raise UserError(f"{self.path} cannot be written to ({error.strerror})") from error
        self.answered.update((request.prompt.key, request.sample) for request, _ in answers)

    def rows(self) -> Iterator[ResponseRow]:
        """Yields the rows of this model in the order of the file."""
        for _, _, row in self._lines():
            if row is not None and row["model"] == self.model:
                yield row

    def _line(self, request: Request, answer: Answer) -> bytes:
        prompt = request.prompt
        own = {"tools": prompt.tools, "chat_template_kwargs": dict(prompt.template_kwargs)}
        row = {
            "prompt": prompt.content,
            **{name: value for name, value in own.items() if value},
            **self._images_of(prompt),
            "model": self.model,
            "response": answer.text,
            "sample": request.sample,
            "seed": request.seed(self.sampling),
            "finish_reason": answer.finish_reason,
            "prompt_tokens": answer.prompt_tokens,
            "response_tokens": answer.response_tokens,
            "settings": self.settings,
        }
        # An endpoint may cut a text inside a surrogate pair, and half a pair cannot be encoded as UTF-8.
        return json.dumps(row, ensure_ascii=False).encode("utf-8", "replace") + b"\n"

    @staticmethod
    def _images_of(prompt: Prompt) -> dict[str, Any]:
        if not prompt.images:
            return {}
        from ..data.image_files import image_text  # imports datasets, which --help does without

        return {"images": [*map(image_text, prompt.images)], "image_digests": prompt.image_digests}

    # --- Existing rows ---

    def _read_existing(self) -> None:
        """Collects the requests that are already answered, checks their settings, and removes a torn last line."""
        is_whole = True
        for start, line, row in self._lines():
            is_whole = line.endswith(b"\n")
            if row is None:
                self._file.truncate(start)
                logger.warning("%s: removed the last line, which a killed run had cut off", self.path)
                return
            if row["model"] == self.model:
                self._check_settings(row)
                self.answered.add((prompt_of(row).key, row.get("sample", 0)))
        if not is_whole:  # the last row is complete, but its newline is missing
            self._file.write(b"\n")

    def _lines(self) -> Iterator[tuple[int, bytes, ResponseRow | None]]:
        """Yields the start, the bytes and the row of every non-empty line. The row of a torn last line is None."""
        with self.path.open("rb") as file:
            end = 0
            for number, line in enumerate(file, start=1):
                start, end = end, end + len(line)
                if not line.strip():
                    continue
                row = _parse_row(line)
                if row is None and not _is_torn(line):
                    raise UserError(
                        f"{self.path}, line {number}: not a response (with the keys {', '.join(RESPONSE_COLUMNS)});"
                        " choose another file to append to"
                    )
                yield start, line, row

    def _check_settings(self, row: ResponseRow) -> None:
        theirs = row.get("settings") or {}
        changed = {name for name, value in self.settings.items() if name in theirs and theirs[name] != value}
        if changed:
            ways = "; ".join(f"{name} was {theirs[name]!r} and is {self.settings[name]!r}" for name in sorted(changed))
            raise UserError(
                f"{self.path} has responses of {self.model} with other settings ({ways}): choose another file, or give"
                " cpt generate another --model_label"
            )


def prompt_of(row: ResponseRow) -> Prompt:
    """Returns the prompt that a row answers."""
    images = tuple(row.get("images") or ()), row.get("image_digests", "")
    return Prompt(row["prompt"], row.get("tools"), row.get("chat_template_kwargs") or {}, *images)


def _parse_row(line: bytes) -> ResponseRow | None:
    """Returns the row of a line, or None if the line is not a response."""
    try:
        row = json.loads(line)
    except ValueError:  # not JSON, or not UTF-8
        return None
    if not isinstance(row, dict) or not all(row.get(name) is not None for name in RESPONSE_COLUMNS):
        return None
    return row


def _is_torn(line: bytes) -> bool:
    """Returns whether a killed run may have left this line."""
    line = line.rstrip(b"\0")  # after a power cut a file may end in zeros
    return not line.endswith(b"\n") and line[: len(_START)] == _START[: len(line)]
