"""Finds the completions of a dataset that the cache lacks, and packs them into micro-batches for scoring."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest, xxh3_128_digest

from ..data.batches import pack_padded, pack_rows
from ..data.collate import PackedCollator, Tokens
from ..data.images import IMAGES, ImageId, images_of
from ..data.truncation import TruncationMode, truncate
from .cache import ReferenceCache
from .keys import TokenIds
from .shards import KEY_BYTES

_CHUNK = 1000  # rows of a dataset that are read at a time
_BEGINNINGS = [64 << i for i in range(9)]  # lengths of the beginnings by which sequences that share them are found

_Arrays = tuple[NDArray[np.int64], NDArray[np.int64]]
_truncate_arrays = cast("Callable[..., _Arrays]", truncate)  # it slices arrays like lists


class DatasetCompletion(NamedTuple):
    """A completion of a prepared dataset, truncated as it is in training."""

    row: int  # of the dataset
    position: int  # among the completions of the row
    prompt_ids: NDArray[np.int64]
    completion_ids: NDArray[np.int64]
    image_ids: NDArray[np.int64]  # identities of the prompt's images, see `data.images`
    scored: NDArray[np.bool_] | None = None  # which of the completion's tokens are scored; None for all
    weights: NDArray[np.float32] | None = None  # of the completion's tokens; None: 1 each

    @property
    def ids(self) -> tuple[TokenIds, TokenIds]:
        """(prompt key, completion ids), as `ReferenceCache` takes them."""
        prompt = np.concatenate([self.image_ids, self.prompt_ids]) if len(self.image_ids) else self.prompt_ids
        return prompt, self.completion_ids


@dataclass(frozen=True)
class Missing:
    """The n different completions of a dataset that have no reference log-probs. There may be millions, so arrays."""

    keys: NDArray[np.void]  # (n,) 16 bytes, keys in the cache
    prompts: NDArray[np.void]  # (n,) 16 bytes, equal for equal truncated prompts
    # (n, 9) digests of the first 64, 128, ... tokens of prompt + completion, 0 beyond its end.
    beginnings: NDArray[np.uint64]
    rows: NDArray[np.int64]  # (n,) where the dataset has the completion, see `DatasetCompletion`
    positions: NDArray[np.int64]  # (n,) its position among the row's completions
    prompt_lengths: NDArray[np.int64]  # (n,) tokens of the prompt after truncation
    lengths: NDArray[np.int64]  # (n,) of the completion alone
    completions: int  # number of completions in the dataset, including repetitions and those that are stored
    found: int  # number of them that are stored

    def __len__(self) -> int:
        return len(self.keys)


def iter_sequences(
    dataset: Dataset, max_length: int | None, truncation_mode: TruncationMode
) -> Iterator[list[DatasetCompletion]]:
    """Yields all completions of a prepared dataset in order, a list for every chunk of rows.

    Completions of which truncation leaves no token are left out.
    """
    start, cut = 0, (max_length, truncation_mode)
    names = [name for name in ("prompt_ids", "completion_ids", "image_ids", "scored") if name in dataset.column_names]
    for table in dataset.with_format("arrow").select_columns(names).iter(_CHUNK):
        prompts = _list_items(table["prompt_ids"])
        images = _list_items(table["image_ids"]) if "image_ids" in names else [np.empty(0, np.int64)] * len(prompts)
        counts = pc.list_value_length(table["completion_ids"]).to_numpy()
        completions = iter(_list_items(pc.list_flatten(table["completion_ids"])))
        sequences = [
            DatasetCompletion(
                start + row, position, *_truncate_arrays(prompt, next(completions), *cut, len(words)), words
            )
            for row, (prompt, count, words) in enumerate(zip(prompts, counts.tolist(), images))
            for position in range(count)
        ]
        if "scored" in names and len(masks := _list_items(pc.list_flatten(table["scored"]), np.float32)):
            has_mask = np.repeat(pc.list_value_length(table["scored"]).to_numpy() > 0, counts)
            for i, mask in zip(np.flatnonzero(has_mask).tolist(), masks):
                each = sequences[i]
                prompt = prompts[each.row - start]
                kept = cast("NDArray[np.float32]", _truncate_arrays(prompt, mask, *cut, len(each.image_ids))[1])
                sequences[i] = each._replace(scored=None if kept.all() else kept > 0, weights=kept)
        yield [sequence for sequence in sequences if len(sequence.completion_ids)]
        start += len(prompts)


def find_missing(
    dataset: Dataset, cache: ReferenceCache, max_length: int | None, truncation_mode: TruncationMode
) -> Missing:
    """Returns the completions of a prepared dataset that the cache lacks."""
    keys: list[bytes] = []
    prompts: list[bytes] = []
    beginnings: list[list[int]] = []
    numbers: list[tuple[int, int, int, int]] = []
    completions = 0
    for sequences in iter_sequences(dataset, max_length, truncation_mode):
        found_keys = cache.keys([sequence.ids for sequence in sequences])
        found = cache.count_keys(found_keys, [len(sequence.completion_ids) for sequence in sequences])
        completions += len(sequences)
        for key, is_stored, each in zip(found_keys, found, sequences):
            if not is_stored:
                keys.append(key)
                prompt = each.image_ids.tobytes() + each.prompt_ids.tobytes()
                prompts.append(xxh3_128_digest(prompt))
                shared = b"" if len(each.image_ids) else prompt + each.completion_ids.tobytes()  # see `PackedCollator`
                beginnings.append(_digest_beginnings(shared))
                numbers.append((each.row, each.position, len(each.prompt_ids), len(each.completion_ids)))
    # A completion that occurs several times is scored once, where it occurs first.
    first = np.sort(np.unique(_digest_array(keys), return_index=True)[1])
    rows, positions, prompt_lengths, lengths = np.array(numbers, np.int64).reshape(-1, 4)[first].T
    return Missing(
        keys=_digest_array(keys)[first],
        prompts=_digest_array(prompts)[first],
        beginnings=np.array(beginnings, np.uint64).reshape(-1, len(_BEGINNINGS))[first],
        rows=rows,
        positions=positions,
        prompt_lengths=prompt_lengths,
        lengths=lengths,
        completions=completions,
        found=completions - len(keys),
    )


def scoring_batches(
    missing: Missing, collator: PackedCollator, budget: int, world: int
) -> list[list[NDArray[np.int64]]]:
    """Packs the missing completions into micro-batches of at most ``budget`` tokens, longest prompt groups first.

    A group holds completions of one prompt, or of prompts with a common beginning, as indices into ``missing``. Only a
    single completion that is longer than the budget exceeds it.

    Args:
        collator: says which sequences share what they begin with.
        world: number of ranks; the number of micro-batches is a multiple of it.
    """
    if collator.padded:
        count, longest = len(missing), missing.prompt_lengths + missing.lengths
        batches = pack_padded(range(count), longest, np.ones(count, np.int64), max(budget, int(longest.max())), world)
        return [[np.array(batch)] if batch else [] for batch in batches]
    # Collect the completions that share something, and split them where they exceed the budget.
    groups: list[NDArray[np.int64]] = []
    tokens: list[int] = []  # of each group in a packed row, at most
    order = np.argsort(missing.prompts, kind="stable")
    if collator.minimum_shared is not None:
        order = order[np.lexsort(missing.beginnings[order].T[::-1])]
    first, prompts = missing.beginnings[order, 0], missing.prompts[order]
    together = collator.minimum_shared is not None and (first[1:] == first[:-1]) & (first[1:] > 0)
    edges = np.flatnonzero((prompts[1:] != prompts[:-1]) & np.logical_not(together)) + 1
    for members in np.split(order, edges):
        lengths = (missing.prompt_lengths + missing.lengths)[members]
        shared = _least_shared(missing, members, collator)
        start, total = 0, 0
        for i, length in enumerate(lengths.tolist()):
            more = length - (shared[i] if total else 0)
            if total and total + more > budget:
                groups.append(members[start:i])
                tokens.append(total)
                start, total, more = i, 0, length
            total += more
        groups.append(members[start:])
        tokens.append(total)
    # Pack whole groups into micro-batches.
    sizes = np.array(tokens, np.int64)
    longest_first = np.argsort(-sizes, kind="stable").tolist()
    batches = pack_rows(longest_first, sizes, max(budget, int(sizes.max())), world)
    return [[groups[number] for number in batch] for batch in batches]


def _least_shared(missing: Missing, members: NDArray[np.int64], collator: PackedCollator) -> list[int]:
    """Returns how many tokens each member of a group shares with the one before it, at least."""
    prompts, minimum = missing.prompt_lengths[members], collator.minimum_shared
    lengths = prompts + missing.lengths[members]
    same = missing.prompts[members][1:] == missing.prompts[members][:-1]
    if minimum is None:
        return [0, *np.where(same & collator.shares(int(lengths.max())), prompts[1:], 0).tolist()]
    digests = missing.beginnings[members]
    equal = (digests[1:] == digests[:-1]) & (digests[1:] > 0)
    longest = (equal * np.array(_BEGINNINGS)).max(axis=1, initial=0)
    base = np.where(same | (prompts[1:] <= longest), prompts[1:], 0)
    shared = np.where(longest - base >= minimum, longest, base)
    return [0, *(n if collator.shares(length) else 0 for n, length in zip(shared.tolist(), lengths[1:].tolist()))]


def _digest_beginnings(tokens: bytes) -> list[int]:
    """Returns the digests of the beginnings of a sequence of int64 tokens; 0 for those longer than it."""
    return [xxh3_64_intdigest(tokens[: 8 * n]) if 8 * n <= len(tokens) else 0 for n in _BEGINNINGS]


def read_sequences(
    dataset: Dataset, missing: Missing, groups: Sequence[NDArray[np.int64]], collator: PackedCollator
) -> tuple[list[Tokens], dict[ImageId, Any]]:
    """Reads the (prompt key, completion ids) of a micro-batch, truncated, and the images of their prompts."""
    wanted = sorted({int(row) for members in groups for row in missing.rows[members]})
    names = ("prompt_ids", "completion_ids", "image_ids", IMAGES)
    rows = dataset.select_columns([name for name in names if name in dataset.column_names]).select(wanted).to_list()
    stored = {number: collator.truncated(row) for number, row in zip(wanted, rows)}
    places = ((int(missing.rows[i]), int(missing.positions[i])) for members in groups for i in members)
    return [stored[row][position] for row, position in places], images_of(rows)


def _list_items(lists: pa.ChunkedArray | pa.Array, dtype: type = np.int64) -> list[NDArray[Any]]:
    """Returns the items of a list column in a dtype; views of its memory if they have it, else copies."""
    lengths = pc.list_value_length(lists).to_numpy()
    flat = pc.list_flatten(lists).to_numpy().astype(dtype, copy=False)
    stops = np.cumsum(lengths)
    return [flat[start:stop] for start, stop in zip((stops - lengths).tolist(), stops.tolist())]


def _digest_array(digests: Sequence[bytes]) -> NDArray[np.void]:
    return np.frombuffer(b"".join(digests), f"V{KEY_BYTES}")
