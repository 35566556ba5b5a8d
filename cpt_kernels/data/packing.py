"""Computes where tokens, segments, predictions and completions lie in a packed row, from their lengths. Pure numpy.

A packed row is a sequence of *pieces*. A group that shares its prompt is laid out as
``[prompt, completion 1, completion 2, ...]``, any other group as ``[prompt, completion 1, prompt, completion 2, ...]``.
An attention *segment* is a range of consecutive queries together with the keys that they see. Queries and keys are
aligned at their ends (bottom-right causal):

    first segment of a group     queries: prompt + completion 1    keys: the same tokens
    every further segment        queries: completion i             keys: prompt + completion i, gathered by `kv_index`

The positions of every completion continue those of its prompt. The last prompt token predicts the first token of every
completion of the group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class GroupLengths:
    """Token counts of one prompt group. The prompt and every completion have at least one token."""

    prompt: int
    completions: Sequence[int]
    share: bool = True  # lay the prompt out once for all completions

    def tokens(self) -> int:
        """Returns the number of tokens that the group takes in a packed row."""
        return (1 if self.share else len(self.completions)) * self.prompt + sum(self.completions)


@dataclass(frozen=True)
class Layout:
    """Index arrays of a packed row with T tokens, N predictions, S completions and G attention segments."""

    pieces: list[tuple[int, int]] = field(repr=False)  # (group, completion within the group, or -1 for the prompt)
    position_ids: NDArray[np.int64]  # (T,)
    cu_seqlens_q: NDArray[np.int32]  # (G+1,) where the queries of each segment begin
    cu_seqlens_k: NDArray[np.int32]  # (G+1,) where the keys of each segment begin in kv_index
    kv_index: NDArray[np.int64]  # (K,) token of each key, segment after segment
    predictor_index: NDArray[np.int64]  # (N,) token whose hidden row predicts each completion token
    cu_completions: NDArray[np.int64]  # (S+1,) where each completion begins in the N predictions


def pack(groups: Sequence[GroupLengths]) -> Layout:
    """Lays prompt groups out one after another in one row, without padding."""
    pieces, positions, queries, keys, kv_index, predictors, completions = [], [], [], [], [], [], []
    start = 0  # token at which the next piece begins
    for g, group in enumerate(groups):
        assert group.prompt > 0 and len(group.completions) > 0 and min(group.completions) > 0
        for i, length in enumerate(group.completions):
            # The prompt's piece. Later completions of a sharing group refer to the same tokens through `prompt`.
            if i == 0 or not group.share:
                pieces.append((g, -1))
                prompt, start = np.arange(start, start + group.prompt), start + group.prompt
                positions.append(np.arange(group.prompt))
                queries.append(group.prompt + length)
            else:
                queries.append(length)
            # The completion's piece, its keys and its predictors.
            pieces.append((g, i))
            completion, start = np.arange(start, start + length), start + length
            positions.append(group.prompt + np.arange(length))
            keys.append(group.prompt + length)
            kv_index += [prompt, completion]
            predictors += [prompt[-1:], completion[:-1]]
            completions.append(length)

    return Layout(
        pieces,
        np.concatenate(positions),
        _starts(queries).astype(np.int32),
        _starts(keys).astype(np.int32),
        np.concatenate(kv_index),
        np.concatenate(predictors),
        _starts(completions),
    )


def _starts(lengths: list[int]) -> NDArray[np.int64]:
    """Returns (len(lengths) + 1,) start offsets, and the total at the end."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def scatter_rounds(
    index: NDArray[np.int64],  # (K,)
    rows: int,
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Plans how to sum the gradient of ``x[index]`` into the rows of ``x`` deterministically, without atomics.

    Round r holds the rows of x that occur more than r times in ``index``, and the places of their r-th occurrence
    (counted from 0). Rows are unique within a round, so adding round after round is a segment sum in a fixed order. A
    prompt token occurs once per completion, so the number of rounds is the number of completions in the largest group.

    Returns:
        For each round: (rows of x, places in ``index``).
    """
    order = np.argsort(index, kind="stable")
    sorted_rows = index[order]
    counts = np.bincount(sorted_rows, minlength=rows)
    starts = np.cumsum(counts) - counts
    occurrence = np.arange(len(index)) - starts[sorted_rows]
    return [(sorted_rows[occurrence == r], order[occurrence == r]) for r in range(counts.max(initial=0))]


def pair_block_boundaries(completions: int, edges: Sequence[tuple[int, ...]]) -> list[int]:
    """Cuts S completions into pair blocks: the smallest consecutive completions that no edge crosses.

    Args:
        completions: S.
        edges: completions that belong together, e.g. (chosen, target, rejected) of each pair.

    Returns:
        The boundaries of the blocks, from 0 to S.
    """
    # A difference array: `inside[s]` counts the edges that join a completion before s with one at or after s.
    changes = np.zeros(completions + 1, dtype=np.int64)
    for edge in edges:
        changes[min(edge) + 1] += 1
        changes[max(edge) + 1] -= 1
    inside = np.cumsum(changes)[:completions]
    return [*(s for s in range(completions) if s == 0 or inside[s] == 0), completions] if completions else [0]
