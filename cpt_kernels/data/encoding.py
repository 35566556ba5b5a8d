"""Encodes texts to the token ids that calling the tokenizer gives, but faster.

Three things save time. Ids come straight from the tokenizer's Rust backend. A text that occurs twice is encoded once.
And the text that a prompt shares with its completions is encoded once, if the prompt has a place where the encoding of
the whole text is the encodings of both parts, one after the other. Such a place is called a *cut*.

A cut lies after an ASCII letter that is followed by a space and another ASCII letter. It is safe in byte-level BPE
tokenizers that split text into words by one of the patterns below, and each condition has its reason:

- BPE encodes every word separately, so only the split into words matters.
- No alternative of the patterns matches a letter followed by a space, so a word ends at the cut in any text.
- No alternative looks back, so the words after the cut depend only on the text after it.
- No match that starts before the cut depends on the text after it: a run of letters ends at the cut, and the
  look-ahead of ``\\s+(?!\\S)`` from white space before the cut reaches at most the letter at the cut.
- NFC composes no character with a space.
- Tokenizers are excluded if an added token contains a character followed by a space, or strips or checks the text
  around itself.
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
WORD_PATTERNS = {  # the pattern of GPT-2 is built into ByteLevel(use_regex=True)
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
    """Returns the token ids of each text, the same as calling the tokenizer."""
    return [ids for (ids,) in encode_groups(tokenizer, [[text] for text in texts], add_special_tokens)]


def encode_groups(
    tokenizer: PreTrainedTokenizerBase, groups: Sequence[Sequence[str]], add_special_tokens: bool = True
) -> list[list[list[int]]]:
    """Returns the token ids of each text of each group. Texts that begin with their group's first text save time."""
    # verbose=False: the tokenizer would warn about the model's maximum length, but truncation happens later.
    options = {"add_special_tokens": add_special_tokens, "return_attention_mask": False, "verbose": False}
    if not has_own_backend(tokenizer):
        ids = iter(tokenizer(text=[text for group in groups for text in group], **options)["input_ids"])
        return [[next(ids) for _ in group] for group in groups]
    # Calling the backend directly avoids building transformers' BatchEncoding, a third of the time. The call with one
    # text sets the backend's state as transformers does for any text: no truncation, no padding, its special tokens.
    tokenizer(text=["a"], **options)
    backend = tokenizer.backend_tokenizer
    # Without a front (see `_front`) whole texts are encoded. Otherwise each distinct piece before or after a cut is
    # encoded without special tokens, which are put in front afterwards.
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
    """Returns whether the tokenizer encodes with transformers' own methods, which end in one call of a Rust backend."""
    defined = {
        "__call__": "transformers.tokenization_utils_base",
        "apply_chat_template": "transformers.tokenization_utils_base",
        "_encode_plus": "transformers.tokenization_utils_tokenizers",
    }
    methods = {name: getattr(type(tokenizer), name, None) for name in defined}
    return all(getattr(methods[name], "__module__", None) == module for name, module in defined.items())


def _cut(group: Sequence[str]) -> int:
    """Returns the last cut of the text that all texts of the group begin with: their first. Without one, returns 0."""
    first = group[0]
    found = _LAST_CUT.match(first) if len(group) > 1 and all(text.startswith(first) for text in group) else None
    return found.end() if found else 0


def _may_cut(backend: Tokenizer) -> bool:
    """Returns whether cuts are safe with this tokenizer: the conditions are in the module's docstring."""
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
    """Classifies a pre-tokenizer step: "words" (splits by a known pattern), "nothing" (harmless to cuts) or "other"."""
    if step["type"] == "ByteLevel":
        return "words" if step["use_regex"] else "nothing"  # GPT-2's pattern
    if step["type"] == "Digits":
        return "nothing"
    if step["type"] == "Split" and (step["behavior"], step["invert"]) == ("Isolated", False):
        return "words" if step["pattern"].get("Regex") in WORD_PATTERNS.values() else "other"
    return "other"


def _front(backend: Tokenizer, add_special_tokens: bool) -> list[int] | None:
    """Returns the special tokens that precede every text, or None if special tokens follow the text."""
    bare, whole = (backend.encode("a", add_special_tokens=special).ids for special in (False, add_special_tokens))
    front = whole[: len(whole) - len(bare)]
    return front if front + bare == whole else None
