"""Finds the weights of a completion's tokens where some turns of a conversation are not scored, or have weights.

As in TRL's SFT trainer, a chat template may mark what the assistant writes by ``{% generation %}``. Other templates are
rendered turn by turn: a turn begins where the text of the turns before it ends, with the header that asks the assistant
to write, and ends where the text ends if no turn follows. Both texts must be beginnings of the whole text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from .formats import Example
from .messages import MALFORMED, RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNJOINED = "turns that cannot be told apart"  # no reason to drop a row, but an error of the whole dataset

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


def scored_tokens(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    sequences: Sequence[Sequence[int]],  # token ids of the prompt with each completion
) -> list[list[float]]:
    """Returns the weight of every token of each sequence: that of its turn, 0 for turns that are not scored.

    Raises:
        RowError: the row is text, or (with the reason UNJOINED) the turns do not join to the whole conversation.
    """
    options: dict[str, Any] = {"tools": example.tools, **example.template_kwargs}
    marked = example.train_on is None and _is_marked(tokenizer, example)
    masks = []
    for i, (turns, ids) in enumerate(zip(example.completions, sequences)):
        whole: Any = [*example.prompt, *turns]
        if marked:
            found: Any = tokenizer.apply_chat_template(
                whole, tokenize=True, return_dict=True, return_assistant_tokens_mask=True, **options
            )
            encoded, mask = found["input_ids"], [float(value) for value in found["assistant_masks"]]
        else:
            render: Any = partial(tokenizer.apply_chat_template, tokenize=False, **options)
            spans = turn_spans(render, example, i, str(render(whole)))
            encoded, mask = text_mask(tokenizer, str(render(whole)), spans)
        assert encoded == list(ids), "the tokenizer gives other tokens with offsets"
        masks.append(mask)
    return masks


def turn_spans(
    render: Callable[..., Any], example: Example, completion: int, whole: str, prompt: list | None = None
) -> list[tuple[int, int, float]]:
    """Returns the scored turns of a completion as (start, end, weight) in the characters of the whole text.

    The weights are those of the row's ``train_on``, or else 1 for the assistant's turns.

    Args:
        render: renders messages; takes ``add_generation_prompt``.
        completion: its index in the example.
        whole: the text of prompt and completion.
        prompt: the messages of the prompt; default those of the example.

    Raises:
        RowError: the row is text, or (with the reason UNJOINED) the turns do not join to ``whole``.
    """
    if not example.is_chat:
        raise RowError(MALFORMED, "only turns of messages can be scored apart, and the row is text")
    turns: Any = example.completions[completion]
    flags = None if example.train_on is None else example.train_on[completion]
    spans = []
    for i, turn in enumerate(turns):
        is_assistant = turn["role"] == "assistant"
        weight = float(is_assistant) if flags is None else flags[i]
        if not weight:
            continue
        before = [*(prompt or example.prompt), *turns[:i]]
        start = render(before, add_generation_prompt=is_assistant)
        if i == 0:  # a prompt may end differently when a completion follows; the completion begins there
            start = os.path.commonprefix([start, whole])  # noqa: RUF071 (of characters)
        end = whole if i + 1 == len(turns) else render([*before, turn], add_generation_prompt=False)
        if not (end.startswith(start) and whole.startswith(end)):
            raise RowError(
                UNJOINED,
                f"turn {len(before)} of the conversation cannot be told apart, because the chat template renders it"
                " differently when other turns follow: mark what the assistant writes in the template by"
                " {% generation %} and {% endgeneration %}, or set assistant_only_loss=false and remove `train_on`",
            )
        spans.append((len(start), len(end), weight))
    return spans


def text_mask(
    tokenizer: PreTrainedTokenizerBase, text: str, spans: Iterable[tuple[int, int, float]]
) -> tuple[list[int], list[float]]:
    """Returns the token ids of a text, and their weights: the largest of the spans that hold a part of the token."""
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    spans = list(spans)
    offsets: Any = found["offset_mapping"]
    return found["input_ids"], [
        max((weight for start, stop, weight in spans if first < stop and last > start), default=0.0)
        for first, last in offsets
    ]


def _is_marked(tokenizer: PreTrainedTokenizerBase, example: Example) -> bool:
    """Returns whether the row's chat template marks what the assistant writes."""
    given = example.template_kwargs.get("chat_template")
    return _GENERATION.search(tokenizer.get_chat_template(given, example.tools)) is not None
