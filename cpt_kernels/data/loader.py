"""Builds the DataLoader of one rank from a map-style dataset or a stream, with or without a curriculum."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset as TorchIterableDataset

from ..errors import UserError
from .batches import BatchSampler, pack_in_order, pack_rows
from .collate import PackedCollator
from .curriculum import HARD, PLACE, Curriculum, Draws, Keys, check_levels, find_levels, read_keys, split_by_difficulty
from .digest import StreamDigest
from .preparation import PreparationReport
from .rows import read_columns
from .stream_curriculum import StreamDraws

_STREAM_WINDOW = 512  # rows of a stream that are packed together if there is a token budget


class StepBudget(NamedTuple):
    """How the rows of a step fill its micro-batches, see :class:`BatchSampler`."""

    tokens: int  # most of a micro-batch
    step_rows: int  # of a step on all ranks


def kept_columns(curriculum: Curriculum | None, dataset: Any) -> tuple[str, ...]:
    """Returns the columns that the curriculum reads. They must be kept when the dataset is prepared.

    The dataset has no transform, see :func:`visible_rows`.

    Raises:
        UserError: the dataset has no such column, or no row of a level.
    """
    if curriculum is None or not isinstance(dataset, (Dataset, IterableDataset)):
        return ()
    curriculum.check_columns(read_columns(dataset))
    if isinstance(dataset, Dataset) and isinstance(curriculum.levels, tuple):
        # Dropped rows may empty a level later; a level that no row names is known before anything is tokenized.
        columns = (dataset[name] for name in curriculum.columns)
        found = Counter(f"{chosen}>{rejected}" for chosen, rejected in zip(*columns))
        sizes = [found.pop(name, 0) for name in curriculum.levels]
        check_levels(find_levels(curriculum, []), sizes, found)
    return curriculum.columns


def order_seed(args: Any) -> int:
    """Returns the seed of the order of rows."""
    return args.seed if args.data_seed is None else args.data_seed


def make_draws(
    curriculum: Curriculum | None, dataset: Dataset | IterableDataset, seed: int
) -> Draws | StreamDraws | None:
    """Returns the rows that the curriculum draws from a prepared dataset, or None without a curriculum.

    Raises:
        UserError: an option does not fit this kind of dataset, a row lacks a value, or a level has no rows.
    """
    if curriculum is None:
        return None
    if isinstance(dataset, IterableDataset):
        if curriculum.epochs is not None:
            raise UserError("curriculum: a stream's schedule ends with max_steps: remove epochs")
        stored = {"keep": curriculum.keep, "stages": curriculum.stages, "schedule": curriculum.schedule == "sorted"}
        if needing := [name for name, given in stored.items() if given]:
            value = f"{needing[0]}={getattr(curriculum, needing[0])}"
            raise UserError(f"curriculum: {value} needs all rows, which a stream does not know: store the data")
        return StreamDraws(curriculum, seed)
    if curriculum.buffer is not None:
        raise UserError("curriculum: buffer has an effect only on streams: remove it")
    return Draws(curriculum, _keys(curriculum, dataset), seed)


def keep_easiest(
    curriculum: Curriculum | None, dataset: Dataset | IterableDataset, seed: int
) -> tuple[Dataset | IterableDataset, list[str]]:
    """Returns a prepared dataset without the hard rows that the curriculum leaves out, and a line that counts them."""
    if curriculum is None or curriculum.keep is None or isinstance(dataset, IterableDataset):
        return dataset, []
    if curriculum.trains_hard_rows or not len(dataset):
        return dataset, []
    keys = np.asarray(_keys(curriculum, dataset))
    easy, hard = split_by_difficulty(keys, curriculum.keep, seed)
    name, last = curriculum.columns[0], dataset[int(easy[-1])]
    line = (
        f"curriculum: keep {curriculum.keep:g} keeps the {len(easy)} easiest of {len(keys)} rows, up to {name}"
        f" {last[name]}; the {len(hard)} hardest are left out"
    )
    return dataset.select(np.sort(easy)), [line]


def _keys(curriculum: Curriculum, dataset: Dataset) -> Keys:
    columns = dataset.select_columns([*curriculum.columns, "row"])[:]
    return read_keys(curriculum, [columns[name] for name in curriculum.columns], columns["row"])


def make_loader(
    dataset: Dataset | IterableDataset,
    collator: Callable,
    args: Any,
    layout: PackedCollator,
    training: bool,
    draws: Draws | StreamDraws | None = None,
    *,
    batch_size: int,
    digest: StreamDigest | None = None,
    budget: StepBudget | None = None,
) -> DataLoader:
    """Returns a DataLoader of this rank's micro-batches of a prepared dataset.

    Unlike accelerate's sharding, it repeats no rows to give all ranks the same number.

    Args:
        collator: rows -> batch.
        args: the run's ``ContrastiveConfig``.
        layout: the packed collator in ``collator``: how completions are laid out, and which share their prompt.
        training: order the rows for training; otherwise they keep the dataset's order.
        draws: of a curriculum, see :func:`make_draws`.
        batch_size: rows of a micro-batch, if ``args`` set no token budget.
        digest: digests the rows that are read from a stream.
        budget: fills micro-batches by tokens, with the rows of a step as they are, in place of ``batch_size``.

    Raises:
        UserError: the dataset is not prepared, a row is longer than the budget of a micro-batch, or several processes
            would read a stream.
    """
    _check_prepared(dataset)
    count_tokens = partial(row_tokens, layout=layout)
    in_order = draws is not None or isinstance(dataset, IterableDataset)
    if layout.padded and in_order and args.max_tokens_per_batch and args.max_length is None:
        raise UserError(
            "max_tokens_per_batch with a curriculum or a stream needs max_length for this model, whose completions run"
            " in padded rows: set max_length, or per_device_train_batch_size instead"
        )
    grouped = training and args.group_by_prefix
    if grouped:
        _check_grouping(dataset, layout)
    workers = _worker_options(args)

    # A stream: batches are cut from it as it is read.
    if isinstance(dataset, IterableDataset):
        assert not isinstance(draws, Draws)
        cut = (batch_size, args.max_tokens_per_batch, count_tokens)
        batches = _stream_batches(dataset, cut, args, draws, training)
        batches.digest = digest
        return DataLoader(batches, batch_size=None, collate_fn=collator, **workers)

    # A map-style dataset: all batches are planned from the lengths of its rows.
    assert not isinstance(draws, StreamDraws)
    tokens, sequences = (count_tokens(dataset), None) if draws is not None else micro_batch_tokens(dataset, layout)
    max_tokens = args.max_tokens_per_batch if budget is None else budget.tokens
    _check_budget(dataset, tokens if sequences is None else tokens * sequences, max_tokens)
    trees, tree_tokens = _trees(dataset, tokens, layout) if grouped else (None, None)
    sampler = BatchSampler(
        tokens,
        batch_size=batch_size,
        world_size=args.data_ranks,
        rank=args.data_rank,
        micro_batches=args.gradient_accumulation_steps if training else 1,
        max_tokens=max_tokens,
        step_rows=None if budget is None else budget.step_rows,
        shuffle=training and args.train_sampling_strategy != "sequential",
        seed=order_seed(args),
        drop_last=training and args.dataloader_drop_last,
        draws=draws,
        sequences=sequences,
        trees=trees,
        tree_tokens=tree_tokens,
    )
    if training:
        _plan_run(sampler, args)
    rows = dataset if draws is None else DrawnRows(dataset, draws)
    return EpochLoader(rows, batch_sampler=sampler, collate_fn=collator, **workers)


def check_budget(dataset: Dataset | IterableDataset, layout: PackedCollator, max_tokens: Any, name: str) -> None:
    """Checks that every row of a prepared dataset fits into a micro-batch; a stream is checked while it is read.

    Raises:
        UserError: a row is longer. The message names the dataset, and the row's number in its source.
    """
    if not isinstance(max_tokens, int) or not isinstance(dataset, Dataset):
        return
    tokens, sequences = micro_batch_tokens(dataset, layout)
    _check_budget(dataset, tokens if sequences is None else tokens * sequences, max_tokens, f" of the {name} data")


def _check_budget(dataset: Dataset, sizes: NDArray[np.int64], max_tokens: int | None, of: str = "") -> None:
    if max_tokens is None or sizes.max(initial=0) <= max_tokens:
        return
    longest = int(sizes.argmax())
    row = dataset[longest]["row"] if "row" in dataset.column_names else longest
    raise UserError(
        f"row {row}{of} takes {sizes[longest]} tokens, more than max_tokens_per_batch={max_tokens}: raise it to at"
        f" least {sizes[longest]}, or lower max_length"
    )


def longest_sequence(dataset: Dataset, max_length: int | None) -> tuple[int, int]:
    """Returns the tokens of the longest prompt + completion after truncation, and the number of its row."""
    _, lengths, counts = _sequence_lengths(dataset)
    if not len(lengths):
        return 0, 0
    place = int(np.repeat(np.arange(len(counts)), counts)[int(lengths.argmax())])
    longest = int(lengths.max())
    return longest if max_length is None else min(longest, max_length), dataset[place].get("row", place)


def micro_batch_tokens(dataset: Dataset, layout: PackedCollator) -> tuple[NDArray[np.int64], NDArray[np.int64] | None]:
    """Returns (rows,) tokens that each row takes in a packed row, and None.

    For padded rows the tokens are those of each row's longest sequence, and the second result is (rows,) the number of
    its sequences.
    """
    if not layout.padded:
        return row_tokens(dataset, layout), None
    _, lengths, sequences = _sequence_lengths(dataset)
    lengths = lengths if layout.max_length is None else np.minimum(lengths, layout.max_length)
    return np.maximum.reduceat(lengths, np.cumsum(sequences) - sequences) if len(sequences) else sequences, sequences


def _check_grouping(dataset: Dataset | IterableDataset, layout: PackedCollator) -> None:
    if isinstance(dataset, IterableDataset):
        raise UserError("group_by_prefix=true needs all rows, which a stream does not know: store the data")
    if layout.padded or not layout.share_prompts:
        raise UserError("group_by_prefix=true has no effect here, because no two sequences share tokens: leave it out")
    if "tree" not in dataset.column_names:
        raise UserError("group_by_prefix=true needs the column `tree` of prepared rows: prepare the data again")


def _trees(
    dataset: Dataset, tokens: NDArray[np.int64], layout: PackedCollator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns (rows,) the code of each row's tree, and (trees,) the tokens that the rows of each take together."""
    column = dataset.with_format("arrow").select_columns(["tree"])[:]["tree"].to_numpy()
    _, codes, counts = np.unique(column, return_inverse=True, return_counts=True)
    together = np.bincount(codes, weights=tokens).astype(np.int64)
    members = np.split(np.argsort(codes, kind="stable"), np.cumsum(counts)[:-1])
    for tree in np.flatnonzero(counts > 1).tolist():
        together[tree] = min(together[tree], layout.count_tokens(dataset.__getitems__(members[tree].tolist())))
    return codes, together


