"""``python -m bench cache``: how fast the reference cache fills, opens and is looked up, and what else could be had.

The index has ten million completions, one million of them with 200 values (0.8 GB); the others have one. Everything is
read in fresh processes with a warm page cache. At one million, in the same run: SQLite, LMDB, an Arrow column of the
same values as ``datasets`` stores it, and TRL's columns, which hold one sum per completion. The last two are addressed
by row number: they know nothing of content, so a look-up there is less than a look-up here.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from cpt_kernels.reference_cache import ReferenceCache

FINGERPRINT = "c0ffee" * 5 + "00"
BATCH = 512
_CHUNK = 100_000  # rows added and flushed together
_TOKENS = np.random.default_rng(0).integers(0, 150_000, 1 << 16)
_VALUES = -np.random.default_rng(1).random(1 << 16, dtype=np.float32)


def sequence(row: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and completion number ``row``: any process knows them."""
    prompt = np.array([row, 1, 2, 3])
    start = row * 31 % (len(_TOKENS) - tokens)
    return prompt, _TOKENS[start : start + tokens]


def values(row: int, tokens: int) -> np.ndarray:
    """What a look-up of it must give."""
    start = row * 37 % (len(_VALUES) - tokens)
    return _VALUES[start : start + tokens]


# --- Stores that hold the same: each with a folder to itself ---


class Ours:
    name = "reference cache"
    flush_seconds = 0.0

    def fill(self, folder: Path, rows: range, tokens: int) -> None:
        cache = ReferenceCache(folder, FINGERPRINT, flush_seconds=1e9)
        for start in range(rows.start, rows.stop, _CHUNK):
            chunk = range(start, min(start + _CHUNK, rows.stop))
            cache.add_many([sequence(row, tokens) for row in chunk], [values(row, tokens) for row in chunk])
            started = time.perf_counter()
            cache.flush()
            self.flush_seconds += time.perf_counter() - started

    def open(self, folder: Path) -> None:
        self.cache = ReferenceCache(folder, FINGERPRINT)

    def keys(self, rows: np.ndarray, tokens: int) -> list[bytes]:
        return self.cache.keys([sequence(row, tokens) for row in rows.tolist()])

    def get(self, keys: list[bytes], tokens: int) -> np.ndarray:
        return self.cache.look_up(keys, [tokens] * len(keys))[0]


class OursByTokens(Ours):
    """The look-up hashes the tokens, too."""

    name = "reference cache, from tokens"

    def fill(self, folder: Path, rows: range, tokens: int) -> None:
        raise NotImplementedError("it reads what Ours wrote")

    def keys(self, rows: np.ndarray, tokens: int) -> list[tuple]:
        return [sequence(row, tokens) for row in rows.tolist()]

    def get(self, keys: list[tuple], tokens: int) -> np.ndarray:
        return super().get(self.cache.keys(keys), tokens)


class ByKey:
    """Stores of bytes by bytes share our keys."""

    def keys(self, rows: np.ndarray, tokens: int) -> list[bytes]:
        return ReferenceCache("/nonexistent", FINGERPRINT).keys([sequence(row, tokens) for row in rows.tolist()])

    def items(self, rows: range, tokens: int) -> Iterator[list[tuple[bytes, bytes]]]:
        for start in range(rows.start, rows.stop, _CHUNK):
            chunk = range(start, min(start + _CHUNK, rows.stop))
            keys = self.keys(np.array(chunk), tokens)
            yield sorted((key, values(row, tokens).tobytes()) for key, row in zip(keys, chunk))


class SQLite(ByKey):
    name = "SQLite"

    def fill(self, folder: Path, rows: range, tokens: int) -> None:
        connection = sqlite3.connect(folder / "cache.db")
        connection.execute("create table rows (key blob primary key, value blob) without rowid")
        for items in self.items(rows, tokens):
            with connection:
                connection.executemany("insert into rows values (?, ?)", items)
        connection.close()

    def open(self, folder: Path) -> None:
        self.connection = sqlite3.connect(folder / "cache.db")

    def get(self, keys: list[bytes], tokens: int) -> list[np.ndarray]:
        marks = ",".join("?" * len(keys))
        found = dict(self.connection.execute(f"select key, value from rows where key in ({marks})", keys))
        return [np.frombuffer(found[key], np.float32) for key in keys]


