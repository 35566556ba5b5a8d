"""Reference log-probs on disk: a completion that was scored once is never scored again.

    <directory>/<fingerprint>/reference.json    what the reference is, for people
    <directory>/<fingerprint>/<uuid>.arrow      immutable shards, see `cpt_kernels.reference.shards`

A row is found by a hash of (reference fingerprint, prompt ids, completion ids) and of nothing else, so the cache
outlives shuffles, splits, losses, betas and seeds. Any number of processes may write to one folder: a shard gets its
own name, and only when all its bytes are on disk. Two writers that score the same row store it twice, which costs bytes
and no more. A killed writer leaves at most a hidden `.tmp` file, which no reader looks at.
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
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import UserError
from ..files import replacing, write_text
from .index import Index
from .keys import Sequences, Tokens, row_keys
from .shards import KINDS, UNREADABLE, DamagedShardError, Rows, Shard, write_shard

logger = logging.getLogger(__name__)

_PENDING_BYTES = 1 << 25  # of unwritten rows: a shard is written then at the latest
_SMALL = 1 << 26  # bytes of a shard that is still merged with others
_LARGEST = 1 << 28  # bytes of what they are merged into


def default_cache_dir() -> Path:
    """`$CPT_CACHE`, else `cpt_kernels/reference` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if chosen := os.environ.get("CPT_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cpt_kernels" / "reference"


class ReferenceCache:
    """Per-token log-probs of completions under one reference model.

    One thread adds; any number of threads and processes read. A pickled copy, in a DataLoader worker say, opens the
    same folder anew and sees all that was added before. As a context manager it flushes at the end.

    Args:
        directory: folder for all references, see `default_cache_dir`. Made at the first flush.
        fingerprint: 32 hex digits that identify the reference, see `cpt_kernels.reference.fingerprint`.
        description: written to `reference.json`, for people.
        flush_seconds: when the oldest unwritten row is this old, `add` has a shard written, beside what comes next.
        kind: of the rows that are added, one of `shards.KINDS`; rows of either are found.

    Attributes:
        hits, misses: completions found and not found by `look_up`, and by what calls it, in this process.
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
            raise UserError(f"kind={kind!r}: choose one of {', '.join(KINDS)}")
        self.directory = Path(directory).expanduser()
        self.folder = self.directory / fingerprint
        self.fingerprint = fingerprint
        self.description = dict(description or {})
        self.flush_seconds = flush_seconds
        self.kind = kind
        self.hits = self.misses = self.bytes_written = 0
        self._header = bytes.fromhex(fingerprint)
        self._lock = threading.RLock()
        self._pending = Rows()
        self._pending_since = 0.0
        self._writing: tuple[Rows, Future[Shard]] | None = None  # a shard that a thread of its own writes
        self._seen: set[str] = set()  # shards that were opened, or found damaged: neither is opened again
        self._index = Index()
        self.refresh()

    # --- Reading ---

    def key(self, prompt_ids: Tokens, completion_ids: Tokens) -> bytes:
        """16 bytes that identify a completion of a prompt under this reference.

        Raises:
            UserError: token ids that are not a flat sequence of integers.
        """
        return self.keys([(prompt_ids, completion_ids)])[0]

    def keys(self, sequences: Sequences) -> list[bytes]:
        """The `key` of each (prompt ids, completion ids); about 1 us each from int64 arrays, 3 us from lists."""
        return row_keys(self._header, sequences)

    def look_up(self, keys: Sequence[bytes], lengths: Sequence[int]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Log-probs of completions by their keys, about a microsecond each.

        Args:
            keys: n, see `keys`.
            lengths: n, tokens of each completion.

        Returns:
            (sum of lengths,) log-probs one after another, NaN where they are not there, and (n,) whether they are.
        """
        pieces = self._find(keys, lengths)
        found = np.array([piece is not None for piece in pieces], bool)
        hits = int(found.sum())
        self.hits += hits
        self.misses += len(found) - hits
        for item in np.flatnonzero(~found).tolist():
            pieces[item] = np.full(lengths[item], np.nan, np.float32)
        # Buffers are joined in a third of the time that arrays are concatenated in, or less.
        return np.frombuffer(bytearray().join(pieces), np.float32), found

    def log_probs(self, sequences: Sequences) -> NDArray[np.float32]:
        """As `look_up` of (prompt ids, completion ids), without the second array: what a collator asks for."""
        return self.look_up(self.keys(sequences), [len(completion) for _, completion in sequences])[0]

    def get_many(self, sequences: Sequences) -> list[NDArray[np.float32] | None]:
        """Log-probs of every (prompt ids, completion ids): (len(completion_ids),) fp32; None if not there.

        Raises:
            UserError: token ids that are not a flat sequence of integers.
        """
        lengths = [len(completion) for _, completion in sequences]
        values, found = self.look_up(self.keys(sequences), lengths)
        parts = np.split(values, np.cumsum(lengths))
        return [part if there else None for part, there in zip(parts, found.tolist())]

    def get_or_none(self, prompt_ids: Tokens, completion_ids: Tokens) -> NDArray[np.float32] | None:
        """As `get_many` for one completion."""
        return self.get_many([(prompt_ids, completion_ids)])[0]

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
        return self.has_keys([self.key(*sequence)], [len(sequence[1])])[0]

    def has_keys(self, keys: Sequence[bytes], lengths: Sequence[int]) -> list[bool]:
        """Whether each is there, and intact. Not counted in `hits` and `misses`."""
        return [piece is not None for piece in self._find(keys, lengths)]

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The shards that are open, but for damaged ones."""
        return tuple(shard for shard in self._index.shards if shard.trusted)

    @property
    def num_rows(self) -> int:
        """Rows stored, duplicates by concurrent writers included, and rows not yet written."""
        return sum(map(len, self.shards)) + sum(map(len, self._unwritten()))

    # --- Writing ---

    def add(self, prompt_ids: Tokens, completion_ids: Tokens, logps: ArrayLike) -> None:
        """As `add_many` for one completion."""
        self.add_many([(prompt_ids, completion_ids)], [logps])

    def add_many(self, sequences: Sequences, logps: Iterable[ArrayLike]) -> None:
        """Keep the log-probs, (len(completion_ids),) floats, of completions; the first values of a row are kept.

        They can be read at once. Every `flush_seconds` a thread begins to write what has come together, one shard at a
        time: a slow disk delays no scoring.

        Raises:
            UserError: another number of log-probs than tokens, or one that is not finite.
            OSError: as `flush`, also of a shard that was begun by an earlier call.
        """
        arrays = [np.asarray(values, dtype=np.float32) for values in logps]
        lengths = [len(completion) for _, completion in sequences]
        for values, length in zip(arrays, lengths, strict=True):
            if values.shape != (length,):
                raise UserError(f"log-probs of shape {values.shape} for a completion of {length} tokens")
        keys = self.keys(sequences)
        with self._lock:
            new: dict[bytes, NDArray[np.float32]] = {}
            for key, values, piece in zip(keys, arrays, self._find(keys, lengths)):
                if piece is None:
                    new.setdefault(key, values)
            if not new:
                return
            if not self._pending:
                self._pending_since = time.monotonic()
            self._pending.add(list(new), list(new.values()))
            old = time.monotonic() - self._pending_since >= self.flush_seconds
            full = self._pending.nbytes >= _PENDING_BYTES
            if old or full or (self._writing and self._writing[1].done()):
                self._finish_writing()
            if old or full:
                writer = ThreadPoolExecutor(1, "reference-cache")
                self._writing = self._pending, writer.submit(self._write, self._pending, self.kind)
                writer.shutdown(wait=False)  # the thread ends with its shard; the interpreter does not end before
                self._pending = Rows()  # not cleared, see _unwritten

    def flush(self) -> None:
        """Write all rows that are not on disk. On return they survive a crash or a power cut.

        Raises:
            OSError: of the kind that the system gave (read-only folder, disk full, ...). The rows are still held.
        """
        with self._lock:
            self._finish_writing()
            if self._pending:
                self._take_in(self._write(self._pending, self.kind))
                self._pending = Rows()

    def _finish_writing(self) -> None:
        """Wait for the shard that is being written. What its thread could not write is tried again here, and raises."""
        if self._writing:
            rows, written = self._writing
            wait([written])
            self._take_in(self._write(rows, self.kind) if written.exception() else written.result())
            self._writing = None

    def _take_in(self, shard: Shard) -> None:
        self.bytes_written += shard.nbytes
        self._index = self._index.with_shards([shard])

    def _unwritten(self) -> list[Rows]:
        """Rows move from the first to the second to the index, and are there before they leave: look in this order."""
        pending, writing = self._pending, self._writing
        return [pending, writing[0]] if writing else [pending]

    def merge(self, shards: Sequence[Shard]) -> None:
        """Put the rows of small shards into few, then delete those: a long build leaves a file every 30 seconds.

        A reader that holds one of them keeps its mapping of it (on a network file system only on the same machine: see
        that no other reads what is merged). Of two who merge the same, both keep all rows. A death on the way leaves
        rows in two shards.

        Raises:
            OSError: as `flush`. No row is lost.
        """
        with self._lock:
            for kind in KINDS:
                group: list[Shard] = []
                for shard in [shard for shard in shards if shard.kind == kind and shard.nbytes < _SMALL]:
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
        about, path = self.folder / "reference.json", self.folder / f"{uuid.uuid4().hex}.arrow"
        self._seen.add(path.name)  # before `refresh` can see it
        content = json.dumps({**self.description, "fingerprint": self.fingerprint}, indent=2, default=str)
        try:
            if not about.exists():
                write_text(about, f"{content}\n")
            with replacing(path) as (temporary,), temporary.open("xb") as file:
                write_shard(file, rows, self.fingerprint, kind)
        except OSError as error:
            raise OSError(
                error.errno,
                f"reference log-probs cannot be written to {self.folder} ({error.strerror or error}); free it, or"
                " choose another folder with ref_cache_dir or $CPT_CACHE",
            ) from error
        return Shard.open(path, self.fingerprint)

    # --- Shards of others ---

    def refresh(self) -> int:
        """Open the shards that others wrote since; returns how many. A damaged one is left out, with one warning."""
        with self._lock:
            shards: list[Shard] = []
            vanished = True
            while vanished:  # what is deleted between listing and opening may have been merged into a new one
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
        self.flush()  # after an exception too: rows that were scored are right

    def __getstate__(self) -> dict[str, Any]:
        self.flush()  # the copy reads from disk only
        names = ("directory", "fingerprint", "description", "flush_seconds", "kind")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def _find(self, keys: Sequence[bytes], lengths: Sequence[int]) -> list[memoryview | NDArray[np.float32] | None]:
        """The floats of every row, to be read only."""
        pieces: list[memoryview | NDArray[np.float32] | None] = [None] * len(keys)
        if not keys:
            return pieces
        for rows in filter(len, self._unwritten()):
            for item, start in enumerate(map(rows.starts.get, keys)):
                if start is not None:
                    pieces[item] = rows.read(start, lengths[item])
        halves = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)
        low = halves[:, 1].tolist()
        index = self._index
        shards = index.shards
        for item, number, row in index.find(np.ascontiguousarray(halves[:, 0])):
            shard = shards[number]
            if pieces[item] is None and shard.trusted:
                try:
                    pieces[item] = shard.read(row, low[item], lengths[item])
                except DamagedShardError as error:
                    self._distrust(shard, str(error))  # its rows are not there any more
        return pieces

    def _distrust(self, shard: Shard, reason: str) -> None:
        with self._lock:
            if shard.trusted:
                shard.trusted = False
                self._warn_ignored(shard.path, reason)

    def _warn_ignored(self, path: Path, reason: str) -> None:
        logger.warning(
            "%s is damaged or not for this program, and ignored: %s. Its rows are scored again", path, reason
        )
