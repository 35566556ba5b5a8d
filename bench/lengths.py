"""Preference data of random tokens, with lengths from a preset or a file.

The cost of a training step depends on lengths only, so the tokens need no meaning.
"""

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

Group = tuple[int, list[int]]  # tokens of a prompt, and of its completions, best first
Draw = Callable[[np.random.Generator, int], np.ndarray]  # (generator, size) -> lengths


def uniform(low: int, high: int) -> Draw:
    """Draws lengths uniformly from ``low`` to ``high``, both included."""
    return lambda random, size: random.integers(low, high + 1, size)


def lognormal(median: float, sigma: float, low: int, high: int) -> Draw:
    """Draws heavy-tailed lengths, clipped to ``low`` and ``high`` as a trainer would truncate them."""

    def draw(random: np.random.Generator, size: int) -> np.ndarray:
        return np.clip(median * np.exp(sigma * random.standard_normal(size)), low, high).astype(np.int64)

    return draw


@dataclass(frozen=True)
class Lengths:
    """Distributions of the lengths of prompts and completions."""

    prompt: Draw
    completion: Draw


# These presets resemble the data that they are named after; they are not fitted to it. The table behind "responses"
# has the lengths of 300 real prompts and of the responses of four models.
PRESETS = {
    "mixed": Lengths(uniform(64, 256), uniform(32, 256)),
    "ultrafeedback": Lengths(lognormal(120, 0.9, 8, 1024), lognormal(280, 0.65, 8, 1024)),
    "hh": Lengths(lognormal(90, 0.9, 8, 768), lognormal(50, 0.8, 4, 384)),
    "long-prompt": Lengths(uniform(512, 1024), uniform(32, 128)),
    "tiny": Lengths(uniform(4, 12), uniform(2, 12)),
}


@dataclass(frozen=True)
class Trees:
    """Lengths of rows whose sequences begin alike.

    A tree is a first question and ``turns`` turns, each an answer and what follows it: the next question, or the result
    of a tool. Without ``pairs_at_turns`` it is one pair, whose sides have the turns before ``parting`` in common.
    """

    first: Draw
    answer: Draw
    between: Draw
    turns: int
    parting: int = 0
    pairs_at_turns: bool = False


# multi-turn: 6 turns with a pair at each. The means of the lengths, 69 and 215 tokens, are those of LMSYS-Chat-1M: its
# Table 1 gives 69.5 tokens per prompt and 214.5 per response (arXiv 2309.11998). steps: two answers that have the
# first half of their 10 steps in common; PRM800K has 800,000 labels of steps of 75,000 solutions, 10.7 each (arXiv
# 2305.20050). agents: two trajectories of 16 calls that part at the thirteenth. Of seven collections of trajectories,
# the README of nebius/SWE-rebench-openhands-trajectories gives means from 16.1 to 64.3 turns; 16 fit on a small
# machine. The tokens of a step, of a call and of a tool's result are assumed.
_USER, _ANSWER = lognormal(50, 0.8, 8, 512), lognormal(156, 0.8, 8, 1024)
TREES = {
    "multi-turn": Trees(_USER, _ANSWER, _USER, turns=6, pairs_at_turns=True),
    "steps": Trees(lognormal(70, 0.6, 16, 256), lognormal(25, 0.5, 5, 80), uniform(1, 1), 10, 5),
    "agents": Trees(lognormal(300, 0.5, 64, 1024), lognormal(50, 0.6, 10, 200), lognormal(120, 0.9, 10, 600), 16, 12),
}
TREE_HELP = f"{', '.join(TREES)} (sequences that begin alike)"
_RESPONSES = Path(__file__).with_name("responses_lengths.csv")
HELP = f"{', '.join(PRESETS)}, responses, uniform:P:C (P tokens per prompt and C per completion), or a JSONL file"


