"""Keeps reference log-probs on disk, so that a completion is scored once.

    <directory>/<fingerprint>/reference.json    describes the reference, for people
    <directory>/<fingerprint>/probe.json        log-probs of a few tokens, see `cpt_kernels.reference.probe`
    <directory>/<fingerprint>/<uuid>.arrow      immutable shards, see `cpt_kernels.reference.shards`

The key of a row is a hash of (reference fingerprint, prompt ids, completion ids) and of nothing else. A stored row
therefore stays valid across shuffles, splits, losses, betas and seeds.

Any number of processes may write to one folder. Every shard has a unique name, which appears once all bytes are on
disk. Two writers that score the same row store it twice: this costs bytes, and nothing else. A writer that is killed
leaves at most a hidden `.tmp` file, which readers ignore.
"""

from __future__ import annotations

import json
import logging
import os
import re
import threading
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UserError
from ..files import replacing, write_text
from .index import Index
from .keys import Sequences, TokenIds, row_keys
from .shards import KINDS, UNREADABLE, DamagedShardError, Rows, Shard, write_shard

logger = logging.getLogger(__name__)

DESCRIPTION = "reference.json"

_PENDING_BYTES = 1 << 25  # a shard is written when this much is unwritten
_SMALL = 1 << 26  # `merge` merges shards of fewer bytes
_LARGEST = 1 << 28  # `merge` makes shards of at most this many bytes

StoredLogps = memoryview | NDArray[np.float32]  # the log-probs of a row, read-only


