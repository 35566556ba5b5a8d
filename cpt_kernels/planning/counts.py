"""Counts the steps, tokens and operations of a run from the lengths of its rows, through the loader of training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any, cast

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import NDArray

from ..data.batches import BatchSampler
from ..data.collate import PackedCollator
from ..data.curriculum import Curriculum
from ..data.images import ImageId, ids_of
from ..data.loader import EpochLoader
from ..data.packing import GroupLengths, Span, lay_out
from ..reference.missing import iter_sequences
from .peer import Sides, reads_all_rows
from .work import Work, packed_groups, packed_row, padded_sequences

_Prompt = tuple[int, dict[int, int]]  # tokens of a prompt; hash of each different completion -> its tokens
# Tokens, those of the prompt, its hash, whether it has images, and the mask of the completion.
_Path = tuple[NDArray[np.int32], int, int, bool, NDArray[np.bool_] | None]


@dataclass(frozen=True)
class Counts:
    """What a run does, on all its processes unless said otherwise."""

    steps: int
    micro_batches: int  # of one process, or of one sequence group
    idle: float  # share of the tokens' time that processes wait for the one with the most tokens
    pairs: int  # pairs of all steps; a pair counts once for every epoch
    work: Work  # of all steps, without recomputation
    unshared: Work  # the same with a copy of the prompt for each completion
    peer: Work  # the same in batches of as many pairs, each side padded to the longest of the batch, as TRL runs them
    peer_pairs: int  # pairs of such a batch
    largest: Work  # of the micro-batch with the most tokens
    fill: float  # tokens of the first epoch as a share of the token budget; 1 without a budget
    reference: Work  # of scoring every different completion once, and again in later stages, without a backward
    batches: list[list[int]]  # rows of every micro-batch in turns of all processes, as indices into the dataset
    # (prompt, completion) tokens of both sides of every pair in every batch of ``peer``
    peer_batches: list[list[Sides]]
    lengths: RowLengths  # of the prepared dataset
    peer_reads_all_rows: bool  # whether the peer's head reads the rows of prompts and pads, too

    def asdict(self) -> dict[str, Any]:
        """Returns the counts of the whole run as plain data."""
        whole = ("steps", "micro_batches", "idle", "pairs", "peer_pairs", "fill")
        works = ("work", "unshared", "peer", "largest", "reference")
        return {name: getattr(self, name) for name in whole} | {name: getattr(self, name).asdict() for name in works}

    @property
    def largest_rows(self) -> list[int]:
        """Rows of the micro-batch with the most tokens, as indices into the prepared dataset."""
        return max(self.batches, key=lambda rows: self.lengths.work(rows).tokens)

    @property
    def dataset_pairs(self) -> int:
        """Pairs of the prepared dataset."""
        return sum(map(len, self.lengths.pairs))

    def peer_work(self, pairs: Sequence[Sides]) -> Work:
        """Returns the work of a batch that is padded as the peer pads it."""
        return _padded(pairs, self.peer_reads_all_rows)


class RowLengths:
    """Token counts of the rows of a prepared dataset after truncation, with hashes that tell equal tokens."""

    def __init__(self, dataset: Dataset, collator: PackedCollator) -> None:
        self.collator = collator
        self.prompts: list[dict[int, _Prompt]] = [{} for _ in range(len(dataset))]
        lengths: list[dict[int, tuple[int, int]]] = [{} for _ in range(len(dataset))]  # by position in the row
        self.images: list[dict[ImageId, float]] = [{} for _ in range(len(dataset))]  # tokens of each row's images
        self.unscored = [0] * len(dataset)  # tokens of each row's completions that are not scored
        # With trees, the different sequences of each row by the hashes of prompt and completion.
        self.paths: list[dict[tuple[int, int], _Path]] = [{} for _ in range(len(dataset))]
        self._works: dict[tuple[int, ...], Work] = {}  # of micro-batches whose trees have been counted
        for chunk in iter_sequences(dataset, collator.max_length, collator.truncation_mode):
            for row, position, prompt, completion, words, scored, _ in chunk:
                key = hash((prompt.tobytes(), words.tobytes()))
                of_row = self.prompts[row].setdefault(key, (len(prompt), {}))
                of_row[1][hash(completion.tobytes())] = len(completion)
                if collator.minimum_shared is not None:
                    path = np.concatenate([prompt, completion]).astype(np.int32)
                    mask = b"" if scored is None else scored.tobytes()
                    path_of = (path, len(prompt), key, len(words) > 0, scored)
                    self.paths[row][key, hash((completion.tobytes(), mask))] = path_of
                lengths[row][position] = (len(prompt), len(completion))
                self.unscored[row] += 0 if scored is None else int((~scored).sum())
                if collator.images is not None and len(words):
                    tokens, images = (prompt == collator.images.feature_token).sum(), ids_of(words.tolist())
                    self.images[row] = dict.fromkeys(images, float(tokens) / len(images))
        columns = dataset.select_columns(["chosen", "rejected"])[:]
        # (prompt, completion) of the sides of each pair, one side for supervised rows.
        self.pairs = [
            [tuple(of_row[i] for i in pair) for pair in zip(*([chosen, rejected] if rejected else [chosen]))]
            for of_row, chosen, rejected in zip(lengths, columns["chosen"], columns["rejected"])
        ]

    def groups(self, rows: Iterable[int], share: bool = True) -> list[GroupLengths]:
        """Returns the prompt groups of a micro-batch, in which equal prompts and completions are merged."""
        merged: dict[int, _Prompt] = {}
        for row in rows:
            for key, (prompt, completions) in self.prompts[row].items():
                merged.setdefault(key, (prompt, {}))[1].update(completions)
        found = [(prompt, [*completions.values()]) for prompt, completions in merged.values()]
        found = found or [(1, [1])]  # a rank without rows runs one pad token behind another
        shares = self.collator.shares
        return [GroupLengths(prompt, c, share and shares(prompt + max(c))) for prompt, c in found]

    def work(self, rows: Sequence[int], share: bool = True) -> Work:
        """Returns the work of a micro-batch."""
        images = self.encoded(rows)
        if share and self.collator.minimum_shared is not None and rows:
            if (key := tuple(rows)) not in self._works:
                self._works[key] = replace(self._work_of_trees(rows), **images)
            return self._works[key]
        groups, unscored = self.groups(rows, share), sum(self.unscored[row] for row in rows)
        if not self.collator.padded:
            work = packed_groups(groups)
            return replace(work, **images, head_rows=work.head_rows - unscored)
        sequences = sum(len(group.completions) for group in groups)
        longest = max(group.prompt + max(group.completions) for group in groups)
        work = padded_sequences(sequences, longest, sum(sum(group.completions) for group in groups), head_gemms=3)
        return replace(work, **images, head_rows=work.head_rows - unscored)

    def _work_of_trees(self, rows: Sequence[int]) -> Work:
        merged: dict[tuple[int, int], _Path] = {}
        for row in rows:
            merged |= self.paths[row]
        paths, prompts, keys, have_images, masks = zip(*merged.values())
        branches = self.collator.branches(paths, prompts, keys, have_images)
        ends = [len(paths[branch.sequences[-1]]) for branch in branches]
        segments = [(end - branch.shared, end) for end, branch in zip(ends, branches)]
        spans = [Span(g, prompts[s], len(paths[s])) for g, branch in enumerate(branches) for s in branch.sequences]
        ordered = [masks[s] for branch in branches for s in branch.sequences]
        layout = lay_out(segments, spans, ordered if any(mask is not None for mask in masks) else None)
        return packed_row(segments, len(layout.predictor_index))

    def scored_work(self, rows: Sequence[int]) -> Work:
        """Returns the work of the reference on rows, each of whose different completions it scores once."""
        return replace(packed_groups(self.groups(rows)), **self.encoded(rows))

    def encoded(self, rows: Iterable[int]) -> dict[str, Any]:
        """Returns fields of the work of a micro-batch: its different images, each encoded once, and their tokens."""
        different = {image: tokens for row in rows for image, tokens in self.images[row].items()}
        return {"images": len(different), "image_tokens": sum(different.values())}


def count_run(loader: EpochLoader, dataset: Dataset, collator: PackedCollator, args: Any) -> Counts:
    """Counts a run from its training loader; ``args`` is its ``ContrastiveConfig``."""
    sampler = cast("BatchSampler", loader.batch_sampler)
    rows = RowLengths(dataset, collator)
    steps = args.max_steps
    if steps <= 0:
        steps = math.ceil(args.num_train_epochs * math.ceil(len(sampler) / args.gradient_accumulation_steps))
    fill = sampler.fill
    batches = [batch for step in step_batches(sampler, args.gradient_accumulation_steps, steps) for batch in step]
    works = [rows.work(batch) for batch in batches]
    largest = max(range(len(works)), key=lambda number: works[number].tokens)
    turns = np.array([work.tokens for work in works]).reshape(-1, sampler.world_size)
    total = sum(len(rows.pairs[row]) for batch in batches for row in batch)
    per_batch = max(1, round(total / len(batches)))
    peer_batches = _peer_batches(rows, batches, per_batch, args, sampler)
    reads_all = reads_all_rows(args.device)
    peer = reduce(add, (_padded(batch, reads_all) for batch in peer_batches))
    # The peer encodes the images of a row for each side of each of its pairs.
    sides = [(row, sum(map(len, rows.pairs[row]))) for batch in batches for row in batch]
    fields = [{name: count * n for name, n in rows.encoded([row]).items()} for row, count in sides]
    peer = replace(peer, **{name: sum(each[name] for each in fields) for name in ("images", "image_tokens")})
    return Counts(
        steps=steps,
        micro_batches=len(turns),
        idle=1 - turns.mean() / turns.max(axis=1).mean(),
        pairs=total,
        work=reduce(add, works),
        unshared=reduce(add, (rows.work(batch, share=False) for batch in batches)),
        peer=peer,
        peer_pairs=per_batch,
        largest=works[largest],
        fill=fill,
        reference=_reference_work(rows, sampler, args, steps),
        batches=batches,
        peer_batches=peer_batches,
        lengths=rows,
        peer_reads_all_rows=reads_all,
    )


def _reference_work(rows: RowLengths, sampler: BatchSampler, args: Any, steps: int) -> Work:
    """Returns the work of all reference passes of a run: over all rows, and over those of every later stage."""
    passes: list[Sequence[int]] = [range(len(rows.pairs))]
    curriculum = None if args.curriculum is None else Curriculum.parse(args.curriculum)
    if curriculum is not None and curriculum.refresh_reference:
        ends = [math.ceil(i * steps / curriculum.stages) for i in range(1, curriculum.stages + 1)]
        drawn = [sampler.count_draws(end, args.gradient_accumulation_steps) for end in ends]
        passes += [np.flatnonzero(after > before).tolist() for before, after in itertools.pairwise(drawn)]
    return reduce(add, map(rows.scored_work, passes))


def _peer_batches(
    rows: RowLengths, batches: Sequence[Sequence[int]], size: int, args: Any, sampler: BatchSampler
) -> list[list[Sides]]:
    """Returns batches of as many pairs as ours have in total, in the peer's order; a curriculum's in our order."""
    if sampler.draws is not None or not sampler.shuffle:
        pairs = [pair for batch in batches for row in batch for pair in rows.pairs[row]]
        return [pairs[i : i + size] for i in range(0, len(pairs), size)]
    pairs = [pair for of_row in rows.pairs for pair in of_row]
    left, found = sum(len(rows.pairs[row]) for batch in batches for row in batch), []
    for epoch in itertools.count():
        # accelerate's SeedableRandomSampler, which transformers takes.
        seed = args.seed if args.data_seed is None else args.data_seed
        order = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(seed + epoch)).tolist()[:left]
        found += [[pairs[i] for i in order[start : start + size]] for start in range(0, len(order), size)]
        left -= len(order)
        if left == 0:
            return found


def step_batches(sampler: BatchSampler, micro_batches: int, steps: int) -> Iterator[list[list[int]]]:
    """Yields the micro-batches of every step of a run on all its ranks, as lists of rows; ranks take turns.

    Args:
        micro_batches: of a step on a rank; the last step of an epoch may have fewer.
    """
    for epoch in itertools.count():
        batches = sampler._epoch(epoch)
        for start in range(0, len(batches), of_step := micro_batches * sampler.world_size):
            if steps == 0:
                return
            yield batches[start : start + of_step]
            steps -= 1


def _padded(pairs: Sequence[Sides], reads_all_rows: bool) -> Work:
    sides = [side for pair in pairs for side in pair]
    completions = sum(completion for _, completion in sides)
    return padded_sequences(len(sides), max(map(sum, sides)), completions, not reads_all_rows)
