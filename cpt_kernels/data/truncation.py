"""Cuts a prompt and one completion to `max_length` tokens. Pure Python, shared by the filter and the collator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from ..errors import UserError

TruncationMode = Literal["keep_start", "keep_end"]


def check_truncation(max_length: int | None, mode: str) -> None:
    """Raises a UserError that names the option unless `truncate` accepts both values."""
    if max_length is not None and max_length < 1:
        raise UserError(f"max_length={max_length} leaves no token: give a positive number, or None to cut nothing")
    if mode not in get_args(TruncationMode):
        raise UserError(f"truncation_mode={mode!r} is unknown: choose one of {', '.join(get_args(TruncationMode))}")


def truncate(
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    max_length: int | None,
    mode: TruncationMode = "keep_start",
    whole_prompt: bool = False,
) -> tuple[Sequence[int], Sequence[int]]:
    """Cuts (prompt, completion) so that both together have at most `max_length` tokens.

    `keep_start` keeps the first tokens and `keep_end` the last ones; `max_length=None` cuts nothing. If no prompt token
    is left, or there was none, the first completion token becomes the prompt: no earlier token predicts it, so it has
    no log-prob. The returned completion may be empty. With `whole_prompt` it is empty if the prompt would be cut: of a
    prompt with images no part may be missing.

    Raises:
        UserError: `max_length` is below 1, or `mode` is unknown.
    """
    check_truncation(max_length, mode)
    if max_length is not None and (excess := len(prompt_ids) + len(completion_ids) - max_length) > 0:
        if mode == "keep_start":
            completion_ids = completion_ids[: max(0, max_length - len(prompt_ids))]
            prompt_ids = prompt_ids[:max_length]
        elif whole_prompt:
            completion_ids = completion_ids[:0]
        else:
            completion_ids = completion_ids[max(0, excess - len(prompt_ids)) :]
            prompt_ids = prompt_ids[excess:]
    if len(prompt_ids) == 0:
        return completion_ids[:1], completion_ids[1:]
    return prompt_ids, completion_ids
