"""Object stores (s3, gs, az, hf, ...), by fsspec: downloads, uploads, and the local folders that stand for URLs.

What a run reads from a store lies in a local copy, and what it writes goes to a local folder first and is then
uploaded. The path of such a folder tells its URL, so that the rest of the package works with paths.

Credentials come from where the library of each store finds them (environment, files, the machine's role). A URL that
holds some is refused, and the queries of signed URLs are left out of messages.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from ..files import cache_folder, replacing, replacing_folder

_EXTRAS = {**dict.fromkeys(("s3", "s3a"), "s3"), **dict.fromkeys(("gs", "gcs"), "gs")}
_EXTRAS |= dict.fromkeys(("az", "abfs", "abfss", "adl"), "az")
_VERSIONS = ("ETag", "etag", "generation", "blob_id", "mtime", "LastModified", "created")  # as file systems name them
_CHECKPOINT = re.compile(r"checkpoint-\d+/")


class StoredFile(NamedTuple):
    """A file on a store."""

    nbytes: int
    version: str  # changes when the file is overwritten


# --- Names ---


def is_remote(name: str | os.PathLike[str]) -> bool:
    """Returns whether a name is a URL of a store, and not of a local file."""
    return "://" in str(name) and not str(name).startswith("file://")


def shown(text: object) -> str:
    """Returns a message or URL without the queries of URLs, which may hold signatures."""
    return re.sub(r"(://[^\s'\"?]*)\?[^\s'\"]*", r"\1", str(text))


def local_root() -> Path:
    """Returns the folder of all local copies: `$CPT_LOCAL`, else one of this machine in the user's cache folder."""
    if chosen := os.environ.get("CPT_LOCAL"):
        return Path(chosen).expanduser().absolute()
    return cache_folder() / "stores" / socket.gethostname()  # nodes may share the user's home


def local_path(name: str | os.PathLike[str]) -> Path:
    """Returns the path itself, or the local folder that stands for a URL: ``$CPT_LOCAL/s3/bucket/runs/x``.

    Raises:
        UserError: the URL holds a password, or is not of the form ``protocol://place/path``.
    """
    if not is_remote(name):
        return Path(str(name).removeprefix("file://")).expanduser()
    scheme, _, rest = str(name).partition("://")
    parts = rest.strip("/").split("/")
    if re.match(r"[^/@]*:[^/@]*@", rest):
        raise UserError(
            f"{scheme}://{rest.partition('@')[2]}: the URL holds a password, which would be saved and logged: leave it"
            " out, and give credentials by the environment"
        )
    if not re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme) or "::" in rest or {"", ".", ".."} & {*parts}:
        raise UserError(f"{shown(name)} does not name a folder on a store: give protocol://place/path")
    return local_root().joinpath(scheme, *parts)


def local_name(name: str) -> str:
    """Returns the path of :func:`local_path` for a URL, and any other name as it is."""
    return str(local_path(name)) if is_remote(name) else name


def url_of(path: Path) -> str | None:
    """Returns the URL that a local folder, or a path in it, stands for; None for other paths."""
    try:
        scheme, *parts = path.absolute().relative_to(local_root()).parts
    except ValueError:
        return None
    return f"{scheme}://{'/'.join(parts)}" if parts and not scheme.startswith(".") else None


def display_name(path: Path) -> str:
    """Returns the URL that a path stands for, else the path."""
    return url_of(path) or str(path)


# --- Access ---


