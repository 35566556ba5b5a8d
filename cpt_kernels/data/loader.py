"""Micro-batches of one rank, from a map-style dataset or from a stream."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterableDataset

from ..errors import UserError
from .batches import BatchSampler, pack_in_order, pack_rows
from .curriculum import PLACE, Curriculum, Draws, read_keys
from .preparation import PreparationReport
from .stream_curriculum import StreamDraws

# Rows of a stream that are packed together under a token budget.
_STREAM_WINDOW = 512


def kept_columns(curriculum: Curriculum | None, dataset: Any) -> tuple[str, ...]:
    """Columns of a dataset, before it is prepared, that the curriculum will read.

    Raises:
        UserError: there is no such column.
    """
    if curriculum is None or not isinstance(dataset, (Dataset, IterableDataset)):
        return ()
    curriculum.check_columns(dataset.column_names or list(next(iter(dataset), {})))
    return curriculum.columns


def order_seed(args: Any) -> int:
    """The seed of the order of rows."""
    return args.seed if args.data_seed is None else args.data_seed


def make_draws(
    curriculum: Curriculum | None, dataset: Dataset | IterableDataset, seed: int
) -> Draws | StreamDraws | None:
    """What the curriculum draws of a prepared dataset.

    Raises:
        UserError: a row without a level's columns, or a level without rows.
    """
    if curriculum is None:
        return None
    if isinstance(dataset, IterableDataset):
        if curriculum.epochs is not None:
            raise UserError("curriculum: epochs has no effect on a stream, whose schedule ends with max_steps")
        return StreamDraws(curriculum, seed)
    if curriculum.buffer is not None:
        raise UserError("curriculum: buffer is for streams and has no effect on this dataset: leave it out")
    table = dataset.select_columns([*curriculum.columns, "row"]).with_format("arrow")[:]
    columns = [table[name].to_pylist() for name in curriculum.columns]
    return Draws(curriculum, read_keys(curriculum, columns, table["row"].to_pylist()), seed)


def make_loader(
    dataset: Dataset | IterableDataset,
    collator: Callable,
    args: Any,
    share_prompts: bool,
    training: bool,
    draws: Draws | StreamDraws | None = None,
    *,
    batch_size: int,
) -> DataLoader:
    """This rank's micro-batches of a prepared dataset. accelerate would repeat rows to make ranks even; this does not.

    Args:
        collator: rows -> batch.
        args: the run's ``ContrastiveConfig``.
        share_prompts: whether the collator runs a prompt once for all its completions.
        training: in the order that training wants, else the dataset's own.
        draws: of a curriculum, see :func:`make_draws`.
        batch_size: rows of a micro-batch, where ``args`` give no budget of tokens.

    Raises:
        UserError: the dataset is not prepared, a row is longer than the budget of a micro-batch, or a stream would be
            read by several processes.
    """
    if dataset.column_names is not None and "completion_ids" not in dataset.column_names:
        raise UserError(
            f"the dataset with the columns {', '.join(dataset.column_names)} is not tokenised: give it to the trainer's"
            " constructor, to evaluate or to predict, instead of setting it as an attribute"
        )
    count_tokens = partial(
        row_tokens, max_length=args.max_length, truncation_mode=args.truncation_mode, share_prompts=share_prompts
    )
    workers = _worker_options(args)
    world = dict(world_size=args.world_size, rank=args.process_index)
    accumulation = args.gradient_accumulation_steps
    if isinstance(dataset, IterableDataset):
        if args.dataloader_num_workers > 1:
            raise UserError("a stream is read by one process: set dataloader_num_workers to 0 or 1")
        cut = (batch_size, args.max_tokens_per_batch, count_tokens)
        if draws is None:
            batches = StreamBatches(dataset, *cut, **world, endless=training)
        else:
            batches = DrawnBatches(dataset, *cut, **world, draws=draws, steps=args.max_steps * accumulation)
        return DataLoader(batches, batch_size=None, collate_fn=collator, **workers)
    sampler = BatchSampler(
        count_tokens(dataset),
        batch_size=batch_size,
        micro_batches=accumulation if training else 1,
        max_tokens=args.max_tokens_per_batch,
        shuffle=training and args.train_sampling_strategy != "sequential",
        seed=order_seed(args),
        drop_last=training and args.dataloader_drop_last,
        draws=draws,
        **world,
    )
    if training:
        _plan_run(sampler, args)
    rows = dataset if draws is None else DrawnRows(dataset, draws)
    return EpochLoader(rows, batch_sampler=sampler, collate_fn=collator, **workers)


def _worker_options(args: Any) -> dict[str, Any]:
    """Options of a DataLoader, from those of the run that begin with ``dataloader_``."""
    return dict(
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        in_order=args.dataloader_in_order,
    )


def _plan_run(sampler: BatchSampler, args: Any) -> None:
    """Tell sampler and curriculum how long the run is."""
    if not len(sampler):
        raise UserError(
            f"dataloader_drop_last leaves nothing of {len(sampler.tokens)} rows, which fill no step: set it to false,"
            " or lower per_device_train_batch_size"
        )
    epochs = args.max_steps / _steps_per_epoch(sampler, args) if args.max_steps > 0 else args.num_train_epochs
    if sampler.draws is not None:
        sampler.draws.end_with_run(epochs)
    sampler.plan_epochs(math.ceil(epochs))


def _steps_per_epoch(sampler: BatchSampler, args: Any) -> int:
    return math.ceil(len(sampler) / args.gradient_accumulation_steps)


def report_draws(loader: EpochLoader, draws: Draws, args: Any) -> list[str]:
    """Lines of text: how often a run draws the rows of each level, of all ranks together."""
    sampler = loader.batch_sampler
    steps = args.max_steps
    if steps <= 0:
        steps = math.ceil(args.num_train_epochs * _steps_per_epoch(sampler, args))
    return draws.report(sampler.count_draws(steps, args.gradient_accumulation_steps))


def report_stream(report: PreparationReport, draws: StreamDraws | None, args: Any, steps: int) -> list[str]:
    """Lines of text: what was read of a stream, and dropped, in so many steps.

    Raises:
        UserError: there was no step.
    """
    if not steps:
        raise UserError("\n  ".join(["no row of the stream can be trained on", *report.summary()]))
    if args.dataloader_num_workers:
        return ["what was read and dropped of the stream was counted in a worker: set dataloader_num_workers=0"]
    return [*report.summary(), *(draws.report() if draws is not None else [])]


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


class DrawnRows(TorchDataset):
    """Rows of a dataset, each with its place in the curriculum."""

    def __init__(self, rows: Dataset, draws: Draws) -> None:
        self.rows, self.places = rows, draws.places

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        return [row | {PLACE: self.places[i]} for i, row in zip(indices, self.rows.__getitems__(indices))]


class StreamBatches(TorchIterableDataset):
    """Lists of rows of a stream, this rank's share.

    Every rank reads the whole stream, so that all of them see the same micro-batches and stop at the same one; a rank
    without rows in the last step gets an empty list. In training a stream has no end: its passes go on into each other,
    so that a place in the run is a place in one sequence, and to resume is to skip.

    Args:
        rows: prepared rows.
        batch_size: rows per micro-batch, where ``max_tokens`` is not given.
        max_tokens: budget of a micro-batch.
        count_tokens: tokens that rows take in a packed batch, e.g. :func:`row_tokens`.
        endless: begin another pass, in another order if the stream is shuffled, after each.
    """

    def __init__(
        self,
        rows: IterableDataset,
        batch_size: int,
        max_tokens: int | None,
        count_tokens: Callable[[list[dict]], NDArray[np.int64]],
        world_size: int,
        rank: int,
        endless: bool,
    ) -> None:
        self.rows, self.batch_size, self.max_tokens, self.count_tokens = rows, batch_size, max_tokens, count_tokens
        self.world_size, self.rank, self.endless = world_size, rank, endless

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
        for number in itertools.count() if self.endless else (0,):
            rows = self._pass(number)
            held = list(itertools.islice(rows, window))
            if not held:
                return  # nothing in all of a pass
            while held:
                yield from self._cut(held)
                held = list(itertools.islice(rows, window))

    def _pass(self, number: int) -> Iterator[dict]:
        self.rows.set_epoch(number)
        return iter(self.rows)

    def _cut(self, rows: list[dict]) -> Iterator[list[dict]]:
        if not self.max_tokens:
            yield rows
            return
        for batch in pack_rows(range(len(rows)), self._count(rows), self.max_tokens):
            yield [rows[i] for i in batch]

    def _count(self, rows: list[dict]) -> NDArray[np.int64]:
        tokens = self.count_tokens(rows)
        if tokens.max() > self.max_tokens:
            raise UserError(
                f"row {rows[int(tokens.argmax())]['row']} takes {tokens.max()} tokens, more than"
                f" max_tokens_per_batch={self.max_tokens}: raise it, or lower max_length"
            )
        return tokens


class DrawnBatches(StreamBatches):
    """What a curriculum draws of a stream, without end.

    Args:
        draws: which rows.
        steps: micro-batches of this rank in the whole run.
        others: as of :class:`StreamBatches`.
    """

    def __init__(self, *args: Any, draws: StreamDraws, steps: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, endless=True)
        self.draws = draws
        self.size = self.max_tokens or self.batch_size  # of a micro-batch, in tokens or rows
        self.total = steps * self.world_size * self.size

    def _batches(self) -> Iterator[list[dict]]:
        drawn = 0  # tokens or rows

        def progress() -> float:
            return drawn / self.total

        def measured() -> Iterator[tuple[dict, int]]:
            nonlocal drawn
            for row in self.draws.draw(self._pass, progress):
                size = int(self._count([row])[0]) if self.max_tokens else 1
                drawn += size
                yield row, size

        if self.max_tokens:
            batches = pack_in_order(measured(), lambda item: item[1], self.max_tokens)
        else:
            items = measured()
            batches = iter(lambda: list(itertools.islice(items, self.batch_size)), [])
        for batch in batches:
            yield [row for row, _ in batch]
