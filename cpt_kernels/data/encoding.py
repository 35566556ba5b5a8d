"""Texts -> token ids, those that calling the tokenizer gives, in less time.

What a tokenizer's backend (Rust) makes of a text is taken from it directly. A text that comes twice is encoded once,
and so is the beginning that a prompt and its completions share, where that is sure to change no token.

It is sure at a *cut*, a place between an ASCII letter and a space with an ASCII letter behind it, for byte-level BPE
whose words are found by one of the patterns below. BPE sees one word at a time. No alternative of these patterns
matches a letter and a space behind it, so a word ends at the cut whatever stands elsewhere. None looks back, so words
behind the cut depend on the text behind it alone. None that starts before the cut looks across it: a run of letters
ends there, and `\\s+(?!\\S)`, which looks at the character behind a run of whitespace, has met the letter. NFC composes
nothing with a space, and added tokens must not hold a character and a space behind it, or care for what is beside them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_CAPITALS, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CAMELS = [rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}*{_SMALL}+", rf"[^\r\n\p{{L}}\p{{N}}]?{_CAPITALS}+{_SMALL}*"]
WORD_PATTERNS = {  # besides GPT-2's, which the library knows
    name: "|".join([*words, _SPACES])
    for name, words in {
        "GPT-4, Llama 3": [_ENDINGS, r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n]*"],
        "Qwen 2 and 3": [_ENDINGS, r"[^\r\n\p{L}\p{N}]?\p{L}+", r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n]*"],
        "Qwen 3.5": [_ENDINGS, r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+", r"\p{N}", r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"],
        "GPT-4o, gpt-oss": [*(f"{word}{_ENDINGS}?" for word in _CAMELS), r"\p{N}{1,3}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"],
        "Mistral": [*_CAMELS, r"\p{N}", r" ?[^\s\p{L}\p{N}]+[\r\n/]*"],
    }.items()
}
_LAST_CUT = re.compile(r"(?s).*[A-Za-z](?= [A-Za-z])")


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], add_special_tokens: bool = True
) -> list[list[int]]:
    """Token ids of each text, those that calling the tokenizer gives."""
    return [ids for (ids,) in encode_groups(tokenizer, [[text] for text in texts], add_special_tokens)]


def encode_groups(
    tokenizer: PreTrainedTokenizerBase,
    groups: Sequence[Sequence[str]],
    add_special_tokens: bool = True,
) -> list[list[list[int]]]:
    """As `encode_texts`, for texts of which those of a group may begin with the group's first."""
    # verbose=False: the warning about the model's maximum length would come before anything is truncated.
    options = {"add_special_tokens": add_special_tokens, "return_attention_mask": False, "verbose": False}
    if not has_own_backend(tokenizer):
        ids = iter(tokenizer(text=[text for group in groups for text in group], **options)["input_ids"])
        return [[next(ids) for _ in group] for group in groups]
    # What transformers makes of an encoding besides its ids takes a third of the time. A call with one text leaves the
    # backend in the state that all of them need (no truncation, no padding, special tokens as the tokenizer has it).
    tokenizer(text=["a"], **options)
    backend = tokenizer.backend_tokenizer
    front = _front(backend, add_special_tokens) if _may_cut(backend) else None
    cuts = [0 if front is None else _cut(group) for group in groups]
    heads = [group[0][:cut] for group, cut in zip(groups, cuts)]
    tails = [[text[cut:] for text in group] for group, cut in zip(groups, cuts)]
    pieces = list(dict.fromkeys([*filter(None, heads), *(tail for group in tails for tail in group)]))
    encodings = backend.encode_batch_fast(pieces, add_special_tokens=add_special_tokens and front is None)
    ids_of = {piece: encoding.ids for piece, encoding in zip(pieces, encodings)}
    if front is None:
        return [[ids_of[text] for text in group] for group in groups]
    starts = [[*front, *ids_of[head]] if head else front for head in heads]
    return [[start + ids_of[tail] for tail in group] for start, group in zip(starts, tails)]


def has_own_backend(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether transformers' own methods turn text into ids, which end in one call of the Rust tokenizer."""
    defined = {
        "__call__": "transformers.tokenization_utils_base",
        "apply_chat_template": "transformers.tokenization_utils_base",
        "_encode_plus": "transformers.tokenization_utils_tokenizers",
    }
    methods = {name: getattr(type(tokenizer), name, None) for name in defined}
    return all(getattr(methods[name], "__module__", None) == module for name, module in defined.items())


def _cut(group: Sequence[str]) -> int:
    """The last cut of a group's first text, 0 if there is none or other texts of the group begin in another way."""
    first = group[0]
    found = _LAST_CUT.match(first) if len(group) > 1 and all(text.startswith(first) for text in group) else None
    return found.end() if found else 0


def _may_cut(backend: Tokenizer) -> bool:
    """Whether the tokenizer is one of those that this module's docstring speaks of."""
    if type(backend.model).__name__ != "BPE" or backend.model.dropout or backend.pre_tokenizer is None:
        return False
    if type(backend.normalizer).__name__ not in ("NoneType", "NFC"):
        return False
    for token in backend.get_added_tokens_decoder().values():
        if token.lstrip or token.rstrip or token.single_word or re.search(r"\S ", token.content):
            return False
    outer = json.loads(backend.pre_tokenizer.__getstate__())
    steps = list(map(_step, outer["pretokenizers"] if outer["type"] == "Sequence" else [outer]))
    return "other" not in steps and "words" in steps


def _step(step: dict[str, Any]) -> str:
    """What a step of a pre-tokenizer does: finds words by a known pattern, nothing that matters at a cut, or other."""
    if step["type"] == "ByteLevel":
        return "words" if step["use_regex"] else "nothing"  # GPT-2's pattern
    if step["type"] == "Digits":
        return "nothing"
    if step["type"] == "Split" and (step["behavior"], step["invert"]) == ("Isolated", False):
        return "words" if step["pattern"].get("Regex") in WORD_PATTERNS.values() else "other"
    return "other"


def _front(backend: Tokenizer, add_special_tokens: bool) -> list[int] | None:
    """Special tokens in front of every text; None where some follow it."""
    bare, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, add_special_tokens))
    front = whole[: len(whole) - len(bare)]
    return front if front + bare == whole else None
