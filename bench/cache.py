"""How fast can the reference cache be filled, opened and read, compared with other stores?

    python -m bench cache

The index has ten million completions. One million of them have 200 values (0.8 GB), the others one. Everything is read
in fresh processes with a warm page cache. For the one million, the same run measures SQLite, LMDB, an Arrow column of
the same values as ``datasets`` stores it, and TRL's columns, which hold one sum per completion. The last two are
addressed by row number and not by content, so a look-up there does less work.

Filling is timed from token ids and log-probs in memory to bytes on disk, synced every 524,288 rows (the last two do not
sync). Ours also syncs full shards in between, in the background. Look-ups copy every value out. The last
measurement is the share of a training step (the model of ``bench step``, on a CPU) that is spent in the cache. CPU
seconds are shown beside seconds, because other work on the machine affects them less.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from cpt_kernels.reference.cache import ReferenceCache
from cpt_kernels.reference.keys import Sequences

from .timing import add_output_options, finish, table

FINGERPRINT = "c0ffee" * 5 + "00"
BATCH = 512  # completions added or looked up together
_CHUNK = 1 << 19  # rows between two syncs
_SHORT_CHUNK = 1 << 16  # for rows of one value, so that they are spread over many shards as well
_TOKENS = np.random.default_rng(0).integers(0, 150_000, 1 << 16)
_VALUES = -np.random.default_rng(1).random(1 << 16, dtype=np.float32)


def sequence(row: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the token ids of prompt and completion number ``row``, the same in every process."""
    prompt = np.array([row, 1, 2, 3])
    start = row * 31 % (len(_TOKENS) - tokens)
    return prompt, _TOKENS[start : start + tokens]


def values(row: int, tokens: int) -> np.ndarray:
    """Returns the values that a look-up of completion ``row`` must give."""
    start = row * 37 % (len(_VALUES) - tokens)
    return _VALUES[start : start + tokens]


# --- Stores: each holds the same content in its own folder ---


class Ours:
    """Our reference cache, with keys computed before the look-up."""

    name = "reference cache"

    def __init__(self, folder: Path) -> None:
        self.cache = ReferenceCache(folder, FINGERPRINT, flush_seconds=1e9)

    def add(self, sequences: Sequences, logps: list[np.ndarray]) -> None:
        for start in range(0, len(sequences), BATCH):
            self.cache.add_many(sequences[start : start + BATCH], logps[start : start + BATCH])
        self.cache.flush()

    def keys(self, rows: list[int], tokens: int) -> list[bytes]:
        return self.cache.keys([sequence(row, tokens) for row in rows])

    def get(self, keys: list[bytes], tokens: int) -> np.ndarray:
        return self.cache.look_up(keys, [tokens] * len(keys))[0]


class OursByTokens(Ours):
    """Our reference cache, where each look-up includes hashing the tokens. Reads the files of ``Ours``."""

    name = "reference cache, from tokens"

    def keys(self, rows: list[int], tokens: int) -> list[tuple]:
        return [sequence(row, tokens) for row in rows]

    def get(self, keys: list[tuple], tokens: int) -> np.ndarray:
        return super().get(self.cache.keys(keys), tokens)


class ByKey:
    """Base of stores that map bytes to bytes. They use the keys of the reference cache."""

    hasher = ReferenceCache("/nonexistent", FINGERPRINT)

    def keys(self, rows: list[int], tokens: int) -> list[bytes]:
        return self.hasher.keys([sequence(row, tokens) for row in rows])

    def items(self, sequences: Sequences, logps: list[np.ndarray]) -> list[tuple[bytes, bytes]]:
        return sorted(zip(self.hasher.keys(sequences), [row.tobytes() for row in logps]))


