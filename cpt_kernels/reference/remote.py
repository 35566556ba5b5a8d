"""The reference cache on an object store: what a node uploads, and how it sees what other nodes have uploaded.

    <store>/<fingerprint>/<writer>-<number>.arrow    shards of some 64 MB
    <store>/<fingerprint>/<writer>.list              one line for each shard of a writer
    <store>/<fingerprint>/reference.json, probe.json

A writer is a process. Ranks write small shards to a local folder, as without a store. When these have reached the size
of an object, one process of the node merges them, uploads the object, and then its list, which makes it visible. An
upload is whole or absent, and no object is ever replaced by other rows. A process that dies between the two leaves an
object that nobody reads, and the small shards, which the next process of the node uploads.

A list only grows, so its size tells whether there is something new. One listing of the lists and one range of each list
that has grown show all new shards: no name is read twice, however many there are.

Shards are copied to the local folder whole. If the disk has no room, only their keys are (two ranges); values are then
read from the store as they are needed, neighboring blocks in one range.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from ..data import stores
from ..files import replacing, write_text
from .shards import BLOCK_BYTES, KINDS, UNREADABLE, DamagedShardError, Shard, grouped, merge_rows, write_shard

logger = logging.getLogger(__name__)

OBJECT_BYTES = 64 * 10**6
HEAD = ".head"  # suffix of a local shard without its values
_SPARE_BYTES = 1 << 30  # of the local disk, which stay free
_BLOCKS = 1024  # blocks of values (64 KiB) that a process keeps
_DOWNLOADS = 8  # at a time


class StoredShard(NamedTuple):
    """A line of a writer's list."""

    name: str
    nbytes: int
    values_at: int  # bytes of the object before its values
    values_end: int

    @classmethod
    def parse(cls, line: str) -> StoredShard:
        name, *numbers = line.split()
        return cls(name, *map(int, numbers))