def filesystem(url: str) -> tuple[Any, str]:
    """Returns fsspec's file system of a URL, and the path in it.

    fsspec caches it for each process and thread, so callers ask again instead of keeping it.

    Raises:
        UserError: the package of this store is not installed, or nothing knows its protocol.
    """
    import fsspec

    scheme = url.partition("://")[0]
    options: dict[str, Any] = {}
    chosen = {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & os.environ.keys() or "config_kwargs" in fsspec.config.conf.get(
        "s3", {}
    )
    if _EXTRAS.get(scheme) == "s3" and not chosen:
        # A store that throttles many nodes may do so for longer than the four retries that are botocore's default.
        options["config_kwargs"] = {"retries": {"mode": "standard", "total_max_attempts": 10}}
    try:
        return fsspec.core.url_to_fs(url, **options)
    except ImportError as error:
        package = f"cpt-kernels[{_EXTRAS[scheme]}]" if scheme in _EXTRAS else f"the package for {scheme}:// of fsspec"
        raise UserError(f"{shown(url)} needs another package ({error}): pip install '{package}'") from error
    except ValueError as error:
        raise UserError(f"{shown(url)}: {shown(error)}") from error


@contextmanager
def access(url: str, what: str) -> Iterator[tuple[Any, str]]:
    """:func:`filesystem`; what the libraries of the stores raise in this block becomes a UserError.

    Put it around calls of the file system only. FileExistsError is passed on, and FileNotFoundError in reading.

    Args:
        what: "read" or "written", for the message.
    """
    found = filesystem(url)
    try:
        yield found
    except (FileExistsError, UserError):
        raise
    except Exception as error:  # there is no common class: botocore, aiohttp, google.auth and azure have their own
        if isinstance(error, FileNotFoundError) and what == "read":
            raise
        text = shown(error).strip() or type(error).__name__
        raise UserError(f"{shown(url)} cannot be {what} ({type(error).__name__}: {text})") from error


def list_files(url: str) -> dict[str, StoredFile]:
    """Returns the files below a URL by their path in it; empty if there are none."""
    with access(url, "listed") as (fs, root):
        fs.invalidate_cache()
        found = fs.find(root, detail=True)
    prefix = root.rstrip("/") + "/"
    return {
        path.removeprefix(prefix): StoredFile(
            info["size"], next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
        )
        for path, info in found.items()
        if path.startswith(prefix)
    }


def read_bytes(url: str, start: int | None = None, stop: int | None = None) -> bytes:
    """Returns a file, or a range of its bytes.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with access(url, "read") as (fs, path):
        return fs.cat_file(path, start=start, end=stop)


def write_bytes(url: str, data: bytes) -> None:
    """Writes a file in one request; readers see it whole or not at all."""
    with access(url, "written") as (fs, path):
        fs.pipe_file(path, data)


def create_bytes(url: str, data: bytes) -> bool:
    """Writes a file unless there is one; of several writers at once, one does (conditional writes of s3, gs and az).

    Returns:
        Whether this call made the file.
    """
    try:
        with access(url, "written") as (fs, path):
            if fs.exists(path):
                return False
            fs.pipe_file(path, data, mode="create")
    except FileExistsError:
        return False
    return True


def download(url: str, file: Path) -> None:
    """Downloads a file; it appears when it is whole.

    Raises:
        FileNotFoundError: there is no such file.
    """
    with replacing(file) as (temporary,), access(url, "read") as (fs, path):
        fs.get_file(path, str(temporary))


def upload(file: Path, url: str) -> None:
    """Uploads a file; readers see it whole or not at all."""
    with access(url, "written") as (fs, path):
        fs.put_file(str(file), path)


def remove(url: str, names: Sequence[str]) -> None:
    """Deletes files below a URL; those that are gone already are no error."""
    if names:
        with access(url, "deleted") as (fs, root):
            fs.rm([f"{root.rstrip('/')}/{name}" for name in names])


# --- Copies of folders that are only read ---


def folder_copy(url: str) -> Path:
    """Returns a local copy of a folder on a store, downloaded unless this version of it is here already.

    Folders ``checkpoint-N`` in it are left out. A process sees one version of a folder as long as the copy is there.

    Raises:
        UserError: there are no files, or they cannot be read.
    """
    if not (copy := _copied(url)).is_dir():  # somebody has deleted it
        _copied.cache_clear()
        copy = _copied(url)
    return copy


@lru_cache(None)
def _copied(url: str) -> Path:
    from filelock import FileLock

    target = local_path(url)
    files = {name: about for name, about in list_files(url).items() if not _CHECKPOINT.match(name)}
    if not files:
        raise UserError(f"{shown(url)}: there is no such folder")
    digest = sha256(json.dumps([*sorted(files.items())]).encode()).hexdigest()[:16]
    copy = local_root() / ".copies" / digest / target.name
    copy.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(copy.parent / ".lock"):  # one process of a node downloads
        if not copy.is_dir():
            with replacing_folder(copy) as temporary:
                places = [temporary / name for name in files]
                for folder in {place.parent for place in places}:
                    folder.mkdir(parents=True, exist_ok=True)
                with access(url, "read") as (fs, root):
                    fs.get([f"{root.rstrip('/')}/{name}" for name in files], [str(place) for place in places])
                for place, (name, about) in zip(places, files.items()):
                    if place.stat().st_size != about.nbytes:
                        raise UserError(f"{shown(url)}/{name} has changed while it was downloaded: start again")
    return copy


def local_folder(name: str) -> str:
    """Returns the folder of a model or tokenizer: a local copy of a URL, else the name itself."""
    return str(folder_copy(name)) if is_remote(name) else name