class LMDB(ByKey):
    name = "LMDB"

    def fill(self, folder: Path, rows: range, tokens: int) -> None:
        import lmdb

        with lmdb.open(str(folder), map_size=1 << 36) as environment:
            for items in self.items(rows, tokens):
                with environment.begin(write=True) as transaction:
                    transaction.cursor().putmulti(items)

    def open(self, folder: Path) -> None:
        import lmdb

        self.transaction = lmdb.open(str(folder), map_size=1 << 36, readonly=True).begin(buffers=True)

    def get(self, keys: list[bytes], tokens: int) -> list[np.ndarray]:
        return [np.frombuffer(self.transaction.get(key), np.float32) for key in keys]


class ArrowColumn:
    """Values by row number, as a column of a dataset."""

    name = "Arrow column, by row number"

    def fill(self, folder: Path, rows: range, tokens: int) -> None:
        from datasets import Dataset, Features, List, Value

        def generate() -> Iterator[dict]:
            for row in rows:
                yield {"logps": values(row, tokens)}

        Dataset.from_generator(
            generate, features=Features({"logps": List(Value("float32"))}), cache_dir=str(folder / "cache")
        ).save_to_disk(folder / "data")

    def open(self, folder: Path) -> None:
        from datasets import Dataset

        self.dataset = Dataset.load_from_disk(folder / "data").with_format("numpy")

    def keys(self, rows: np.ndarray, tokens: int) -> list[int]:
        return rows.tolist()

    def get(self, keys: list[int], tokens: int) -> list[np.ndarray]:
        return list(self.dataset[keys]["logps"])


