"""Reads a prompt or a response as text or as chat messages, in the notations of several trainers.

A conversation is a list of {role, content} messages. ShareGPT writes {from, value}, LLaMA-Factory writes one message
without a list, OpenAI writes content as a list of parts, and Anthropic's HH writes transcripts: text that begins with
"Human:" after two newlines, in which each answer follows "Assistant:". Pure Python.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import date, time
from typing import Any

from ..errors import UserError

Text = str | list  # plain text, or chat messages: a list of {"role": ..., "content": ...}

MALFORMED = "malformed row"  # a reason to drop a row; the others are in formats.py

# ShareGPT's sender of a message -> role.
_SENDERS = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("observation", "tool", "function_response"), "tool"),
    "system": "system",
}
_TEXT_PARTS = ("text", "input_text", "output_text")
_IMAGE = "image"  # TRL's placeholder for an image of the row, {"type": "image"}
_MEDIA_PARTS = (_IMAGE, "image_url", "input_image", "video", "audio", "input_audio")

_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class RowError(UserError):
    """A row that cannot be used. `reason` is a short constant, `detail` names the field."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def read_text_or_messages(field: str, value: Any, images: bool = False) -> Text | None:
    """Returns text as it is, and a message or a list of messages as a list of {role, content} messages.

    Args:
        images: messages may have parts {"type": "image"}, each in place of the next one of the row's images.

    Raises:
        RowError: the value is something else, or holds an image, a video or audio.
    """
    if value is None or isinstance(value, str):
        return value
    turns = [value] if isinstance(value, dict) else value
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and _sender(turn) is not None for turn in turns):
        # `datasets` guesses types when it reads JSON; `load_data` does not.
        is_guessed = isinstance(value, (date, time))
        hint = "; `datasets` made it from text: read the file with cpt_kernels.data.sources.load_data" * is_guessed
        raise RowError(
            MALFORMED, f"`{field}` is {type_name(value)}; expected text or a list of {{role, content}} messages{hint}"
        )
    return [_read_turn(field, turn, images) for turn in turns]


def read_history(field: str, value: Any) -> list:
    """Returns the messages of earlier turns, which Alpaca's `history` holds as [prompt, response] pairs of text.

    Raises:
        RowError: the value is neither null, nor such pairs, nor messages.
    """
    turns: list = []
    for item in value if isinstance(value, list) else [value] if value else []:
        if isinstance(item, list) and len(item) == 2 and all(isinstance(text, str) for text in item):
            turns += [{"role": "user", "content": item[0]}, {"role": "assistant", "content": item[1]}]
        elif isinstance(item, dict):
            turns += read_text_or_messages(field, item) or []
        else:
            raise RowError(MALFORMED, f"`{field}` is {type_name(value)}; expected a list of [prompt, response] pairs")
    return turns


def transcript_prompt(sides: Sequence[str]) -> int | None:
    """Returns the number of characters of the prompt that transcripts share; None if the texts are no transcripts.

    The prompt ends with the last "Assistant:" that all sides have in common.

    Raises:
        RowError: the transcripts differ before the first answer.
    """
    if not all(side.startswith(_HUMAN) for side in sides):
        return None
    shared = next((i for i, letters in enumerate(zip(*sides)) if len({*letters}) > 1), min(map(len, sides)))
    cut = sides[0].rfind(_ASSISTANT, 0, shared)
    if cut < 0:
        raise RowError(MALFORMED, "the transcripts differ before their first 'Assistant:', so they share no prompt")
    return cut + len(_ASSISTANT)


def text_as_turns(prompt: str, completions: Sequence[str]) -> tuple[list, list[list]]:
    """Returns a text prompt as a user turn and its completions as assistant turns; transcripts as all their turns."""
    if not prompt.startswith(_HUMAN):
        return [_turn("user", prompt)], [[_turn("assistant", completion)] for completion in completions]
    sides = [_transcript_turns(_ASSISTANT + completion) for completion in completions]
    return _transcript_turns(prompt.removesuffix(_ASSISTANT)), sides


