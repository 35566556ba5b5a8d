"""Which completions of a dataset the reference has yet to score, and in which micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray
from xxhash import xxh3_128_digest

from ..data.batches import pack_rows
from ..data.collate import PackedCollator
from ..data.truncation import truncate
from .cache import ReferenceCache
from .shards import KEY_BYTES

_CHUNK = 1000  # rows of a dataset that are read together


@dataclass(frozen=True)
class Missing:
    """Completions without reference log-probs, n of them, each once. Arrays, as there may be millions.

    Attributes:
        keys: (n,) of 16 bytes, in the cache.
        prompts: (n,) of 16 bytes, equal where the truncated prompts are.
        rows, positions: (n,) row of the dataset, and which of its completions.
        prompt_lengths, lengths: (n,) tokens after truncation.
        completions: in the dataset, repetitions included.
        found: of them, those that were in the cache.
    """

    keys: NDArray[np.void]
    prompts: NDArray[np.void]
    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    prompt_lengths: NDArray[np.int64]
    lengths: NDArray[np.int64]
    completions: int
    found: int

    def __len__(self) -> int:
        return len(self.keys)


def iter_sequences(
    dataset: Dataset, max_length: int | None, truncation_mode: str
) -> Iterator[list[tuple[int, int, NDArray[np.int64], NDArray[np.int64]]]]:
    """All completions of a prepared dataset in lists: row, which of the row's, and both ids as they are trained on.

    Left out are completions of which truncation leaves nothing.
    """
    start = 0
    for table in dataset.with_format("arrow").select_columns(["prompt_ids", "completion_ids"]).iter(_CHUNK):
        prompts = _split(table["prompt_ids"])
        counts = pc.list_value_length(table["completion_ids"]).to_numpy()
        completions = iter(_split(pc.list_flatten(table["completion_ids"])))
        sequences = [
            (start + row, position, *truncate(prompt, next(completions), max_length, truncation_mode))
            for row, (prompt, count) in enumerate(zip(prompts, counts.tolist()))
            for position in range(count)
        ]
        yield [sequence for sequence in sequences if len(sequence[3])]
        start += len(prompts)


def find_missing(dataset: Dataset, cache: ReferenceCache, max_length: int | None, truncation_mode: str) -> Missing:
    """What the cache lacks of a prepared dataset."""
    columns: list[tuple[bytes, bytes, int, int, int, int]] = []
    completions = found = 0
    for sequences in iter_sequences(dataset, max_length, truncation_mode):
        keys = cache.keys([sequence[2:] for sequence in sequences])
        _, there = cache.look_up(keys, [len(completion) for *_, completion in sequences])
        completions += len(keys)
        for key, known, (row, position, prompt, completion) in zip(keys, there.tolist(), sequences):
            if not known:
                digest = xxh3_128_digest(prompt.tobytes())
                columns.append((key, digest, row, position, len(prompt), len(completion)))
            else:
                found += 1
    keys, prompts, *numbers = zip(*columns) if columns else [()] * 6
    first = np.unique(_digests(keys), return_index=True)[1]
    arrays = [_digests(keys), _digests(prompts), *(np.array(column, np.int64) for column in numbers)]
    return Missing(*(array[np.sort(first)] for array in arrays), completions, found)


def scoring_batches(
    missing: Missing, collator: PackedCollator, budget: int, world: int
) -> list[list[NDArray[np.int64]]]:
    """Micro-batches of groups, a group being the missing completions of one prompt that fit; longest groups first.

    Their number is a multiple of ``world``. Only a single completion that is longer than ``budget`` tokens exceeds it.
    """
    groups: list[NDArray[np.int64]] = []
    tokens: list[int] = []
    order = np.argsort(missing.prompts, kind="stable")
    edges = np.flatnonzero(missing.prompts[order][1:] != missing.prompts[order][:-1]) + 1
    for members in np.split(order, edges):
        prompt, lengths = int(missing.prompt_lengths[members[0]]), missing.lengths[members]
        shares = collator.shares(prompt + int(lengths.max()))
        start, total = 0, 0
        for i, length in enumerate(lengths.tolist()):
            more = length if shares and total else prompt + length
            if total and total + more > budget:
                groups.append(members[start:i])
                tokens.append(total)
                start, total, more = i, 0, prompt + length
            total += more
        groups.append(members[start:])
        tokens.append(total)
    sizes = np.array(tokens, np.int64)
    batches = pack_rows(np.argsort(-sizes, kind="stable"), sizes, max(budget, int(sizes.max())), world)
    return [[groups[number] for number in batch] for batch in batches]


def scoring_rows(
    dataset: Dataset, missing: Missing, groups: Sequence[NDArray[np.int64]], collator: PackedCollator
) -> list[dict[str, Any]]:
    """The groups of a micro-batch as rows for a collator that truncates nothing and pairs nothing."""
    wanted = sorted({int(row) for members in groups for row in missing.rows[members]})
    columns = dataset.select_columns(["prompt_ids", "completion_ids"])[wanted]
    stored = dict(zip(wanted, zip(columns["prompt_ids"], columns["completion_ids"])))
    rows: dict[tuple[int, ...], list[Sequence[int]]] = {}  # a prompt once, also of a group that was too long and split
    for row, position in ((missing.rows[i], missing.positions[i]) for members in groups for i in members):
        prompt, completions = stored[int(row)]
        prompt, completion = truncate(prompt, completions[int(position)], collator.max_length, collator.truncation_mode)
        rows.setdefault(tuple(prompt), []).append(completion)
    no_pairs: dict[str, list[int]] = {"chosen": [], "rejected": [], "targets": []}
    return [{"prompt_ids": prompt, "completion_ids": completions, **no_pairs} for prompt, completions in rows.items()]


def _split(lists: pa.ChunkedArray | pa.Array) -> list[NDArray[np.int64]]:
    """The items of a list column; views, but for other integers than int64."""
    lengths = pc.list_value_length(lists).to_numpy()
    flat = pc.list_flatten(lists).to_numpy().astype(np.int64, copy=False)
    stops = np.cumsum(lengths)
    return [flat[start:stop] for start, stop in zip((stops - lengths).tolist(), stops.tolist())]


def _digests(digests: Sequence[bytes]) -> NDArray[np.void]:
    return np.frombuffer(b"".join(digests), f"V{KEY_BYTES}")
