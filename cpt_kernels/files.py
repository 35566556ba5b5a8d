"""Atomic writing: readers see a file or folder whole or not at all, and what was written survives a power cut."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError


@contextmanager
def replacing(*paths: Path) -> Iterator[list[Path]]:
    """Temporary files beside ``paths``: they take the places of ``paths`` when the block ends, else they are deleted.

    Folders are made where they are missing. Every file is synced before it is renamed, and every folder afterwards.

    Raises:
        OSError: a file cannot be written. None of the temporary files is left.
    """
    missing = [folder for path in paths for folder in path.parents if not folder.exists()]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = [path.with_name(f".{uuid.uuid4().hex}.tmp") for path in paths]
    try:
        yield temporary
        for written in temporary:
            _sync(written)
        for written, path in zip(temporary, paths):
            os.replace(written, path)
    except BaseException:
        for written in temporary:
            written.unlink(missing_ok=True)
        raise
    if os.name != "nt":  # Windows cannot open a folder
        for entry in (*paths, *missing):  # a name is durable once the folder that holds it is synced
            _sync(entry.parent)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside ``path``: it takes the place of ``path`` when the block ends, else it is deleted.

    Raises:
        OSError: ``path`` holds files already, or the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for entry in (*temporary.rglob("*"), temporary):
            if entry.is_file() or os.name != "nt":
                _sync(entry)
        if path.is_dir():
            path.rmdir()  # raises if it is not empty
        os.replace(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if os.name != "nt":
        _sync(path.parent)


def check_writable(folder: Path, what: str) -> None:
    """Makes a folder if it is missing; raises a UserError that begins with ``what`` if it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"{what} cannot be written to ({error.strerror})") from error


def cache_folder() -> Path:
    """Returns the folder for what this package keeps for the user: ``cpt_kernels`` in $XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "cpt_kernels"


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` as UTF-8 to ``path``, atomically."""
    with replacing(path) as (temporary,):
        temporary.write_text(text, encoding="utf-8")


def stored_json(path: Path, compute: Callable[[], Any]) -> Any:
    """Returns the JSON value in a file. Without the file, computes the value and writes it, atomically."""
    if not path.exists():
        write_text(path, json.dumps(compute()) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


def create_text(path: Path, text: str) -> bool:
    """Writes ``text`` as UTF-8 to ``path``, atomically, unless the file exists.

    Returns:
        Whether this process made the file; of several that try at once, one does.

    Raises:
        OSError: the file cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        _sync(temporary)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links, on which two processes may both believe to be the first
            if path.exists():
                return False
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    if os.name != "nt":
        _sync(path.parent)
    return True


def update_digest(digest: Any, file: Path) -> None:
    """Adds the content of a file to a digest, such as one of xxhash."""
    with file.open("rb") as content:
        while block := content.read(1 << 22):
            digest.update(block)


def sync_files(folder: Path) -> dict[str, int]:
    """Writes all files below a folder to disk.

    Returns:
        The size of each file in bytes, by its path in the folder with slashes.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _sync(path) for path in files}


def replace_folder(written: Path, folder: Path) -> None:
    """Gives a folder the place of another on the same disk, which is deleted if it exists.

    The files in ``written`` must be on disk already (:func:`sync_files`).
    """
    if os.name != "nt":
        for path in (written, *(path for path in written.rglob("*") if path.is_dir())):
            _sync(path)
    if folder.exists():
        old = written.with_name(f".{uuid.uuid4().hex}.tmp")
        os.replace(folder, old)
        os.replace(written, folder)
        shutil.rmtree(old)
    else:
        os.replace(written, folder)
    if os.name != "nt":
        _sync(folder.parent)


def _sync(path: Path) -> int:
    """Writes a file or folder to disk; returns its size in bytes."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        return os.fstat(descriptor).st_size
    finally:
        os.close(descriptor)
