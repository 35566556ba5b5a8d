"""The reference cache under damage, killed writers and many processes: right values, or none and a warning."""

from __future__ import annotations

import errno
import multiprocessing
import os
import random
import resource
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pytest

import cpt_kernels.reference.cache as module
from cpt_kernels.reference.cache import ReferenceCache
from tests.reference.test_cache import FINGERPRINT, OTHER, fill, found, make_row, shards, wait_for_writer

# --- damage


def opened_with(directory: Path, content: bytes, seeds: Sequence[int], caplog) -> tuple[list[int], int]:
    """Replaces the only shard by `content`; returns the rows found (with right values) and the number of warnings."""
    (path,) = shards(directory)
    path.unlink()  # makes a new file: other readers hold mappings of the old one
    path.write_bytes(content)
    caplog.clear()
    cache = ReferenceCache(directory, FINGERPRINT)
    there = found(cache, seeds)
    cache.refresh()
    assert found(cache, seeds) == there
    assert all(str(path) in record.getMessage() for record in caplog.records)
    return there, len(caplog.records)


def test_truncated_at_any_length(tmp_path, caplog):
    fill(tmp_path, range(3))
    content = shards(tmp_path)[0].read_bytes()
    for length in range(len(content)):
        assert opened_with(tmp_path, content[:length], range(3), caplog) == ([], 1), length
    assert opened_with(tmp_path, content, range(3), caplog) == ([0, 1, 2], 0)


def test_any_flipped_byte(tmp_path, caplog):
    """Values are right, or not found and warned of. Only damage to padding goes unnoticed."""
    fill(tmp_path, range(3))
    content = shards(tmp_path)[0].read_bytes()
    noticed = 0
    for at in range(len(content)):
        damaged = content[:at] + bytes([content[at] ^ random.Random(at).randrange(1, 256)]) + content[at + 1 :]
        there, warnings = opened_with(tmp_path, damaged, range(3), caplog)
        assert (there, warnings) in (([], 1), ([0, 1, 2], 0)), at
        noticed += warnings
    assert noticed > len(content) / 2
    for row in map(make_row, range(3)):  # damage to any byte of a value is noticed
        at = content.index(row[2].tobytes())
        for i in range(at, at + row[2].nbytes):
            assert opened_with(tmp_path, content[:i] + b"\xa5" + content[i + 1 :], range(3), caplog) == ([], 1)


def test_a_damaged_shard_takes_no_other_with_it_and_its_rows_can_be_scored_again(tmp_path, caplog):
    fill(tmp_path, range(10))
    (damaged,) = shards(tmp_path)
    fill(tmp_path, range(5, 15))  # 5 to 9 are stored already
    content = damaged.read_bytes()
    at = content.index(make_row(7)[2].tobytes())
    damaged.unlink()
    damaged.write_bytes(content[:at] + b"\xa5\xa5" + content[at + 2 :])
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    assert not caplog.records, "values are verified when they are read"
    assert found(cache, range(15)) == list(range(10, 15)) and len(caplog.records) == 1
    with cache:
        for seed in range(10):
            cache.add(*make_row(seed))
    assert found(cache, range(15)) == found(ReferenceCache(tmp_path, FINGERPRINT), range(15)) == list(range(15))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t.replace_schema_metadata(t.schema.metadata | {b"version": b"0"}), "format version b'0'"),
        (lambda t: t.replace_schema_metadata(None), "format version None"),
        (lambda t: t.select(["logps", "key_low", "key_high"]), "unexpected columns"),
        (lambda t: t.set_column(2, "logps", t["logps"].cast(pa.large_list(pa.float64()))), "unexpected columns"),
        (lambda t: pa.concat_tables([t, t]), "unexpected columns"),  # as two record batches
        (lambda t: t.slice(0, 2), "keys do not match"),
        (lambda t: t.slice(0, 0), "keys do not match"),
        (lambda t: t.take([1, 0, 2]), "keys do not match"),
    ],
)
def test_shards_that_another_program_made(tmp_path, caplog, change, reason):
    fill(tmp_path, range(3))
    (path,) = shards(tmp_path)
    table = change(pa.ipc.open_file(path.read_bytes()).read_all())
    path.unlink()
    empty = pa.record_batch([pa.array([], field.type) for field in table.schema], schema=table.schema)
    with pa.ipc.new_file(path, table.schema) as writer:
        for batch in table.to_batches() or [empty]:
            writer.write_batch(batch)
    assert found(ReferenceCache(tmp_path, FINGERPRINT), range(3)) == [] and reason in caplog.text


