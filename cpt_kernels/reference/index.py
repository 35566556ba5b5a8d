"""Finds rows in many shards: the first halves of all keys lie in one sorted array, which is searched by bisection.

The index of many rows is written to a file beside the shards, which all processes of a node map into their memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from xxhash import xxh3_128_hexdigest

from ..files import replacing
from .shards import UNREADABLE, Shard

_VERSION = "1"


class Index(NamedTuple):
    """The n rows of all shards. An index is replaced, never changed, so readers need no lock.

    It takes 12 bytes of memory per row, or 16 from 2^32 rows on.
    """

    shards: tuple[Shard, ...] = ()
    starts: NDArray[np.int64] = np.zeros(1, np.int64)  # (shards + 1,) index of every shard's first row, and n
    prefixes: NDArray[np.uint64] = np.zeros(0, np.uint64)  # (n,) first halves of the keys, sorted
    rows: NDArray[np.integer] = np.zeros(0, np.uint32)  # (n,) the row of each; rows count through all shards

    def with_shards(self, shards: Sequence[Shard]) -> Index:
        """Returns an index of these shards and of those that this index has."""
        shards = [shard for shard in shards if len(shard)]
        if not shards:
            return self
        starts = np.cumsum([0, *map(len, self.shards), *map(len, shards)])
        prefixes = np.concatenate([self.prefixes, *(shard.columns.high for shard in shards)])
        # numpy's stable sort of 64-bit integers merges sorted runs. Every shard is one, so adding one shard is O(n).
        order = prefixes.argsort(kind="stable")
        dtype = np.uint32 if starts[-1] <= 1 << 32 else np.int64
        rows = np.concatenate([self.rows, np.arange(self.starts[-1], starts[-1], dtype=dtype)])
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
            rows = self.rows[at].astype(np.int64)
            shards = self.starts.searchsorted(rows, "right") - 1
            yield from zip(items.tolist(), shards.tolist(), (rows - self.starts[shards]).tolist())
            at = at + 1

    def write(self, file: Path) -> None:
        """Writes the index as an Arrow file that names the shards."""
        names = [(shard.path.name, len(shard)) for shard in self.shards]
        about = {"version": _VERSION, "shards": json.dumps(names), "digest": _index_digest(self.prefixes, self.rows)}
        batch = pa.record_batch([pa.array(self.prefixes), pa.array(self.rows)], ["prefix", "row"])
        with replacing(file) as (temporary,), pa.OSFile(str(temporary), "wb") as sink:
            schema = batch.schema.with_metadata(about)
            with pa.ipc.new_file(sink, schema) as writer:
                writer.write_batch(batch.replace_schema_metadata(about))


def map_index(file: Path, shards: Mapping[str, Shard]) -> Index | None:
    """Returns the index in a file, mapped into memory; None if it is damaged, or has a shard that is not at hand.

    Args:
        shards: the shards at hand by the names of their files.
    """
    try:
        with pa.memory_map(str(file)) as source:
            reader = pa.ipc.open_file(source)
            about = {key.decode(): value.decode() for key, value in (reader.schema.metadata or {}).items()}
            prefixes, rows = (column.to_numpy() for column in reader.get_batch(0))
        names = json.loads(about["shards"])
        if about["version"] != _VERSION or about["digest"] != _index_digest(prefixes, rows):
            return None
    except (*UNREADABLE, KeyError):
        return None
    members = [shards[name] for name, length in names if name in shards and len(shards[name]) == length]
    if len(members) != len(names):
        return None
    return Index(tuple(members), np.cumsum([0, *map(len, members)]), prefixes, rows)


def _index_digest(prefixes: NDArray[np.uint64], rows: NDArray[np.integer]) -> str:
    return xxh3_128_hexdigest(prefixes.data) + xxh3_128_hexdigest(rows.data)