class RemoteFolder:
    """The shards of one reference on a store, and their copies in a local folder that all processes of a node share."""

    def __init__(self, url: str, folder: Path, fingerprint: str) -> None:
        self.url, self.folder, self.fingerprint = url, folder, fingerprint
        self._writer = uuid.uuid4().hex
        self._lines: list[str] = []  # of this writer's list
        self._blocks: dict[tuple[str, int], bytes] = {}  # (shard, number) -> values, verified
        folder.mkdir(parents=True, exist_ok=True)

    # --- Uploads ---

    def upload(self, everything: bool) -> None:
        """Uploads the small shards of the local folder, as objects of at most `OBJECT_BYTES`.

        Args:
            everything: also the last object, which is smaller; waits while another process of the node uploads. Else
                whole objects only, and not if another process uploads.

        Raises:
            UserError: the store refuses. The small shards stay.
        """
        try:
            with FileLock(self.folder / ".upload.lock", timeout=-1 if everything else 0):
                paths = [path for path in sorted(self.folder.glob("*.arrow")) if is_small(path.name)]
                if not everything and sum(path.stat().st_size for path in paths) <= OBJECT_BYTES:
                    return
                small = []
                for path in paths:
                    with contextlib.suppress(DamagedShardError):  # the cache warns of it
                        small.append(self._opened(path))
                for kind in KINDS:
                    batches = grouped([shard for shard in small if shard.kind == kind], OBJECT_BYTES)
                    for batch in batches if everything else batches[:-1]:
                        self._upload(batch, kind)
        except Timeout:
            pass  # that process, or the next upload, takes these shards, too

    def _upload(self, small: Sequence[Shard], kind: str) -> None:
        rows, damaged = merge_rows(small)
        small = [shard for shard in small if shard not in {shard for shard, _ in damaged}]
        if not rows:
            return
        name = f"{self._writer}-{len(self._lines):06d}.arrow"
        with replacing(self.folder / name) as (temporary,):
            with temporary.open("xb") as file:
                write_shard(file, rows, self.fingerprint, kind)
            shard = Shard.open(temporary, self.fingerprint)
            stores.upload(temporary, f"{self.url}/{name}")
            line = StoredShard(name, shard.nbytes, shard.values_at, shard.values_at + 4 * shard.num_values)
            self._lines.append(" ".join(map(str, line)) + "\n")
            try:
                stores.write_bytes(f"{self.url}/{self._writer}.list", "".join(self._lines).encode())
            except BaseException:
                self._lines.pop()
                raise
        for shard in small:
            shard.path.unlink(missing_ok=True)

    # --- What other nodes have uploaded ---

    def sync(self) -> None:
        """Makes the shards that were uploaded before this call readable in the local folder.

        Processes of one node that call it at the same time share one pass over the store.
        """
        asked = time.time_ns()
        stamp = self.folder / ".synced"
        with FileLock(self.folder / ".sync.lock"):
            if stamp.exists() and int(stamp.read_text() or 0) > asked:
                return
            began = time.time_ns()
            files = stores.list_files(self.url)
            lists = {name: about.nbytes for name, about in files.items() if name.endswith(".list")}
            with ThreadPoolExecutor(_DOWNLOADS) as pool:
                new = [shard for found in pool.map(self._read_list, lists, lists.values()) for shard in found]
                self._copy([shard for shard in new if not (self.folder / shard.name).exists()], pool)
            write_text(stamp, str(began))

    def _read_list(self, name: str, nbytes: int) -> list[StoredShard]:
        """Returns the shards of a writer's list, of which only the new lines are read from the store."""
        local = self.folder / name
        known = local.read_bytes() if local.exists() else b""
        if len(known) != nbytes:
            start = len(known) if len(known) < nbytes else 0
            known = known[:start] + stores.read_bytes(f"{self.url}/{name}", start, nbytes)
            known = known[: known.rfind(b"\n") + 1]
            write_text(local, known.decode())
        return [StoredShard.parse(line) for line in known.decode().splitlines()]

    def _copy(self, new: Sequence[StoredShard], pool: ThreadPoolExecutor) -> None:
        free = shutil.disk_usage(self.folder).free - _SPARE_BYTES
        whole = sum(shard.nbytes for shard in new) <= free
        new = new if whole else [shard for shard in new if not (self.folder / shard.name).with_suffix(HEAD).exists()]
        if new and not whole:
            logger.warning(
                f"the values of {len(new)} shards ({sum(shard.nbytes for shard in new) / 1e9:.1f} GB) of {self.url} do"
                f" not fit on the disk of {self.folder}: they are read from the store when they are needed; to keep"
                " them locally, make room or set $CPT_LOCAL to a larger disk"
            )
        download = self._download if whole else self._download_head
        for shard, reason in zip(new, pool.map(lambda shard: self._attempt(download, shard), new)):
            if reason is not None:
                logger.warning(f"{self.url}/{shard.name} is ignored ({reason}). Its rows will be scored again")

    def _attempt(self, download: Callable[[StoredShard], None], shard: StoredShard) -> str | None:
        """Copies a shard; returns why it cannot be used."""
        try:
            download(shard)
        except FileNotFoundError:
            return "it was deleted"
        except DamagedShardError as error:
            return str(error)
        return None

    def _download(self, shard: StoredShard) -> None:
        with replacing(self.folder / shard.name) as (temporary,):
            with stores.access(self.url, "read") as (fs, root):
                fs.get_file(f"{root.rstrip('/')}/{shard.name}", str(temporary))
            self._opened(temporary).verify()

    def _download_head(self, shard: StoredShard) -> None:
        """Copies a shard without its values, which become a hole in a file of the shard's size."""
        url = f"{self.url}/{shard.name}"
        head = stores.read_bytes(url, 0, shard.values_at)
        tail = stores.read_bytes(url, shard.values_end, shard.nbytes)
        with replacing((self.folder / shard.name).with_suffix(HEAD)) as (temporary,):
            with temporary.open("xb") as file:
                file.write(head)
                file.seek(shard.values_end)
                file.write(tail)
            self._opened(temporary)

    def _opened(self, file: Path) -> Shard:
        try:
            return Shard.open(file, self.fingerprint)
        except UNREADABLE as error:
            raise DamagedShardError(str(error)) from error

    # --- Values that stay on the store ---

    def read(self, places: Sequence[tuple[Shard, int, int]]) -> list[memoryview | None]:
        """Returns the values of places, (shard, start, stop), in one range for each run of neighboring blocks.

        A place of which a block does not match its checksum is None.
        """
        spans = [range(4 * start // BLOCK_BYTES, -(-4 * stop // BLOCK_BYTES)) for _, start, stop in places]
        wanted = {(s.path.name, number): s for (s, *_), span in zip(places, spans) for number in span}
        if len(self._blocks) > _BLOCKS:
            self._blocks = {}  # a new object: other threads may be reading the old one
        blocks = {place: self._blocks[place] for place in wanted.keys() & self._blocks.keys()}
        missing = sorted(wanted.keys() - blocks.keys())
        # Neighbors have equal differences between their numbers and their positions in the list.
        runs = [
            [place for _, place in run]
            for _, run in groupby(enumerate(missing), lambda item: (item[1][0], item[1][1] - item[0]))
        ]
        heads = [wanted[run[0]] for run in runs]
        starts = [head.values_at + run[0][1] * BLOCK_BYTES for head, run in zip(heads, runs)]
        ends = [min((run[-1][1] + 1) * BLOCK_BYTES, 4 * head.num_values) for head, run in zip(heads, runs)]
        stops = [head.values_at + end for head, end in zip(heads, ends)]
        with stores.access(self.url, "read") as (fs, root):
            names = [f"{root.rstrip('/')}/{head.path.with_suffix('.arrow').name}" for head in heads]
            ranges = fs.cat_ranges(names, starts, stops, on_error="raise") if runs else []
        for run, data in zip(runs, ranges):
            for i, place in enumerate(run):
                block = data[i * BLOCK_BYTES : (i + 1) * BLOCK_BYTES]
                if wanted[place].has_digest(place[1], block):
                    blocks[place] = block
        self._blocks |= blocks
        found: list[memoryview | None] = []
        for (shard, start, stop), span in zip(places, spans):
            parts = [blocks.get((shard.path.name, number)) for number in span]
            whole = None if None in parts else np.frombuffer(b"".join(parts), "<f4")  # type: ignore[arg-type]
            first = span.start * (BLOCK_BYTES // 4)
            found.append(None if whole is None else whole[start - first : stop - first].data)
        return found


def is_small(name: str) -> bool:
    """Returns whether a local shard is not yet part of an object."""
    return re.fullmatch(r"[0-9a-f]+\.arrow", name) is not None