def test_shard_in_the_folder_of_another_reference(tmp_path, caplog):
    fill(tmp_path, range(3))
    (tmp_path / FINGERPRINT).rename(tmp_path / OTHER)
    assert ReferenceCache(tmp_path, OTHER).num_rows == 0 and "belongs to another reference" in caplog.text


def test_row_of_another_length_is_not_trusted(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(ReferenceCache, "keys", lambda self, rows: [bytes(16) for _ in rows])
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    cache.add([1], [2, 3], [-1.0, -2.0])
    cache.flush()
    assert cache.get_or_none([1], [2]) is None and "a row has 2 values for a completion of 1" in caplog.text
    cache.add([1], [2], [-5.0])
    cache.flush()
    assert cache.get([1], [2]).tolist() == [-5.0]


# --- writers that fail, are killed, or run at the same time


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EACCES])
@pytest.mark.parametrize("call", ["mkdir", "fsync", "replace"])
def test_write_errors_are_clear_and_lose_nothing(tmp_path, monkeypatch, code, call):
    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    cache = ReferenceCache(tmp_path, FINGERPRINT)
    cache.add(*make_row(0))
    with monkeypatch.context() as patched:
        patched.setattr(*((Path, call) if call == "mkdir" else (os, call)), fail)
        with pytest.raises(OSError, match=r"cannot be written to .*ref_cache_dir") as raised:
            cache.flush()
        assert raised.value.errno == code and isinstance(raised.value, type(OSError(code, "")))
    assert found(cache, [0]) == [0] and not [p for p in tmp_path.rglob("*") if p.is_file()]
    cache.flush()
    assert found(ReferenceCache(tmp_path, FINGERPRINT), [0]) == [0]


def test_write_errors_beside_the_scoring_are_raised_by_the_next_call(tmp_path, monkeypatch):
    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    cache = ReferenceCache(tmp_path, FINGERPRINT, flush_seconds=0)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", fail)
        cache.add(*make_row(0))
        wait_for_writer()
        cache.flush_seconds = 30
        for call in (lambda: cache.add(*make_row(1)), lambda: cache.add(*make_row(2)), cache.flush):
            with pytest.raises(OSError, match=r"cannot be written to .*ref_cache_dir"):
                call()
    assert found(cache, range(4)) == [0, 1, 2] and not [p for p in tmp_path.rglob("*") if p.is_file()]
    cache.add(*make_row(3))  # the disk has space again: the shard that failed is written at once
    assert found(ReferenceCache(tmp_path, FINGERPRINT), range(4)) == [0]
    cache.flush()
    assert found(ReferenceCache(tmp_path, FINGERPRINT), range(4)) == [0, 1, 2, 3]


def without_privileges(call: Callable[[], str]) -> str:
    """Returns the result of a call as a user who is not root, because root may write to any folder."""
    if os.geteuid():
        return call()
    reading, writing = os.pipe()
    if not (child := os.fork()):
        try:
            os.seteuid(65534)
            os.write(writing, call().encode())
        except BaseException:
            os.write(writing, traceback.format_exc().encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with open(reading) as answer:
        return answer.read()


def test_read_only_folder():
    """Stored rows are found. Writing others raises one error that names the folder and the mend."""

    def use() -> str:
        cache = ReferenceCache(directory, FINGERPRINT)
        assert found(cache, [0, 1]) == [0]
        cache.add(*make_row(1))
        try:
            cache.flush()
        except PermissionError as error:
            assert found(cache, [0, 1]) == [0, 1]
            return str(error)
        return "it was written"

    with tempfile.TemporaryDirectory() as name:  # other users cannot enter pytest's own folders
        directory = Path(name)
        assert found(fill(directory, [0]), [0]) == [0]  # imports modules that the other user may not be able to read
        (directory / FINGERPRINT).chmod(0o555)
        directory.chmod(0o755)
        message = without_privileges(use)
        (directory / FINGERPRINT).chmod(0o755)
    assert f"cannot be written to {directory / FINGERPRINT} (Permission denied)" in message
    assert "choose another folder with ref_cache_dir" in message


def test_disk_full_in_the_middle_of_a_shard(tmp_path):
    cache = fill(tmp_path, range(3))
    for seed in range(3, 1000):
        cache.add(*make_row(seed))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match="cannot be written"):
            cache.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(os.listdir(tmp_path / FINGERPRINT)) == 2, "no temporary file is left"
    cache.flush()
    assert found(ReferenceCache(tmp_path, FINGERPRINT), range(1000)) == list(range(1000))


