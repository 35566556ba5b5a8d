"""The reference cache on a store: what one node uploads another finds, with the right values, whatever fails between.

The store is fsspec's memory file system, and a node is a folder for local copies. tests/test_s3.py runs the same on a
server of the S3 protocol, with processes that are killed.
"""

from __future__ import annotations

import pickle
from collections import Counter, namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

import cpt_kernels.reference.cache as module
from cpt_kernels.data import stores
from cpt_kernels.errors import UserError
from cpt_kernels.reference import remote
from cpt_kernels.reference.cache import ReferenceCache
from cpt_kernels.reference.maintenance import export_parquet, prune, stored_references, summarize_reference
from cpt_kernels.reference.probe import ReferenceProbe, find_folder, read_probe
from tests.reference.test_cache import FINGERPRINT, OTHER, Row, found, make_row

Memory: Any = type(fsspec.filesystem("memory"))
Node = Callable[[str], None]


@pytest.fixture
def url(tmp_path) -> Iterator[str]:
    yield f"memory://{tmp_path.name}/cache"
    Memory.store.clear()


@pytest.fixture
def node(tmp_path, monkeypatch) -> Node:
    """Continues on the node of this name."""
    return lambda name: monkeypatch.setenv("CPT_LOCAL", str(tmp_path / name))


def fill(url: str, seeds: range) -> ReferenceCache:
    with ReferenceCache(url, FINGERPRINT) as cache:
        for seed in seeds:
            cache.add(*make_row(seed))
    return cache


def objects(url: str) -> list[str]:
    return sorted(name for name in stores.list_files(url) if name.endswith(".arrow"))


def counted(monkeypatch) -> Counter[str]:
    """Counts the calls of the memory file system by name."""
    calls: Counter[str] = Counter()

    def count(name: str, call: Callable) -> Callable:
        return lambda *args, **kwargs: calls.update([name]) or call(*args, **kwargs)

    for name in ("find", "cat_file", "get_file", "put_file", "pipe_file"):
        monkeypatch.setattr(Memory, name, count(name, getattr(Memory, name)))
    return calls


def full_disk(monkeypatch) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: usage(0))


def test_nodes_see_what_others_have_uploaded(url, node):
    node("one")
    one = fill(url, range(20))
    node("two")
    two = ReferenceCache(url, FINGERPRINT)
    assert found(two, range(40)) == list(range(20))
    with two:
        for seed in range(10, 30):
            two.add(*make_row(seed))
    assert found(one, range(40)) == list(range(20)), "not before a refresh"
    assert one.refresh() == 1 and found(one, range(40)) == list(range(30)) and one.num_rows == 30
    assert len(objects(url)) == 2 and not [path for path in one.folder.glob("*.arrow") if remote.is_small(path.name)]
    for copy in (pickle.loads(pickle.dumps(one)), ReferenceCache(one.directory, FINGERPRINT)):
        assert found(copy, range(40)) == list(range(30))


def test_small_shards_become_objects_of_some_size(url, node, monkeypatch):
    node("one")
    row = np.full(1000, -1, np.float32)
    monkeypatch.setattr(remote, "OBJECT_BYTES", 64_000)
    cache = ReferenceCache(url, FINGERPRINT, flush_seconds=0)
    for seed in range(100):
        cache.add([seed], list(range(1000)), row)
        if cache._uploading is not None:
            cache._uploading.result()
    sizes = [about.nbytes for name, about in stores.list_files(url).items() if name.endswith(".arrow")]
    assert len(sizes) > 5 and min(sizes) > 40_000 and max(sizes) <= 64_000, sizes
    cache.publish()
    node("two")
    assert ReferenceCache(url, FINGERPRINT).num_rows == 100


def test_no_name_is_read_twice(url, node, monkeypatch):
    for name, seeds in (("one", range(10)), ("two", range(10, 20)), ("three", range(20, 50))):
        node(name)
        fill(url, seeds)
    node("four")
    cache = fill(url, range(50, 60))
    calls = counted(monkeypatch)
    cache.refresh()
    assert calls == {"find": 1, "cat_file": 1}, "the list of its own"
    calls.clear()
    cache.refresh()
    assert calls == {"find": 1}
    node("one")
    fill(url, range(70, 80))
    node("four")
    calls.clear()
    cache.refresh()
    assert calls == {"find": 1, "cat_file": 1, "get_file": 1} and cache.num_rows == 70
    # Processes of one node that ask together share one pass.
    calls.clear()
    monkeypatch.setattr(remote.time, "time_ns", lambda: 0)
    ReferenceCache(url, FINGERPRINT)
    assert not calls