class TrlColumns(ArrowColumn):
    """As TRL's DPOTrainer keeps them: two sums beside every pair."""

    name = "TRL's columns of sums, by row number"

    def fill(self, folder: Path, rows: range, tokens: int) -> None:
        from datasets import Dataset

        sums = np.array([values(row, tokens).sum() for row in rows])
        columns = {"ref_chosen_logps": sums[::2], "ref_rejected_logps": sums[1::2]}
        Dataset.from_dict(columns).save_to_disk(folder / "data")

    def keys(self, rows: np.ndarray, tokens: int) -> list[int]:
        return (rows // 2).tolist()[: len(rows) // 2]  # a pair is two completions

    def get(self, keys: list[int], tokens: int) -> list[np.ndarray]:
        batch = self.dataset[keys]
        return [batch["ref_chosen_logps"], batch["ref_rejected_logps"]]


STORES = {store.__name__: store for store in (Ours, OursByTokens, SQLite, LMDB, ArrowColumn, TrlColumns)}


# --- Measurements, each in a process of its own ---


def fill(store: str, folder: Path, rows: int, tokens: int) -> dict[str, float]:
    started, busy = time.perf_counter(), time.process_time()
    filled = STORES[store]()
    filled.fill(folder, range(rows), tokens)
    result = {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - busy}
    return result | ({"flush_seconds": filled.flush_seconds} if isinstance(filled, Ours) else {})


def read(store: str, folder: Path, rows: int, tokens: int, batches: int = 200) -> dict[str, float]:
    """Open, and look up random rows among the first ``rows``; every value is copied out, and checked in one batch."""
    opened = STORES[store]()
    opening, peak = _peak_anonymous(lambda: opened.open(folder))
    random = np.random.default_rng(2)
    rates = []
    for _ in range(5):
        drawn = random.integers(0, rows, (batches, BATCH))
        keys = [opened.keys(row, tokens) for row in drawn]
        started, busy = time.perf_counter(), time.process_time()
        for batch in keys:
            found = np.concatenate(opened.get(batch, tokens))
        seconds, cpu = time.perf_counter() - started, time.process_time() - busy
        rates.append((batches * BATCH / seconds, batches * BATCH / cpu))
    if not isinstance(opened, TrlColumns):
        np.testing.assert_array_equal(found, np.concatenate([values(row, tokens) for row in drawn[-1].tolist()]))
    best, best_cpu = (max(column) for column in zip(*rates))
    return {**opening, "peak_anonymous_mb": peak, "lookups_per_s": best, "lookups_per_cpu_s": best_cpu}


def _peak_anonymous(call: Callable[[], None]) -> tuple[dict[str, float], float]:
    """Seconds that a call takes, and the most anonymous memory in MB that it added."""

    def resident() -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024 / 1e6

    before, seen, done = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started, busy = time.perf_counter(), time.process_time()
    call()
    seconds = {"open_s": time.perf_counter() - started, "open_cpu_s": time.process_time() - busy}
    done.set()
    watcher.join()
    return seconds, max([*seen, resident()]) - before


def _measure(call: str, *arguments: object) -> dict[str, float]:
    done = subprocess.run(
        [sys.executable, "-m", "bench.cache", "--measure", call, *map(str, arguments)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench cache", description=__doc__.split("\n\n")[0])
    parser.add_argument("--rows", type=int, default=10_000_000, help="completions in the large index")
    parser.add_argument("--valued", type=int, default=1_000_000, help="of them with --tokens values; the others have 1")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--quick", action="store_true", help="200,000 and 20,000 rows, for continuous integration")
    parser.add_argument("--measure", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        call, store, folder, rows, tokens = args.measure
        print(json.dumps({"fill": fill, "read": read}[call](store, Path(folder), int(rows), int(tokens))))
        return
    if args.quick:
        args.rows, args.valued = 200_000, 20_000
    folder = Path(tempfile.mkdtemp(prefix="bench-cache-", dir=args.folder))
    try:
        result = _run(folder, args.rows, args.valued, args.tokens)
    finally:
        shutil.rmtree(folder)
    print(json.dumps(result))


def _run(folder: Path, rows: int, valued: int, tokens: int) -> dict:
    megabytes = valued * tokens * 4 / 1e6
    print(f"{valued:,} completions of {tokens} values ({megabytes:,.0f} MB), load {os.getloadavg()[0]:.1f}\n")
    print(f"{'':38}{'fill MB/s':>10}{'open s':>9}{'MB':>7}{'look-ups/s':>13}{'per CPU s':>13}")
    result: dict = {"rows": rows, "valued": valued, "tokens": tokens, "cpus": os.cpu_count()}
    for name, store in STORES.items():
        if store is LMDB and find_spec("lmdb") is None:
            print(f"{store.name:38}not installed")
            continue
        place = folder / ("Ours" if store is OursByTokens else name)
        place.mkdir(exist_ok=True)
        filled = {} if store is OursByTokens else _measure("fill", name, place, valued, tokens)
        speed = megabytes / filled["seconds"] if filled else None
        found = _measure("read", name, place, valued, tokens)
        _print_line(store.name, speed, found)
        result[name] = {**found, "fill_mb_per_s": speed, "fill": filled}
        if "flush_seconds" in filled:
            print(f"  of which flush, synced: {megabytes / filled['flush_seconds']:.0f} MB/s")
        if store not in (Ours, OursByTokens):
            shutil.rmtree(place)
    cache = ReferenceCache(folder / "Ours", FINGERPRINT, flush_seconds=1e9)
    for start in range(valued, rows, _CHUNK):
        chunk = range(start, min(start + _CHUNK, rows))
        cache.add_many([sequence(row, 1) for row in chunk], [values(row, 1) for row in chunk])
        cache.flush()
    print(f"\n{rows:,} completions, {len(cache.shards)} shards")
    for name in ("Ours", "OursByTokens"):
        found = _measure("read", name, folder / "Ours", valued, tokens)
        _print_line(STORES[name].name, None, found)
        result[f"{name} of {rows}"] = found
    result["load"] = os.getloadavg()[0]
    return result


def _print_line(name: str, speed: float | None, found: dict[str, float]) -> None:
    print(
        f"{name:38}{f'{speed:.0f}' if speed else '':>10}{found['open_s']:9.2f}{found['peak_anonymous_mb']:7.0f}"
        f"{found['lookups_per_s']:13,.0f}{found['lookups_per_cpu_s']:13,.0f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
