"""Where the rows of many shards lie: one sorted array of key halves for all, found by a table of their first bits.

Keys are hashes, so their first bits say nearly where in sorted order one stands: a table of one entry per eight rows
leaves a search of a few steps, which is done for a batch of keys at once. 12.5 bytes of memory per row.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .shards import Shard

_ROWS_PER_BUCKET = 8
_ROWS_PER_PART = 1 << 17  # merged at a time: what a processor's cache holds


@dataclass(eq=False)
class _Run:
    """Sorted first halves of keys, and the row of each, counted through all shards of the index."""

    prefixes: NDArray[np.uint64]  # (n,) sorted
    rows: NDArray[np.uint64] | NDArray[np.uint32]  # (n,)

    def __post_init__(self) -> None:
        bits = max(1, (len(self.prefixes) // _ROWS_PER_BUCKET).bit_length())
        self._shift = np.uint64(64 - bits)
        edges = np.arange(1, 1 << bits, dtype=np.uint64) << self._shift
        self._table = np.zeros((1 << bits) + 1, np.uint32 if len(self.prefixes) < 1 << 32 else np.int64)
        self._table[1:-1] = self.prefixes.searchsorted(edges)
        self._table[-1] = len(self.prefixes)
        self._steps = int(np.diff(self._table).max()).bit_length()

    def __len__(self) -> int:
        return len(self.prefixes)

    def search(self, prefixes: NDArray[np.uint64]) -> NDArray[np.int64]:
        """(k,) -> (k,) first position of each, -1 where it is not there."""
        bucket = (prefixes >> self._shift).astype(np.int64)
        low, high = self._table[bucket].astype(np.int64), self._table[bucket + 1].astype(np.int64)
        for _ in range(self._steps):
            middle = (low + high) >> 1
            below = (self.prefixes.take(middle, mode="clip") < prefixes) & (low < high)
            low = np.where(below, middle + 1, low)
            high = np.where(below, high, middle)
        return np.where(self.prefixes.take(low, mode="clip") == prefixes, low, -1)


class Index(NamedTuple):
    """Rows of all shards. Never changed, only replaced, so that readers need no lock."""

    shards: tuple[Shard, ...] = ()
    starts: tuple[int, ...] = (0,)  # first row of every shard, and their end
    runs: tuple[_Run, ...] = ()  # each less than half as long as the one before

    def with_shards(self, shards: Sequence[Shard]) -> Index:
        """Add shards. A run is merged with what it has grown to, so that n additions cost n log n."""
        shards = [shard for shard in shards if len(shard)]
        if not shards:
            return self
        starts = [*self.starts]
        for shard in shards:
            starts.append(starts[-1] + len(shard))
        total = starts[-1] - self.starts[-1]
        runs = [*self.runs]
        parts: list[_Run] = []
        while runs and len(runs[-1]) <= 2 * total:
            parts.append(runs.pop())
            total += len(parts[-1])
        dtype = np.uint32 if starts[-1] < 1 << 32 else np.uint64
        merged = _merge(shards, starts[len(self.starts) - 1 : -1], parts, dtype)
        return Index((*self.shards, *shards), tuple(starts), (*runs, merged))

    def find(self, prefixes: NDArray[np.uint64]) -> Iterator[Iterable[tuple[int, int, int]]]:
        """Rows that begin like one of a batch of first halves, (k,): (item of the batch, shard, row of the shard)."""
        starts = np.array(self.starts)
        for run in self.runs:
            at = run.search(prefixes)
            items = np.flatnonzero(at >= 0)
            at = at[items]
            while len(items):
                rows = run.rows[at].astype(np.int64)
                shards = starts.searchsorted(rows, "right") - 1
                yield zip(items.tolist(), shards.tolist(), (rows - starts[shards]).tolist())
                # The same first half again: a row that two writers stored, or one in 2^64 by chance.
                at = at + 1
                again = (at < len(run)) & (run.prefixes.take(at, mode="clip") == prefixes[items])
                items, at = items[again], at[again]


def _merge(shards: Sequence[Shard], starts: Sequence[int], runs: Sequence[_Run], dtype: type) -> _Run:
    """One run of sorted shards and runs, a range of keys at a time, so that hardly more memory is used than kept."""
    length = sum(map(len, [*shards, *runs]))
    prefixes, rows = np.empty(length, np.uint64), np.empty(length, dtype)
    count = -(-length // _ROWS_PER_PART)
    edges = np.array([(part << 64) // count for part in range(1, count)], np.uint64)
    sources = [shard.high for shard in shards] + [run.prefixes for run in runs]
    cuts = [[0, *source.searchsorted(edges).tolist(), len(source)] for source in sources]
    done = 0
    for part in range(count):
        keys, places = [], []
        for number, (source, cut) in enumerate(zip(sources, cuts)):
            start, stop = cut[part], cut[part + 1]
            if start < stop:
                keys.append(source[start:stop])
                if number < len(shards):
                    places.append(np.arange(starts[number] + start, starts[number] + stop, dtype=dtype))
                else:
                    places.append(runs[number - len(shards)].rows[start:stop].astype(dtype, copy=False))
        if keys:
            together = np.concatenate(keys)
            order = together.argsort(kind="stable")  # merges what is sorted already
            stop = done + len(order)
            np.take(together, order, out=prefixes[done:stop])
            np.take(np.concatenate(places), order, out=rows[done:stop])
            done = stop
    return _Run(prefixes, rows)
