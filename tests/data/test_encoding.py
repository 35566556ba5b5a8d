"""Tests that token ids are those of calling the tokenizer, with and without cuts."""

from __future__ import annotations

import random

import pytest
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from cpt_kernels.data import encoding
from tests.helpers.rows import EOS, make_tokenizer, nasty_pairs, real_pairs

SPLITS = {
    name: [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    for name, pattern in encoding.WORD_PATTERNS.items()
} | {
    "GPT-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "GPT-2 with a space in front": [pre_tokenizers.ByteLevel(add_prefix_space=True)],
    "SmolLM": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
}
# Characters that patterns, normalizers and added tokens treat specially, and enough letters for cuts.
BITS = [
    *"aBzXé\u0301\u00a0\u2003\u3000ſK中๐🙂\u200d'’.,-_/(<|>\n\r\t0127½ⅷ",
    " ",
    "  ",
    "   ",
    " a",
    "b c",
    "'s",
    "'RE",
    "'ll b",
]
BITS += ["<x>", "<|im|>", EOS, " <x>", "e\u0301", " \u0301", "\r\n", " \n ", "the sky is", "hello wor", "ld"]


def make(
    splits: list, normalizer=None, template: str | None = "<s> $A", bits: list[str] = BITS
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = splits[0] if len(splits) == 1 else pre_tokenizers.Sequence(splits)
    if normalizer:
        backend.normalizer = normalizer
    draw = random.Random(1)
    texts = ["".join(draw.choices(bits, k=30)) for _ in range(300)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=["<s>", EOS, "<|im|>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens(["<x>"])
    if template:
        backend.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0), (EOS, 1)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=EOS)


def groups_of(count: int, seed: int = 0) -> list[list[str]]:
    """Returns a text and texts that begin with it, or sometimes texts that do not."""
    draw = random.Random(seed)

    def text() -> str:
        return "".join(draw.choices(BITS, k=draw.randrange(12)))

    groups = []
    for _ in range(count):
        prompt = text()
        groups.append([prompt, *(prompt + text() for _ in range(draw.randrange(4)))])
        if draw.random() < 0.1:
            groups[-1].append(text())
    return groups


def check(tokenizer: PreTrainedTokenizerFast, groups: list[list[str]], special: bool = True) -> None:
    expected = [[tokenizer(text, add_special_tokens=special)["input_ids"] for text in group] for group in groups]
    assert encoding.encode_groups(tokenizer, groups, special) == expected


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()], ids=["as is", "NFC"])
@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS)
def test_cut_texts_have_the_tokens_of_whole_ones(splits, normalizer, special):
    tokenizer, groups = make(splits, normalizer), groups_of(1500)
    assert encoding._may_cut(tokenizer.backend_tokenizer)
    assert sum(map(bool, map(encoding._cut, groups))) > 200
    check(tokenizer, groups, special)


def test_cut_texts_of_real_data():
    groups = [[row["prompt"], row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]] for row in real_pairs()]
    groups += [[row["prompt"], row["prompt"] + row["chosen"]] for row in nasty_pairs()]
    assert sum(map(bool, map(encoding._cut, groups))) > 250
    for splits in SPLITS.values():
        check(make(splits), groups)


def test_a_common_beginning_is_encoded_once(monkeypatch):
    tokenizer = make(SPLITS["Qwen 2 and 3"])
    asked = []
    backend = tokenizer.backend_tokenizer

    class Watched:
        def __getattr__(self, name):
            return getattr(backend, name)

        def encode_batch_fast(self, texts, **options):
            asked.extend(texts)
            return backend.encode_batch_fast(texts, **options)

    monkeypatch.setattr(type(tokenizer), "backend_tokenizer", Watched())
    encoding.encode_groups(
        tokenizer, [["the sky is ", "the sky is blue", "the sky is red"], ["the sky is"], ["a b", "c"]]
    )
    assert asked == ["the sky", " is ", " is blue", " is red", "the sky is", "a b", "c"]  # each is encoded once


WORDS = SPLITS["Qwen 2 and 3"]
TOKENS = {
    "of two words": AddedToken("sky is"),
    "that ends with a space": AddedToken("sky "),
    "that takes spaces before it": AddedToken("<y>", lstrip=True),
    "that takes spaces after it": AddedToken("sky", rstrip=True),
    "that is a word": AddedToken("sky", single_word=True),
}
UNKNOWN = {
    "another pattern": [pre_tokenizers.Split(Regex(r"\w+ \w+|\s+|."), "isolated"), WORDS[1]],
    "another behavior": [
        pre_tokenizers.Split(Regex(encoding.WORD_PATTERNS["Qwen 2 and 3"]), "merged_with_next"),
        WORDS[1],
    ],
    "one word": [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
    "metaspace": [pre_tokenizers.Metaspace()],
}


@pytest.mark.parametrize("token", TOKENS.values(), ids=TOKENS)
def test_nothing_is_cut_with_such_an_added_token(token):
    tokenizer = make(WORDS)
    tokenizer.backend_tokenizer.add_tokens([token])
    assert not encoding._may_cut(tokenizer.backend_tokenizer)
    check(tokenizer, groups_of(300))


@pytest.mark.parametrize("splits", UNKNOWN.values(), ids=UNKNOWN)
def test_nothing_is_cut_with_an_unknown_pretokenizer(splits):
    tokenizer = make(splits)
    assert not encoding._may_cut(tokenizer.backend_tokenizer)
    check(tokenizer, groups_of(300))


def test_nothing_is_cut_unless_cutting_is_exact():
    for normalizer in (normalizers.Lowercase(), normalizers.Replace("sky is", "x")):
        assert not encoding._may_cut(make(WORDS, normalizer).backend_tokenizer)
        check(make(WORDS, normalizer), groups_of(300))
    dropping = make(WORDS).backend_tokenizer
    dropping.model.dropout = 0.1
    assert not encoding._may_cut(dropping)
    assert not encoding._may_cut(Tokenizer(models.WordLevel({"a": 0}, "a")))
    for template in ("$A </s>", "<s> $A </s>", "</s> $A <s> $A"):
        check(make(WORDS, template=template), groups_of(300))


TEXTS = ["Is the sky blue?", "", "Is the sky blue?", f"yes{EOS} é\u0301 \u2603"]


@pytest.mark.parametrize("special", [True, False])
def test_encode_gives_what_the_tokenizer_gives(special):
    asked = make_tokenizer(bos=True)
    asked.pad_token = EOS
    expected = [asked(text, add_special_tokens=special)["input_ids"] for text in TEXTS]
    asked(TEXTS, padding=True, truncation=True, max_length=3)  # the backend keeps padding and truncation until reset
    assert encoding.encode_texts(asked, TEXTS, special) == expected


def test_encode_calls_a_tokenizer_that_overrides_encoding():
    class Shouting(PreTrainedTokenizerFast):
        def _encode_plus(self, text, *args, **kwargs):
            return super()._encode_plus([t.upper() for t in text], *args, **kwargs)

    plain = make_tokenizer()
    own = Shouting(tokenizer_object=plain.backend_tokenizer, eos_token=EOS)
    assert (
        encoding.encode_texts(own, ["sky"])
        == encoding.encode_texts(plain, ["SKY"])
        != encoding.encode_texts(plain, ["sky"])
    )
