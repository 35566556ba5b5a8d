"""Collates tokenized rows into a packed batch of prompt groups.

Rows of a micro-batch that have the same prompt become one group, and equal completions of a group become one. So each
completion runs once, however many pairs contain it. With ``minimum_shared``, sequences also share beginnings that are
longer than their prompt, and those of different prompts.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import at_place
from .curriculum import HARD, PLACE
from .images import WORDS, ImageId, ImageReader, ImageRows, ids_of, images_of, place_images, split_key
from .packing import Layout, Span, concatenate_masks, lay_out, pair_block_boundaries, scatter_rounds, starts_of
from .trees import Branch, find_branches
from .truncation import TruncationMode, truncate

# [(prompt ids, completion ids)] -> log-probs of the tokens of all these completions in one array, NaN where unknown.
ReferenceLookup = Callable[[Sequence[tuple[Sequence[int], Sequence[int]]]], "NDArray[np.float32]"]

Tokens = tuple[tuple[int, ...], tuple[int, ...]]  # prompt key (see :mod:`.images`), completion
# A completion with weights of its tokens is another one than the same tokens with other weights, or without. A mask is
# weights of 0 and 1: a token with weight 0 is not scored.
ScoredTokens = tuple[tuple[Any, ...], ...]  # prompt key, completion and, unless each is 1, the weights of its tokens


class Predictions(TypedDict):
    """Which tokens are predicted, and from where; dimensions as of :class:`PackedBatch`."""

    predictor_index: Tensor  # (N,) int64, place of each predictor row in the (flattened) input_ids
    predictor_rounds: list[tuple[Tensor, Tensor]]  # of predictor_index
    predictors: NDArray[np.int64]  # (N,) predictor_index of the packed row
    targets: Tensor  # (N,) int64
    cu_completions: Tensor  # (S+1,) int64
    completion_lengths: list[int]  # S
    # If completions have tokens in common, N is less than M; else these are None, and predictions are the M tokens.
    token_index: Tensor | None  # (M,) int64, the prediction of each completion token
    token_order: Tensor | None  # (M,) int64, completion tokens sorted by their prediction
    token_offsets: Tensor | None  # (N+1,) int64, where those of each prediction begin in token_order
    prediction_lengths: list[int]  # S, predictions of each completion that no completion before it has
    token_weights: Tensor | None  # (M,) fp32 above 0, factors of the completion tokens' log-probs; None if each is 1


class PackedBatch(Predictions):
    """A packed row with T tokens, S completions of M tokens, N predictions, P pairs and G attention segments.

    Tensors move to the device, lists and arrays stay on the host. An example with two groups; ``|`` separates prompts
    and completions in the packed row, the segments, or the completions:

        group 0: prompt [1, 2], chosen [3, 4], rejected [5]        group 1: prompt [6], chosen [7], rejected [8, 9]

        input_ids        1 2 | 3 4 | 5 | 6 | 7 | 8 9        the tokens of both groups, each prompt once
        position_ids     0 1 | 2 3 | 2 | 0 | 1 | 1 2        every completion continues its prompt
        cu_seqlens_q     0 4 5 7 9                          queries of the 4 segments: 1 2 3 4 | 5 | 6 7 | 8 9
        cu_seqlens_k     0 4 7 9 12                         keys of the 4 segments: 1 2 3 4 | 1 2 5 | 6 7 | 6 8 9
        kv_index         0 1 2 3 | 0 1 4 | 5 6 | 5 7 8      where these keys lie in the packed row
        predictor_index  1 2 | 1 | 5 | 5 7                  the last prompt token predicts 3 and 5, 3 predicts 4, ...
        targets          3 4 | 5 | 7 | 8 9                  the predicted tokens
        cu_completions   0 2 3 4 6                          completions 0 to 3 in the predicted tokens
        chosen           0 2                                completions of the two pairs
        rejected         1 3
        pair_blocks      2 1 | 2 1                          two blocks of 2 completions and 1 pair
    """

    input_ids: Tensor  # (1, T) int64; (S, L) for padded rows, with a row for each completion
    position_ids: Tensor | None  # (1, T) int64; None for padded rows, whose positions are the model's own
    attention_mask: Tensor | None  # (S, L) int64, 1 at tokens and 0 at pads; None for a packed row
    cu_seqlens_q: Tensor  # (G+1,) int32
    cu_seqlens_k: Tensor  # (G+1,) int32
    kv_index: Tensor  # (K,) int64, place of each key in the packed row
    kv_rounds: list[tuple[Tensor, Tensor]]  # of kv_index, see packing.scatter_rounds
    segment_lengths: list[tuple[int, int]]  # (queries, keys) of every segment
    # In this batch "tokens of completions" are those that are scored, unless these fields say otherwise.
    spans: NDArray[np.int64]  # (S, 3) segment of each completion, and its first token and its end in the segment's path
    scored: NDArray[np.bool_] | None  # which tokens of all completions, one after another, are scored; None for all
    chosen: Tensor  # (P,) int64, index of a completion
    rejected: Tensor | None  # (P,) int64; None for supervised rows
    sft_targets: Tensor  # (P,) int64, the completion of SLiC's regularizer
    gaps: Tensor | None  # (P,) fp32, by how much chosen is better; None unless every pair has a gap
    weights: Tensor | None  # (P,) fp32, factors of the pairs' losses; None if each is 1
    hard: Tensor | None  # (P,) bool, which pairs a curriculum counts as hard; None if none is
    # (completions, pairs) per block: the smallest consecutive completions containing both sides of all their pairs
    pair_blocks: list[tuple[int, int]]
    ref_token_logps: Tensor | None  # (M,) fp32; NaN where missing
    ref_missing: list[tuple[int, tuple[int, ...], tuple[int, ...]]]  # (completion, prompt ids, completion ids)
    order: list[int]  # S, the number of each completion among the different ones in the order of the rows
    num_pairs: int
    num_chosen_tokens: float  # or their weights; a completion counts once per pair in which it is chosen
    num_sequence_tokens: int  # prompt and completion tokens, once per side of every pair
    places: list[float]  # of the rows in a curriculum, see curriculum.Curriculum.places; empty without a curriculum
    shared: bool  # some tokens run once for several completions
    image_rows: list[ImageRows]  # rows that run together, if the model takes images by rows; else empty
    # Of U different images of the batch: what the model takes, {} without images; and (U,) tokens of their features.
    images: dict[str, Tensor]
    image_tokens: list[int]
    image_index: list[int]  # the image at each place of an image in input_ids, in order
    # Of every prompt with images: [first token, token after it, end of its completions] in the packed row; its images.
    image_prompts: list[tuple[list[int], list[int]]]
    # Like input_ids, under the names that the model has for it: 1 at tokens of images; or, for models whose prompts
    # attend in both directions, 0 at tokens of prompts and 1 at others.
    token_types: dict[str, Tensor]


@dataclass(frozen=True)
class PackedCollator:
    """Collate function of a DataLoader: rows (see ``data/tokenize.py``) -> :class:`PackedBatch`.

    Attributes:
        max_length, truncation_mode: applied to each prompt + completion, as in TRL.
        share_prompts: run a prompt once for all its completions.
        minimum_shared: also run other common beginnings once, where that saves at least so many tokens per sequence;
            None: prompts alone. Sequences with images share nothing but their prompt and what follows it.
        share_limit: sequences with more tokens share nothing (for RoPE that depends on the length).
        reference: looks up per-token reference log-probs; ``None`` if the loss needs none.
        pad_token_id: the only token of the batch that a rank without rows runs, and the pads of padded rows.
        images: reads the images of prompts.
        always_images: a batch without images holds one that is in no prompt, so that all ranks run the same modules.
        padded: run each completion behind its prompt as a row of its own, padded on the right, for models that do not
            run packed rows exactly.
    """

    max_length: int | None = None
    truncation_mode: TruncationMode = "keep_start"
    share_prompts: bool = True
    share_limit: int | None = None
    reference: ReferenceLookup | None = None
    pad_token_id: int = 0
    padded: bool = False
    images: ImageReader | None = None
    always_images: bool = False
    minimum_shared: int | None = None

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> PackedBatch:
        """Truncates the rows' completions, and packs them with their pairs."""
        sequences: list[ScoredTokens] = []
        edges: list[tuple[ScoredTokens, ...]] = []
        gaps: list[float | None] = []
        hard: list[bool] = []
        weights: list[float] = []
        for row in rows:
            cut = self._masked(row, self.truncated(row))
            rejected_columns = [row["rejected"]] if row["rejected"] else []  # supervised rows have none
            for chosen, target, *rejected in zip(row["chosen"], row["targets"], *rejected_columns):
                edges.append(tuple(cut[i] for i in (chosen, target, *rejected)))
                gaps.append(gap_of(row, chosen, *rejected))
                hard.append(row.get(HARD, False))
            sequences += cut
            weights += row.get("weights") or [1.0] * len(row["chosen"])
        places = [row[PLACE] for row in rows if PLACE in row]
        with_images = [str(row.get("row")) for row in rows if row.get("image_ids")]
        with at_place(f"rows {', '.join(with_images)}") if with_images else contextlib.nullcontext():
            return self.pack(sequences, edges, gaps, places, images_of(rows), hard, weights=weights)

    def pack(
        self,
        sequences: Sequence[ScoredTokens],
        edges: Sequence[tuple[ScoredTokens, ...]],
        gaps: Sequence[float | None],
        places: list[float],
        images: Mapping[ImageId, Any] | None = None,
        hard: Sequence[bool] = (),
        *,
        weights: Sequence[float] = (),
    ) -> PackedBatch:
        """Packs sequences and their pairs into one batch.

        Args:
            sequences: (prompt key, completion ids) and, unless each is 1, the tokens' weights; repeated or not.
            edges: the sequences of each pair: chosen, target of SLiC's regularizer, and rejected if there is one.
            gaps: one per pair, see :func:`gap_of`.
            places: see :class:`PackedBatch`.
            images: the images of the prompts, see :func:`images.images_of`.
            hard: which pairs are hard; default none.
            weights: of the pairs; default 1.
        """
        if not sequences:  # a rank without rows runs one token, to take part in every collective
            sequences = [((self.pad_token_id,), (self.pad_token_id,))]
            if self.always_images and self.images is not None and self.images.by_rows:
                key, image = self.images.blank_prompt
                sequences, images = [(key, (self.pad_token_id,))], {ids_of(key[:WORDS])[0]: image}
        # Completions are numbered in packed order.
        # Truncation may leave no token of a completion, or none that is scored; then no pair has it.
        different = list(dict.fromkeys(each for each in sequences if each[1] and all(map(any, each[2:]))))
        tokens = [(prompt, completion) for prompt, completion, *_ in different]
        paths, prompts = _paths(tokens)
        keys = [prompt for prompt, _ in tokens]
        branches = self.branches(paths, prompts, keys, [key[0] < 0 for key in keys])
        order = [s for branch in branches for s in branch.sequences]
        unique = [different[s] for s in order]
        ends = [len(paths[branch.sequences[-1]]) for branch in branches]
        segment_lengths = [(end - branch.shared, end) for end, branch in zip(ends, branches)]
        spans = [Span(g, prompts[s], len(paths[s])) for g, branch in enumerate(branches) for s in branch.sequences]
        masks: list[Any] = [sequence[2] if len(sequence) > 2 else None for sequence in unique]
        every = concatenate_masks(spans, masks) if any(masks) else None
        scored = None if every is None or (every > 0).all() else every > 0
        token_weights = None if every is None or np.isin(every, (0, 1)).all() else every[every > 0]
        layout = lay_out(segment_lengths, spans, masks if any(masks) else None)

        # Pairs are sorted so that each block's are consecutive.
        index_of = {sequence: s for s, sequence in enumerate(unique)}
        pairs, edge_order, pair_blocks = _index_pairs(edges, index_of, layout.ties())
        gaps = [gaps[p] for p in edge_order]
        hard = [hard[p] for p in edge_order] if any(hard) else []
        weights = [weights[p] for p in edge_order] if any(weight != 1 for weight in weights) else []
        chosen, sft_targets, *rejected = np.array(pairs, np.int64).T if pairs else np.zeros((3, 0), np.int64)

        # Counts, and everything as tensors.
        row = np.concatenate([paths[branch.sequences[-1]][branch.shared :] for branch in branches])
        counted = np.diff(layout.cu_completions)
        if token_weights is not None:
            counted = np.add.reduceat(token_weights, layout.cu_completions[:-1], dtype=np.float64)
        input_ids, attention_mask, place = _ints(row)[None], None, None
        if self.padded:
            place, attention_mask = _padded_places(np.diff(layout.cu_seqlens_q))
            input_ids = torch.full_like(attention_mask, self.pad_token_id).masked_scatter(attention_mask > 0, input_ids)
        roots = [g for g, branch in enumerate(branches) if branch.shared == 0]
        bounds = [*layout.cu_seqlens_q[roots].tolist(), len(row)]
        trees = [(different[branches[g].sequences[0]][0], span) for g, span in zip(roots, pairwise(bounds))]
        pictures = place_images(self.images, self.always_images, trees, input_ids, images or {})
        ref_token_logps, ref_missing = self._reference_logps([(p, c) for p, c, *_ in unique], bool(edges), scored)
        return PackedBatch(
            input_ids=input_ids,
            position_ids=None if self.padded else _ints(layout.position_ids)[None],
            attention_mask=attention_mask,
            cu_seqlens_q=torch.from_numpy(layout.cu_seqlens_q),
            cu_seqlens_k=torch.from_numpy(layout.cu_seqlens_k),
            kv_index=_ints(layout.kv_index),
            kv_rounds=_rounds(layout.kv_index, len(row)),
            segment_lengths=segment_lengths,
            **_predictions(layout, place, input_ids, token_weights),
            spans=np.array(spans, np.int64),
            scored=scored,
            chosen=_ints(chosen),
            rejected=_ints(rejected[0]) if rejected else None,
            sft_targets=_ints(sft_targets),
            gaps=None if None in gaps else torch.tensor(gaps, dtype=torch.float32),
            weights=torch.tensor(weights, dtype=torch.float32) if weights else None,
            hard=torch.tensor(hard) if hard else None,
            pair_blocks=pair_blocks,
            ref_token_logps=ref_token_logps,
            ref_missing=ref_missing,
            order=order,
            num_pairs=len(pairs),
            num_chosen_tokens=counted[chosen].sum().item(),
            num_sequence_tokens=sum(spans[s].stop for chosen, _, *rejected in pairs for s in (chosen, *rejected)),
            places=places,
            shared=any(branch.shared for branch in branches),
            **pictures,
        )

    def shares(self, longest: int) -> bool:
        """Returns whether a group runs its prompt once, if its longest prompt + completion has ``longest`` tokens."""
        return self.share_prompts and not self.padded and (self.share_limit is None or longest <= self.share_limit)

    def count_tokens(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Returns the tokens that rows take together in a packed row."""
        different = list(dict.fromkeys(each for row in rows for each in self.truncated(row) if each[1]))
        paths, prompts = _paths(different)
        keys = [prompt for prompt, _ in different]
        branches = self.branches(paths, prompts, keys, [key[0] < 0 for key in keys])
        return sum(len(paths[branch.sequences[-1]]) - branch.shared for branch in branches)

    def truncated(self, row: Mapping[str, Any]) -> list[Tokens]:
        """Returns the prompt key and the token ids of each completion of a prepared row, truncated."""
        words = row.get("image_ids") or ()
        how = (self.max_length, self.truncation_mode, bool(words))
        cut = (truncate(row["prompt_ids"], completion, *how) for completion in row["completion_ids"])
        return [((*words, *prompt), tuple(completion)) for prompt, completion in cut]

    def _masked(self, row: Mapping[str, Any], cut: list[Tokens]) -> Sequence[ScoredTokens]:
        """Returns a row's truncated completions with the weights of their tokens."""
        if not row.get("scored"):
            return cut
        how = (self.max_length, self.truncation_mode, bool(row.get("image_ids")))
        masks = [tuple(truncate(row["prompt_ids"], mask, *how)[1]) for mask in row["scored"]]
        return [tokens if {*mask} <= {1} else (*tokens, mask) for tokens, mask in zip(cut, masks)]

    def branches(
        self,
        paths: Sequence[NDArray[Any]],  # tokens of different sequences
        prompts: Sequence[int],  # tokens of the prompt of each
        keys: Sequence[Hashable],  # equal for equal prompts
        have_images: Sequence[bool],
    ) -> list[Branch]:
        """Returns the segments of a packed row: by prompts, or as trees where that saves tokens."""
        by_prompt = []
        for group in _equal(keys):
            shares = self.shares(max(len(paths[s]) for s in group))
            by_prompt += [Branch(prompts[s] if shares and i else 0, [s]) for i, s in enumerate(group)]
        if self.minimum_shared is None or not self.shares(0):
            return by_prompt
        trees = []
        # Texts may share their beginnings, and sequences with images those of one prompt. A prompt that attends in both
        # directions is shared whole.
        alone = [not self.shares(len(path)) for path in paths]
        whole = self.images is not None and self.images.marks_prompts
        some_prompt = [keys[s] if have_images[s] or whole else None for s in range(len(paths))]
        sets: list[Hashable] = [(s,) if alone[s] else some_prompt[s] for s in range(len(paths))]
        for some in _equal(sets):
            found = find_branches([paths[s] for s in some], [prompts[s] for s in some], self.minimum_shared)
            trees += [Branch(branch.shared, [some[s] for s in branch.sequences]) for branch in found]

        def tokens(branches: list[Branch]) -> int:
            return sum(len(paths[branch.sequences[-1]]) - branch.shared for branch in branches)

        return trees if tokens(trees) < tokens(by_prompt) else by_prompt

    def _reference_logps(
        self, sequences: Sequence[Tokens], looked_up: bool, scored: NDArray[np.bool_] | None
    ) -> tuple[Tensor | None, list[tuple[int, tuple[int, ...], tuple[int, ...]]]]:
        """Returns `ref_token_logps` and `ref_missing` of the batch. A batch without pairs is not looked up."""
        if self.reference is None:
            return None, []
        stops = np.cumsum([len(completion) for _, completion in sequences])
        logps = self.reference(sequences) if looked_up else np.zeros(stops[-1], np.float32)
        missing = [(s, *sequences[s]) for s in np.flatnonzero(np.isnan(logps[stops - 1])).tolist()]
        return torch.from_numpy(logps if scored is None else logps[scored]), missing


def _paths(sequences: Sequence[Tokens]) -> tuple[list[NDArray[np.int64]], list[int]]:
    """Returns the tokens of each sequence, without the numbers of images, and the number of them in its prompt."""
    prompts = {key: np.array(split_key(key)[1], np.int64) for key in dict.fromkeys(prompt for prompt, _ in sequences)}
    paths = [np.concatenate([prompts[prompt], np.array(completion, np.int64)]) for prompt, completion in sequences]
    return paths, [len(prompts[prompt]) for prompt, _ in sequences]


def _equal(keys: Sequence[Hashable]) -> list[list[int]]:
    """Returns the places of equal keys, in the order of their first occurrence."""
    groups: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    return [*groups.values()]


def _index_pairs(
    edges: Sequence[tuple[ScoredTokens, ...]], index_of: Mapping[ScoredTokens, int], ties: Sequence[tuple[int, int]]
) -> tuple[list[tuple[int, ...]], list[int], list[tuple[int, int]]]:
    """Returns the pairs as indices of completions, sorted by block; which edge each pair is; and the pair blocks.

    ``ties`` are completions that must be in one block although no pair holds both.
    """
    pairs = [tuple(index_of[sequence] for sequence in edge) for edge in edges]
    # Blocks are ranges of completions, so sorting by the first completion makes the pairs of a block consecutive.
    order = sorted(range(len(pairs)), key=lambda p: min(pairs[p]))
    pairs = [pairs[p] for p in order]
    boundaries = pair_block_boundaries(len(index_of), [*pairs, *ties])
    pairs_below = np.searchsorted([min(pair) for pair in pairs], boundaries)
    return pairs, order, list(zip(np.diff(boundaries).tolist(), np.diff(pairs_below).tolist()))


def _predictions(
    layout: Layout,
    place: NDArray[np.int64] | None,
    input_ids: Tensor,
    token_weights: NDArray[np.float32] | None = None,  # (M,)
) -> Predictions:
    """Returns the fields of a batch that say which tokens are predicted, and from where.

    Args:
        place: where the tokens of the packed row lie in the (flattened) input_ids; None: where they are.
    """
    found = layout.predictor_index if place is None else place[layout.predictor_index]
    targets = layout.target_index if place is None else place[layout.target_index]
    ids = input_ids.flatten()
    index, order, offsets = _token_arrays(layout.token_index)
    return {
        "predictor_index": _ints(found),
        "predictor_rounds": _rounds(found, input_ids.numel()),
        "predictors": layout.predictor_index,
        # numpy is faster on the host, and does not start threads for it.
        "targets": _ints(ids.numpy()[targets]) if ids.device.type == "cpu" else ids[_ints(targets).to(ids.device)],
        "cu_completions": _ints(layout.cu_completions),
        "completion_lengths": np.diff(layout.cu_completions).tolist(),
        "token_index": index,
        "token_order": order,
        "token_offsets": offsets,
        "prediction_lengths": layout.prediction_lengths.tolist(),
        "token_weights": None if token_weights is None else torch.from_numpy(token_weights),
    }


def with_all_scored(batch: PackedBatch) -> Predictions:
    """Returns the fields of a batch that differ if all tokens of its completions are scored; tensors on the host."""
    segments = batch["segment_lengths"]
    place = None if batch["attention_mask"] is None else _padded_places(np.array([q for q, _ in segments], np.int32))[0]
    return _predictions(lay_out(segments, [Span(*span) for span in batch["spans"].tolist()]), place, batch["input_ids"])


def _padded_places(lengths: NDArray[np.int32]) -> tuple[NDArray[np.int64], Tensor]:
    """Returns where consecutive sequences' tokens lie in a padded matrix, flattened, and its attention mask."""
    mask = np.arange(lengths.max()) < lengths[:, None]
    return np.flatnonzero(mask), _ints(mask)


def gap_of(row: Mapping[str, Any], chosen: int, rejected: int | None = None) -> float | None:
    """Returns by how much one completion of a row is better than another, or None if the row has no ratings."""
    scores = row.get("scores")
    return scores[chosen] - scores[rejected] if scores and rejected is not None else None


def _ints(values: Any) -> Tensor:
    return torch.from_numpy(np.asarray(values, dtype=np.int64))


def _token_arrays(index: NDArray[np.int64] | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns `token_index`, `token_order` and `token_offsets` of a batch."""
    if index is None:
        return None, None, None
    return _ints(index), _ints(np.argsort(index, kind="stable")), _ints(starts_of(np.bincount(index)))


def _rounds(index: NDArray[np.int64], rows: int) -> list[tuple[Tensor, Tensor]]:
    return [(_ints(to), _ints(source)) for to, source in scatter_rounds(index, rows)]
