"""The reference cache returns the rows that were added, to every reader, with the right values."""

from __future__ import annotations

import json
import os
import pickle
import random
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import cpt_kernels.reference.cache as module
import cpt_kernels.reference.shards as shards_module
from cpt_kernels.reference.cache import ReferenceCache, default_cache_dir

FINGERPRINT = "0123456789abcdef" * 2
OTHER = "f" * 32

Row = tuple[list[int], list[int], np.ndarray]


def make_row(seed: int) -> Row:
    """Returns a row that depends on the seed alone, so every process knows its values."""
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
    """Returns the seeds whose rows are stored. Asserts that their values are right."""
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


def wait_for_writer() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("reference-cache"):
            thread.join()


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
    for wrong in ([1.0], [[1]], ["1"], [2**70], 3):
        with pytest.raises(ValueError, match="token ids"):
            cache.key(wrong, [1])


def test_the_key_is_this_forever():
    """A change of the key would make every stored row unreachable: raise the format version with it."""
    cache = ReferenceCache("unused", FINGERPRINT)
    assert cache.key([1, 2, 3], [4]).hex() == "ca4cddaba416b831f7bd4f2f8a19592a"


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


def test_unwritten_rows_outgrow_their_array(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "_CAPACITY", 4)
    cache = ReferenceCache(tmp_path, FINGERPRINT)
    for start in range(0, 60, 20):
        rows = [make_row(seed) for seed in range(start, start + 20)]
        cache.add_many([row[:2] for row in rows], [row[2] for row in rows])
        assert found(cache, range(60)) == list(range(start + 20))
    cache.flush()
    assert found(ReferenceCache(tmp_path, FINGERPRINT), range(61)) == list(range(60))


def test_a_batch_may_hold_a_row_twice_and_rows_that_are_there(tmp_path):
    cache = fill(tmp_path, [0, 1])
    cache.add(*make_row(2))
    rows = [make_row(seed) for seed in (3, 0, 4, 3, 2, 5)]
    cache.add_many([row[:2] for row in rows], [values - n for n, (_, _, values) in enumerate(rows)])
    assert cache.num_rows == 6
    np.testing.assert_array_equal(cache.get(*make_row(3)[:2]), make_row(3)[2], "the first of the two")
    assert found(cache, [0, 1, 2, 3]) == [0, 1, 2, 3]
    cache.flush()
    for n, seed in ((2, 4), (5, 5)):
        np.testing.assert_array_equal(cache.get(*make_row(seed)[:2]), make_row(seed)[2] - n)


def test_flat_look_ups(tmp_path):
    cache = fill(tmp_path, range(4))
    cache.add(*make_row(4))
    rows = [make_row(seed) for seed in (4, 9, 0, 2)]
    lengths = [len(completion) for _, completion, _ in rows]
    values, there = cache.look_up(cache.keys([row[:2] for row in rows]), lengths)
    assert there.tolist() == [True, False, True, True] and (cache.hits, cache.misses) == (3, 1)
    expected = [logps if known else np.full(len(logps), np.nan) for (_, _, logps), known in zip(rows, there)]
    np.testing.assert_array_equal(values, np.concatenate(expected))
    values[:] = 0  # the array belongs to the caller
    assert found(cache, range(5)) == list(range(5))
    nothing, there = cache.look_up([], [])
    assert len(nothing) == len(there) == 0


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
    wait_for_writer()
    assert len(shards(tmp_path)) == 1 and found(ReferenceCache(tmp_path, FINGERPRINT), range(3)) == [0, 1, 2]
    now[0] += 1000  # no row is pending, so the next one is pending for 30 seconds
    cache.add(*make_row(3))
    wait_for_writer()
    assert len(shards(tmp_path)) == 1


def test_rows_are_added_and_found_while_a_shard_is_written(tmp_path, monkeypatch):
    may_write, write_shard = threading.Event(), module.write_shard

    def write_later(*arguments) -> None:
        assert may_write.wait(60)
        write_shard(*arguments)

    monkeypatch.setattr(module, "write_shard", write_later)
    cache = ReferenceCache(tmp_path, FINGERPRINT, flush_seconds=0)
    cache.add(*make_row(0))
    cache.flush_seconds = 30
    for seed in (1, 0, 2):
        cache.add(*make_row(seed))
    assert found(cache, range(4)) == [0, 1, 2] and cache.num_rows == 3 and not shards(tmp_path)
    may_write.set()
    cache.flush()
    assert found(cache, range(4)) == found(ReferenceCache(tmp_path, FINGERPRINT), range(4)) == [0, 1, 2]
    assert len(shards(tmp_path)) == 2 and cache.num_rows == 3
    assert cache.bytes_written == sum(path.stat().st_size for path in shards(tmp_path))


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
    code = "import sys, cpt_kernels.reference.cache; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_keys_that_share_their_first_half(tmp_path, monkeypatch):
    monkeypatch.setattr(ReferenceCache, "keys", lambda self, rows: [bytes(8) + bytes([p[0]]) * 8 for p, _ in rows])
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
    np.testing.assert_array_equal(cache._indexes[1].prefixes, fresh._indexes[1].prefixes)
    assert sorted(cache._indexes[1].rows.tolist()) == list(range(300))
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
    assert found(cache, range(5)) == list(range(5)), "the mapping outlives the file name"
    assert found(ReferenceCache(tmp_path, FINGERPRINT), range(5)) == []


def test_shard_deleted_between_listing_and_opening(tmp_path, monkeypatch, caplog):
    fill(tmp_path, range(5))
    names = os.listdir(tmp_path / FINGERPRINT)
    monkeypatch.setattr(module.os, "listdir", lambda _: [*names, "gone.arrow"])
    assert found(ReferenceCache(tmp_path, FINGERPRINT), range(5)) == list(range(5)) and not caplog.records
