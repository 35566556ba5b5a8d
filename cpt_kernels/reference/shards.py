"""Reads and writes a shard, one file of the reference cache: an immutable Arrow table of (key, log-probs) rows.

Rows are sorted by key. A key has 128 bits and is stored as two 64-bit columns, so that the first half can be searched
without a copy. Log-probs are a list *view* column: its starts and lengths follow the order of the keys, while the
values keep the order in which they were scored. Writing therefore copies the values once.

A shard is memory-mapped. Opening it verifies the checksum of keys, starts and lengths (at some 10 GB/s). Values have a
checksum per block of 64 KiB, which is verified when a row in the block is first read. Opening is therefore fast, and no
value is returned unverified.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from xxhash import xxh3_64_digest, xxh3_128_hexdigest

from ..errors import UserError

KEY_BYTES = 16
VERSION = b"3"
SCHEMA = pa.schema({"key_high": pa.uint64(), "key_low": pa.uint64(), "logps": pa.list_view(pa.float32())})
UNREADABLE = (OSError, ValueError, pa.ArrowException)  # raised when a damaged file is opened as a shard
# "tokens": a log-prob per token. "sums": an imported sum, spread evenly over the tokens; only the sum is meaningful.
KINDS = ("tokens", "sums")

_CAPACITY = 1 << 24  # initial capacity of `Rows` in values: twice the most that the cache leaves unwritten
_BLOCK_BITS = 14  # 2^14 values (64 KiB) share a checksum
BLOCK_BYTES = 4 << _BLOCK_BITS


class DamagedShardError(UserError):
    """The content of a shard is not what was written to it."""


class Columns(NamedTuple):
    """Rows as a shard stores them: n rows and m values."""

    high: NDArray[np.uint64]  # (n,) first half of every key
    low: NDArray[np.uint64]  # (n,) second half of every key
    starts: NDArray[np.int32]  # (n,) index of a row's first value
    lengths: NDArray[np.int32]  # (n,) number of a row's values
    values: NDArray[np.float32]  # (m,)

    def index_digest(self, kind: str, block_digests: bytes) -> bytes:
        """Returns the checksum of everything but the values, which ``block_digests`` stand for."""
        parts = [column.data for column in (self.high, self.low, self.starts, self.lengths)]
        digests = [xxh3_128_hexdigest(part).encode() for part in (*parts, memoryview(block_digests))]
        return xxh3_128_hexdigest(b" ".join([kind.encode(), *digests])).encode()


@dataclass(eq=False)
class Shard:
    """A memory-mapped shard of n rows and m values. The arrays stay readable after the file is deleted."""

    path: Path
    columns: Columns  # rows, sorted by key
    kind: str  # one of `KINDS`
    block_digests: bytes  # checksums of the blocks of values, 8 bytes each
    nbytes: int  # size of the file
    values_at: int  # the byte of the file at which the values begin
    trusted: bool = True  # False once damage has been found; the cache then ignores the shard
    _verified: bytearray = field(init=False)  # 1 for every block of values whose checksum was found right

    def __post_init__(self) -> None:
        self._verified = bytearray(_num_blocks(len(self.columns.values)))
        # `read` works on memoryviews: Python indexes them three times as fast as arrays, and slices them twice as fast.
        self._low, self._starts, self._lengths, self._values = (column.data for column in self.columns[1:])

    @classmethod
    def open(cls, path: Path, fingerprint: str) -> Shard:
        """Maps a shard, and verifies all of it but the values.

        Raises:
            OSError, ValueError, pa.ArrowException: the file is not a whole, intact shard of this reference.
        """
        with pa.memory_map(str(path)) as source:  # closing releases the descriptor; the arrays keep the mapping
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
            source.seek(0)
            begin = source.read_buffer(nbytes).address  # of the mapping
        batch.validate()  # a damaged file may hold any lengths and buffer sizes
        high, low, logps = batch.columns
        _, starts, lengths = logps.buffers()[:3]
        columns = Columns(
            high=np.frombuffer(high.buffers()[1], "<u8", len(high)),
            low=np.frombuffer(low.buffers()[1], "<u8", len(low)),
            starts=np.frombuffer(starts, "<i4", len(logps)),
            lengths=np.frombuffer(lengths, "<i4", len(logps)),
            values=np.frombuffer(logps.values.buffers()[1], "<f4", len(logps.values)),
        )
        kind = metadata.get(b"kind", b"").decode()
        digests = bytes.fromhex(metadata.get(b"block_digests", b"").decode())
        if columns.index_digest(kind, digests) != metadata.get(b"index_digest"):
            raise DamagedShardError("its keys do not match their checksum")
        num_values = len(columns.values)
        if len(digests) != 8 * _num_blocks(num_values) or columns.lengths.sum(dtype=np.int64) != num_values:
            raise DamagedShardError("it does not hold as many values as its index says")
        values_at = logps.values.buffers()[1].address - begin if num_values else nbytes
        return cls(path, columns, kind, digests, nbytes, values_at)

    def __len__(self) -> int:
        return len(self.columns.high)

    @property
    def num_values(self) -> int:
        return len(self.columns.values)

    def place(self, row: int, low: int, length: int) -> tuple[int, int] | None:
        """Returns where the values of a row begin and end; None if ``low`` is not the row key's second half.

        Raises:
            DamagedShardError: the row has another number of values.
        """
        if self._low[row] != low:
            return None
        if self._lengths[row] != length:
            raise DamagedShardError(f"a row has {self._lengths[row]} values for a completion of {length} tokens")
        start = self._starts[row]
        return start, start + length

    def read(self, row: int, low: int, length: int) -> memoryview | None:
        """Returns the (length,) verified, read-only floats of a row; None if ``low`` is not the row key's second half.

        Raises:
            DamagedShardError: the values do not match their checksum, or the row has another number of them.
        """
        if (place := self.place(row, low, length)) is None:
            return None
        start, stop = place
        if length:
            first, last = start >> _BLOCK_BITS, (stop - 1) >> _BLOCK_BITS
            if not (self._verified[first] and self._verified[last]) or last - first > 1:
                self.verify(first, last + 1)
        return self._values[start:stop]

    def has_digest(self, block: int, data: bytes | memoryview) -> bool:
        """Whether bytes are those of a block of values."""
        return xxh3_64_digest(data) == self.block_digests[8 * block : 8 * block + 8]

    def verify(self, first: int = 0, stop: int | None = None) -> None:
        """Compares blocks of values with their checksums, each block once in the life of this object.

        Raises:
            DamagedShardError: a block does not match.
        """
        for block in range(first, len(self._verified) if stop is None else stop):
            if not self._verified[block]:
                if not self.has_digest(block, _block(self.columns.values, block)):
                    raise DamagedShardError("its values do not match their checksum")
                self._verified[block] = 1

    def sorted_keys(self) -> list[bytes]:
        """Returns the n keys of 16 bytes, in order."""
        return np.stack([self.columns.high, self.columns.low], axis=1).view(f"V{KEY_BYTES}")[:, 0].tolist()

    def rows(self) -> dict[bytes, NDArray[np.float32]]:
        """Returns the verified, read-only values of every key, in the order in which they were scored.

        A merged shard then keeps the completions of a prompt together.

        Raises:
            DamagedShardError: a checksum does not match.
        """
        self.verify()
        keys, places = self.sorted_keys(), [*zip(self._starts, self._lengths)]
        order = self.columns.starts.argsort(kind="stable").tolist()
        return {keys[i]: self.columns.values[places[i][0] : sum(places[i])] for i in order}


def grouped(shards: Sequence[Shard], most_bytes: int) -> list[list[Shard]]:
    """Divides shards into groups of consecutive ones with at most ``most_bytes`` together, or a single larger one."""
    groups: list[list[Shard]] = []
    nbytes = 0  # of the last group
    for shard in shards:
        if not groups or nbytes + shard.nbytes > most_bytes:
            groups.append([])
            nbytes = 0
        groups[-1].append(shard)
        nbytes += shard.nbytes
    return groups


def merge_rows(shards: Sequence[Shard]) -> tuple[Rows, list[tuple[Shard, str]]]:
    """Returns the rows of shards, each key once; and the shards that are damaged, with the reason."""
    rows, damaged = Rows(), []
    for shard in shards:
        try:
            new = {key: values for key, values in shard.rows().items() if key not in rows.starts}
        except DamagedShardError as error:
            damaged.append((shard, str(error)))
            continue
        if new:
            rows.add(list(new), list(new.values()))
    return rows, damaged


class Rows:
    """Rows that are not yet in a shard: keys, and values one after another in the order in which they came.

    One thread may add while other threads read.
    """

    def __init__(self) -> None:
        self.starts: dict[bytes, int] = {}  # key -> index of its first value
        self._stop = 0  # number of values
        self._values = np.empty(_CAPACITY, np.float32)  # the system provides memory when it is first written to

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def nbytes(self) -> int:
        return 4 * self._stop + KEY_BYTES * len(self)

    def add(self, keys: Sequence[bytes], rows: Sequence[NDArray[np.float32]]) -> None:
        """Adds keys that are not there yet, and a copy of their values.

        Raises:
            UserError: a value is not finite; nothing is added.
        """
        stops = self._stop + np.cumsum([len(row) for row in rows])
        stop = int(stops[-1])
        if stop > len(self._values):
            larger = np.empty(max(stop, 2 * len(self._values)), np.float32)
            larger[: self._stop] = self._values[: self._stop]
            self._values = larger  # a thread that still reads the old array finds all earlier values in it
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
        """Returns the (length,) values of the row that begins at ``start``."""
        return self._values[start : start + length]

    def sorted_columns(self) -> Columns:
        """Returns the rows in the order of their keys."""
        halves = np.frombuffer(b"".join(self.starts), "<u8").reshape(-1, 2)
        starts = np.fromiter(self.starts.values(), "<i4", len(self))
        lengths = np.diff(starts, append=np.int32(self._stop))
        order = np.lexsort((halves[:, 1], halves[:, 0]))
        high, low = (np.ascontiguousarray(half) for half in halves[order].T)
        return Columns(high, low, starts[order], lengths[order], self._values[: self._stop])


def write_shard(file: BinaryIO, rows: Rows, fingerprint: str, kind: str = "tokens") -> None:
    """Writes rows as a shard of the reference with this fingerprint."""
    columns = rows.sorted_columns()
    blocks = range(_num_blocks(len(columns.values)))
    digests = b"".join(xxh3_64_digest(_block(columns.values, block)) for block in blocks)
    metadata = {
        "version": VERSION,
        "fingerprint": fingerprint,
        "kind": kind,
        "index_digest": columns.index_digest(kind, digests),
        "block_digests": digests.hex(),
    }
    schema = SCHEMA.with_metadata(metadata)
    high, low, starts, lengths, values = map(pa.py_buffer, columns)
    make = pa.Array.from_buffers  # unlike pa.array, it does not import pandas
    logps = make(pa.float32(), len(columns.values), [None, values])
    arrays = [
        make(pa.uint64(), len(rows), [None, high]),
        make(pa.uint64(), len(rows), [None, low]),
        make(SCHEMA.field("logps").type, len(rows), [None, starts, lengths], children=[logps]),
    ]
    with pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(pa.record_batch(arrays, schema=schema))


def _num_blocks(num_values: int) -> int:
    return -(-num_values >> _BLOCK_BITS)


def _block(values: NDArray[np.float32], block: int) -> memoryview:
    return values[block << _BLOCK_BITS : (block + 1) << _BLOCK_BITS].data
