"""An ``output_dir`` on an object store: a run writes to a local folder, whose files are uploaded.

    <url>/checkpoint-N/...                 the files of a checkpoint
    <url>/checkpoint-N/_complete.json      their sizes and checksums; uploaded last, so a checkpoint with it is complete
    <url>/_owner.json                      the run that writes there
    <url>/...                              model, tokenizer, metrics, ...: uploaded with each checkpoint and at the end

The store decides what there is: when a run begins, its local folder gets the records of the complete checkpoints, and
loses everything that is not on the store. The files of a checkpoint are downloaded when a run resumes from it.

A store has no locks that end with their process. So a run writes its name there, a later run writes its own over it,
and a run that does not find its name any more uploads no further checkpoint, but ends with an error. Two runs that
write at the same moment may mix the files of a checkpoint; the checksums then do not match, and it is not resumed from.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import time
import uuid
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock
from transformers.trainer import TRAINER_STATE_NAME
from xxhash import xxh3_64

from ..data import stores
from ..errors import UserError
from ..files import update_digest, write_text

logger = logging.getLogger(__name__)

RECORD = "run.json"  # in a checkpoint; in output_dir, of the run that has written there last
_COMPLETE = "_complete.json"
_OWNER = "_owner.json"
_CHECKPOINT = re.compile(r"(checkpoint-\d+)/(.*)")
_AT_ONCE = 8  # files of a checkpoint


class OutputStore:
    """A folder on a store, and the local folder that stands for it."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url, folder
        self._name = uuid.uuid4().hex
        self._uploaded: dict[str, tuple[int, int]] = {}  # file -> size, time of change
        self._is_new = True  # in this process

    @classmethod
    def of(cls, folder: str | Path) -> OutputStore | None:
        """Returns the store of a local folder that stands for a URL, else None."""
        url = stores.url_of(Path(folder))
        return None if url is None else _known.setdefault(Path(folder), cls(url, Path(folder)))

    # --- The run that writes ---

    def take(self) -> None:
        """Writes the name of this run, over that of an earlier one."""
        other = self._owner()
        if other and other["name"] != self._name:
            logger.warning(
                f"{self.url} belongs to {other['process']}, since {other['since']}, which has not said that it ended."
                " This run takes it over; if that one is alive, it will stop at its next checkpoint"
            )
        process = f"process {os.getpid()} on {socket.gethostname()}"
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        record = {"name": self._name, "process": process, "since": since}
        stores.write_bytes(f"{self.url}/{_OWNER}", json.dumps(record).encode())

    def release(self) -> None:
        """Removes the name of this run."""
        if (other := self._owner()) and other["name"] == self._name:
            stores.remove(self.url, [_OWNER])

    def _owner(self) -> dict[str, str] | None:
        try:
            return json.loads(stores.read_bytes(f"{self.url}/{_OWNER}"))
        except FileNotFoundError:
            return None

    def _check_owner(self) -> None:
        other = self._owner()
        if other is None or other["name"] != self._name:
            by = f" by {other['process']}, since {other['since']}" if other else ""
            raise UserError(f"{self.url} has been taken over{by}: this run ends, and uploads no checkpoint")

    # --- From the store ---

    def pull(self) -> None:
        """Gives the local folder the records of what is on the store.

        Removes what earlier processes left there, and checkpoints that are not on the store.
        """
        files = stores.list_files(self.url)
        self.folder.mkdir(parents=True, exist_ok=True)
        complete = {name.partition("/")[0] for name in files if name.endswith(f"/{_COMPLETE}")}
        for path in self.folder.iterdir():
            if path.is_dir():
                if path.name not in complete or not self._is_same(path):
                    shutil.rmtree(path)
            elif self._is_new and not path.name.endswith(".lock"):
                path.unlink()
        self._is_new = False
        for name in [f"{each}/{file}" for each in sorted(complete) for file in (RECORD, TRAINER_STATE_NAME, _COMPLETE)]:
            if name in files and not (self.folder / name).exists():
                stores.download(f"{self.url}/{name}", self.folder / name)
        if RECORD in files:
            stores.download(f"{self.url}/{RECORD}", self.folder / RECORD)

    def _is_same(self, checkpoint: Path) -> bool:
        local = checkpoint / _COMPLETE
        return local.exists() and local.read_bytes() == stores.read_bytes(f"{self.url}/{checkpoint.name}/{_COMPLETE}")

    def fetch(self, checkpoint: Path) -> None:
        """Downloads the files of a complete checkpoint that are not in the local folder.

        Raises:
            UserError: a file does not have the size and the checksum that were recorded when it was uploaded.
        """
        with FileLock(self.folder / ".fetch.lock"), ThreadPoolExecutor(_AT_ONCE) as pool:  # one process of a node
            sizes = json.loads((checkpoint / _COMPLETE).read_text())

            def fetch(name: str) -> None:
                file = checkpoint / name
                if file.exists() and [*_size_and_checksum(file)] == sizes[name]:
                    return
                try:
                    stores.download(f"{self.url}/{checkpoint.name}/{name}", file)
                except FileNotFoundError:
                    raise UserError(f"{self.url}/{checkpoint.name} lacks {name}: resume from another one") from None
                if [*_size_and_checksum(file)] != sizes[name]:
                    raise UserError(
                        f"{self.url}/{checkpoint.name}/{name} is not what was uploaded there: resume from another one"
                    )

            list(pool.map(fetch, sizes))

    def delete_files(self, names: set[str]) -> None:
        """Deletes files of the folder itself, on the store and in the local folder."""
        stores.remove(self.url, [*(names & stores.list_files(self.url).keys())])
        for name in names:
            (self.folder / name).unlink(missing_ok=True)
            self._uploaded.pop(name, None)

    # --- To the store ---

    def upload_files(self, checkpoint: Path) -> Mapping[str, tuple[int, str]]:
        """Uploads this node's files of a checkpoint; returns their sizes and checksums."""
        names = [path.relative_to(checkpoint).as_posix() for path in sorted(checkpoint.rglob("*")) if path.is_file()]
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            url = f"{self.url}/{checkpoint.name}"
            list(pool.map(lambda name: stores.upload(checkpoint / name, f"{url}/{name}"), names))
            return dict(zip(names, pool.map(lambda name: _size_and_checksum(checkpoint / name), names)))

    def begin_checkpoint(self, checkpoint: Path) -> None:
        """Makes a checkpoint of this name on the store incomplete, before its files are replaced."""
        self._check_owner()
        self.delete_checkpoint(checkpoint)

    def complete_checkpoint(self, checkpoint: Path, sizes: Mapping[str, tuple[int, str]]) -> None:
        """Makes a checkpoint complete, whose files (of all nodes) have been uploaded."""
        self._check_owner()
        stores.write_bytes(f"{self.url}/{checkpoint.name}/{_COMPLETE}", self.mark(checkpoint, sizes).encode())

    def mark(self, checkpoint: Path, sizes: Mapping[str, tuple[int, str]]) -> str:
        """Writes the sizes and checksums of a complete checkpoint to the local folder, and returns them as text."""
        text = json.dumps(sizes, indent=1) + "\n"
        if checkpoint.is_dir():
            write_text(checkpoint / _COMPLETE, text)
        return text

    def delete_checkpoint(self, checkpoint: Path) -> None:
        """Deletes a checkpoint on the store; from the first request on it is not complete."""
        url = f"{self.url}/{checkpoint.name}"
        names = [*stores.list_files(url)]
        if _COMPLETE in names:
            stores.remove(url, [_COMPLETE])
        stores.remove(url, [name for name in names if name != _COMPLETE])

    def push(self) -> None:
        """Uploads the other files that have changed since the last call."""
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder).as_posix()
            if not path.is_file() or _CHECKPOINT.match(name) or name.startswith(("_", ".")):
                continue
            about = path.stat()
            if self._uploaded.get(name) != (about.st_size, about.st_mtime_ns):
                stores.upload(path, f"{self.url}/{name}")
                self._uploaded[name] = about.st_size, about.st_mtime_ns


_known: dict[Path, OutputStore] = {}  # by local folder, in this process


def _size_and_checksum(file: Path) -> tuple[int, str]:
    """Returns size and checksum of a file."""
    digest = xxh3_64()
    update_digest(digest, file)
    return file.stat().st_size, digest.hexdigest()
