"""Preference data made of random tokens: what it costs depends on lengths alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

# Ids below this are special in the synthetic tokenizer.
FIRST_TOKEN = 3

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


# Shapes, not fits to any dataset.
PRESETS = {
    "mixed": Lengths(uniform(64, 256), uniform(32, 256)),
    "long-prompt": Lengths(uniform(512, 1024), uniform(32, 128)),
    "heavy-tailed": Lengths(lognormal(120, 0.9, 8, 1024), lognormal(220, 0.7, 8, 1024)),
    "tiny": Lengths(uniform(4, 12), uniform(2, 12)),
}


def preference_rows(preset: str, rows: int, vocab: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Tokenised pairs, TRL's columns: ``prompt_ids``, ``chosen_ids``, ``rejected_ids``."""
    random = np.random.default_rng(seed)
    lengths = PRESETS[preset]
    counts = {
        "prompt_ids": lengths.prompt(random, rows),
        "chosen_ids": lengths.completion(random, rows),
        "rejected_ids": lengths.completion(random, rows),
    }
    return [
        {name: random.integers(FIRST_TOKEN, vocab, lengths[row]).tolist() for name, lengths in counts.items()}
        for row in range(rows)
    ]


def row_lengths(rows: list[dict[str, list[int]]]) -> list[tuple[int, int, int]]:
    """(prompt, chosen, rejected) of every row."""
    return [tuple(len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids")) for row in rows]