class SQLite(ByKey):
    """One table with the key as its primary key."""

    name = "SQLite"

    def __init__(self, folder: Path) -> None:
        self.connection = sqlite3.connect(folder / "cache.db")
        self.connection.execute("create table if not exists rows (key blob primary key, value blob) without rowid")

    def add(self, sequences: Sequences, logps: list[np.ndarray]) -> None:
        with self.connection:
            self.connection.executemany("insert into rows values (?, ?)", self.items(sequences, logps))

    def get(self, keys: list[bytes], tokens: int) -> np.ndarray:
        marks = ",".join("?" * len(keys))
        found = dict(self.connection.execute(f"select key, value from rows where key in ({marks})", keys))
        return np.frombuffer(b"".join(map(found.__getitem__, keys)), np.float32)


class LMDB(ByKey):
    """One LMDB database."""

    name = "LMDB"

    def __init__(self, folder: Path) -> None:
        import lmdb

        self.environment = lmdb.open(str(folder), map_size=1 << 36)
        self.transaction = self.environment.begin(buffers=True)

    def add(self, sequences: Sequences, logps: list[np.ndarray]) -> None:
        with self.environment.begin(write=True) as transaction:
            transaction.cursor().putmulti(self.items(sequences, logps))

    def get(self, keys: list[bytes], tokens: int) -> np.ndarray:
        return np.frombuffer(b"".join(map(self.transaction.get, keys)), np.float32)


class ArrowColumn:
    """A list column of a ``datasets.Dataset``, addressed by row number."""

    name = "Arrow column, by row number"

    def __init__(self, folder: Path) -> None:
        from datasets import Dataset, concatenate_datasets

        self.folder = folder
        parts = [Dataset.load_from_disk(part) for part in sorted(folder.iterdir())]
        self.dataset = concatenate_datasets(parts).with_format("numpy") if parts else None

    def add(self, sequences: Sequences, logps: list[np.ndarray]) -> None:
        from datasets import Dataset, Features, List, Value

        columns = self.columns(logps)
        kind = Value("float32") if isinstance(next(iter(columns.values())), np.ndarray) else List(Value("float32"))
        part = Dataset.from_dict(columns, features=Features(dict.fromkeys(columns, kind)))
        part.save_to_disk(self.folder / f"{len(list(self.folder.iterdir())):06}")

    def columns(self, logps: list[np.ndarray]) -> dict:
        return {"logps": logps}

    def keys(self, rows: list[int], tokens: int) -> list[int]:
        return rows

    def get(self, keys: list[int], tokens: int) -> np.ndarray:
        return np.concatenate(list(self.dataset[keys]["logps"]))


