"""Preference data of random tokens, with lengths of a preset or of a file: no more decides what a step costs."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

# Ids below this are special in the synthetic tokenizer.
FIRST_TOKEN = 3

Group = tuple[int, list[int]]  # tokens of a prompt and of its completions, best first
Draw = Callable[[np.random.Generator, int], np.ndarray]


def uniform(low: int, high: int) -> Draw:
    """Lengths from ``low`` to ``high``, both included."""
    return lambda random, size: random.integers(low, high + 1, size)


def lognormal(median: float, sigma: float, low: int, high: int) -> Draw:
    """Heavy-tailed lengths, clipped to what a trainer would truncate to."""

    def draw(random: np.random.Generator, size: int) -> np.ndarray:
        return np.clip(median * np.exp(sigma * random.standard_normal(size)), low, high).astype(np.int64)

    return draw


@dataclass(frozen=True)
class Lengths:
    """How long prompts and completions are."""

    prompt: Draw
    completion: Draw


# The shapes of such data, not fits to them. "responses" beside these: 300 prompts and what four models said to them.
PRESETS = {
    "mixed": Lengths(uniform(64, 256), uniform(32, 256)),
    "ultrafeedback": Lengths(lognormal(120, 0.9, 8, 1024), lognormal(280, 0.65, 8, 1024)),
    "hh": Lengths(lognormal(90, 0.9, 8, 768), lognormal(50, 0.8, 4, 384)),
    "long-prompt": Lengths(uniform(512, 1024), uniform(32, 128)),
    "tiny": Lengths(uniform(4, 12), uniform(2, 12)),
}
_RESPONSES = Path(__file__).with_name("responses_lengths.csv")
HELP = f"{', '.join(PRESETS)}, responses, uniform:P:C (all prompts and completions of P and C tokens), or a JSONL file"


def preference_rows(
    lengths: str, prompts: int, vocab: int, completions: int = 2, seed: int = 0
) -> list[dict[str, list[int]]]:
    """Tokenised pairs, TRL's columns: ``prompt_ids``, ``chosen_ids``, ``rejected_ids``.

    Args:
        lengths: see ``HELP``.
        prompts: how many; each has all pairs of its ``completions``, one after another.
        vocab: ids are drawn from ``FIRST_TOKEN`` to here.
    """
    random = np.random.default_rng(seed)
    rows = []
    for prompt, sides in draw_groups(lengths, prompts, completions, random):
        prompt, *texts = (random.integers(FIRST_TOKEN, vocab, length).tolist() for length in (prompt, *sides))
        rows += [
            {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
            for chosen, rejected in combinations(texts, 2)
        ]
    return rows


def rows_of(spec: Mapping[str, Any]) -> list[dict[str, list[int]]]:
    """The pairs of all steps and ranks of ``bench step``'s contestants, in order."""
    completions = spec.get("completions", 2)
    pairs = spec["steps"] * spec["pairs"] * spec.get("ranks", 1)
    prompts = pairs // (completions * (completions - 1) // 2)
    return preference_rows(spec["lengths"], prompts, spec["shape"]["vocab"], completions)


def draw_groups(lengths: str, prompts: int, completions: int, random: np.random.Generator) -> list[Group]:
    """Lengths of so many prompts with so many completions each.

    Raises:
        ValueError: no such preset or file, or too few completions in it.
    """
    if lengths.startswith("uniform:"):
        if not (found := re.fullmatch(r"uniform:(\d+):(\d+)", lengths)):
            raise ValueError(f"--lengths {lengths}: must be uniform:P:C, tokens of a prompt and of a completion")
        return [(int(found[1]), [int(found[2])] * completions)] * prompts
    if preset := PRESETS.get(lengths):
        every = preset.prompt(random, prompts), preset.completion(random, (prompts * completions))
        return [
            (int(prompt), sides.tolist()) for prompt, sides in zip(every[0], every[1].reshape(prompts, completions))
        ]
    groups = [group for group in groups_of(lengths) if len(group[1]) >= completions]
    if not groups:
        raise ValueError(f"--lengths {lengths}: no prompt has {completions} different completions")
    drawn = (int(i) for _ in range(-(-prompts // len(groups))) for i in random.permutation(len(groups)))
    # The first and the last: of ranked responses those that differ most.
    return [(groups[i][0], [*groups[i][1][: completions - 1], groups[i][1][-1]]) for i, _ in zip(drawn, range(prompts))]


def groups_of(lengths: str) -> list[Group]:
    """Lengths in the shipped table of responses, in another such table, or in a file of the user's own."""
    path = _RESPONSES if lengths == "responses" else Path(lengths)
    if not path.is_file():
        raise ValueError(f"--lengths {lengths}: no preset and no file; there are {HELP}")
    if path.suffix == ".csv":
        with path.open() as file:
            return [(prompt, sides) for prompt, *sides in (list(map(int, row)) for row in list(csv.reader(file))[1:])]
    return count_tokens([json.loads(line) for line in path.read_text().splitlines() if line.strip()], lengths)


def checked(lengths: str, completions: int, folder: Path) -> str:
    """What other processes are told: ``lengths``, or a table in ``folder`` of a JSONL file's, which are counted once.

    Raises:
        ValueError: as :func:`draw_groups`.
    """
    path = Path(lengths)
    if path.is_file() and path.suffix != ".csv":
        groups = groups_of(lengths)
        path = folder / f"{path.stem}.csv"
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([["prompt", "completions"], *([prompt, *sides] for prompt, sides in groups)])
        lengths = str(path)
    draw_groups(lengths, 1, completions, np.random.default_rng(0))
    return lengths


def count_tokens(rows: Sequence[dict[str, str]], name: str, vocab: int = 8000) -> list[Group]:
    """Lengths of rows {prompt, chosen, rejected} or {prompt, model, response}, by a tokenizer trained on their text."""
    texts: dict[str, list[str]] = {}
    for number, row in enumerate(rows, 1):
        sides = [row[column] for column in ("chosen", "rejected", "response") if column in row]
        if "prompt" not in row or not sides:
            raise ValueError(
                f"--lengths {name}, row {number}: wants prompt with chosen and rejected, or with model and response;"
                f" found {', '.join(row)}"
            )
        if not all(isinstance(text, str) for text in (row["prompt"], *sides)):
            raise ValueError(f"--lengths {name}, row {number}: text is wanted, not messages")
        texts.setdefault(row["prompt"], []).extend(sides)
    tokenizer = train_bpe([text for prompt, sides in texts.items() for text in (prompt, *sides)], vocab)
    groups = []
    for prompt, sides in texts.items():
        counts = [len(found.ids) for found in tokenizer.encode_batch([prompt, *dict.fromkeys(sides)])]
        if len(counts) > 2 and min(counts) > 0:
            groups.append((counts[0], counts[1:]))
    return groups


def train_bpe(texts: Iterable[str], vocab: int, words: str | None = None, roles: Sequence[str] = ()):
    """A byte-level BPE ``tokenizers.Tokenizer`` of the texts themselves.

    Args:
        words: the regular expression that cuts a text into words; default GPT-2's.
        roles: special tokens beside ``<pad>`` and ``<eos>``.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    cut = [] if words is None else [pre_tokenizers.Split(Regex(words), "isolated")]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cut, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<pad>", "<eos>", *roles],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def pair_of(row: dict[str, list[int]]) -> tuple[list[int], list[int], list[int]]:
    """(prompt, chosen, rejected) of a row, as :mod:`bench.work` counts it."""
    return row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
