"""Computes where tokens, segments, predictions and completions lie in a packed row, from their lengths. Pure numpy.

A packed row holds trees of tokens, depth first. A *path* leads from a root to a leaf: all tokens of a sequence. An
attention *segment* is a range of consecutive queries, the last tokens of a path, together with the keys that they see,
the whole path. Queries and keys are aligned at their ends (bottom-right causal):

    first segment of a tree    queries: a whole path                   keys: the same tokens
    every further segment      queries: what the path before lacks     keys: its path, gathered by `kv_index`

So the keys before a segment's queries are the first tokens of the path before it, and the lengths of all segments
determine all paths. A prompt group that shares its prompt is the smallest tree: ``[prompt, completion 1], [completion
2], ...``. Positions are places in a path. A completion is the end of a path, or of the beginning of one.

The token before it on its path predicts each token of a completion, and several completions may hold one token: a
*prediction* is a different token of some completion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

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


class Span(NamedTuple):
    """A completion: tokens ``start`` to ``stop`` of the path of a segment."""

    segment: int
    start: int  # tokens of its prompt
    stop: int


@dataclass(frozen=True)
class Layout:
    """Index arrays of a packed row with T tokens, G segments, S completions of M tokens, and N predictions.

    Without tokens that several completions hold, N is M and `token_index` is None.
    """

    position_ids: NDArray[np.int64]  # (T,)
    cu_seqlens_q: NDArray[np.int32]  # (G+1,) where the queries of each segment begin
    cu_seqlens_k: NDArray[np.int32]  # (G+1,) where the keys of each segment begin in kv_index
    kv_index: NDArray[np.int64]  # (K,) token of each key, segment after segment
    predictor_index: NDArray[np.int64]  # (N,) token whose hidden row predicts, in the order of completions
    target_index: NDArray[np.int64]  # (N,) token that it predicts
    cu_completions: NDArray[np.int64]  # (S+1,) where each completion begins in the M
    token_index: NDArray[np.int64] | None  # (M,) prediction of each completion token
    prediction_lengths: NDArray[np.int64]  # (S,) predictions of each completion that none before it has

    def ties(self) -> list[tuple[int, int]]:
        """Returns each completion with the first one that holds one of its tokens, if completions share tokens."""
        if self.token_index is None:
            return []
        first = np.repeat(np.arange(len(self.prediction_lengths)), self.prediction_lengths)[self.token_index]
        parts = np.split(first, self.cu_completions[1:-1])
        return [(int(part.min(initial=s)), s) for s, part in enumerate(parts)]


def pack(groups: Sequence[GroupLengths]) -> Layout:
    """Lays prompt groups out one after another in one row, without padding."""
    segments: list[tuple[int, int]] = []
    completions: list[Span] = []
    for group in groups:
        assert group.prompt > 0 and len(group.completions) > 0 and min(group.completions) > 0
        for i, length in enumerate(group.completions):
            keys = group.prompt + length
            completions.append(Span(len(segments), group.prompt, keys))
            segments.append((length if i and group.share else keys, keys))
    return lay_out(segments, completions)


def lay_out(
    segments: Sequence[tuple[int, int]],
    completions: Sequence[Span],
    masks: Sequence[Sequence[float] | None] | None = None,
) -> Layout:
    """Lays out a row.

    Args:
        segments: (queries, keys).
        completions: in the order of their segments; those of one segment are in the order of their ends.
        masks: weights of each completion's tokens, one or more above 0; None: 1 each. Tokens of weight 0 are in no
            array of M or N.
    """
    paths = paths_of(segments)
    queries, keys = zip(*segments)
    # Completion tokens and their predictors, without those that are not scored.
    targets = np.concatenate([paths[segment][start:stop] for segment, start, stop in completions])
    predictors = np.concatenate([paths[segment][start - 1 : stop - 1] for segment, start, stop in completions])
    cu_completions = starts_of([stop - start for _, start, stop in completions])
    if masks is not None:
        scored = concatenate_masks(completions, masks) > 0
        targets, predictors = targets[scored], predictors[scored]
        cu_completions = starts_of(np.add.reduceat(scored, cu_completions[:-1], dtype=np.int64))
    token_index, prediction_lengths = None, np.diff(cu_completions)
    if np.bincount(targets).max() > 1:
        # Number the different ones in the order in which they first occur.
        _, first, token_index = np.unique(targets, return_index=True, return_inverse=True)
        order = np.argsort(first)
        first, token_index = first[order], np.argsort(order)[token_index]
        targets, predictors = targets[first], predictors[first]
        prediction_lengths = np.diff(np.searchsorted(first, cu_completions))
    return Layout(
        np.concatenate([np.arange(k - q, k) for q, k in segments]),
        starts_of(queries).astype(np.int32),
        starts_of(keys).astype(np.int32),
        np.concatenate(paths),
        predictors,
        targets,
        cu_completions,
        token_index,
        prediction_lengths,
    )


def concatenate_masks(completions: Sequence[Span], masks: Sequence[Sequence[float] | None]) -> NDArray[np.float32]:
    """Returns the weight of each token of all completions, one after another."""
    parts = (
        np.ones(stop - start, np.float32) if mask is None else mask
        for (_, start, stop), mask in zip(completions, masks)
    )
    return np.concatenate([np.asarray(part, np.float32) for part in parts])


def paths_of(segments: Sequence[tuple[int, int]]) -> list[NDArray[np.int64]]:
    """Returns the path of every segment, (keys,) tokens of the row; ``segments`` are (queries, keys)."""
    paths: list[NDArray[np.int64]] = []
    start = 0
    for queries, keys in segments:
        own = np.arange(start, start + queries)
        paths.append(np.concatenate([paths[-1][: keys - queries], own]) if keys > queries else own)
        start += queries
    return paths


def starts_of(lengths: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns (len(lengths) + 1,) start offsets, and the total at the end."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def scatter_rounds(
    index: NDArray[np.int64],  # (K,)
    rows: int,
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Plans how to sum the gradient of ``x[index]`` into the rows of ``x`` deterministically, without atomics.

    Round r holds the rows of x that occur more than r times in ``index``, and the places of their r-th occurrence
    (counted from 0). Rows are unique within a round, so adding round after round is a segment sum in a fixed order. A
    token occurs once per path through it, so the number of rounds is the number of segments of the largest tree.

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
