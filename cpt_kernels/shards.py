"""One file of the reference cache: an immutable, memory-mapped Arrow table of rows (key, log-probs), sorted by key.

A key is 128 bits, kept as two 64-bit columns so that either can be searched where it lies. Keys and row boundaries are
checked against their checksum when a shard is opened (some 10 GB/s), values in blocks of 64 KiB when a row in them is
first read: opening stays fast, a look-up reads little, and what was read has been checked.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from xxhash import xxh3_64_digest, xxh3_128_hexdigest

KEY_BYTES = 16
VERSION = b"2"
SCHEMA = pa.schema({"key_high": pa.uint64(), "key_low": pa.uint64(), "logps": pa.large_list(pa.float32())})
UNREADABLE = (OSError, ValueError, pa.ArrowException)  # what opening damaged bytes as a shard may raise
# What rows hold: a value per token, or an imported sum spread over the tokens, of which only the sum is right.
KINDS = ("tokens", "sums")

_BLOCK_BITS = 14  # values that share a checksum: 2^14, 64 KiB


class DamagedShardError(ValueError):
    """What a shard holds is not what was written to it."""


@dataclass(eq=False)
class Shard:
    """A memory-mapped shard of n rows and m values. The arrays stay readable after the file has been deleted."""

    path: Path
    kind: str
    high: NDArray[np.uint64]  # (n,) sorted
    low: NDArray[np.uint64]  # (n,)
    offsets: NDArray[np.int64]  # (n+1,)
    values: NDArray[np.float32]  # (m,)
    block_digests: bytes  # 8 of each block
    nbytes: int  # of the file
    trusted: bool = True
    _checked: bytearray = field(init=False)

    def __post_init__(self) -> None:
        self._checked = bytearray(_num_blocks(len(self.values)))
        # Python reads single numbers from a memoryview in a third of the time it takes from an array.
        self._low, self._offsets = memoryview(self.low), memoryview(self.offsets)

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
                raise ValueError(f"format version {version!r}, this program reads {VERSION!r}")
            if metadata.get(b"fingerprint") != fingerprint.encode():
                raise ValueError("it belongs to another reference")
            if not reader.schema.equals(SCHEMA) or reader.num_record_batches != 1:
                raise ValueError("unexpected columns")
            batch = reader.get_batch(0)
            nbytes = source.size()
        batch.validate()  # lengths and buffer sizes, which may be anything in a damaged file
        high, low, logps = batch.columns
        digests = bytes.fromhex(metadata.get(b"block_digests", b"").decode())
        shard = cls(
            path=path,
            kind=metadata.get(b"kind", b"").decode(),
            high=np.frombuffer(high.buffers()[1], "<u8", len(high)),
            low=np.frombuffer(low.buffers()[1], "<u8", len(low)),
            offsets=np.frombuffer(logps.buffers()[1], "<i8", len(logps) + 1),
            values=np.frombuffer(logps.values.buffers()[1], "<f4", len(logps.values)),
            block_digests=digests,
            nbytes=nbytes,
        )
        expected = _index_digest(shard.kind, shard.high, shard.low, shard.offsets, digests)
        if expected != metadata.get(b"index_digest"):
            raise DamagedShardError("its keys do not match their checksum")
        if len(digests) != 8 * _num_blocks(len(shard.values)) or shard.offsets[-1] != len(shard.values):
            raise DamagedShardError("it has another number of values than its index says")
        return shard

    def __len__(self) -> int:
        return len(self.high)

    def read(self, row: int, low: int, length: int) -> NDArray[np.float32] | None:
        """(length,) values of a row, read-only and checked; None where the row's key has another second half.

        Raises:
            DamagedShardError: the values do not match their checksum, or are of another number.
        """
        if self._low[row] != low:
            return None
        start, stop = self._offsets[row], self._offsets[row + 1]
        if stop - start != length:
            raise DamagedShardError(f"a row has {stop - start} values for a completion of {length} tokens")
        if stop > start:
            first, last = start >> _BLOCK_BITS, (stop - 1) >> _BLOCK_BITS
            if not (self._checked[first] and self._checked[last]) or last - first > 1:
                self.check(first, last + 1)
        return self.values[start:stop]

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

    def rows(self) -> list[NDArray[np.float32]]:
        """The values of every row, read-only and checked.

        Raises:
            DamagedShardError: a checksum does not match.
        """
        self.check()
        return [self.values[start:stop] for start, stop in zip(self._offsets, self._offsets[1:])]


def write_shard(
    file: BinaryIO,
    keys: bytes,  # 16 of each row
    rows: Sequence[NDArray[np.float32]],
    fingerprint: str,
    kind: str = "tokens",
) -> None:
    """Write rows in the order of their keys; of rows with the same key, the first."""
    halves = np.frombuffer(keys, "<u8").reshape(-1, 2)
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    halves = halves[order]
    first = np.ones(len(order), bool)
    first[1:] = (halves[1:] != halves[:-1]).any(1)
    high, low = np.ascontiguousarray(halves[first].T)
    rows = [rows[i] for i in order[first].tolist()]
    offsets = np.zeros(len(rows) + 1, "<i8")
    np.cumsum([len(row) for row in rows], out=offsets[1:])
    values = np.concatenate(rows).astype("<f4", copy=False)
    blocks = range(0, len(values), 1 << _BLOCK_BITS)
    digests = b"".join(xxh3_64_digest(values[start : start + (1 << _BLOCK_BITS)]) for start in blocks)
    metadata = {
        "version": VERSION,
        "fingerprint": fingerprint,
        "kind": kind,
        "index_digest": _index_digest(kind, high, low, offsets, digests),
        "block_digests": digests.hex(),
    }
    schema = SCHEMA.with_metadata(metadata)
    columns = [pa.array(high), pa.array(low), pa.LargeListArray.from_arrays(offsets, values)]
    with pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))


def publish(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Make a file that others see whole or not at all, and that outlives a power cut once this returns.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    made = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    for entry in (path, *made):  # a name is durable when the folder that holds it is synced
        descriptor = os.open(entry.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _num_blocks(values: int) -> int:
    return -(-values >> _BLOCK_BITS)


def _index_digest(
    kind: str, high: NDArray[np.uint64], low: NDArray[np.uint64], offsets: NDArray[np.int64], block_digests: bytes
) -> bytes:
    parts = [kind.encode(), *(xxh3_128_hexdigest(part).encode() for part in (high, low, offsets, block_digests))]
    return xxh3_128_hexdigest(b" ".join(parts)).encode()
