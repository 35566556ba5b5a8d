"""Reference log-probs on disk: a completion that was scored once is never scored again.

    <directory>/<fingerprint>/reference.json    what the reference is, for people
    <directory>/<fingerprint>/<uuid>.arrow      immutable shards: one Arrow record batch (key, logps) each

A row is found by a hash of (reference fingerprint, prompt ids, completion ids) and of nothing else, so the cache
outlives shuffles, splits, losses, betas and seeds. Any number of processes may write to one folder: a shard gets its
own name, and only when all its bytes are on disk. Two writers that score the same row store it twice, which costs bytes
and no more. A killed writer leaves at most a hidden `.tmp` file, which no reader looks at.

Shards are memory-mapped. Keys and row boundaries are checked against their digest when a shard is opened, values when
one of its rows is first found: opening stays fast, and what is reported as found has been checked.
"""

from __future__ import annotations

import json
import logging
import os
import re
import struct
import threading
import time
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

logger = logging.getLogger(__name__)

Tokens = Sequence[int] | NDArray[np.integer]

_KEY_BYTES = 16
_VERSION = b"1"
_SCHEMA = pa.schema({"key": pa.binary(_KEY_BYTES), "logps": pa.large_list(pa.float32())})
_UNREADABLE = (OSError, ValueError, pa.ArrowException)  # what opening damaged bytes as a shard may raise


