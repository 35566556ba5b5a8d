"""Shows a pair of the data as text: its prompt, the tokens that are scored, and those that ``max_length`` cuts away."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ..data.collate import PackedCollator
from ..data.truncation import truncate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPEATED = re.compile(r"([<\[][^\s<>\[\]]+[>\]])(\s?\1){3,}")
_STYLES = {"prompt": "cyan", "scored": "green", "not scored": "yellow", "cut": "red"}


def decoded_pair(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, collator: PackedCollator) -> list[Text]:
    """Returns the first pair of a prepared row as lines, with a colour and a word for each kind of tokens.

    A prompt conditions the completion, but its tokens have no log-prob in the loss, and neither have the tokens of a
    completion that a mask leaves out. Weights of tokens other than 0 and 1 follow them.
    """
    lines = [Text(f"row {row['row']} of the data as the model sees it:")]
    shown: list[Sequence[int]] = []
    for side in ("chosen", "rejected"):
        if not row[side]:  # supervised rows have no rejected side
            continue
        whole = [*row["prompt_ids"], *row["completion_ids"][row[side][0]]]
        number, how = row[side][0], (collator.max_length, collator.truncation_mode)
        prompt, completion = truncate(row["prompt_ids"], row["completion_ids"][number], *how)
        masks = row.get("scored") or [[1] * len(ids) for ids in row["completion_ids"]]
        _, mask = truncate(row["prompt_ids"], masks[number], *how)
        kept = len(prompt) + len(completion)
        cut = whole[kept:] if collator.truncation_mode == "keep_start" else whole[: len(whole) - kept]
        if list(prompt) not in shown:
            lines.append(_decoded_line("prompt", [(prompt, "prompt")], tokenizer))
            shown.append(list(prompt))
        runs = [(list(run), mark) for mark, run in groupby(range(len(mask)), key=mask.__getitem__)]
        parts = [([completion[i] for i in run], _scored_kind(mark)) for run, mark in runs]
        scored = sum(weight > 0 for weight in mask)
        what = f"{side} ({'scored' if scored == len(mask) else f'{scored} scored'})"
        lines.append(_decoded_line(what, parts, tokenizer))
        if cut:
            lines.append(_decoded_line(f"{side}, cut by max_length (not scored)", [(cut, "cut")], tokenizer))
    return lines


def _scored_kind(weight: float) -> str:
    return "not scored" if weight == 0 else "scored" if weight == 1 else f"scored x {weight:g}"


def _decoded_line(what: str, parts: Sequence[tuple[Sequence[int], str]], tokenizer: PreTrainedTokenizerBase) -> Text:
    """Returns token ids as a line of text, each part in the colour of its kind, and in brackets if it is not scored."""
    line = Text(f"  {what}, {sum(len(ids) for ids, _ in parts)} tokens: ")
    for ids, kind in parts:
        text = tokenizer.decode(list(ids)).replace("\n", "\u21b5\n    ")  # decodes special tokens, too
        text = _REPEATED.sub(lambda run: f"{run[1]} x {run[0].count(run[1])}", text)  # such as the tokens of an image
        style, _, weight = kind.partition(" x ")
        line.append(
            f"[{text}]" if kind == "not scored" else f"{text}{{x {weight}}}" if weight else text, _STYLES[style]
        )
    return line