def report_trees(loader: DataLoader) -> list[str]:
    """Returns a line about the rows that run together with ``group_by_prefix``, and what that saves."""
    sampler = cast("BatchSampler", loader.batch_sampler)
    if sampler.trees is None or sampler.tree_tokens is None:
        return []
    rows, trees, alone, together = len(sampler.trees), len(sampler.tree_tokens), sampler.tokens, sampler.tree_tokens
    share = together.sum() / max(alone.sum(), 1)
    return [
        f"group_by_prefix: {rows} rows are {trees} trees, the largest of {np.bincount(sampler.trees).max()} rows; whole"
        f" trees take {together.sum()} tokens, {share:.1%} of the {alone.sum()} that their rows take apart"
    ]


def _stream_batches(
    dataset: IterableDataset,
    cut: tuple[int, int | None, Callable],  # batch_size, max_tokens, count_tokens
    args: Any,
    draws: StreamDraws | None,
    training: bool,
) -> StreamBatches:
    if args.dataloader_num_workers > 1:
        raise UserError("only one process can read a stream: set dataloader_num_workers to 0 or 1")
    if draws is None:
        return StreamBatches(dataset, *cut, args.data_ranks, args.data_rank, endless=training)
    steps = args.max_steps * args.gradient_accumulation_steps
    return DrawnBatches(dataset, *cut, args.data_ranks, args.data_rank, draws=draws, steps=steps)