def default_cache_dir() -> Path:
    """`$CPT_CACHE`, else `cpt_kernels/reference` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if chosen := os.environ.get("CPT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cpt_kernels" / "reference"


class ReferenceCache:
    """Per-token log-probs of completions under one reference model.

    One thread writes; any number of threads and processes read. A pickled copy, in a DataLoader worker say, opens the
    same folder anew and sees all that was added before. As a context manager it flushes at the end.

    Args:
        directory: folder for all references, see `default_cache_dir`. Made at the first flush.
        fingerprint: 32 hex digits that identify the reference, see `cpt_kernels.fingerprint`.
        description: written to `reference.json`, for people.
        flush_seconds: `add` writes a shard when the oldest unwritten row is this old.

    Attributes:
        hits, misses: look-ups by `get` and `get_or_none` in this process.
        bytes_written: size of the shards that this object wrote.

    Raises:
        ValueError: a malformed fingerprint.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        fingerprint: str,
        *,
        description: Mapping[str, Any] | None = None,
        flush_seconds: float = 30.0,
    ) -> None:
        if not re.fullmatch("[0-9a-f]{32}", fingerprint):
            raise ValueError(f"a reference's fingerprint is 32 hex digits, not {fingerprint!r}")
        self.directory = Path(directory).expanduser()
        self.folder = self.directory / fingerprint
        self.fingerprint = fingerprint
        self.description = dict(description or {})
        self.flush_seconds = flush_seconds
        self.hits = self.misses = self.bytes_written = 0
        self._key_hash = blake2b(bytes.fromhex(fingerprint), digest_size=_KEY_BYTES, person=b"cpt-reference-1")
        self._lock = threading.RLock()
        self._pending: dict[bytes, NDArray[np.float32]] = {}
        self._pending_since = 0.0
        self._seen: set[str] = set()  # shards that were opened, or found damaged: neither is opened again
        self._index = _Index(np.empty(0, np.uint64), np.empty(0, np.int64), (), (0,))
        self.refresh()

    def key(self, prompt_ids: Tokens, completion_ids: Tokens) -> bytes:
        """16 bytes that identify a completion of a prompt under this reference.

        Both lengths are hashed ahead of the tokens (int64, little-endian), so (1, 2 | 3) is not (1 | 2, 3).

        Raises:
            ValueError: token ids that are not a flat sequence of integers.
        """
        prompt, completion = _token_bytes(prompt_ids), _token_bytes(completion_ids)
        digest = self._key_hash.copy()
        digest.update(struct.pack("<QQ", len(prompt), len(completion)))
        digest.update(prompt)
        digest.update(completion)
        return digest.digest()

    def get_or_none(self, prompt_ids: Tokens, completion_ids: Tokens) -> NDArray[np.float32] | None:
        """Log-probs of the completion's tokens, a new (len(completion_ids),) fp32 array; None when not there."""
        values = self._find(self.key(prompt_ids, completion_ids), len(completion_ids))
        if values is None:
            self.misses += 1
            return None
        self.hits += 1
        return values.copy()

    def get(self, prompt_ids: Tokens, completion_ids: Tokens) -> NDArray[np.float32]:
        """As `get_or_none`.

        Raises:
            KeyError: the completion was not scored yet.
        """
        values = self.get_or_none(prompt_ids, completion_ids)
        if values is None:
            raise KeyError(
                f"no reference log-probs in {self.folder} for this completion of {len(completion_ids)} tokens"
                f" to a prompt of {len(prompt_ids)}"
            )
        return values

    def __contains__(self, sequence: tuple[Tokens, Tokens]) -> bool:
        """Whether `(prompt_ids, completion_ids)` is there. Not counted in `hits` and `misses`."""
        prompt_ids, completion_ids = sequence
        return self._find(self.key(prompt_ids, completion_ids), len(completion_ids)) is not None

    @property
    def num_rows(self) -> int:
        """Rows stored, duplicates by concurrent writers included, and rows not yet written."""
        return len(self._index.rows) + len(self._pending)

    def add(self, prompt_ids: Tokens, completion_ids: Tokens, logps: ArrayLike) -> None:
        """Keep the log-probs, (len(completion_ids),) floats, of a completion; the first values of a row are kept.

        They can be read at once, and are written by the next `flush`, which this calls every `flush_seconds`.

        Raises:
            ValueError: another number of log-probs than tokens, or one that is not finite.
            OSError: as `flush`.
        """
        values = np.array(logps, dtype=np.float32)  # a copy: the caller may reuse its buffer
        if values.shape != (len(completion_ids),):
            raise ValueError(f"log-probs of shape {values.shape} for a completion of {len(completion_ids)} tokens")
        if not (finite := np.isfinite(values)).all():
            at = int(np.argmin(finite))
            raise ValueError(f"log-prob of completion token {at} is {values[at]}; only finite values can be cached")
        key = self.key(prompt_ids, completion_ids)
        with self._lock:
            if self._find(key, len(values)) is None:
                if not self._pending:
                    self._pending_since = time.monotonic()
                self._pending[key] = values
            if self._pending and time.monotonic() - self._pending_since >= self.flush_seconds:
                self.flush()

    def flush(self) -> None:
        """Write the rows added since the last flush as one shard. On return they survive a crash or a power cut.

        Raises:
            OSError: of the kind that the system gave (read-only folder, disk full, ...). The rows are still held.
        """
        with self._lock:
            if not self._pending:
                return
            about, path = self.folder / "reference.json", self.folder / f"{uuid.uuid4().hex}.arrow"
            content = json.dumps({**self.description, "fingerprint": self.fingerprint}, indent=2, default=str)
            try:
                if not about.exists():
                    _publish(about, lambda file: file.write(f"{content}\n".encode()))
                _publish(path, lambda file: _write_shard(file, self._pending, self.fingerprint))
            except OSError as error:
                raise OSError(
                    error.errno,
                    f"reference log-probs cannot be written to {self.folder} ({error.strerror or error}); free it, or"
                    " choose another folder with ref_cache_dir or $CPT_CACHE",
                ) from error
            self._seen.add(path.name)
            self._index = self._index.with_shards([_Shard.open(path, self.fingerprint)])
            self.bytes_written += path.stat().st_size
            self._pending = {}  # only now, and not cleared: a reader looks here first, in the index next

    def refresh(self) -> int:
        """Open the shards that others wrote since; returns how many. A damaged one is left out, with one warning."""
        with self._lock:
            shards = []
            names = os.listdir(self.folder) if self.folder.exists() else []
            for name in sorted({name for name in names if name.endswith(".arrow")} - self._seen):
                self._seen.add(name)
                try:
                    shards.append(_Shard.open(self.folder / name, self.fingerprint))
                except FileNotFoundError:  # pruned since the listing: gone, not damaged
                    continue
                except _UNREADABLE as error:
                    self._warn_ignored(self.folder / name, str(error))
            self._index = self._index.with_shards(shards)
            return len(shards)

    def __enter__(self) -> ReferenceCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()  # after an exception too: rows that were scored are right

    def __getstate__(self) -> dict[str, Any]:
        self.flush()  # the copy reads from disk only
        return {name: getattr(self, name) for name in ("directory", "fingerprint", "description", "flush_seconds")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def _find(self, key: bytes, length: int) -> NDArray[np.float32] | None:
        """(length,) values of a key, to be read only; shards that prove damaged on the way are dropped."""
        if (pending := self._pending.get(key)) is not None:
            return pending
        for shard, row in self._index.find(key):
            start, stop = shard.offsets[row : row + 2]
            if not shard.values_intact():
                self._distrust(shard, "its values do not match their checksum")
            elif stop - start != length:
                self._distrust(shard, f"a row has {stop - start} values for a completion of {length} tokens")
            else:
                return shard.values[start:stop]
        return None

    def _distrust(self, shard: _Shard, reason: str) -> None:
        with self._lock:
            if shard in self._index.shards:
                self._index = self._index.without(shard)
                self._warn_ignored(shard.path, reason)

    def _warn_ignored(self, path: Path, reason: str) -> None:
        logger.warning(
            "%s is damaged or not for this program, and ignored: %s. Its rows are scored again", path, reason
        )


@dataclass(eq=False)
class _Shard:
    """A memory-mapped shard of n rows and m values."""

    path: Path
    keys: NDArray[np.void]  # (n,) of 16 bytes
    offsets: NDArray[np.int64]  # (n+1,)
    values: NDArray[np.float32]  # (m,)
    values_digest: bytes
    _intact: bool | None = None  # None: not checked yet

    @classmethod
    def open(cls, path: Path, fingerprint: str) -> _Shard:
        """Map a shard and check all of it but the values.

        Raises:
            OSError, ValueError, pa.ArrowException: not a whole, intact shard of this reference.
        """
        with pa.memory_map(str(path)) as source:  # closing gives the descriptor back; the arrays hold the mapping
            reader = pa.ipc.open_file(source)
            metadata = reader.schema.metadata or {}
            if (version := metadata.get(b"version")) != _VERSION:
                raise ValueError(f"format version {version!r}, this program reads {_VERSION!r}")
            if metadata.get(b"fingerprint") != fingerprint.encode():
                raise ValueError("it belongs to another reference")
            if not reader.schema.equals(_SCHEMA) or reader.num_record_batches != 1:
                raise ValueError("unexpected columns")
            batch = reader.get_batch(0)
        batch.validate()  # lengths and buffer sizes, which may be anything in a damaged file
        keys, logps = batch.columns
        shard = cls(
            path,
            np.frombuffer(keys.buffers()[1], f"V{_KEY_BYTES}", len(keys)),
            np.frombuffer(logps.buffers()[1], "<i8", len(logps) + 1),
            np.frombuffer(logps.values.buffers()[1], "<f4", len(logps.values)),
            metadata.get(b"values_digest", b""),
        )
        if _digest(shard.keys, shard.offsets) != metadata.get(b"index_digest"):
            raise ValueError("its keys do not match their checksum")
        return shard

    def values_intact(self) -> bool:
        if self._intact is None:
            self._intact = len(self.values) == self.offsets[-1] and _digest(self.values) == self.values_digest
        return self._intact


class _Index(NamedTuple):
    """Where the rows of all shards lie. Never changed, only replaced, so that readers need no lock.

    Sorted by the first half of the key; the other half is compared in the shard itself, which halves the memory.
    """

    prefixes: NDArray[np.uint64]  # (n,) sorted
    rows: NDArray[np.int64]  # (n,) counted through all shards
    shards: tuple[_Shard, ...]
    starts: tuple[int, ...]  # first row of every shard, and their end

    def find(self, key: bytes) -> Iterator[tuple[_Shard, int]]:
        """Every (shard, row of the shard) that has this key."""
        prefix = np.frombuffer(key, "<u8", 1)[0]
        for at in range(int(self.prefixes.searchsorted(prefix)), len(self.prefixes)):
            if self.prefixes[at] != prefix:
                return
            row = int(self.rows[at])
            number = bisect_right(self.starts, row) - 1
            shard, row = self.shards[number], row - self.starts[number]
            if shard.keys[row].tobytes() == key:
                yield shard, row

    def with_shards(self, shards: Sequence[_Shard]) -> _Index:
        if not shards:
            return self
        prefixes = np.concatenate([shard.keys.view("<u8")[::2] for shard in shards])
        order = np.argsort(prefixes)
        prefixes = prefixes[order]
        starts = [*self.starts]
        for shard in shards:
            starts.append(starts[-1] + len(shard.keys))
        # A merge: at each flush, sorting all over again would cost a second per ten million rows.
        at = self.prefixes.searchsorted(prefixes)
        return _Index(
            np.insert(self.prefixes, at, prefixes),
            np.insert(self.rows, at, order + self.starts[-1]),
            (*self.shards, *shards),
            tuple(starts),
        )

    def without(self, shard: _Shard) -> _Index:
        number = self.shards.index(shard)
        keep = (self.rows < self.starts[number]) | (self.rows >= self.starts[number + 1])
        return self._replace(prefixes=self.prefixes[keep], rows=self.rows[keep])


def _token_bytes(ids: Tokens) -> bytes:
    array = np.asarray(ids)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"token ids must be a flat sequence of integers, not {array.dtype} of shape {array.shape}")
    return array.astype("<i8").tobytes()


def _digest(*arrays: NDArray) -> bytes:
    digest = blake2b(digest_size=16)
    for array in arrays:
        digest.update(array.view(np.uint8))
    return digest.hexdigest().encode()


def _write_shard(file: BinaryIO, rows: Mapping[bytes, NDArray[np.float32]], fingerprint: str) -> None:
    keys = np.frombuffer(b"".join(rows), f"V{_KEY_BYTES}")
    offsets = np.zeros(len(rows) + 1, "<i8")
    np.cumsum([len(values) for values in rows.values()], out=offsets[1:])
    values = np.concatenate(list(rows.values())).astype("<f4", copy=False)
    metadata = {
        "version": _VERSION,
        "fingerprint": fingerprint,
        "index_digest": _digest(keys, offsets),
        "values_digest": _digest(values),
    }
    columns = [
        pa.Array.from_buffers(_SCHEMA.field("key").type, len(rows), [None, pa.py_buffer(keys)]),
        pa.LargeListArray.from_arrays(offsets, values),
    ]
    schema = _SCHEMA.with_metadata(metadata)
    with pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))


def _publish(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Make a file that others see whole or not at all, and that outlives a power cut once this returns."""
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
