"""One file of the reference cache: an immutable, memory-mapped Arrow table of rows (key, log-probs), sorted by key.

A key is 128 bits, kept as two 64-bit columns so that either can be searched where it lies. Log-probs are a list *view*
column: rows are sorted, while their values lie as they came, so that writing copies them once and what was scored
together stays together. Keys and places are checked against their checksum when a shard is opened (some 10 GB/s),
values in blocks of 64 KiB when a row in them is first read: opening stays fast, a look-up reads little, and what was
read has been checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from xxhash import xxh3_64_digest, xxh3_128_hexdigest

from ..errors import UserError

KEY_BYTES = 16
VERSION = b"3"
SCHEMA = pa.schema({"key_high": pa.uint64(), "key_low": pa.uint64(), "logps": pa.list_view(pa.float32())})
UNREADABLE = (OSError, ValueError, pa.ArrowException)  # what opening damaged bytes as a shard may raise
# What rows hold: a value per token, or an imported sum spread over the tokens, of which only the sum is right.
KINDS = ("tokens", "sums")

_CAPACITY = 1 << 24  # values that `Rows` hold before they need a larger array: twice what the cache keeps unwritten
_BLOCK_BITS = 14  # values that share a checksum: 2^14, 64 KiB


class DamagedShardError(UserError):
    """What a shard holds is not what was written to it."""


@dataclass(eq=False)
class Shard:
    """A memory-mapped shard of n rows and m values. The arrays stay readable after the file has been deleted."""

    path: Path
    kind: str
    high: NDArray[np.uint64]  # (n,) sorted
    low: NDArray[np.uint64]  # (n,)
    starts: NDArray[np.int32]  # (n,) where a row's values begin
    lengths: NDArray[np.int32]  # (n,) how many they are
    values: NDArray[np.float32]  # (m,)
    block_digests: bytes  # 8 of each block
    nbytes: int  # of the file
    trusted: bool = True
    _checked: bytearray = field(init=False)

    def __post_init__(self) -> None:
        self._checked = bytearray(_num_blocks(len(self.values)))
        # Python reads single numbers from a memoryview in a third of the time it takes from an array, slices in half.
        views = map(memoryview, (self.low, self.starts, self.lengths, self.values))
        self._low, self._starts, self._lengths, self._values = views

    @classmethod
    def open(cls, path: Path, fingerprint: str) -> Shard:
        """Map a shard and check all of it but the values.

        Raises:
            OSError, ValueError, pa.ArrowException: not a whole, intact shard of this reference.
        """
        with pa.memory_map(str(path)) as source:  # closing gives the descriptor back; the arrays hold the mapping
            reader = pa.ipc.open_file(source)
            metadata = reader.schema.metadata or {}
            if (version := metadata.get(b"version")) != VERSION:
                raise UserError(f"format version {version!r}, this program reads {VERSION!r}")
            if metadata.get(b"fingerprint") != fingerprint.encode():
                raise UserError("it belongs to another reference")
            if not reader.schema.equals(SCHEMA) or reader.num_record_batches != 1:
                raise UserError("unexpected columns")
            batch = reader.get_batch(0)
            nbytes = source.size()
        batch.validate()  # lengths and buffer sizes, which may be anything in a damaged file
        high, low, logps = batch.columns
        _, starts, lengths = logps.buffers()[:3]
        digests = bytes.fromhex(metadata.get(b"block_digests", b"").decode())
        shard = cls(
            path=path,
            kind=metadata.get(b"kind", b"").decode(),
            high=np.frombuffer(high.buffers()[1], "<u8", len(high)),
            low=np.frombuffer(low.buffers()[1], "<u8", len(low)),
            starts=np.frombuffer(starts, "<i4", len(logps)),
            lengths=np.frombuffer(lengths, "<i4", len(logps)),
            values=np.frombuffer(logps.values.buffers()[1], "<f4", len(logps.values)),
            block_digests=digests,
            nbytes=nbytes,
        )
        index = (shard.high, shard.low, shard.starts, shard.lengths)
        if _index_digest(shard.kind, index, digests) != metadata.get(b"index_digest"):
            raise DamagedShardError("its keys do not match their checksum")
        if len(digests) != 8 * _num_blocks(len(shard.values)) or shard.lengths.sum(dtype=np.int64) != len(shard.values):
            raise DamagedShardError("it has another number of values than its index says")
        return shard

    def __len__(self) -> int:
        return len(self.high)

    def read(self, row: int, low: int, length: int) -> memoryview | None:
        """(length,) floats of a row, read-only and checked; None where the row's key has another second half.

        Raises:
            DamagedShardError: the values do not match their checksum, or are of another number.
        """
        if self._low[row] != low:
            return None
        if self._lengths[row] != length:
            raise DamagedShardError(f"a row has {self._lengths[row]} values for a completion of {length} tokens")
        start = self._starts[row]
        stop = start + length
        if length:
            first, last = start >> _BLOCK_BITS, (stop - 1) >> _BLOCK_BITS
            if not (self._checked[first] and self._checked[last]) or last - first > 1:
                self.check(first, last + 1)
        return self._values[start:stop]

    def check(self, first: int = 0, stop: int | None = None) -> None:
        """Compare blocks of values with their checksums, once.

        Raises:
            DamagedShardError: one does not match.
        """
        for block in range(first, len(self._checked) if stop is None else stop):
            if not self._checked[block]:
                values = self.values[block << _BLOCK_BITS : (block + 1) << _BLOCK_BITS]
                if xxh3_64_digest(values) != self.block_digests[8 * block : 8 * block + 8]:
                    raise DamagedShardError("its values do not match their checksum")
                self._checked[block] = 1

    def keys(self) -> NDArray[np.void]:
        """(n,) keys of 16 bytes."""
        return np.stack([self.high, self.low], axis=1).view(f"V{KEY_BYTES}")[:, 0]

    def rows(self) -> dict[bytes, NDArray[np.float32]]:
        """Key -> values, read-only and checked.

        Raises:
            DamagedShardError: a checksum does not match.
        """
        self.check()
        values = (self.values[start : start + length] for start, length in zip(self._starts, self._lengths))
        return dict(zip(self.keys().tolist(), values))


class Rows:
    """Rows on their way into a shard: keys, and values one after another in the order in which they came.

    One thread adds, any number read.
    """

    def __init__(self) -> None:
        self.starts: dict[bytes, int] = {}  # where a key's values begin
        self._stop = 0
        self._values = np.empty(_CAPACITY, "<f4")  # memory is taken when it is first written to

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def nbytes(self) -> int:
        return 4 * self._stop + KEY_BYTES * len(self)

    def add(self, keys: Sequence[bytes], rows: Sequence[NDArray[np.float32]]) -> None:
        """Add new keys and a copy of their values.

        Raises:
            UserError: a value is not finite; nothing is added.
        """
        stops = self._stop + np.cumsum([len(row) for row in rows])
        stop = int(stops[-1])
        if stop > len(self._values):
            larger = np.empty(max(stop, 2 * len(self._values)), "<f4")
            larger[: self._stop] = self._values[: self._stop]
            self._values = larger  # who reads the other one finds all that there was
        values = np.concatenate(rows, out=self._values[self._stop : stop])
        if not np.isfinite(values).all():
            at = self._stop + int(np.argmin(np.isfinite(values)))
            row = int(stops.searchsorted(at, "right"))
            token = at - int(stops[row]) + len(rows[row])
            raise UserError(f"log-prob of completion token {token} is {self._values[at]}; only finite values are kept")
        expected = len(self) + len(keys)
        self.starts.update(zip(keys, [self._stop, *stops[:-1].tolist()]))
        assert len(self) == expected, "a key came twice"
        self._stop = stop

    def read(self, start: int, length: int) -> NDArray[np.float32]:
        """``length`` values from ``start``, a place in ``starts``, on."""
        return self._values[start : start + length]

    def columns(self) -> tuple[NDArray[np.uint64], NDArray[np.int32], NDArray[np.int32], NDArray[np.float32]]:
        """Key halves (n, 2), starts and lengths (n,), values (m,)."""
        halves = np.frombuffer(b"".join(self.starts), "<u8").reshape(-1, 2)
        starts = np.fromiter(self.starts.values(), "<i4", len(self))
        lengths = np.diff(starts, append=np.int32(self._stop))
        return halves, starts, lengths, self._values[: self._stop]


def write_shard(file: BinaryIO, rows: Rows, fingerprint: str, kind: str = "tokens") -> None:
    """Write rows in the order of their keys."""
    halves, starts, lengths, values = rows.columns()
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    high, low = (np.ascontiguousarray(half) for half in halves[order].T)
    starts, lengths = starts[order], lengths[order]
    blocks = range(0, len(values), 1 << _BLOCK_BITS)
    digests = b"".join(xxh3_64_digest(values[start : start + (1 << _BLOCK_BITS)]) for start in blocks)
    metadata = {
        "version": VERSION,
        "fingerprint": fingerprint,
        "kind": kind,
        "index_digest": _index_digest(kind, (high, low, starts, lengths), digests),
        "block_digests": digests.hex(),
    }
    schema = SCHEMA.with_metadata(metadata)
    column = pa.Array.from_buffers  # pa.array would import pandas first
    logps = column(pa.float32(), len(values), [None, pa.py_buffer(values)])
    lists = [None, pa.py_buffer(starts), pa.py_buffer(lengths)]
    columns = [
        *(column(pa.uint64(), len(rows), [None, pa.py_buffer(half)]) for half in (high, low)),
        column(SCHEMA.field("logps").type, len(rows), lists, children=[logps]),
    ]
    with pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))


def _num_blocks(values: int) -> int:
    return -(-values >> _BLOCK_BITS)


def _index_digest(kind: str, index: Iterable[NDArray], block_digests: bytes) -> bytes:
    parts = [kind.encode(), *(xxh3_128_hexdigest(part).encode() for part in (*index, block_digests))]
    return xxh3_128_hexdigest(b" ".join(parts)).encode()
