"""Micro-batches of one rank, from a map-style dataset or from a stream."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from torch.utils.data import IterableDataset as TorchIterableDataset

from .batches import BatchSampler, pack_rows

# Rows of a stream that are packed together under a token budget.
_STREAM_WINDOW = 512


def make_loader(
    dataset: Dataset | IterableDataset, collator: Callable, args: Any, share_prompts: bool, training: bool
) -> DataLoader:
    """This rank's micro-batches of a prepared dataset. accelerate would repeat rows to make ranks even; this does not.

    Args:
        collator: rows -> batch.
        args: the run's ``ContrastiveConfig``.
        share_prompts: whether the collator runs a prompt once for all its completions.
        training: in the order that training wants, else the dataset's own.

    Raises:
        ValueError: a row is longer than the budget of a micro-batch, or a stream would be read by several processes.
    """
    count_tokens = partial(
        row_tokens, max_length=args.max_length, truncation_mode=args.truncation_mode, share_prompts=share_prompts
    )
    workers = dict(
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    batch_size = args.per_device_train_batch_size if training else args.per_device_eval_batch_size
    world = dict(world_size=args.world_size, rank=args.process_index)
    if isinstance(dataset, IterableDataset):
        if args.dataloader_num_workers > 1:
            raise ValueError("a stream is read by one process: set dataloader_num_workers to 0 or 1")
        rows = StreamBatches(dataset, batch_size, args.max_tokens_per_batch, count_tokens, **world)
        return DataLoader(rows, batch_size=None, collate_fn=collator, **workers)
    sampler = BatchSampler(
        count_tokens(dataset),
        batch_size=batch_size,
        max_tokens=args.max_tokens_per_batch,
        shuffle=training and args.train_sampling_strategy != "sequential",
        seed=args.seed if args.data_seed is None else args.data_seed,
        drop_last=training and args.dataloader_drop_last,
        **world,
    )
    if training:
        steps = args.max_steps * args.gradient_accumulation_steps
        sampler.plan_epochs(math.ceil(steps / len(sampler)) if steps > 0 else math.ceil(args.num_train_epochs))
    return EpochLoader(dataset, batch_sampler=sampler, collate_fn=collator, **workers)


def row_tokens(
    rows: Dataset | list[dict], max_length: int | None, truncation_mode: str, share_prompts: bool
) -> NDArray[np.int64]:
    """(rows,) tokens that each prepared row takes in a packed batch, an upper bound where `keep_end` cuts."""
    if isinstance(rows, Dataset):
        prompts, completions, counts = _stored_lengths(rows)
    else:
        prompts = np.array([len(row["prompt_ids"]) for row in rows], dtype=np.int64)
        counts = np.array([len(row["completion_ids"]) for row in rows], dtype=np.int64)
        completions = np.array([len(c) for row in rows for c in row["completion_ids"]], dtype=np.int64)
    limit = np.iinfo(np.int64).max if max_length is None else max_length
    row_of = np.repeat(np.arange(len(prompts)), counts)
    whole = np.minimum(prompts[row_of] + completions, limit)
    unshared = np.bincount(row_of, weights=whole, minlength=len(prompts)).astype(np.int64)
    if not share_prompts:
        return unshared
    shared = unshared - (counts - 1) * prompts
    if truncation_mode == "keep_start":
        return shared
    cut = np.bincount(row_of, weights=whole < prompts[row_of] + completions, minlength=len(prompts)) > 0
    return np.where(cut, unshared, shared)  # completions that lose different parts of the prompt share nothing


def _stored_lengths(rows: Dataset) -> tuple[NDArray, NDArray, NDArray]:
    prompts, completions, counts = [], [], []
    for table in rows.with_format("arrow").select_columns(["prompt_ids", "completion_ids"]).iter(10_000):
        prompts.append(pc.list_value_length(table["prompt_ids"]).to_numpy())
        counts.append(pc.list_value_length(table["completion_ids"]).to_numpy())
        completions.append(pc.list_value_length(pc.list_flatten(table["completion_ids"])).to_numpy())
    return tuple(np.concatenate(part).astype(np.int64) for part in (prompts, completions, counts))


class EpochLoader(DataLoader):
    """A DataLoader that tells its batch sampler which epoch it is."""

    def set_epoch(self, epoch: int) -> None:
        self.batch_sampler.set_epoch(epoch)


class StreamBatches(TorchIterableDataset):
    """Lists of rows of a stream, this rank's share.

    Every rank reads the whole stream, so that all of them see the same micro-batches and stop at the same one; a rank
    without rows in the last step gets an empty list.

    Args:
        rows: prepared rows.
        batch_size: rows per micro-batch, where ``max_tokens`` is not given.
        max_tokens: budget of a micro-batch.
        count_tokens: tokens that rows take in a packed batch, e.g. :func:`row_tokens`.
    """

    def __init__(
        self,
        rows: IterableDataset,
        batch_size: int,
        max_tokens: int | None,
        count_tokens: Callable[[list[dict]], NDArray[np.int64]],
        world_size: int,
        rank: int,
    ) -> None:
        self.rows, self.batch_size, self.max_tokens, self.count_tokens = rows, batch_size, max_tokens, count_tokens
        self.world_size, self.rank = world_size, rank

    def set_epoch(self, epoch: int) -> None:
        self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[dict]]:
        step: list[list[dict]] = []
        for batch in self._batches():
            step.append(batch)
            if len(step) == self.world_size:
                yield step[self.rank]
                step = []
        if step:
            yield step[self.rank] if self.rank < len(step) else []

    def _batches(self) -> Iterator[list[dict]]:
        window = _STREAM_WINDOW if self.max_tokens else self.batch_size
        held: list[dict] = []
        for row in self.rows:
            held.append(row)
            if len(held) >= window:
                yield from self._cut(held)
                held = []
        if held:
            yield from self._cut(held)

    def _cut(self, rows: list[dict]) -> Iterator[list[dict]]:
        if not self.max_tokens:
            yield rows
            return
        tokens = self.count_tokens(rows)
        if tokens.max() > self.max_tokens:
            raise ValueError(
                f"row {rows[int(tokens.argmax())]['row']} takes {tokens.max()} tokens, more than"
                f" max_tokens_per_batch={self.max_tokens}: raise it, or lower max_length"
            )
        for batch in pack_rows(range(len(rows)), tokens, self.max_tokens):
            yield [rows[i] for i in batch]