def _check_prepared(dataset: Dataset | IterableDataset) -> None:
    if isinstance(dataset, Dataset) and dataset.format["type"] is not None:
        raise UserError(
            f"the prepared dataset has the format {dataset.format['type']!r}, which would change token ids after they"
            " were counted and scored: set a transform or format before the trainer gets the dataset"
        )
    if dataset.column_names is not None and "completion_ids" not in dataset.column_names:
        raise UserError(
            f"the dataset with the columns {', '.join(dataset.column_names)} is not tokenized: give it to the trainer's"
            " constructor, or to evaluate or predict, instead of setting it as an attribute"
        )


def _worker_options(args: Any) -> dict[str, Any]:
    """Returns the options of a DataLoader that the run's options ``dataloader_*`` set."""
    return dict(
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and args.device.type != "cpu",
        persistent_workers=args.dataloader_persistent_workers,
        prefetch_factor=args.dataloader_prefetch_factor,
        multiprocessing_context=args.dataloader_multiprocessing_context,
        in_order=args.dataloader_in_order,
    )


def _plan_run(sampler: BatchSampler, args: Any) -> None:
    """Fits the sampler and the curriculum to the length of the run."""
    if not len(sampler):
        raise UserError(
            f"dataloader_drop_last drops all {len(sampler.tokens)} rows, because they fill no micro-batch on every"
            " rank: set it to false, or lower per_device_train_batch_size"
        )
    epochs = args.max_steps / _steps_per_epoch(sampler, args) if args.max_steps > 0 else args.num_train_epochs
    if sampler.draws is not None:
        sampler.draws.end_with_run(epochs)
    sampler.plan_epochs(math.ceil(epochs))


