"""Tokenised rows -> a packed batch of prompt groups.

Rows of a micro-batch that have the same prompt become one group, and equal completions of a group become one: a
response is run once however many pairs it is in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .curriculum import PLACE
from .packing import GroupLengths, pack, pair_block_boundaries, scatter_rounds
from .truncation import truncate

# [(prompt ids, completion ids)] -> log-probs of all their completions' tokens, one array; NaN where they are not known
ReferenceLookup = Callable[[Sequence[tuple[Sequence[int], Sequence[int]]]], "NDArray[np.float32]"]

Tokens = tuple[tuple[int, ...], tuple[int, ...]]  # prompt, completion


class PackedBatch(TypedDict):
    """T tokens, N predicted tokens, S completions, P pairs, G attention segments. Lists stay on the host."""

    input_ids: Tensor  # (1, T) int64
    position_ids: Tensor  # (1, T) int64
    cu_seqlens_q: Tensor  # (G+1,) int32
    cu_seqlens_k: Tensor  # (G+1,) int32
    kv_index: Tensor  # (K,) int64
    kv_rounds: list[tuple[Tensor, Tensor]]  # see packing.scatter_rounds
    segment_lengths: list[tuple[int, int]]  # (queries, keys) of every segment
    predictor_index: Tensor  # (N,) int64
    predictor_rounds: list[tuple[Tensor, Tensor]]
    targets: Tensor  # (N,) int64
    cu_completions: Tensor  # (S+1,) int64
    completion_lengths: list[int]  # S
    chosen: Tensor  # (P,) int64, index of a completion
    rejected: Tensor | None  # (P,) int64; None for supervised rows
    sft_targets: Tensor  # (P,) int64, the completion of the regulariser
    gaps: Tensor | None  # (P,) fp32, by how much chosen is better; None where rows do not say
    # (completions, pairs) per block: the smallest consecutive completions containing both sides of all their pairs
    pair_blocks: list[tuple[int, int]]
    ref_token_logps: Tensor | None  # (N,) fp32; NaN where missing
    ref_missing: list[tuple[int, tuple[int, ...], tuple[int, ...]]]  # (completion, prompt ids, completion ids)
    num_pairs: int
    num_chosen_tokens: int  # with multiplicity: once per pair
    num_sequence_tokens: int  # of prompts and completions, once per side of every pair
    places: list[float]  # of the rows in a curriculum, see curriculum.Curriculum.places; empty without one
    shared: bool  # some group runs its prompt once for several completions


@dataclass(frozen=True)
class PackedCollator:
    """Collate function of a DataLoader: rows (see ``data/tokenize.py``) -> :class:`PackedBatch`.

    Attributes:
        max_length, truncation_mode: applied to each prompt + completion, as TRL's.
        share_prompts: run a prompt once for all its completions.
        share_limit: sequences longer than this do not share their prompt (RoPE that depends on the sequence's length).
        reference: per-token reference log-probs of completions; ``None`` if no loss needs them.
        pad_token_id: the one token of the batch that a rank without rows runs.
    """

    max_length: int | None = None
    truncation_mode: str = "keep_start"
    share_prompts: bool = True
    share_limit: int | None = None
    reference: ReferenceLookup | None = None
    pad_token_id: int = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> PackedBatch:
        run: list[Tokens] = []
        edges: list[tuple[Tokens, ...]] = []
        gaps: list[float | None] = []
        for row in rows:
            sequences: list[Tokens] = [
                tuple(map(tuple, truncate(row["prompt_ids"], completion, self.max_length, self.truncation_mode)))
                for completion in row["completion_ids"]
            ]
            for chosen, target, *rejected in zip(
                row["chosen"], row["targets"], *([row["rejected"]] * bool(row["rejected"]))
            ):
                edges.append(tuple(sequences[i] for i in (chosen, target, *rejected)))
                gaps.append(gap_of(row, chosen, *rejected))
            run += sequences
        return self.pack(run, edges, gaps, [row[PLACE] for row in rows if PLACE in row])

    def pack(
        self,
        sequences: Sequence[Tokens],
        edges: Sequence[tuple[Tokens, ...]],
        gaps: Sequence[float | None],
        places: list[float],
    ) -> PackedBatch:
        """A batch of these sequences.

        Args:
            edges: the sequences of each pair: chosen, target of SLiC's regulariser, and rejected where there is one.
            gaps: of the pairs, as of :func:`gap_of`.
            places: see :class:`PackedBatch`.
        """
        groups: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}  # prompt -> its completions, in order
        for prompt, completion in sequences:
            if completion:  # else nothing of it is left to score; no pair refers to it
                groups.setdefault(prompt, {})[completion] = None
        if not sequences:  # a rank whose last micro-batch is empty still takes part in every collective
            groups[(self.pad_token_id,)] = {(self.pad_token_id,): None}
        lengths = [self._lengths(prompt, completions) for prompt, completions in groups.items()]
        layout = pack(lengths)
        tokens = [(prompt, list(completions)) for prompt, completions in groups.items()]
        number = {sequence: s for s, sequence in enumerate((p, c) for p, completions in tokens for c in completions)}
        pairs, order, pair_blocks = _number_pairs(edges, number)
        gaps = [gaps[p] for p in order]
        chosen, sft_targets, *rejected = np.array(pairs, np.int64).T if pairs else np.zeros((3, 0), np.int64)
        row_count = len(layout.position_ids)
        sequence_lengths = [len(prompt) + len(completion) for prompt, completion in number]
        completion_lengths = np.diff(layout.cu_completions)

        return PackedBatch(
            input_ids=_ints(_concatenate(tokens[g][0] if i < 0 else tokens[g][1][i] for g, i in layout.pieces))[None],
            position_ids=_ints(layout.position_ids)[None],
            cu_seqlens_q=torch.from_numpy(layout.cu_seqlens_q),
            cu_seqlens_k=torch.from_numpy(layout.cu_seqlens_k),
            kv_index=_ints(layout.kv_index),
            kv_rounds=_rounds(layout.kv_index, row_count),
            segment_lengths=list(zip(np.diff(layout.cu_seqlens_q).tolist(), np.diff(layout.cu_seqlens_k).tolist())),
            predictor_index=_ints(layout.predictor_index),
            predictor_rounds=_rounds(layout.predictor_index, row_count),
            targets=_ints(_concatenate(c for _, completions in tokens for c in completions)),
            cu_completions=_ints(layout.cu_completions),
            completion_lengths=completion_lengths.tolist(),
            chosen=_ints(chosen),
            rejected=_ints(rejected[0]) if rejected else None,
            sft_targets=_ints(sft_targets),
            gaps=None if None in gaps else torch.tensor(gaps, dtype=torch.float32),
            pair_blocks=pair_blocks,
            **self._reference_logps(number, scored=bool(edges)),
            num_pairs=len(pairs),
            num_chosen_tokens=int(completion_lengths[chosen].sum()),
            num_sequence_tokens=sum(sequence_lengths[s] for chosen, _, *rejected in pairs for s in (chosen, *rejected)),
            places=places,
            shared=any(g.share and len(g.completions) > 1 for g in lengths),
        )

    def shares(self, longest: int) -> bool:
        """Whether a prompt is run once for completions of which the longest makes, with it, so many tokens."""
        return self.share_prompts and (self.share_limit is None or longest <= self.share_limit)

    def _lengths(self, prompt: Sequence[int], completions: Iterable[Sequence[int]]) -> GroupLengths:
        lengths = [len(completion) for completion in completions]
        return GroupLengths(len(prompt), lengths, self.shares(len(prompt) + max(lengths)))

    def _reference_logps(self, number: Mapping[Tokens, int], scored: bool) -> dict[str, Any]:
        if self.reference is None:
            return {"ref_token_logps": None, "ref_missing": []}
        sequences = list(number)
        stops = np.cumsum([len(completion) for _, completion in sequences])
        logps = self.reference(sequences) if scored else np.zeros(stops[-1], np.float32)
        missing = [(s, *sequences[s]) for s in np.flatnonzero(np.isnan(logps[stops - 1])).tolist()]
        return {"ref_token_logps": torch.from_numpy(logps), "ref_missing": missing}


def _number_pairs(
    edges: Sequence[tuple[Tokens, ...]], number: Mapping[Tokens, int]
) -> tuple[list[tuple[int, ...]], list[int], list[tuple[int, int]]]:
    """Pairs as numbers of completions, a unit's one after another; the place that each had; and the units."""
    pairs = [tuple(number[sequence] for sequence in edge) for edge in edges]
    order = sorted(range(len(pairs)), key=lambda p: min(pairs[p]))  # so a unit's are consecutive; stable
    pairs = [pairs[p] for p in order]
    boundaries = pair_block_boundaries(len(number), pairs)
    pairs_below = np.searchsorted([min(pair) for pair in pairs], boundaries)
    return pairs, order, list(zip(np.diff(boundaries).tolist(), np.diff(pairs_below).tolist()))


def gap_of(row: Mapping[str, Any], chosen: int, rejected: int | None = None) -> float | None:
    """By how much a row's completion is better than another, by its scores; None where it does not say."""
    scores = row.get("scores")
    return scores[chosen] - scores[rejected] if scores and rejected is not None else None


def _ints(values: Any) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.int64))


def _concatenate(pieces: Any) -> list[int]:
    return [token for piece in pieces for token in piece]


def _rounds(index: NDArray[np.int64], rows: int) -> list[tuple[Tensor, Tensor]]:
    return [(_ints(to), _ints(source)) for to, source in scatter_rounds(index, rows)]
