"""Rows whose sequences are paths of random tries."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.helpers.architectures import VOCAB


def random_paths(random: np.random.Generator, depth: int = 6, leaves: int = 16) -> list[list[int]]:
    """Returns the ends of a random trie's nodes as paths: leaves, and some inner nodes. Many nodes have one token."""
    paths: list[list[int]] = []
    grown = [([], 0)]  # (path to a node, its depth)
    while grown:
        path, level = grown.pop(random.integers(len(grown)))
        is_leaf = level > 0 and (level == depth or len(paths) + len(grown) >= leaves - 1 or random.random() < 0.15)
        if len(path) > 1 and (is_leaf or random.random() < 0.3):
            paths.append(path)
        if not is_leaf:
            # Children differ in their first token.
            for first in random.choice(np.arange(3, VOCAB), random.integers(1, 4), replace=False).tolist():
                length = 1 if random.random() < 0.3 else int(random.integers(1, 5))
                grown.append(([*path, first, *random.integers(3, VOCAB, length - 1).tolist()], level + 1))
    return paths[:leaves] or [[3, 4]]


def tree_rows(seed: int, loss: str = "sigmoid", tries: int = 2) -> list[dict[str, Any]]:
    """Returns rows in the form of ``data/tokenize.py``: prompts end anywhere on the paths of random tries.

    So the prompt of one row may hold a completion of another, and a completion may end within another one.
    """
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(tries):
        paths = random_paths(random)
        for _ in range(6):
            path = paths[random.integers(len(paths))]
            prompt = path[: int(random.integers(1, len(path)))]
            if any(row["prompt_ids"] == prompt for row in rows):  # no pair occurs twice
                continue
            inside = [p[len(prompt) :] for p in paths if p[: len(prompt)] == prompt and len(p) > len(prompt)]
            some = random.permutation(len(inside))[: int(random.integers(2, 5))].tolist()
            completions = [inside[i] for i in some]
            count = len(completions)
            edges = [
                (w, y, x) for w in range(count) for y, x in [(int(random.integers(count)), (w + 1) % count)] if w != x
            ]
            edges = edges[: 1 + len(rows) % 3]
            chosen, targets, rejected = (list(side) for side in zip(*edges)) if edges else ([], [], [])
            if loss == "sft":
                chosen, targets, rejected = list(range(count)), list(range(count)), []
            names = ("prompt_ids", "completion_ids", "chosen", "targets", "rejected")
            rows.append(dict(zip(names, (prompt, completions, chosen, targets, rejected))))
    return rows