@pytest.mark.parametrize("failing", ["put_file", "pipe_file", "unlink"])
def test_death_in_an_upload_loses_nothing_and_repeats_one_object(url, node, monkeypatch, failing):
    """The process ends before the object, between it and its list, or before the small shards are deleted."""

    class Death(BaseException):
        pass

    def die(*_, **__):
        raise Death

    node("one")
    fill(url, range(10))
    cache = ReferenceCache(url, FINGERPRINT)
    for seed in range(10, 20):
        cache.add(*make_row(seed))
    with monkeypatch.context() as patched:
        place = Path if failing == "unlink" else Memory
        patched.setattr(place, failing, die)
        with pytest.raises(Death):
            cache.publish()
    node("two")
    assert found(ReferenceCache(url, FINGERPRINT), range(20)) == list(range(20 if failing == "unlink" else 10))
    node("one")
    again = ReferenceCache(url, FINGERPRINT)
    assert found(again, range(20)) == list(range(20)), "nothing is scored again where the disk survives"
    again.publish()
    assert len(objects(url)) == {"put_file": 2, "pipe_file": 3, "unlink": 3}[failing]
    node("three")
    assert found(ReferenceCache(url, FINGERPRINT), range(20)) == list(range(20))


def test_a_store_that_refuses_keeps_rows_on_the_disk(url, node, monkeypatch, caplog):
    def refuse(*_, **__):
        raise PermissionError("AccessDenied")

    node("one")
    cache = ReferenceCache(url, FINGERPRINT, flush_seconds=0)
    with monkeypatch.context() as patched:
        patched.setattr(Memory, "put_file", refuse)
        patched.setattr(remote, "OBJECT_BYTES", 1)
        for seed in range(5):
            cache.add(*make_row(seed))
            wait = cache._uploading and cache._uploading.exception()
        assert isinstance(wait, UserError) and "kept on the local disk until the store takes them" in caplog.text
        with pytest.raises(UserError, match=r"memory://.*cannot be written \(PermissionError: AccessDenied"):
            cache.publish()
    with ReferenceCache(url, FINGERPRINT) as again:
        assert found(again, range(5)) == list(range(5))
    node("two")
    assert found(ReferenceCache(url, FINGERPRINT), range(5)) == list(range(5))


def test_damaged_and_deleted_objects_are_ignored(url, node, caplog):
    for name, seeds in (("one", range(10)), ("two", range(10, 20)), ("three", range(20, 30))):
        node(name)
        fill(url, seeds)
    store, names = fsspec.filesystem("memory"), objects(url)
    content = store.cat_file(f"{url}/{names[0]}")
    at = next(at for seed in range(30) if (at := content.find(make_row(seed)[2].tobytes())) > 0)
    store.pipe_file(f"{url}/{names[0]}", content[:at] + b"\xa5" + content[at + 1 :])
    store.rm(f"{url}/{names[1]}")
    node("four")
    cache = ReferenceCache(url, FINGERPRINT)
    assert len(found(cache, range(30))) == 10 and cache.num_rows == 10
    assert len(caplog.records) == 2 and "it was deleted" in caplog.text and "checksum" in caplog.text


# --- Values that stay on the store


def test_values_are_read_by_range_where_the_disk_has_no_room(url, node, monkeypatch, caplog):
    rows: list[Row] = []
    rng = np.random.default_rng(0)
    for group in range(40):  # of three completions, some of which lie in two blocks
        completions = [(group, rng.integers(0, 9, 3000).tolist()) for _ in range(3)]
        rows += [([group], ids, -rng.random(3000, dtype=np.float32)) for group, ids in completions]
    node("one")
    with ReferenceCache(url, FINGERPRINT) as cache:
        for row in rows:
            cache.add(*row)
    node("two")
    full_disk(monkeypatch)
    cache = ReferenceCache(url, FINGERPRINT)
    (head,) = cache.folder.glob("*.head")
    assert head.stat().st_blocks * 512 < head.stat().st_size / 4 and "do not fit on the disk" in caplog.text
    calls = counted(monkeypatch)
    monkeypatch.setattr(remote, "_BLOCKS", 0)  # nothing that an earlier look-up read is kept
    sequences = [(prompt, ids) for prompt, ids, _ in rows]
    keys, lengths = cache.keys(sequences), [3000] * len(rows)
    assert all(cache.count_keys(keys, lengths)) and not calls and cache.hits == len(rows)
    for start in range(0, len(rows), 3):
        values, _ = cache.look_up(keys[start : start + 3], lengths[start : start + 3])
        np.testing.assert_array_equal(values, np.concatenate([row[2] for row in rows[start : start + 3]]))
    assert calls == {"cat_file": 40}, "one range for a prompt group"
    copy = pickle.loads(pickle.dumps(cache))
    calls.clear()
    values, _ = copy.look_up(keys, lengths)
    np.testing.assert_array_equal(values, np.concatenate([row[2] for row in rows]))
    assert calls == {"cat_file": 1} and copy.misses == 0
    with pytest.raises(UserError, match="make room on the local disk"):
        export_parquet(cache.directory, FINGERPRINT, str(cache.folder / "x.parquet"))