def preference_rows(
    lengths: str, prompts: int, vocab: int, completions: int = 2, seed: int = 0
) -> list[dict[str, list[int]]]:
    """Returns tokenized pairs with TRL's columns ``prompt_ids``, ``chosen_ids`` and ``rejected_ids``.

    Args:
        lengths: A preset, table or file; see ``HELP``.
        prompts: The number of prompts. Each gives all pairs of its completions, one after another.
        vocab: The vocabulary size; ids are drawn from ``FIRST_TOKEN`` to ``vocab`` - 1.
        completions: The number of completions per prompt.
        seed: The seed of lengths and ids.
    """
    random = np.random.default_rng(seed)
    if lengths in TREES:
        return _tree_rows(TREES[lengths], prompts, vocab, random)
    rows = []
    for prompt, sides in draw_groups(lengths, prompts, completions, random):
        prompt, *texts = (random.integers(FIRST_TOKEN, vocab, length).tolist() for length in (prompt, *sides))
        rows += [
            {"prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected}
            for chosen, rejected in combinations(texts, 2)
        ]
    return rows


def _tree_rows(shape: Trees, count: int, vocab: int, random: np.random.Generator) -> list[dict[str, list[int]]]:
    """Returns pairs, those of one tree one after another."""

    def tokens(draw: Draw) -> list[int]:
        return random.integers(FIRST_TOKEN, vocab, int(draw(random, 1)[0])).tolist()

    def turns(number: int) -> list[int]:
        return [token for _ in range(number) for token in (*tokens(shape.answer), *tokens(shape.between))]

    rows: list[dict[str, list[int]]] = []
    while len(rows) < count:
        so_far = tokens(shape.first)
        if not shape.pairs_at_turns:
            common, rest = turns(shape.parting), shape.turns - shape.parting
            sides = ([*common, *turns(rest)] for _ in range(2))
            rows.append(dict(zip(("prompt_ids", "chosen_ids", "rejected_ids"), (so_far, *sides))))
            continue
        for _ in range(shape.turns):
            chosen, rejected = tokens(shape.answer), tokens(shape.answer)
            rows.append({"prompt_ids": so_far, "chosen_ids": chosen, "rejected_ids": rejected})
            so_far = [*so_far, *chosen, *tokens(shape.between)]
    return rows[:count]


def rows_of(spec: Mapping[str, Any]) -> list[dict[str, list[int]]]:
    """Returns the pairs of all steps and ranks that the contestants of ``bench step`` train on, in order."""
    completions = spec.get("completions", 2)
    pairs = spec["steps"] * spec["pairs"] * spec.get("ranks", 1)
    prompts = pairs // (completions * (completions - 1) // 2)
    return preference_rows(spec["lengths"], prompts, spec["shape"]["vocab"], completions)


def draw_groups(lengths: str, prompts: int, completions: int, random: np.random.Generator) -> list[Group]:
    """Draws the lengths of ``prompts`` prompts with ``completions`` completions each.

    Raises:
        ValueError: The preset or file does not exist, or no prompt in it has enough completions.
    """
    if lengths.startswith("uniform:"):
        if not (found := re.fullmatch(r"uniform:(\d+):(\d+)", lengths)):
            raise ValueError(f"--lengths {lengths}: must be uniform:P:C, the tokens of a prompt and of a completion")
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
    # Responses are ranked, so keep the first ones and the last one, which differ most.
    return [(groups[i][0], [*groups[i][1][: completions - 1], groups[i][1][-1]]) for i, _ in zip(drawn, range(prompts))]


def groups_of(lengths: str) -> list[Group]:
    """Reads lengths from the shipped table ("responses"), another CSV table, or a JSONL file.

    Raises:
        ValueError: The file does not exist, or a row of it lacks a column.
    """
    path = _RESPONSES if lengths == "responses" else Path(lengths)
    if not path.is_file():
        raise ValueError(f"--lengths {lengths}: no preset and no file of this name; use {HELP}")
    if path.suffix == ".csv":
        with path.open() as file:
            return [(prompt, sides) for prompt, *sides in (list(map(int, row)) for row in list(csv.reader(file))[1:])]
    return count_tokens([json.loads(line) for line in path.read_text().splitlines() if line.strip()], lengths)


def checked(lengths: str, completions: int, folder: Path) -> str:
    """Checks ``lengths`` and returns the name to pass to other processes.

    The tokens of a JSONL file are counted once; their counts go to a CSV table in ``folder``, which is returned.

    Raises:
        ValueError: See :func:`draw_groups`.
    """
    if lengths in TREES:
        if completions != 2:
            raise ValueError(f"--lengths {lengths}: has pairs of two completions, not {completions}")
        return lengths
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
    """Counts tokens of rows {prompt, chosen, rejected} or {prompt, model, response}.

    The tokenizer is a BPE of ``vocab`` tokens trained on the texts themselves. Prompts with fewer than two different
    completions are left out. ``name`` stands in error messages.
    """
    texts: dict[str, list[str]] = {}
    for number, row in enumerate(rows, 1):
        sides = [row[column] for column in ("chosen", "rejected", "response") if column in row]
        if "prompt" not in row or not sides:
            raise ValueError(
                f"--lengths {name}, row {number}: needs prompt with chosen and rejected, or with model and response;"
                f" found {', '.join(row)}"
            )
        if not all(isinstance(text, str) for text in (row["prompt"], *sides)):
            raise ValueError(f"--lengths {name}, row {number}: must have texts, not messages")
        texts.setdefault(row["prompt"], []).extend(sides)
    tokenizer = train_bpe([text for prompt, sides in texts.items() for text in (prompt, *sides)], vocab)
    groups = []
    for prompt, sides in texts.items():
        counts = [len(found.ids) for found in tokenizer.encode_batch([prompt, *dict.fromkeys(sides)])]
        if len(counts) > 2 and min(counts) > 0:
            groups.append((counts[0], counts[1:]))
    return groups


def train_bpe(texts: Iterable[str], vocab: int, words: str | None = None, roles: Sequence[str] = ()):
    """Trains a byte-level BPE ``tokenizers.Tokenizer`` on ``texts``.

    Args:
        words: The regular expression that splits a text into words; default: GPT-2's.
        roles: Special tokens in addition to ``<pad>`` and ``<eos>``.
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
    """Returns (prompt, chosen, rejected) of a row, the form that :mod:`cpt_kernels.planning.work` takes."""
    return row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