def type_name(value: Any) -> str:
    """Returns the type of a value for error messages; of a list, with the types of its items."""
    if isinstance(value, list):
        return f"a list of {'/'.join(sorted({type(item).__name__ for item in value}))}"
    return type(value).__name__


def _sender(turn: dict) -> str | None:
    """Returns who wrote a message, or None if it is not said."""
    sender = turn.get("role") if isinstance(turn.get("role"), str) else turn.get("from")
    return sender if isinstance(sender, str) else None


def has_images(text: Text | None) -> bool:
    """Returns whether messages have a part that is an image."""
    contents = (turn.get("content") for turn in text) if isinstance(text, list) else ()
    return any(part.get("type") == _IMAGE for parts in contents if isinstance(parts, list) for part in parts)


def with_images(prompt: list, count: int) -> list:
    """Returns the messages of a prompt with parts as contents, and a part for each of ``count`` images, as TRL does.

    If the first turn of the user is text, all images come before it.

    Raises:
        RowError: the messages have another number of images.
    """
    turns = [{**turn, "content": _as_parts(turn.get("content"))} for turn in prompt]
    first = next((i for i, t in enumerate(prompt) if t["role"] == "user" and isinstance(t.get("content"), str)), None)
    if first is not None and not has_images(prompt):
        turns[first]["content"] = [{"type": _IMAGE}] * count + turns[first]["content"]
    found = sum(part.get("type") == _IMAGE for turn in turns for part in turn["content"] or ())
    if found != count:
        raise RowError(MALFORMED, f'the prompt has {found} parts {{"type": "image"}}, and the row has {count} images')
    return turns


def as_list(value: Any) -> list:
    """Returns the images in a column of a row, which may hold one, a list or its JSON, or null."""
    if value is None:
        return []
    if isinstance(value, str) and value.startswith('["'):
        value = json.loads(value)
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _as_parts(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _read_turn(field: str, turn: dict, images: bool) -> dict:
    if not isinstance(turn.get("role"), str):
        weight = {"weight": turn["weight"]} if "weight" in turn else {}
        turn = _read_sharegpt(field, turn) | weight
    parts = turn.get("content")
    if not isinstance(parts, list):
        return turn
    kinds = [part.get("type") if isinstance(part, dict) else None for part in parts]
    if any(kind in _MEDIA_PARTS and not (images and kind == _IMAGE) for kind in kinds):
        raise RowError(MALFORMED, f"`{field}` holds a part that is not text{' or an image' if images else ''}")
    if _IMAGE in kinds:
        if any(part.get(name) for name in ("image", "url", "path", "base64") for part in parts):
            raise RowError(MALFORMED, f"`{field}` has an image in its messages: give it in the column `images`")
        return turn
    if not parts or not all(
        kind in _TEXT_PARTS and isinstance(part.get("text"), str) for kind, part in zip(kinds, parts)
    ):
        return turn  # such as reasoning, which the chat template may know
    return {**turn, "content": "".join(part["text"] for part in parts)}


def _read_sharegpt(field: str, turn: dict) -> dict:
    sender, value = turn["from"], turn.get("value")
    role = _SENDERS.get(sender)
    if role is None:
        raise RowError(MALFORMED, f"`{field}` has a message from {sender!r}; expected one of {', '.join(_SENDERS)}")
    if sender != "function_call":
        return {"role": role, "content": value}
    try:
        calls = json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise RowError(MALFORMED, f"`{field}` has a function call that is not JSON: {error}") from error
    calls = calls if isinstance(calls, list) else [calls]
    return {"role": role, "content": "", "tool_calls": [{"type": "function", "function": call} for call in calls]}


def _turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def _transcript_turns(text: str) -> list[dict]:
    _, *parts = re.split(rf"({_HUMAN}|{_ASSISTANT})", text)
    return [
        _turn("user" if mark == _HUMAN else "assistant", content.strip())
        for mark, content in zip(parts[::2], parts[1::2])
    ]
