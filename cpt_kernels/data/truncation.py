"""Cut a prompt and one completion to `max_length` tokens. Pure Python, so that filter, collator and tests share it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from ..errors import UserError

TruncationMode = Literal["keep_start", "keep_end"]


def check_truncation(max_length: int | None, mode: str) -> None:
    """Raise ValueError, naming the option, unless `truncate` can work with these two."""
    if max_length is not None and max_length < 1:
        raise UserError(f"max_length={max_length} leaves no token; give a positive number, or None for no cut")
    if mode not in get_args(TruncationMode):
        raise UserError(f"truncation_mode={mode!r} is unknown; it is one of {', '.join(get_args(TruncationMode))}")


def truncate(
    prompt_ids: Sequence[int],
    completion_ids: Sequence[int],
    max_length: int | None,
    mode: TruncationMode = "keep_start",
) -> tuple[Sequence[int], Sequence[int]]:
    """What is left of (prompt, completion) when the two together are cut to at most `max_length` tokens.

    `keep_start` keeps the first tokens and `keep_end` the last; `max_length=None` cuts nothing. Where no prompt token
    is left (or there was none), the first completion token becomes the prompt: nothing stands before it to predict it,
    so it cannot be scored. The completion that comes back may be empty.

    Raises:
        UserError: `max_length` is below 1, or `mode` is unknown.
    """
    check_truncation(max_length, mode)
    excess = 0 if max_length is None else len(prompt_ids) + len(completion_ids) - max_length
    if excess > 0 and mode == "keep_start":
        completion_ids = completion_ids[: max(0, max_length - len(prompt_ids))]
        prompt_ids = prompt_ids[:max_length]
    elif excess > 0:
        completion_ids = completion_ids[max(0, excess - len(prompt_ids)) :]
        prompt_ids = prompt_ids[excess:]
    if len(prompt_ids) == 0:
        return completion_ids[:1], completion_ids[1:]
    return prompt_ids, completion_ids
