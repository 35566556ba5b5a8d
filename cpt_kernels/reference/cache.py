"""Keeps reference log-probs on disk, so that a completion is scored once.

    <directory>/<fingerprint>/reference.json    describes the reference, for people
    <directory>/<fingerprint>/probe.json        log-probs of a few tokens, see `cpt_kernels.reference.probe`
    <directory>/<fingerprint>/<uuid>.arrow      immutable shards, see `cpt_kernels.reference.shards`

A directory on an object store has a local folder of this form, see `cpt_kernels.reference.remote`.

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
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import numpy as np
from filelock import FileLock
from numpy.typing import ArrayLike, NDArray

from ..data.stores import create_bytes, display_name, local_path, local_root, url_of
from ..errors import UserError
from ..files import cache_folder, replacing, write_text
from .index import Index, map_index
from .keys import Sequences, TokenIds, row_keys
from .remote import HEAD, RemoteFolder, is_small
from .shards import KINDS, UNREADABLE, DamagedShardError, Rows, Shard, grouped, merge_rows, write_shard

logger = logging.getLogger(__name__)

DESCRIPTION = "reference.json"

_PENDING_BYTES = 1 << 25  # a shard is written when this much is unwritten
_SMALL = 1 << 26  # `merge` merges shards of fewer bytes
_LARGEST = 1 << 28  # `merge` makes shards of at most this many bytes
_MAPPED_ROWS = 1 << 20  # an index of more rows is a file that the processes of a node share

StoredLogps = memoryview | NDArray[np.float32]  # the log-probs of a row, read-only


def default_cache_dir() -> Path:
    """Returns `$CPT_CACHE`, a folder or URL, else `cpt_kernels/reference` in `$XDG_CACHE_HOME` or `~/.cache`."""
    chosen = os.environ.get("CPT_CACHE")
    return local_path(chosen) if chosen else cache_folder() / "reference"


class ReferenceCache:
    """Per-token log-probs of completions under one reference model.

    One thread may add; any number of threads and processes may read. As a context manager, the cache flushes at the
    end. A pickled copy (in a DataLoader worker, for example) opens the same folder again. Pickling flushes, so the copy
    sees every row that was added before.

    Args:
        directory: folder or URL of all references, see `default_cache_dir`. The first flush creates it.
        fingerprint: 32 hex digits that identify the reference, see `cpt_kernels.reference.fingerprint`.
        description: written to `reference.json`, for people.
        flush_seconds: `add` starts to write a shard in the background once the oldest unwritten row is this old.
        kind: kind of the rows that this object adds, one of `shards.KINDS`. Rows of both kinds are found.
        sync: whether to look at once for what other nodes have uploaded to a store; see `refresh`.

    Attributes:
        hits, misses: completions that `look_up` (and the methods that call it) found and did not find in this process.
        bytes_written: size of the shards that this object wrote.

    Raises:
        UserError: a malformed fingerprint, or an unknown kind; the store cannot be read.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        fingerprint: str,
        *,
        description: Mapping[str, Any] | None = None,
        flush_seconds: float = 30.0,
        kind: str = "tokens",
        sync: bool = True,
    ) -> None:
        if not re.fullmatch("[0-9a-f]{32}", fingerprint):
            raise UserError(f"a reference's fingerprint is 32 hex digits, not {fingerprint!r}")
        if kind not in KINDS:
            raise UserError(f"kind={kind!r} is unknown: choose one of {', '.join(KINDS)}")
        self.directory = local_path(directory)
        self.folder = self.directory / fingerprint
        self.fingerprint = fingerprint
        self.description = dict(description or {})
        self.flush_seconds = flush_seconds
        self.kind = kind
        self.hits = self.misses = self.bytes_written = 0
        self._header = bytes.fromhex(fingerprint)
        self._lock = threading.RLock()
        url = url_of(self.folder)
        self._remote = None if url is None else RemoteFolder(url, self.folder, fingerprint)
        self._uploading: Future[None] | None = None
        # A row moves from `_pending` to `_writing` (a shard that a background thread writes) to `_indexes`.
        self._pending = Rows()
        self._pending_since = 0.0
        self._writing: tuple[Rows, Future[Shard]] | None = None
        self._indexes = Index(), Index()  # of many rows, mapped from a file; of the other rows, in memory
        self._seen: set[str] = set()  # names of shards that were opened or found damaged; `refresh` skips them
        if sync:
            self.refresh()
        else:
            self._open_shards()

    # --- Reading ---

    def key(self, prompt_ids: TokenIds, completion_ids: TokenIds) -> bytes:
        """Returns the 16 bytes that identify a completion of a prompt under this reference."""
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
        self._count(int(found.sum()), len(found))
        for item in np.flatnonzero(~found).tolist():
            pieces[item] = np.full(lengths[item], np.nan, np.float32)
        # Joining buffers takes at most a third of the time of np.concatenate.
        return np.frombuffer(bytearray().join(cast("list[memoryview]", pieces)), np.float32), found

    def log_probs(self, sequences: Sequences) -> NDArray[np.float32]:
        """Returns the first result of `look_up` for (prompt ids, completion ids); the collator calls it."""
        return self.look_up(self.keys(sequences), [len(completion) for _, completion in sequences])[0]

    def get_many(self, sequences: Sequences) -> list[NDArray[np.float32] | None]:
        """Returns the (len(completion_ids),) log-probs of every (prompt ids, completion ids), None if not stored."""
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
                f"{display_name(self.folder)} holds no reference log-probs of this completion"
                f" ({len(completion_ids)} tokens, after a prompt of {len(prompt_ids)})"
            )
        return values

    def __contains__(self, sequence: tuple[TokenIds, TokenIds]) -> bool:
        """Whether `(prompt_ids, completion_ids)` is stored. Does not count in `hits` and `misses`."""
        return self.has_keys([self.key(*sequence)], [len(sequence[1])])[0]

    def has_keys(self, keys: Sequence[bytes], lengths: Sequence[int]) -> list[bool]:
        """Whether each key is stored, with intact values where they are local. Does not count as `hits` or `misses`."""
        return [piece is not None for piece in self._find(keys, lengths, has_values=False)]

    def count_keys(self, keys: Sequence[bytes], lengths: Sequence[int]) -> list[bool]:
        """Does what `has_keys` does, and counts in `hits` and `misses`."""
        found = self.has_keys(keys, lengths)
        self._count(sum(found), len(found))
        return found

    def _count(self, found: int, asked: int) -> None:
        self.hits += found
        self.misses += asked - found

    @property
    def shards(self) -> tuple[Shard, ...]:
        """The open shards, without damaged ones."""
        return tuple(shard for index in self._indexes for shard in index.shards if shard.trusted)

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
            age = time.monotonic() - self._pending_since
            is_due = age >= self.flush_seconds or self._pending.nbytes >= _PENDING_BYTES
            if is_due or (self._writing and self._writing[1].done()):
                self._finish_writing()
            if is_due:
                writer = ThreadPoolExecutor(1, "reference-cache")
                self._writing = self._pending, writer.submit(self._write, self._pending, self.kind)
                writer.shutdown(wait=False)  # the thread ends with its shard, and the interpreter waits for it
                self._pending = Rows()  # a new object, because `_writing` keeps the old one; see `_unwritten`
                self._start_upload()

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

    def publish(self) -> None:
        """Writes all unwritten rows, and uploads them if the cache is on a store; other nodes can then see them.

        Raises:
            OSError: see `flush`.
            UserError: the store refuses. The rows stay on the local disk, and the next process of this node uploads
                them.
        """
        self.flush()
        if self._remote is not None:
            if self._uploading is not None:
                wait([self._uploading])
            self._remote.upload(everything=True)
            about = self.folder / DESCRIPTION
            if about.exists():
                create_bytes(f"{self._remote.url}/{DESCRIPTION}", about.read_bytes())
            self._open_shards()

    def _start_upload(self) -> None:
        """Uploads in the background once there is enough for an object. A failure is retried after the next shard."""
        if self._remote is None or (self._uploading is not None and not self._uploading.done()):
            return
        if self._uploading is not None:
            if (error := self._uploading.exception()) is not None:
                logger.warning(f"reference log-probs are kept on the local disk until the store takes them: {error}")
            self._open_shards()
        uploader = ThreadPoolExecutor(1, "reference-upload")
        self._uploading = uploader.submit(self._remote.upload, everything=False)
        uploader.shutdown(wait=False)

    def _finish_writing(self) -> None:
        """Waits for the background thread. If the thread failed, writes its shard again here, which may raise."""
        if self._writing:
            rows, written = self._writing
            wait([written])
            self._take_in(self._write(rows, self.kind) if written.exception() else written.result())
            self._writing = None

    def _take_in(self, shard: Shard) -> None:
        self.bytes_written += shard.nbytes
        mapped, recent = self._indexes
        self._indexes = mapped, recent.with_shards([shard])

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
            UserError: the cache is on a store, where objects are never replaced.
        """
        if self._remote is not None:
            raise UserError(f"{self._remote.url} is on a store, whose shards are large already: nothing to merge")
        with self._lock:
            for kind in KINDS:
                small = [shard for shard in self.shards if shard.kind == kind and shard.nbytes < _SMALL]
                for group in grouped(small, _LARGEST):
                    self._merge_group(group, kind)

    def _merge_group(self, group: Sequence[Shard], kind: str) -> None:
        rows, damaged = merge_rows(group)
        for shard, reason in damaged:
            self._distrust(shard, reason)
        read = [shard for shard in group if shard.trusted]
        if len(read) < 2:
            return
        merged = self._write(rows, kind)
        self.bytes_written += merged.nbytes
        others = [shard for shard in self.shards if shard not in read]
        self._indexes = Index(), Index().with_shards([*others, merged])
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

        For a cache on a store, other nodes' shards are copied to this node first. A damaged shard is ignored, with one
        warning.
        """
        if self._remote is not None:
            self._remote.sync()
        return self._open_shards()

    def _open_shards(self) -> int:
        """Opens the shards in the local folder that are not open yet, and returns their number."""
        with self._lock:
            shards: list[Shard] = []
            vanished = True
            while vanished:  # another process merged shards after they were listed: list the merged one, too
                vanished = False
                names = set(os.listdir(self.folder)) if self.folder.exists() else set()
                heads = {name for name in names if name.endswith(HEAD) and f"{Path(name).stem}.arrow" not in names}
                for name in sorted({name for name in names if name.endswith(".arrow")} | heads):
                    if name in self._seen:
                        continue
                    self._seen.add(name)
                    try:
                        shards.append(Shard.open(self.folder / name, self.fingerprint))
                    except FileNotFoundError:
                        vanished = True
                    except UNREADABLE as error:
                        self._warn_ignored(self.folder / name, str(error))
            self._index_shards(shards, names)
            return len(shards)

    def _index_shards(self, new: Sequence[Shard], names: set[str]) -> None:
        """Adds new shards to the index; ``names`` are the files in the folder."""
        mapped, recent = self._indexes
        # For a store, small shards vanish when they have become part of an object, which is among the new shards.
        kept = [s for s in recent.shards if self._remote is None or s.path.name in names]
        settled = [s for s in (*kept, *new) if self._remote is None or not is_small(s.path.name)]
        if sum(map(len, settled)) > max(_MAPPED_ROWS, len(mapped.rows) // 4):
            mapped = self._map([*mapped.shards, *settled])
            inside = {*mapped.shards}
            recent = Index().with_shards([s for s in (*kept, *new) if s not in inside])
        elif len(kept) < len(recent.shards):
            recent = Index().with_shards([*kept, *new])
        else:
            recent = recent.with_shards(new)
        self._indexes = mapped, recent

    def _map(self, shards: Sequence[Shard]) -> Index:
        """Returns an index of most of the rows of some shards, in a file that all processes of this node map."""
        folder = local_root() / ".indexes" / sha256(str(self.folder.resolve()).encode()).hexdigest()[:32]
        at_hand = {shard.path.name: shard for shard in shards}
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".lock"):  # one process of a node builds
                found = [index for file in folder.glob("*.index") if (index := map_index(file, at_hand)) is not None]
                best = max(found, key=lambda index: len(index.rows), default=Index())
                if sum(map(len, shards)) - len(best.rows) > max(_MAPPED_ROWS, len(best.rows) // 4):
                    file = folder / f"{uuid.uuid4().hex}.index"
                    Index().with_shards(shards).write(file)
                    best = map_index(file, at_hand) or Index()
                    for other in {*folder.glob("*.index")} - {file}:
                        other.unlink(missing_ok=True)  # who has mapped it keeps it
                return best
        except (OSError, NotImplementedError) as error:
            logger.warning(
                f"each process keeps its own index of {sum(map(len, shards))} completions, because {folder} cannot be"
                f" written to ({error}): set $CPT_LOCAL to a folder on a local disk"
            )
            return Index().with_shards(shards)

    def __enter__(self) -> ReferenceCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.publish()  # also after an exception: rows that were scored are right

    def __getstate__(self) -> dict[str, Any]:
        self.flush()  # the copy sees only what is on disk
        names = ("directory", "fingerprint", "description", "flush_seconds", "kind")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state, sync=False)  # type: ignore[misc]

    def _find(self, keys: Sequence[bytes], lengths: Sequence[int], has_values: bool = True) -> list[StoredLogps | None]:
        """Returns the read-only log-probs of every key, None if not stored.

        Args:
            has_values: if false, nothing is read from a store, and log-probs that are only there are empty.
        """
        pieces: list[StoredLogps | None] = [None] * len(keys)
        if not keys:
            return pieces
        for rows in filter(len, self._unwritten()):
            for item, start in enumerate(map(rows.starts.get, keys)):
                if start is not None:
                    pieces[item] = rows.read(start, lengths[item])
        halves = np.frombuffer(b"".join(keys), "<u8").reshape(-1, 2)
        high, low = np.ascontiguousarray(halves[:, 0]), halves[:, 1].tolist()
        distant: dict[int, tuple[Shard, int, int]] = {}  # where the values of an item are on the store
        for index in self._indexes:
            for item, number, row in index.find(high):
                shard = index.shards[number]
                if pieces[item] is None and shard.trusted:
                    try:
                        if shard.path.suffix != HEAD:
                            pieces[item] = shard.read(row, low[item], lengths[item])
                        elif (place := shard.place(row, low[item], lengths[item])) is not None:
                            distant[item] = shard, *place
                    except DamagedShardError as error:
                        self._distrust(shard, str(error))
        distant = {item: place for item, place in distant.items() if pieces[item] is None}
        if distant and self._remote is not None:
            found = self._remote.read([*distant.values()]) if has_values else [memoryview(b"")] * len(distant)
            for (item, (shard, *_)), values in zip(distant.items(), found):
                pieces[item] = values
                if values is None:
                    self._distrust(shard, "its values do not match their checksum")
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
