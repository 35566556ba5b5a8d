"""Lists, verifies, prunes and exports what a cache directory holds, for any number of references."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..data import stores
from ..errors import UserError
from .cache import DESCRIPTION, ReferenceCache
from .probe import PROBE, read_probe
from .remote import HEAD
from .shards import KEY_BYTES, UNREADABLE, DamagedShardError, Shard

_ABOUT = (DESCRIPTION, PROBE)  # files of a reference beside its shards
_FINGERPRINT = "[0-9a-f]" * 32
_TEMPORARY_SECONDS = 3600.0  # a temporary file of this age belongs to a writer that was killed
_DAY = 86400.0


class StoredReference(NamedTuple):
    """What the cache holds of one reference."""

    description: dict[str, Any]  # of `reference.json`; empty where there is none
    completions: int
    imported: int  # of them, imported sums
    tokens: int
    shards: int
    nbytes: int  # of all files
    is_proven: bool  # it has a probe, so a model is compared with it before its rows are served


class Pruned(NamedTuple):
    """The files that were deleted, or would be, and their size."""

    paths: list[Path]
    nbytes: int


def stored_references(directory: Path, prefix: str | None = None) -> list[str]:
    """Returns the fingerprints of the stored references that begin with ``prefix``, sorted.

    Of a cache on a store, the descriptions of its references are copied to the local folder.

    Raises:
        UserError: there is a prefix, and no reference begins with it; the store cannot be read.
    """
    if (url := stores.url_of(directory)) is not None:
        for name in stores.list_files(url):
            if Path(name).name in _ABOUT:
                stores.download(f"{url}/{name}", directory / name)
    found = [path.name for path in sorted(directory.glob(_FINGERPRINT)) if path.name.startswith(prefix or "")]
    if prefix and not found:
        raise UserError(f"--reference {prefix}: no fingerprint in {directory} begins with it")
    return found


def summarize_reference(directory: Path, fingerprint: str) -> StoredReference:
    """Counts what the cache holds of one reference."""
    about = directory / fingerprint / DESCRIPTION
    cache = ReferenceCache(directory, fingerprint)
    return StoredReference(
        description=json.loads(about.read_text()) if about.exists() else {},
        completions=cache.num_rows,
        imported=sum(len(shard) for shard in cache.shards if shard.kind == "sums"),
        tokens=sum(shard.num_values for shard in cache.shards),
        shards=len(cache.shards),
        nbytes=sum(path.stat().st_size for path in _files(directory / fingerprint)),
        is_proven=read_probe(directory / fingerprint) is not None,
    )


def damaged_shards(directory: Path, fingerprint: str) -> list[tuple[Path, str]]:
    """Verifies every checksum of one reference's shards; returns each damaged shard with the reason."""
    damaged = []
    for path in sorted((directory / fingerprint).glob("*.arrow")):
        try:
            Shard.open(path, fingerprint).verify()
        except UNREADABLE as error:
            damaged.append((path, str(error)))
    return damaged


def export_parquet(directory: Path, fingerprint: str, file: str) -> int:
    """Writes one reference's rows to a Parquet file; returns their number.

    The columns are ``key`` (16 bytes), ``logps`` (a list of fp32) and ``kind`` (see `shards.KINDS`).
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema({"key": pa.binary(KEY_BYTES), "logps": pa.list_(pa.float32()), "kind": pa.string()})
    cache = ReferenceCache(directory, fingerprint)
    with pq.ParquetWriter(file, schema.with_metadata({"fingerprint": fingerprint})) as writer:
        for shard in cache.shards:
            try:
                if shard.path.suffix == HEAD:
                    raise DamagedShardError("its values are on the store only, make room on the local disk")
                rows = shard.rows()
            except DamagedShardError as error:
                raise UserError(f"{shard.path}: {error}; delete it, and its rows will be scored again") from error
            stops = np.cumsum([0, *map(len, rows.values())], dtype=np.int32)
            logps = pa.ListArray.from_arrays(stops, np.concatenate(list(rows.values())))
            keys = pa.array(list(rows), schema.field("key").type)
            writer.write_table(pa.table([keys, logps, [shard.kind] * len(rows)], schema=schema))
    return cache.num_rows


def prune(
    directory: Path,
    fingerprints: Sequence[str],
    *,
    everything: bool = False,
    older_than_days: float | None = None,
    max_gb: float | None = None,
    dry_run: bool = False,
) -> Pruned:
    """Deletes files of some references; in any case the temporary files that killed writers left.

    Args:
        everything: delete all files of these references.
        older_than_days: delete shards that were written before.
        max_gb: delete the oldest shards until the remaining ones take at most this much.
        dry_run: delete nothing.

    Raises:
        UserError: parts of a cache on a store are to be deleted; or the store refuses.
    """
    url = stores.url_of(directory)
    if url is not None and (older_than_days is not None or max_gb is not None):
        raise UserError(f"--older_than and --max_gb delete local files, and {url} is on a store: set a rule there")
    now = time.time()
    folders = [directory / fingerprint for fingerprint in fingerprints]
    files = [(path, path.stat()) for folder in folders for path in _files(folder)]

    # Choose the files.
    doomed = {path for path, about in files if path.suffix == ".tmp" and now - about.st_mtime > _TEMPORARY_SECONDS}
    if everything:
        doomed |= {path for path, _ in files}
    if older_than_days is not None:
        old = {path for path, about in files if now - about.st_mtime > older_than_days * _DAY}
        doomed |= {path for path in old if path.name not in _ABOUT}
    if max_gb is not None:
        shards = sorted((about.st_mtime, path, about.st_size) for path, about in files if path.suffix == ".arrow")
        kept = [(path, size) for _, path, size in shards if path not in doomed]
        excess = sum(size for _, size in kept) - max_gb * 1e9
        for path, size in kept:
            if excess > 0:
                doomed.add(path)
                excess -= size

    # Delete them, and the folders in which no shard is left.
    if not dry_run:
        for fingerprint in fingerprints if url is not None and everything else ():
            stores.remove(f"{url}/{fingerprint}", [*stores.list_files(f"{url}/{fingerprint}")])
        for path in doomed:
            path.unlink(missing_ok=True)
        for folder in folders if doomed else ():
            if all(path.name in _ABOUT for path in folder.iterdir()):
                for name in _ABOUT:
                    (folder / name).unlink(missing_ok=True)
                folder.rmdir()
    return Pruned(sorted(doomed), sum(about.st_size for path, about in files if path in doomed))


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file()]