class TrlColumns(ArrowColumn):
    """The format of TRL's DPOTrainer: two sums per pair. Two completions of ours make a pair."""

    name = "TRL's columns of sums, by row number"

    def columns(self, logps: list[np.ndarray]) -> dict:
        sums = np.array([row.sum() for row in logps])
        return {"ref_chosen_logps": sums[::2], "ref_rejected_logps": sums[1::2]}

    def keys(self, rows: list[int], tokens: int) -> list[int]:
        return [row // 2 for row in rows[::2]]

    def get(self, keys: list[int], tokens: int) -> np.ndarray:
        batch = self.dataset[keys]
        return np.concatenate([batch["ref_chosen_logps"], batch["ref_rejected_logps"]])


STORES = {store.__name__: store for store in (Ours, OursByTokens, SQLite, LMDB, ArrowColumn, TrlColumns)}


# --- Measurements, each in a process of its own ---


@dataclass
class Clock:
    """Adds up the seconds and CPU seconds that this process spends in ``with`` blocks."""

    seconds: float = 0.0
    cpu: float = 0.0

    def __enter__(self) -> Clock:
        self._started = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._started[0]
        self.cpu += time.process_time() - self._started[1]


def _import_libraries(store: str) -> None:
    """Imports the libraries of a store, so that opening it is timed without imports."""
    if issubclass(STORES[store], ArrowColumn):
        __import__("datasets")


def fill(store: str, folder: str, first: str, rows: str, tokens: str) -> dict[str, float]:
    """Adds the rows ``first`` to ``rows`` - 1 to a store and returns the rates of filling it."""
    step = _CHUNK if int(tokens) > 1 else _SHORT_CHUNK
    _import_libraries(store)
    with Clock() as opening:
        filled = STORES[store](Path(folder))
    clock = Clock(opening.seconds, opening.cpu)
    for start in range(int(first), int(rows), step):
        chunk = range(start, min(start + step, int(rows)))
        sequences = [sequence(row, int(tokens)) for row in chunk]
        logps = [values(row, int(tokens)) for row in chunk]
        with clock:
            filled.add(sequences, logps)
    megabytes = (int(rows) - int(first)) * int(tokens) * 4 / 1e6
    return {"fill_mb_per_s": megabytes / clock.seconds, "fill_mb_per_cpu_s": megabytes / clock.cpu}


def read(store: str, folder: str, rows: str, tokens: str, rounds: int = 7, batches: int = 200) -> dict[str, float]:
    """Opens a store and looks up random rows among the first ``rows``.

    Every batch is compared with the expected values, outside of the timed part.
    """
    _import_libraries(store)
    opened: list = []
    opening, peak = _peak_anonymous(lambda: opened.append(STORES[store](Path(folder))))
    random = np.random.default_rng(2)
    rates = []
    for _ in range(rounds):
        drawn = random.integers(0, int(rows), (batches, BATCH)).tolist()
        keys = [opened[0].keys(batch, int(tokens)) for batch in drawn]
        found = []
        with Clock() as clock:
            for batch in keys:
                found.append(opened[0].get(batch, int(tokens)))
        rates.append((batches * BATCH / clock.seconds, batches * BATCH / clock.cpu))
        if store != "TrlColumns":
            for batch, got in zip(drawn, found):
                np.testing.assert_array_equal(got, np.concatenate([values(row, int(tokens)) for row in batch]))
    rate, cpu_rate = (statistics.median(column) for column in zip(*rates[1:]))  # the first round warms up
    lookups = {"lookups_per_s": rate, "lookups_per_cpu_s": cpu_rate}
    return {"open_s": opening.seconds, "open_cpu_s": opening.cpu, "peak_anonymous_mb": peak, **lookups}


def _peak_anonymous(call: Callable[[], None]) -> tuple[Clock, float]:
    """Returns the time of a call and its peak of additional anonymous memory in MB, sampled every 2 ms."""

    def resident() -> float:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024 / 1e6

    before, seen, done = resident(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    with Clock() as clock:
        call()
    done.set()
    watcher.join()
    return clock, max([*seen, resident()]) - before


def train(lengths: str, steps: str) -> dict[str, float]:
    """Trains the model of ``bench step``. Returns the seconds per step and the share of them spent in the cache."""
    from datasets import Dataset
    from transformers import TrainerCallback

    from .lengths import preference_rows
    from .shapes import Shape
    from .trainers import build_model, our_trainer

    shape = Shape() if lengths != "tiny" else Shape(hidden=32, layers=2, heads=2, kv_heads=1, vocab=500)
    lookups, stepping = Clock(), Clock()
    lookup = ReferenceCache.log_probs

    def timed(self: ReferenceCache, sequences: Sequences) -> np.ndarray:
        with lookups:
            return lookup(self, sequences)

    class Times(TrainerCallback):
        def on_step_end(self, args, state, control, **_) -> None:
            if state.global_step == 1:  # the first step warms up: start counting after it
                lookups.__init__()
                stepping.__enter__()
            elif state.global_step == state.max_steps:
                stepping.__exit__()

    ReferenceCache.log_probs = timed
    spec = {"device": "cpu", "loss": "sigmoid", "gradient_checkpointing": False, "learning_rate": 1e-6}
    spec |= {"steps": int(steps), "pairs": 8, "shape": vars(shape)}
    rows = Dataset.from_list(preference_rows(lengths, spec["steps"] * spec["pairs"], shape.vocab))
    with tempfile.TemporaryDirectory() as folder:
        our_trainer(spec, build_model(shape), rows, [Times()], folder).train()
    timed_steps = spec["steps"] - 1
    return {
        "step_s": stepping.seconds / timed_steps,
        "share_of_step": lookups.seconds / stepping.seconds,
        "us_per_completion": lookups.seconds / (timed_steps * spec["pairs"] * 2) * 1e6,
    }


def _measure(call: Callable[..., dict[str, float]], *arguments: object) -> dict[str, float]:
    """Runs one measurement in its own process and returns its result."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.cache", "--measure", call.__name__, *map(str, arguments)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


# --- The whole run ---


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench cache", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000_000, help="completions in the large index")
    parser.add_argument(
        "--valued", type=int, default=1_000_000, help="completions with --tokens values; the others have one"
    )
    parser.add_argument("--tokens", type=int, default=200, help="values per completion")
    parser.add_argument("--stores", default=",".join(STORES), help="stores to measure, separated by commas")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--quick", action="store_true", help="smoke test: 50,000 and 5,000 rows, one peer, toy steps")
    add_output_options(parser)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        call, *arguments = args.measure
        print(json.dumps({call.__name__: call for call in (fill, read, train)}[call](*arguments)))
        return
    if args.quick:
        args.rows, args.valued, args.stores = 50_000, 5_000, "Ours,OursByTokens,SQLite"
    # Compare the stores on the smaller number of rows, then fill ours up to the large index.
    folder = Path(tempfile.mkdtemp(prefix="bench-cache-", dir=args.folder))
    try:
        stores = _compare(folder, args.stores.split(","), args.valued, args.tokens)
        _measure(fill, "Ours", folder / "Ours", args.valued, args.rows, 1)
        large = {name: _measure(read, name, folder / "Ours", args.valued, args.tokens) for name in _OF_OURS}
        shards = len(list(folder.glob("Ours/*/*.arrow")))
    finally:
        shutil.rmtree(folder)
    step = _measure(train, *(("tiny", 4) if args.quick else ("mixed", 12)))
    print(f"{args.valued:,} completions of {args.tokens} values\n{_report(stores)}")
    print(f"\n{args.rows:,} completions, {args.valued:,} of them of {args.tokens} values, {shards} shards")
    print(_report(large))
    print(
        f"\na step of {step['step_s']:.2f} s spends {step['share_of_step']:.3%} in the cache,"
        f" {step['us_per_completion']:.1f} us per completion"
    )
    summary = {"index_of": args.rows, **large["Ours"], **{k: v for k, v in stores["Ours"].items() if "fill" in k}}
    details = {"valued": args.valued, "tokens": args.tokens, "shards": shards}
    finish("cache", {**details, "stores": stores, "large": large, "step": step}, summary | step, args)


_OF_OURS = ("Ours", "OursByTokens")


def _compare(folder: Path, names: list[str], rows: int, tokens: int) -> dict[str, dict[str, float]]:
    """Fills and reads every store; removes its files before the next one."""
    stores = {}
    for name in names:
        store = STORES[name]
        if store is LMDB and find_spec("lmdb") is None:
            print("LMDB is left out, because it is not installed")
            continue
        place = folder / ("Ours" if name in _OF_OURS else name)
        place.mkdir(exist_ok=True)
        filled = {} if store is OursByTokens else _measure(fill, name, place, 0, rows, tokens)
        stores[name] = filled | _measure(read, name, place, rows, tokens)
        if name not in _OF_OURS:
            shutil.rmtree(place)
    return stores


def _report(measured: dict[str, dict[str, float]]) -> str:
    columns = {
        "fill MB/s": ("fill_mb_per_s", ",.0f"),
        "per CPU s": ("fill_mb_per_cpu_s", ",.0f"),
        "open s": ("open_s", ".2f"),
        "MB": ("peak_anonymous_mb", ",.0f"),
        "look-ups/s": ("lookups_per_s", ",.0f"),
        "per CPU s ": ("lookups_per_cpu_s", ",.0f"),
    }
    rows = [
        [STORES[name].name, *(format(found[key], how) if key in found else "" for key, how in columns.values())]
        for name, found in measured.items()
    ]
    return table(["", *columns], rows)


if __name__ == "__main__":
    main()
