"""Lengths -> layout: where every token, segment, prediction and completion of a packed row lies. Pure numpy.

A packed row is a sequence of *pieces*: ``[prompt, completion 1, completion 2, ...]`` for a group that shares its
prompt, otherwise ``[prompt, completion 1, prompt, completion 2, ...]``. An attention *segment* is a run of
queries and the keys that they see, aligned at their ends (bottom-right causal):

    segment 1 of a group:   queries prompt + completion 1     keys the same
    every further one:      queries completion i              keys prompt + completion i, gathered by `kv_index`

Completion i's positions go on after the prompt's, and its first token is predicted by the prompt's last row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class GroupLengths:
    """Token counts of one prompt group: a prompt (at least one token) and its completions (at least one token each)."""

    prompt: int
    completions: Sequence[int]
    share: bool = True  # run the prompt once for all completions

    def tokens(self) -> int:
        """Tokens that the group takes in a packed row."""
        return (1 if self.share else len(self.completions)) * self.prompt + sum(self.completions)


@dataclass(frozen=True)
class Layout:
    """Index arrays of a packed row of T tokens with N predictions, S completions and G attention segments."""

    pieces: list[tuple[int, int]] = field(repr=False)  # (group, completion within the group or -1 for the prompt)
    position_ids: NDArray[np.int64]  # (T,)
    cu_seqlens_q: NDArray[np.int32]  # (G+1,)
    cu_seqlens_k: NDArray[np.int32]  # (G+1,)
    kv_index: NDArray[np.int64]  # (K,) token whose key a segment sees
    predictor_index: NDArray[np.int64]  # (N,) token whose hidden row predicts a completion token
    cu_completions: NDArray[np.int64]  # (S+1,)


def pack(groups: Sequence[GroupLengths]) -> Layout:
    """Lay out prompt groups one after another in one row, without padding."""
    pieces, positions, queries, keys, kv_index, predictors, completions = [], [], [], [], [], [], []
    start = 0
    for g, group in enumerate(groups):
        assert group.prompt > 0 and len(group.completions) > 0 and min(group.completions) > 0
        for i, length in enumerate(group.completions):
            if i == 0 or not group.share:
                pieces.append((g, -1))
                prompt, start = np.arange(start, start + group.prompt), start + group.prompt
                positions.append(np.arange(group.prompt))
                queries.append(group.prompt + length)
            else:
                queries.append(length)
            pieces.append((g, i))
            completion, start = np.arange(start, start + length), start + length
            positions.append(group.prompt + np.arange(length))
            keys.append(group.prompt + length)
            kv_index += [prompt, completion]
            predictors += [prompt[-1:], completion[:-1]]
            completions.append(length)

    def cumulative(lengths: list[int], dtype: type) -> NDArray:
        return np.concatenate([[0], np.cumsum(lengths)]).astype(dtype)

    return Layout(
        pieces,
        np.concatenate(positions),
        cumulative(queries, np.int32),
        cumulative(keys, np.int32),
        np.concatenate(kv_index),
        np.concatenate(predictors),
        cumulative(completions, np.int64),
    )


def scatter_rounds(index: NDArray[np.int64], rows: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """How to sum the rows of a gradient of ``x[index]`` back into ``x`` without atomics.

    Level l holds the rows of x that occur more than l times in ``index``, and where they do for the l-th time; within
    a level rows are unique, so adding level after level is a deterministic segment sum. A prompt's rows occur once per
    completion, so there are as many levels as the largest group has completions.
    """
    order = np.argsort(index, kind="stable")
    sorted_rows = index[order]
    counts = np.bincount(sorted_rows, minlength=rows)
    starts = np.cumsum(counts) - counts
    occurrence = np.arange(len(index)) - starts[sorted_rows]
    return [(sorted_rows[occurrence == level], order[occurrence == level]) for level in range(counts.max(initial=0))]


def pair_block_boundaries(completions: int, edges: Sequence[tuple[int, ...]]) -> list[int]:
    """Boundaries, 0 to S, of the smallest runs of S completions that no edge (a tuple of completions) crosses."""
    covered = np.zeros(completions + 1, dtype=np.int64)
    for edge in edges:
        covered[min(edge) + 1] += 1
        covered[max(edge) + 1] -= 1
    inside = np.cumsum(covered)[:completions]
    return [*(s for s in range(completions) if s == 0 or inside[s] == 0), completions] if completions else [0]
