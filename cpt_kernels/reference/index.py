"""Finds rows in many shards: the first halves of all keys lie in one sorted array, which is searched by bisection."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .shards import Shard


class Index(NamedTuple):
    """The n rows of all shards. An index is replaced, never changed, so readers need no lock.

    It takes 16 bytes of memory per row.
    """

    shards: tuple[Shard, ...] = ()
    starts: NDArray[np.int64] = np.zeros(1, np.int64)  # (shards + 1,) index of every shard's first row, and n
    prefixes: NDArray[np.uint64] = np.zeros(0, np.uint64)  # (n,) first halves of the keys, sorted
    rows: NDArray[np.int64] = np.zeros(0, np.int64)  # (n,) the row of each; rows count through all shards

    def with_shards(self, shards: Sequence[Shard]) -> Index:
        """Returns an index of these shards and of those that this index has."""
        shards = [shard for shard in shards if len(shard)]
        if not shards:
            return self
        starts = np.cumsum([0, *map(len, self.shards), *map(len, shards)])
        prefixes = np.concatenate([self.prefixes, *(shard.columns.high for shard in shards)])
        # numpy's stable sort of 64-bit integers merges sorted runs. Every shard is one, so adding one shard is O(n).
        order = prefixes.argsort(kind="stable")
        rows = np.concatenate([self.rows, np.arange(self.starts[-1], starts[-1])])
        return Index((*self.shards, *shards), starts, prefixes[order], rows[order])

    def find(self, prefixes: NDArray[np.uint64]) -> Iterator[tuple[int, int, int]]:
        """Finds the rows whose keys begin with one of a batch of first halves, (k,).

        Yields:
            (position in the batch, number of the shard, row of the shard) of every such row.
        """
        if not self.shards:
            return
        items = np.arange(len(prefixes))
        at = self.prefixes.searchsorted(prefixes)
        # Several rows may have the same first half: two writers stored the same row, or, rarely, two keys share it.
        while len(items):
            matches = (at < len(self.prefixes)) & (self.prefixes.take(at, mode="clip") == prefixes[items])
            items, at = items[matches], at[matches]
            rows = self.rows[at]
            shards = self.starts.searchsorted(rows, "right") - 1
            yield from zip(items.tolist(), shards.tolist(), (rows - self.starts[shards]).tolist())
            at = at + 1
