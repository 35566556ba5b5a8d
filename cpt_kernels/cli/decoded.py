"""Shows a pair of the data as text: its prompt, the tokens that are scored, and those that ``max_length`` cuts away."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.text import Text

from ..data.collate import PackedCollator
from ..data.truncation import truncate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_REPEATED = re.compile(r"([<\[][^\s<>\[\]]+[>\]])(\s?\1){3,}")
_STYLES = {"prompt": "cyan", "scored": "green", "not scored": "red"}


def decoded_pair(row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, collator: PackedCollator) -> list[Text]:
    """Returns the first pair of a prepared row as lines, with a colour and a word for each kind of tokens.

    A prompt conditions the completion, but its tokens have no log-prob in the loss.
    """
    lines = [Text(f"row {row['row']} of the data as the model sees it:")]
    shown: list[Sequence[int]] = []
    for side in ("chosen", "rejected"):
        if not row[side]:  # supervised rows have no rejected side
            continue
        whole = [*row["prompt_ids"], *row["completion_ids"][row[side][0]]]
        prompt, completion = truncate(
            row["prompt_ids"], row["completion_ids"][row[side][0]], collator.max_length, collator.truncation_mode
        )
        kept = len(prompt) + len(completion)
        cut = whole[kept:] if collator.truncation_mode == "keep_start" else whole[: len(whole) - kept]
        if list(prompt) not in shown:
            lines.append(_decoded_line("prompt", "prompt", prompt, tokenizer))
            shown.append(list(prompt))
        lines.append(_decoded_line(side, "scored", completion, tokenizer))
        if cut:
            lines.append(_decoded_line(f"{side}, cut by max_length", "not scored", cut, tokenizer))
    return lines


def _decoded_line(what: str, kind: str, ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> Text:
    label = what if kind == what else f"{what} ({kind})" if kind not in what else what
    text = tokenizer.decode(list(ids)).replace("\n", "\u21b5\n    ")  # decodes special tokens, too
    text = _REPEATED.sub(lambda run: f"{run[1]} x {run[0].count(run[1])}", text)  # such as the tokens of an image
    return Text(f"  {label}, {len(ids)} tokens: ").append(text, _STYLES[kind])