def die_in_flush(directory: Path, call: str, occasion: int) -> None:
    """Stores rows 0 to 9, then exits without cleaning up at one call of the flush that writes rows 10 to 19."""
    cache = fill(directory, range(10))
    for seed in range(10, 20):
        cache.add(*make_row(seed))
    if call == "write":
        write_shard = module.write_shard

        def write_half(file: BinaryIO, *rest) -> None:
            write_shard(whole := BytesIO(), *rest)
            file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            file.flush()
            os._exit(9)

        module.write_shard = write_half
    else:
        real, calls = getattr(os, call), iter(range(100))
        setattr(os, call, lambda *args: os._exit(9) if next(calls) == occasion else real(*args))
    cache.flush()


@pytest.mark.parametrize(
    ("call", "occasion", "kept"), [("write", 0, 10), ("fsync", 0, 10), ("replace", 0, 10), ("fsync", 1, 20)]
)
def test_death_at_each_point_of_a_flush(tmp_path, caplog, call, occasion, kept):
    if not (writer := os.fork()):
        try:
            die_in_flush(tmp_path, call, occasion)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(writer, 0)[1]) == 9
    assert len(list((tmp_path / FINGERPRINT).glob(".*.tmp"))) == (kept == 10)
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    assert found(cache, range(20)) == list(range(kept)) and not caplog.records
    assert found(fill(tmp_path, range(20)), range(20)) == list(range(20))


def write_forever(directory: Path, first: int) -> None:
    cache = ReferenceCache(directory, FINGERPRINT, flush_seconds=0.002)
    for seed in range(first, first + 10**6):
        cache.add(*make_row(seed))


def test_kill_9_at_any_time(tmp_path, caplog):
    context, rng = multiprocessing.get_context("spawn"), random.Random(0)
    writers = [context.Process(target=write_forever, args=(tmp_path, 10**6 * i)) for i in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        count = len(shards(tmp_path))
        while len(shards(tmp_path)) < count + 20:
            assert writer.is_alive()
            time.sleep(0.01)
        time.sleep(rng.random() / 50)
        writer.kill()
        writer.join()
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    rows = 0  # the rows of a writer have no gaps: only its last flush can be lost
    for first in range(0, 3 * 10**6, 10**6):
        rows += next(n for n in range(10**6) if not found(cache, [first + n]))
    assert rows == cache.num_rows >= 60 and not caplog.records


def write_some(directory: Path, seeds: Sequence[int], barrier) -> None:
    cache = ReferenceCache(directory, FINGERPRINT)
    barrier.wait()
    for n, seed in enumerate(seeds):
        cache.add(*make_row(seed))
        if n % 10 == 0:
            cache.flush()
    cache.flush()


def run_at_once(target: Callable, *arguments: tuple) -> None:
    """Runs `target` in one process per tuple of arguments; a barrier is added to each."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(len(arguments))
    processes = [context.Process(target=target, args=(*each, barrier)) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0


def test_four_writers_of_the_same_rows(tmp_path, caplog):
    run_at_once(write_some, *[(tmp_path, range(200))] * 4)
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    assert cache.num_rows == 800, "each writer wrote all rows, without waiting for the others"
    assert found(cache, range(201)) == list(range(200)) and not caplog.records
    assert not list((tmp_path / FINGERPRINT).glob(".*.tmp"))
    cache.merge()
    assert cache.num_rows == 200 and found(ReferenceCache(tmp_path, FINGERPRINT), range(201)) == list(range(200))


def test_two_writers_of_overlapping_rows(tmp_path, caplog):
    run_at_once(write_some, (tmp_path, range(200)), (tmp_path, range(100, 300)))
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    assert cache.num_rows == 400, "both wrote rows 100 to 199"
    assert found(cache, range(300)) == list(range(300)) and not caplog.records


def test_readers_in_other_threads_see_a_row_all_along(tmp_path):
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    added, failures = [-1], []

    def read() -> None:
        rng = random.Random()
        while added[0] < 150 and not failures:
            seed = rng.randint(max(0, added[0] - 3), max(0, added[0]))
            if added[0] >= 0 and found(cache, [seed]) != [seed]:
                failures.append(seed)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for seed in range(151):
        cache.add(*make_row(seed))
        added[0] = seed
        if seed % 3 == 0:
            cache.flush()
    for reader in readers:
        reader.join()
    assert not failures