def test_damaged_blocks_on_the_store_are_not_served(url, node, monkeypatch, caplog):
    node("one")
    fill(url, range(10))
    node("two")
    full_disk(monkeypatch)
    cache = ReferenceCache(url, FINGERPRINT)
    store, (name,) = fsspec.filesystem("memory"), objects(url)
    content = store.cat_file(f"{url}/{name}")
    at = content.index(make_row(3)[2].tobytes())
    store.pipe_file(f"{url}/{name}", content[:at] + b"\xa5" + content[at + 1 :])
    assert cache.get_or_none(*make_row(3)[:2]) is None and "checksum" in caplog.text


# --- The index of many rows


@pytest.mark.parametrize("place", ["store", "folder"])
def test_processes_of_a_node_map_one_index(url, node, tmp_path, monkeypatch, place):
    monkeypatch.setattr(module, "_MAPPED_ROWS", 40)
    node("one")
    directory = url if place == "store" else str(tmp_path / "cache")
    cache = fill(directory, range(30))
    assert not len(cache._indexes[0].rows)
    fill(directory, range(30, 60))
    assert found(ReferenceCache(directory, FINGERPRINT), range(60)) == list(range(60))
    (file,) = (tmp_path / "one" / ".indexes").rglob("*.index")
    for _ in range(2):
        again = ReferenceCache(directory, FINGERPRINT)
        mapped, recent = again._indexes
        assert len(mapped.rows) == 60 and not len(recent.rows) and not mapped.prefixes.flags.owndata
        assert found(again, range(70)) == list(range(60))
    assert [*file.parent.glob("*.index")] == [file], "built once"
    # New rows are kept apart, until they are many again.
    again = fill(directory, range(60, 80))
    assert [len(index.rows) for index in again._indexes] == [60, 20] and file.exists()
    again = fill(directory, range(80, 120))
    again = ReferenceCache(directory, FINGERPRINT)
    assert [len(index.rows) for index in again._indexes] == [120, 0] and not file.exists()
    assert found(again, range(130)) == list(range(120)) == found(pickle.loads(pickle.dumps(again)), range(130))
    # Damage, and shards that have been deleted: it is built anew.
    (file,) = (tmp_path / "one" / ".indexes").rglob("*.index")
    content = file.read_bytes()
    file.unlink()  # other caches have mapped it
    file.write_bytes(content[:900] + b"\xa5\xa5" + content[902:])
    assert found(ReferenceCache(directory, FINGERPRINT), range(130)) == list(range(120))
    if place == "folder":
        ReferenceCache(directory, FINGERPRINT).shards[0].path.unlink()
        left = ReferenceCache(directory, FINGERPRINT)
        assert left.num_rows < 120 and len(found(left, range(130))) == left.num_rows


# --- Proof and maintenance


def test_the_probe_lies_on_the_store(url, node):
    probes = {"same": ReferenceProbe([-1.0, -2.0], 1e-3), "other": ReferenceProbe([-1.0, -3.0], 1e-3)}
    for name in ("one", "two"):
        node(name)
        directory = stores.local_path(url)
        folder = find_folder(directory, FINGERPRINT, probes["same"])
        assert folder == (FINGERPRINT, 0, 0.0) and read_probe(directory / FINGERPRINT) == probes["same"]
    rival = find_folder(directory, FINGERPRINT, probes["other"])
    assert rival.fingerprint != FINGERPRINT and rival.rivals == 1 and rival.difference == 1.0
    fill(url, range(3))
    fsspec.filesystem("memory").rm(f"{url}/{FINGERPRINT}/probe.json")
    unproven = find_folder(directory, FINGERPRINT, probes["same"])
    assert unproven.rivals == 2, "rows without a probe are not served"


def test_maintenance_of_a_store(url, node):
    node("one")
    fill(url, range(10))
    node("two")
    directory = stores.local_path(url)
    assert stored_references(directory) == [FINGERPRINT]
    about = summarize_reference(directory, FINGERPRINT)
    assert (about.completions, about.shards, about.is_proven) == (10, 1, False)
    with pytest.raises(UserError, match="on a store"):
        prune(directory, [FINGERPRINT], max_gb=0.0)
    with pytest.raises(UserError, match="on a store"):
        ReferenceCache(url, FINGERPRINT).merge()
    prune(directory, [FINGERPRINT], everything=True)
    assert stored_references(directory) == [] and not stores.list_files(url)
    node("three")
    assert ReferenceCache(url, FINGERPRINT).num_rows == 0 == ReferenceCache(url, OTHER).num_rows
