"""The store of reference log-probs: what was added is found, by anyone, after anything."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import pickle
import random
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import cpt_kernels.reference_cache as module
from cpt_kernels.reference_cache import ReferenceCache, default_cache_dir

FINGERPRINT = "0123456789abcdef" * 2
OTHER = "f" * 32

Row = tuple[list[int], list[int], np.ndarray]


def make_row(seed: int) -> Row:
    """Row `seed`: any process knows what its values must be."""
    rng = np.random.default_rng(seed)
    prompt, completion = (rng.integers(0, 200_000, rng.integers(1, 9)).tolist() for _ in range(2))
    return [seed, *prompt], completion, -rng.random(len(completion), dtype=np.float32)


def fill(directory: Path, seeds: Sequence[int]) -> ReferenceCache:
    cache = ReferenceCache(directory, FINGERPRINT)
    with cache:
        for seed in seeds:
            cache.add(*make_row(seed))
    return cache


def found(cache: ReferenceCache, seeds: Sequence[int]) -> list[int]:
    """The seeds whose rows are there, every one of them with the right values."""
    there = []
    for seed in seeds:
        prompt, completion, logps = make_row(seed)
        present = (prompt, completion) in cache
        values = cache.get_or_none(prompt, completion)
        assert present == (values is not None)
        if values is not None:
            np.testing.assert_array_equal(values, logps)
            there.append(seed)
    return there


def shards(directory: Path) -> list[Path]:
    return sorted((directory / FINGERPRINT).glob("*.arrow"))


# --- what a user sees


def test_round_trip(tmp_path):
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    prompt, completion, logps = make_row(0)
    with pytest.raises(KeyError, match=f"{len(completion)} tokens"):
        cache.get(prompt, completion)
    cache.add(prompt, completion, logps)
    for at_hand in (cache, fill(tmp_path, range(1, 50)), ReferenceCache(tmp_path, FINGERPRINT)):
        cache.flush()
        at_hand.refresh()
        values = at_hand.get(prompt, completion)
        assert values.dtype == np.float32 and values.shape == (len(completion),)
        np.testing.assert_array_equal(values, logps)
    assert found(at_hand, range(60)) == list(range(50)) and at_hand.num_rows == 50
    assert (cache.hits, cache.misses) == (1, 1)
    assert cache.bytes_written in {path.stat().st_size for path in shards(tmp_path)}


def test_tokens_may_be_of_any_integer_sequence(tmp_path):
    cache = fill(tmp_path, [0])
    prompt, completion, logps = make_row(0)
    for as_type in (tuple, np.array, lambda x: np.array(x, np.int32), lambda x: np.array(x, ">u4")):
        np.testing.assert_array_equal(cache.get(as_type(prompt), as_type(completion)), logps)
    assert cache.key([], [1]) != cache.key([1], [])
    for wrong in ([1.0], [[1]], ["1"], [True], [2**70], 3):
        with pytest.raises(ValueError, match="token ids"):
            cache.key(wrong, [1])


def test_the_key_is_this_forever():
    """Another key for the same content would orphan every cache: then raise the version with it."""
    cache = ReferenceCache("unused", FINGERPRINT)
    assert cache.key([1, 2, 3], [4]).hex() == "20ced8a2f8933c865022ad1e1badd32f"


def test_keys_tell_prompt_from_completion(tmp_path):
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    tokens = list(range(6))
    keys = {cache.key(tokens[:i], tokens[i:j]) for j in range(7) for i in range(j + 1)}
    assert len(keys) == 28
    cache.add([1, 2], [3], [-1.0])
    cache.add([1], [2, 3], [-2.0, -3.0])
    cache.flush()
    assert cache.get([1, 2], [3]).tolist() == [-1.0] and cache.get([1], [2, 3]).tolist() == [-2.0, -3.0]
    assert ([], [1, 2, 3]) not in cache


def test_references_are_apart(tmp_path):
    fill(tmp_path, range(5))
    other = ReferenceCache(tmp_path, OTHER)
    assert found(other, range(5)) == []
    prompt, completion, logps = make_row(0)
    assert other.key(prompt, completion) != ReferenceCache(tmp_path, FINGERPRINT).key(prompt, completion)
    other.add(prompt, completion, logps - 1)
    np.testing.assert_array_equal(other.get(prompt, completion), logps - 1)


@pytest.mark.parametrize("name", ["", "abc", "../" + FINGERPRINT, FINGERPRINT.upper(), FINGERPRINT + "\n"])
def test_malformed_fingerprint(tmp_path, name):
    with pytest.raises(ValueError, match="32 hex digits"):
        ReferenceCache(tmp_path, name)


def test_values_are_checked(tmp_path):
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    for wrong in (float("nan"), float("-inf")):
        with pytest.raises(ValueError, match=r"token 1 is (nan|-inf)"):
            cache.add([1], [2, 3], [-1.0, wrong])
    for wrong in ([-1.0], [[-1.0, -1.0]], -1.0):
        with pytest.raises(ValueError, match="completion of 2 tokens"):
            cache.add([1], [2, 3], wrong)
    assert cache.num_rows == 0 and not (tmp_path / FINGERPRINT).exists()


def test_arrays_are_the_callers_own(tmp_path):
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    logps = np.array([-1.0, -2.0], np.float32)
    cache.add([1], [2, 3], logps)
    logps[:] = 0
    for _ in range(2):
        cache.get([1], [2, 3])[:] = 0
        assert cache.get([1], [2, 3]).tolist() == [-1.0, -2.0]
        cache.flush()


def test_first_values_of_a_row_are_kept(tmp_path):
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    for _ in range(2):
        cache.add([1], [2], [-1.0])
        cache.add([1], [2], [-9.0])
        assert cache.get([1], [2]).tolist() == [-1.0] and cache.num_rows == 1
        cache.flush()
    assert len(shards(tmp_path)) == 1


def test_flushes_by_time(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    cache = ReferenceCache(tmp_path, FINGERPRINT, flush_seconds=30)
    cache.add(*make_row(0))
    now[0] += 29
    cache.add(*make_row(1))
    assert not shards(tmp_path)
    now[0] += 1
    cache.add(*make_row(2))
    assert len(shards(tmp_path)) == 1 and found(ReferenceCache(tmp_path, FINGERPRINT), range(3)) == [0, 1, 2]
    now[0] += 1000  # no row is waiting, so the next one waits its 30 seconds
    cache.add(*make_row(3))
    assert len(shards(tmp_path)) == 1


def test_context_manager_flushes_after_an_exception_too(tmp_path):
    with pytest.raises(RuntimeError, match="killed"), ReferenceCache(tmp_path, FINGERPRINT) as cache:
        cache.add(*make_row(0))
        raise RuntimeError("killed")
    assert found(ReferenceCache(tmp_path, FINGERPRINT), [0]) == [0]


def test_description_is_written_once(tmp_path):
    for model in ("a/model", "another/name"):
        with ReferenceCache(tmp_path, FINGERPRINT, description={"model": model, "path": Path("x")}) as cache:
            cache.add(*make_row(len(model)))
    about = json.loads((tmp_path / FINGERPRINT / "reference.json").read_text())
    assert about == {"model": "a/model", "path": "x", "fingerprint": FINGERPRINT}


def test_default_cache_dir(monkeypatch):
    for name in ("CPT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert default_cache_dir() == Path("/home/me/.cache/cpt_kernels/reference")
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache")
    assert default_cache_dir() == Path("/var/cache/cpt_kernels/reference")
    monkeypatch.setenv("CPT_CACHE", "~/mine")
    assert default_cache_dir() == Path("/home/me/mine")


def test_pickled_copy_sees_everything_that_was_added(tmp_path):
    cache = ReferenceCache(tmp_path, FINGERPRINT, flush_seconds=7)
    cache.add(*make_row(0))
    copy = pickle.loads(pickle.dumps(cache))
    assert found(copy, [0]) == [0] and copy.flush_seconds == 7
    copy.add(*make_row(1))
    copy.flush()
    assert cache.refresh() == 1 and cache.refresh() == 0 and found(cache, [0, 1]) == [0, 1]


def test_needs_no_torch():
    code = "import sys, cpt_kernels.reference_cache; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the index


def test_keys_that_share_their_first_half(tmp_path, monkeypatch):
    monkeypatch.setattr(ReferenceCache, "key", lambda self, p, c: bytes(8) + bytes([p[0]]) * 8)
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    for i in range(20):
        cache.add([i], [0], [-float(i)])
        if i % 3 == 0:
            cache.flush()
    assert [cache.get([i], [0])[0] for i in range(20)] == [-float(i) for i in range(20)]
    assert ([99], [0]) not in cache


def test_incremental_index_equals_one_from_scratch(tmp_path):
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    seeds = list(range(300))
    random.Random(0).shuffle(seeds)
    for i, seed in enumerate(seeds):
        cache.add(*make_row(seed))
        if i % 17 == 0:
            cache.flush()
    cache.flush()
    fresh = ReferenceCache(tmp_path, FINGERPRINT)
    np.testing.assert_array_equal(cache._index.prefixes, fresh._index.prefixes)
    assert found(cache, seeds) == found(fresh, seeds) == seeds


def test_open_shards_hold_no_descriptors(tmp_path):
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    before = len(os.listdir("/proc/self/fd"))
    for seed in range(50):
        cache.add(*make_row(seed))
        cache.flush()
    fresh = ReferenceCache(tmp_path, FINGERPRINT)
    assert len(shards(tmp_path)) == 50 and found(fresh, range(50)) == list(range(50))
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_shard_deleted_under_a_reader(tmp_path):
    fill(tmp_path, range(5))
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    for path in shards(tmp_path):
        path.unlink()
    assert found(cache, range(5)) == list(range(5)), "the mapping outlives the name"
    assert found(ReferenceCache(tmp_path, FINGERPRINT), range(5)) == []


def test_shard_deleted_between_listing_and_opening(tmp_path, monkeypatch, caplog):
    fill(tmp_path, range(5))
    names = os.listdir(tmp_path / FINGERPRINT)
    monkeypatch.setattr(module.os, "listdir", lambda _: [*names, "gone.arrow"])
    assert found(ReferenceCache(tmp_path, FINGERPRINT), range(5)) == list(range(5)) and not caplog.records


# --- damage


def opened_with(directory: Path, content: bytes, seeds: Sequence[int], caplog) -> tuple[list[int], int]:
    """Rows found when the only shard holds `content` (all of them with right values), and the number of warnings."""
    (path,) = shards(directory)
    path.unlink()  # a file of its own: other readers hold mappings of the old one
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
    """Values are right or not there. Only padding may be damaged without a word."""
    fill(tmp_path, range(3))
    content = shards(tmp_path)[0].read_bytes()
    noticed = 0
    for at in range(len(content)):
        damaged = content[:at] + bytes([content[at] ^ random.Random(at).randrange(1, 256)]) + content[at + 1 :]
        there, warnings = opened_with(tmp_path, damaged, range(3), caplog)
        assert (there, warnings) in (([], 1), ([0, 1, 2], 0)), at
        noticed += warnings
    assert noticed > len(content) / 2
    for row in map(make_row, range(3)):  # every byte that carries a value is noticed
        at = content.index(row[2].tobytes())
        for i in range(at, at + row[2].nbytes):
            assert opened_with(tmp_path, content[:i] + b"\xa5" + content[i + 1 :], range(3), caplog) == ([], 1)


def test_a_damaged_shard_takes_no_other_with_it_and_its_rows_can_be_scored_again(tmp_path, caplog):
    fill(tmp_path, range(10))
    (damaged,) = shards(tmp_path)
    fill(tmp_path, range(5, 15))  # 5 to 9 are there already
    content = damaged.read_bytes()
    at = content.index(make_row(7)[2].tobytes())
    damaged.unlink()
    damaged.write_bytes(content[:at] + b"\xa5\xa5" + content[at + 2 :])
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    assert not caplog.records, "values are checked when they are looked for"
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
        (lambda t: t.select(["logps", "key"]), "unexpected columns"),
        (lambda t: t.set_column(1, "logps", t["logps"].cast(pa.large_list(pa.float64()))), "unexpected columns"),
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
    monkeypatch.setattr(ReferenceCache, "key", lambda self, p, c: bytes(16))
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    cache.add([1], [2, 3], [-1.0, -2.0])
    cache.flush()
    assert cache.get_or_none([1], [2]) is None and "a row has 2 values for a completion of 1" in caplog.text
    cache.add([1], [2], [-5.0])
    cache.flush()
    assert cache.get([1], [2]).tolist() == [-5.0]


# --- writers that fail, die, or meet


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


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path):
    fill(tmp_path, [0])
    (tmp_path / FINGERPRINT).chmod(0o555)
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    assert found(cache, [0]) == [0]
    cache.add(*make_row(1))
    with pytest.raises(PermissionError, match="cannot be written"):
        cache.flush()


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
    """Stored: 0 to 9. Then write 10 to 19 and die, with no chance to clean up, in a system call of that flush."""
    cache = fill(directory, range(10))
    for seed in range(10, 20):
        cache.add(*make_row(seed))
    real, calls = getattr(os, call), iter(range(100))
    setattr(os, call, lambda *args: os._exit(9) if next(calls) == occasion else real(*args))
    cache.flush()
    os._exit(0)


@pytest.mark.parametrize(("call", "occasion", "kept"), [("fsync", 0, 10), ("replace", 0, 10), ("fsync", 1, 20)])
def test_death_at_each_point_of_a_flush(tmp_path, caplog, call, occasion, kept):
    process = multiprocessing.get_context("spawn").Process(target=die_in_flush, args=(tmp_path, call, occasion))
    process.start()
    process.join()
    assert process.exitcode == 9
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
    rows = 0  # a writer's rows lie without gaps from its first on: nothing but its last flush can be lost
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


def test_two_writers_of_overlapping_rows(tmp_path, caplog):
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(2)
    ranges = (range(200), range(100, 300))
    writers = [context.Process(target=write_some, args=(tmp_path, seeds, barrier)) for seeds in ranges]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    assert cache.num_rows == 400, "both wrote rows 100 to 199"
    assert found(cache, range(300)) == list(range(300)) and not caplog.records
    assert not list((tmp_path / FINGERPRINT).glob("*.tmp"))


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
