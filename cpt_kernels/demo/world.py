"""The task of the demo: short exercises on words of a few letters, each with one right answer.

    reverse, then count c: cadcb
    reverse: bcdac; count c: 2; answer: 2.

The first line is a prompt. The second is its model solution: every step with its result, then the answer.
"""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefgh"

# Name of a step -> its result on a word. x is the letter that "drop" and "count" name; the others ignore it.
OPERATIONS: dict[str, Callable[[str, str], str]] = {
    "reverse": lambda word, x: word[::-1],
    "sort": lambda word, x: "".join(sorted(word)),
    "next": lambda word, x: "".join(LETTERS[(LETTERS.index(letter) + 1) % len(LETTERS)] for letter in word),
    "drop": lambda word, x: word.replace(x, ""),
    "count": lambda word, x: str(word.count(x)),
}
FILLER = " hope this helps!"

_PROMPT = re.compile(rf"(.+): ([{LETTERS}]+)\n")


@dataclass(frozen=True)
class Exercise:
    """One or two steps on a word. A step is written as in the prompt: ``reverse``, ``count c``."""

    steps: tuple[str, ...]
    word: str

    @property
    def prompt(self) -> str:
        return f"{', then '.join(self.steps)}: {self.word}\n"

    @classmethod
    def parse(cls, prompt: str) -> Exercise:
        """Returns the exercise of a prompt."""
        steps, word = _PROMPT.fullmatch(prompt).groups()
        return cls(tuple(steps.split(", then ")), word)

    @property
    def results(self) -> list[str]:
        """The results of all steps; the last one is the answer."""
        results, value = [], self.word
        for step in self.steps:
            value = apply(step, value)
            results.append(value)
        return results


def apply(step: str, value: str) -> str:
    """Returns the result of a step on a word."""
    name, _, letter = step.partition(" ")
    return OPERATIONS[name](value, letter)


def solution(steps: tuple[str, ...], results: list[str]) -> str:
    """Returns a response that shows these steps and results, and the last result as the answer."""
    return "".join(f"{step}: {result}; " for step, result in zip(steps, results)) + f"answer: {results[-1]}."


def make_exercises(count: int, rng: random.Random, longest: int = 5, two_steps: float = 0.6) -> list[Exercise]:
    """Returns ``count`` exercises with different prompts.

    Args:
        longest: letters of the longest word; the shortest has 3.
        two_steps: the probability of a second step, where the first one is not ``count``.
    """
    found: dict[Exercise, None] = {}
    while len(found) < count:
        word = "".join(rng.choices(LETTERS, k=rng.randint(3, longest)))
        names = [rng.choice(list(OPERATIONS))]
        if names[0] != "count" and rng.random() < two_steps:
            names.append(rng.choice([name for name in OPERATIONS if name != names[0]]))
        steps: list[str] = []
        value = word
        for name in names:
            steps.append(f"{name} {rng.choice(value)}" if name in ("drop", "count") else name)
            value = apply(steps[-1], value)
            if not value:  # "drop" removed every letter: draw again
                break
        if value:
            found[Exercise(tuple(steps), word)] = None
    return list(found)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer with a token per word, letter, digit and mark; decoding restores the text exactly."""
    words = {*OPERATIONS, "then", "answer", *re.findall(r"\w+", FILLER)}
    tokens = ["<pad>", "<eos>", "<unk>", *sorted(words), *LETTERS, *string.digits, ": ", "; ", ", ", *" .!\n"]
    backend = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    pattern = "|".join(sorted(words, key=len, reverse=True))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(rf"{pattern}|[:;,] |[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