def _steps_per_epoch(sampler: BatchSampler, args: Any) -> int:
    by_rows = sampler.step_rows is not None
    return math.ceil(len(sampler) / (sampler.micro_batches if by_rows else args.gradient_accumulation_steps))


def report_draws(loader: EpochLoader, draws: Draws, args: Any) -> list[str]:
    """Returns lines of text about how often all ranks together draw the rows of each level."""
    sampler = cast("BatchSampler", loader.batch_sampler)
    steps = args.max_steps
    if steps <= 0:
        steps = math.ceil(args.num_train_epochs * _steps_per_epoch(sampler, args))
    return draws.report(sampler.count_draws(steps, args.gradient_accumulation_steps))


def report_stream(report: PreparationReport, draws: StreamDraws | None, args: Any, steps: int) -> list[str]:
    """Returns lines of text about the rows read from a stream and dropped, after ``steps`` steps.

    Raises:
        UserError: there was no step.
    """
    if not steps:
        raise UserError("\n  ".join(["no row of the stream can be trained on", *report.summary()]))
    if args.dataloader_num_workers:
        return ["no counts of the stream's rows, because a worker read them: set dataloader_num_workers=0 to see them"]
    return [*report.summary(), *(draws.report() if draws is not None else [])]


def row_tokens(rows: Dataset | list[dict], layout: PackedCollator) -> NDArray[np.int64]:
    """Returns (rows,) tokens that each prepared row takes in a batch.

    This is an upper bound if `keep_end` cuts the row, and for padded rows, which may be padded up to ``max_length``.
    """
    prompts, lengths, counts = _sequence_lengths(rows)
    whole = lengths if layout.max_length is None else np.minimum(lengths, layout.max_length)
    if layout.padded:
        return counts * (whole.max(initial=0) if layout.max_length is None else layout.max_length)
    row_of = np.repeat(np.arange(len(prompts)), counts)
    unshared = np.bincount(row_of, weights=whole, minlength=len(prompts)).astype(np.int64)
    if not layout.share_prompts:
        return unshared
    shared = unshared - (counts - 1) * prompts
    if layout.truncation_mode == "keep_start":
        return shared
    # Cut prompts differ between completions, so they are not shared.
    cut = np.bincount(row_of, weights=whole < lengths, minlength=len(prompts)) > 0
    return np.where(cut, unshared, shared)