def default_cache_dir() -> Path:
    """Returns `$CPT_CACHE`, else `cpt_kernels/reference` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if chosen := os.environ.get("CPT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cpt_kernels" / "reference"


class ReferenceCache:
    """Per-token log-probs of completions under one reference model.

    One thread may add; any number of threads and processes may read. As a context manager, the cache flushes at the
    end. A pickled copy (in a DataLoader worker, for example) opens the same folder again. Pickling flushes, so the copy
    sees every row that was added before.

    Args:
        directory: folder of all references, see `default_cache_dir`. The first flush creates it.
        fingerprint: 32 hex digits that identify the reference, see `cpt_kernels.reference.fingerprint`.
        description: written to `reference.json`, for people.
        flush_seconds: `add` starts to write a shard in the background once the oldest unwritten row is this old.
        kind: kind of the rows that this object adds, one of `shards.KINDS`. Rows of both kinds are found.

    Attributes:
        hits, misses: completions that `look_up` (and the methods that call it) found and did not find in this process.
        bytes_written: size of the shards that this object wrote.

    Raises:
        UserError: a malformed fingerprint, or an unknown kind.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        fingerprint: str,
        *,
        description: Mapping[str, Any] | None = None,
        flush_seconds: float = 30.0,
        kind: str = "tokens",
    ) -> None:
        if not re.fullmatch("[0-9a-f]{32}", fingerprint):
            raise UserError(f"a reference's fingerprint is 32 hex digits, not {fingerprint!r}")
        if kind not in KINDS:
            raise UserError(f"kind={kind!r} is unknown: choose one of {', '.join(KINDS)}")
        self.directory = Path(directory).expanduser()
        self.folder = self.directory / fingerprint
        self.fingerprint = fingerprint
        self.description = dict(description or {})
        self.flush_seconds = flush_seconds
        self.kind = kind
        self.hits = self.misses = self.bytes_written = 0
        self._header = bytes.fromhex(fingerprint)
        self._lock = threading.RLock()
        # A row moves from `_pending` to `_writing` (a shard that a background thread writes) to `_index`.
        self._pending = Rows()
        self._pending_since = 0.0
        self._writing: tuple[Rows, Future[Shard]] | None = None
        self._index = Index()
        self._seen: set[str] = set()  # names of shards that were opened or found damaged; `refresh` skips them
        self.refresh()

    # --- Reading ---

    def key(self, prompt_ids: TokenIds, completion_ids: TokenIds) -> bytes:
        """Returns the 16 bytes that identify a completion of a prompt under this reference.

        Raises:
            UserError: token ids that are not a flat sequence of integers.
        """
        return self.keys([(prompt_ids, completion_ids)])[0]

    def keys(self, sequences: Sequences) -> list[bytes]:
        """Returns the `key` of each (prompt ids, completion ids): 1 us each from int64 arrays, 3 us from lists."""
        return row_keys(self._header, sequences)

    def look_up(self, keys: Sequence[bytes], lengths: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Returns the log-probs of n completions by their keys; about 1.5 us each.

        Args:
            keys: (n,) see `keys`.
            lengths: (n,) number of tokens of each completion.

        Returns:
            (sum of lengths,) log-probs, concatenated, NaN for completions that are not stored; and (n,) whether each
            completion is stored.
        """
        pieces = self._find(keys, lengths)
        found = np.array([piece is not None for piece in pieces], bool)
        hits = int(found.sum())
        self.hits += hits
        self.misses += len(found) - hits
        for item in np.flatnonzero(~found).tolist():
            pieces[item] = np.full(lengths[item], np.nan, np.float32)
        # Joining buffers takes at most a third of the time of np.concatenate.
        return np.frombuffer(bytearray().join(cast("list[memoryview]", pieces)), np.float32), found

    def log_probs(self, sequences: Sequences) -> NDArray[np.float32]:
        """Returns the first result of `look_up` for (prompt ids, completion ids); the collator calls it."""
        return self.look_up(self.keys(sequences), [len(completion) for _, completion in sequences])[0]

    def get_many(self, sequences: Sequences) -> list[NDArray[np.float32] | None]:
        """Returns the (len(completion_ids),) log-probs of every (prompt ids, completion ids), None if not stored.

        Raises:
            UserError: token ids that are not a flat sequence of integers.
        """
        lengths = [len(completion) for _, completion in sequences]
        values, found = self.look_up(self.keys(sequences), lengths)
        parts = np.split(values, np.cumsum(lengths))
        return [part if is_stored else None for part, is_stored in zip(parts, found.tolist())]

    def get_or_none(self, prompt_ids: TokenIds, completion_ids: TokenIds) -> NDArray[np.float32] | None:
        """Does what `get_many` does, for one completion."""
        return self.get_many([(prompt_ids, completion_ids)])[0]

    def get(self, prompt_ids: TokenIds, completion_ids: TokenIds) -> NDArray[np.float32]:
        """Does what `get_or_none` does, but requires that the completion is stored.

        Raises:
            KeyError: the completion is not stored.
        """
        values = self.get_or_none(prompt_ids, completion_ids)
        if values is None:
            raise KeyError(
                f"{self.folder} holds no reference log-probs of this completion ({len(completion_ids)} tokens, after a"
                f" prompt of {len(prompt_ids)})"
            )
        return values

    def __contains__(self, sequence: tuple[TokenIds, TokenIds]) -> bool:
        """Whether `(prompt_ids, completion_ids)` is stored. Does not count in `hits` and `misses`."""
        return self.has_keys([self.key(*sequence)], [len(sequence[1])])[0]

    def has_keys(self, keys: Sequence[bytes], lengths: Sequence[int]) -> list[bool]:
        """Whether each key is stored, with intact values. Does not count in `hits` and `misses`."""
        return [piece is not None for piece in self._find(keys, lengths)]

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The open shards, without damaged ones."""
        return tuple(shard for shard in self._index.shards if shard.trusted)

    @property
    def num_rows(self) -> int:
        """Number of rows, unwritten ones included. A row that two writers stored counts twice."""
        return sum(map(len, self.shards)) + sum(map(len, self._unwritten()))

    @property
    def imported_keys(self) -> set[bytes]:
        """Keys of the rows that are imported sums, whose single values are meaningless; see `shards.KINDS`."""
        return {key for shard in self.shards if shard.kind == "sums" for key in shard.sorted_keys()}

    # --- Writing ---

    def add(self, prompt_ids: TokenIds, completion_ids: TokenIds, logps: ArrayLike) -> None:
        """Does what `add_many` does, for one completion."""
        self.add_many([(prompt_ids, completion_ids)], [logps])

    def add_many(self, sequences: Sequences, logps: Iterable[ArrayLike]) -> None:
        """Stores the (len(completion_ids),) log-probs of completions that are not stored yet.

        They can be read at once. A background thread writes them to disk, at most one shard at a time, when enough of
        them have accumulated (see `flush_seconds`). A slow disk therefore does not delay scoring.

        Raises:
            UserError: the number of log-probs is not the number of tokens, or a log-prob is not finite.
            OSError: see `flush`. The shard in question may have been started by an earlier call.
        """
        arrays = [np.asarray(values, dtype=np.float32) for values in logps]
        lengths = [len(completion) for _, completion in sequences]
        for values, length in zip(arrays, lengths, strict=True):
            if values.shape != (length,):
                raise UserError(f"log-probs of shape {values.shape} for a completion of {length} tokens")
        keys = self.keys(sequences)
        with self._lock:
            # Keep the rows that are neither stored nor repeated in this call.
            new: dict[bytes, NDArray[np.float32]] = {}
            for key, values, piece in zip(keys, arrays, self._find(keys, lengths)):
                if piece is None:
                    new.setdefault(key, values)
            if not new:
                return
            if not self._pending:
                self._pending_since = time.monotonic()
            self._pending.add(list(new), list(new.values()))
            # Take in the shard that is being written if it is done, or if the next one has to be started.
            is_due = (
                time.monotonic() - self._pending_since >= self.flush_seconds or self._pending.nbytes >= _PENDING_BYTES
            )
            if is_due or (self._writing and self._writing[1].done()):
                self._finish_writing()
            if is_due:
                writer = ThreadPoolExecutor(1, "reference-cache")
                self._writing = self._pending, writer.submit(self._write, self._pending, self.kind)
                writer.shutdown(wait=False)  # the thread ends with its shard, and the interpreter waits for it
                self._pending = Rows()  # a new object, because `_writing` keeps the old one; see `_unwritten`

    def flush(self) -> None:
        """Writes all unwritten rows. After it returns, they survive a crash and a power cut.

        Raises:
            OSError: the folder is read-only, the disk is full, ... The rows stay in memory.
        """
        with self._lock:
            self._finish_writing()
            if self._pending:
                self._take_in(self._write(self._pending, self.kind))
                self._pending = Rows()

    def _finish_writing(self) -> None:
        """Waits for the background thread. If the thread failed, writes its shard again here, which may raise."""
        if self._writing:
            rows, written = self._writing
            wait([written])
            self._take_in(self._write(rows, self.kind) if written.exception() else written.result())
            self._writing = None

    def _take_in(self, shard: Shard) -> None:
        self.bytes_written += shard.nbytes
        self._index = self._index.with_shards([shard])

    def _unwritten(self) -> list[Rows]:
        """Returns the rows that are not in the index.

        A row enters `_writing` before it leaves `_pending`, and the index before it leaves `_writing`. A reader without
        the lock must look in this order, so that it cannot miss a row that moves.
        """
        pending, writing = self._pending, self._writing
        return [pending, writing[0]] if writing else [pending]

    def merge(self) -> None:
        """Replaces many small shards by a few large ones: a long build leaves a shard every 30 seconds.

        A reader that has a small shard open keeps its memory mapping. On a network file system this holds only on the
        same machine, so no other machine should be reading. If two processes merge the same shards, both keep all rows.
        A process that dies between writing and deleting leaves rows in two shards.

        Raises:
            OSError: see `flush`. No row is lost.
        """
        with self._lock:
            for kind in KINDS:
                group: list[Shard] = []
                for shard in [shard for shard in self.shards if shard.kind == kind and shard.nbytes < _SMALL]:
                    if group and sum(member.nbytes for member in group) + shard.nbytes > _LARGEST:
                        self._merge_group(group, kind)
                        group = []
                    group.append(shard)
                self._merge_group(group, kind)

    def _merge_group(self, group: Sequence[Shard], kind: str) -> None:
        rows, read = Rows(), []
        for shard in group:
            try:
                new = {key: values for key, values in shard.rows().items() if key not in rows.starts}
            except DamagedShardError as error:
                self._distrust(shard, str(error))
                continue
            read.append(shard)
            if new:
                rows.add(list(new), list(new.values()))
        if len(read) < 2:
            return
        merged = self._write(rows, kind)
        self.bytes_written += merged.nbytes
        self._index = Index().with_shards([*(shard for shard in self.shards if shard not in read), merged])
        for shard in read:
            shard.path.unlink(missing_ok=True)

    def _write(self, rows: Rows, kind: str) -> Shard:
        about, path = self.folder / DESCRIPTION, self.folder / f"{uuid.uuid4().hex}.arrow"
        self._seen.add(path.name)  # before a concurrent `refresh` can list the file
        content = json.dumps({**self.description, "fingerprint": self.fingerprint}, indent=2, default=str)
        try:
            if not about.exists():
                write_text(about, f"{content}\n")
            with replacing(path) as (temporary,), temporary.open("xb") as file:
                write_shard(file, rows, self.fingerprint, kind)
        except OSError as error:
            raise OSError(
                error.errno,
                f"reference log-probs cannot be written to {self.folder} ({error.strerror or error}); free disk space"
                " or permit writing there, or choose another folder with ref_cache_dir or $CPT_CACHE",
            ) from error
        return Shard.open(path, self.fingerprint)

    # --- Shards of other processes ---

    def refresh(self) -> int:
        """Opens the shards that other processes have written since, and returns their number.

        A damaged shard is ignored, with one warning.
        """
        with self._lock:
            shards: list[Shard] = []
            vanished = True
            while vanished:  # another process merged shards after they were listed: list the merged one, too
                vanished = False
                names = os.listdir(self.folder) if self.folder.exists() else []
                for name in sorted({name for name in names if name.endswith(".arrow")} - self._seen):
                    self._seen.add(name)
                    try:
                        shards.append(Shard.open(self.folder / name, self.fingerprint))
                    except FileNotFoundError:
                        vanished = True
                    except UNREADABLE as error:
                        self._warn_ignored(self.folder / name, str(error))
            self._index = self._index.with_shards(shards)
            return len(shards)

    def __enter__(self) -> ReferenceCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.flush()  # also after an exception: rows that were scored are right

    def __getstate__(self) -> dict[str, Any]:
        self.flush()  # the copy sees only what is on disk
        names = ("directory", "fingerprint", "description", "flush_seconds", "kind")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def _find(self, keys: Sequence[bytes], lengths: Sequence[int]) -> list[StoredLogps | None]:
        """Returns the read-only log-probs of every key, None if not stored."""
        pieces: list[StoredLogps | None] = [None] * len(keys)
        if not keys:
            return pieces
        for rows in filter(len, self._unwritten()):
            for item, start in enumerate(map(rows.starts.get, keys)):
                if start is not None:
                    pieces[item] = rows.read(start, lengths[item])
        halves = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)
        low = halves[:, 1].tolist()
        index = self._index
        for item, number, row in index.find(np.ascontiguousarray(halves[:, 0])):
            shard = index.shards[number]
            if pieces[item] is None and shard.trusted:
                try:
                    pieces[item] = shard.read(row, low[item], lengths[item])
                except DamagedShardError as error:
                    self._distrust(shard, str(error))
        return pieces

    def _distrust(self, shard: Shard, reason: str) -> None:
        """Ignores a shard from now on: none of its rows is found any more."""
        with self._lock:
            if shard.trusted:
                shard.trusted = False
                self._warn_ignored(shard.path, reason)

    def _warn_ignored(self, path: Path, reason: str) -> None:
        logger.warning(
            "%s is ignored, because it is damaged or of another program version (%s). Its rows will be scored again",
            path,
            reason,
        )