def _sequence_lengths(
    rows: Dataset | list[dict],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Returns tokens of prompts (rows,) and of all prompts + completions, and completions of each row (rows,)."""
    if isinstance(rows, Dataset):
        prompts, completions, counts = _stored_lengths(rows)
    else:
        prompts = np.array([len(row["prompt_ids"]) for row in rows], dtype=np.int64)
        counts = np.array([len(row["completion_ids"]) for row in rows], dtype=np.int64)
        completions = np.array([len(c) for row in rows for c in row["completion_ids"]], dtype=np.int64)
    return prompts, np.repeat(prompts, counts) + completions, counts


def _stored_lengths(rows: Dataset) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Returns lengths of prompts (rows,) and of all completions, and the number of completions of each row (rows,).

    The offsets of Arrow's lists are read where they are stored. Selecting the rows first would copy all their tokens.
    """
    groups = rows.data.column("completion_ids")
    prompts, counts = (_list_lengths(column) for column in (rows.data.column("prompt_ids"), groups))
    lengths = _list_lengths(pc.list_flatten(groups))
    if rows._indices is None:
        return prompts, lengths, counts
    kept = rows._indices.column(0).to_numpy()
    starts = (np.cumsum(counts) - counts)[kept]
    prompts, counts = prompts[kept], counts[kept]
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return prompts, lengths[np.repeat(starts, counts) + within], counts


def _list_lengths(lists: pa.ChunkedArray) -> NDArray[np.int64]:
    return pc.list_value_length(lists).to_numpy().astype(np.int64)


class EpochLoader(DataLoader):
    """A DataLoader that tells its batch sampler the epoch."""

    def set_epoch(self, epoch: int) -> None:
        cast("BatchSampler", self.batch_sampler).set_epoch(epoch)


class DrawnRows(TorchDataset):
    """The rows of a dataset, each with its place in the curriculum, and whether it is hard."""

    def __init__(self, rows: Dataset, draws: Draws) -> None:
        self.rows, self.places, self.hard = rows, draws.places, draws.hard.tolist()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict]:
        rows = zip(indices, self.rows.__getitems__(indices))
        return [row | {PLACE: self.places[i], HARD: self.hard[i]} for i, row in rows]


class StreamBatches(TorchIterableDataset):
    """This rank's micro-batches of a stream, as lists of rows.

    Every rank reads the whole stream. So all ranks form the same micro-batches and stop at the same one; a rank without
    rows in the last step gets an empty list. In training, passes over the stream are concatenated without end, so
    resuming skips the micro-batches already read.

    Args:
        rows: prepared rows.
        batch_size: rows per micro-batch, if ``max_tokens`` is not given.
        max_tokens: budget of a micro-batch in tokens.
        count_tokens: returns the tokens that rows take in a packed batch, e.g. :func:`row_tokens`.
        endless: start another pass after each; a shuffled stream has a new order in each.
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
        self.digest: StreamDigest | None = None

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
                return  # a whole pass has no rows
            while held:
                yield from self._cut(held)
                held = list(itertools.islice(rows, window))

    def _pass(self, number: int) -> Iterator[dict]:
        self.rows.set_epoch(number)
        return iter(self.rows) if self.digest is None else self.digest.read(self.rows)

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
    """This rank's micro-batches of the rows that a curriculum draws from a stream, without end.

    Args:
        draws: draws the rows.
        steps: micro-batches of this rank in the whole run.
        others: see :class:`StreamBatches`.
    """

    def __init__(self, *args: Any, draws: StreamDraws, steps: int, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "endless": True})
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
