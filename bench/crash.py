"""Does a build of the reference cache lose or change values if its processes are killed at random?

    python -m bench crash --kills 200

A build calls ``Reference.fill``, as the trainer does, with a small model on two gloo ranks that share a folder. Both
ranks are forked from this process, so that a restart takes a second. After a random time, SIGKILL ends one rank, and
shortly afterwards the other, as a launcher would do. One run in five is killed during its start, the others within a
second of their first batch. After the last kill, an undisturbed run finishes the build. If a build finishes earlier,
the next one starts in a new folder. The benchmark checks that

- every value equals that of an undisturbed build up to rounding (a resumed build packs the remaining rows differently);
- a completion that was scored twice was first scored shortly before its rank was killed: within one flush interval,
  one batch and the writing of a shard;
- no reader found a damaged file (it would log a warning).

The report has the number of kills and of completions scored again, the largest difference, and the age of the oldest
completion scored again. The exit code is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import shutil
import signal
import socket
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from datasets import Dataset, disable_progress_bars
from tqdm import tqdm

import cpt_kernels.reference.scorer as reference_module
from cpt_kernels.data.collate import PackedCollator
from cpt_kernels.model.packed_model import PackedModel
from cpt_kernels.reference.cache import ReferenceCache
from cpt_kernels.reference.scorer import Reference

from .shapes import Shape
from .timing import add_output_options, finish
from .trainers import build_model

RANKS = 2
TOKENS_PER_BATCH = 256
TOLERANCE = 1e-5  # nats; the tolerance for fp32 log-probs
_LONGEST = 1800.0  # seconds after which an undisturbed run counts as failed
_SHAPE = Shape(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=128, vocab=512)


def make_rows(prompts: int, completions: int = 4) -> Dataset:
    """Returns prepared rows, each with a prompt and its completions of random tokens."""
    draw = np.random.default_rng(0)

    def ids(longest: int) -> list[int]:
        return draw.integers(3, _SHAPE.vocab, draw.integers(1, longest)).tolist()

    return Dataset.from_list(
        [{"prompt_ids": [row % 500 + 3, *ids(30)], "completion_ids": [ids(40) for _ in range(completions)]}
         for row in range(prompts)]
    )  # fmt: skip


class LoggedCache(ReferenceCache):
    """Appends time, process and key of every scored completion to a log file before it is stored."""

    log: Path

    def add_many(self, sequences, logps) -> None:
        lines = "".join(f"{time.time()} {os.getpid()} {key.hex()}\n" for key in self.keys(sequences))
        descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, lines.encode())
        os.close(descriptor)
        super().add_many(sequences, logps)


def build(model: torch.nn.Module, rows: Dataset, folder: Path, flush_seconds: float) -> None:
    """Runs one rank of a build. Rank and world size come from environment variables."""
    LoggedCache.log = folder.with_suffix(".log")
    reference_module.ReferenceCache = LoggedCache
    accelerator = Accelerator(cpu=True)
    reference = Reference(
        PackedModel(model), None, new_adapter=False, keep=False, accelerator=accelerator, cache_dir=str(folder)
    )
    reference.cache.flush_seconds = flush_seconds
    reference.fill(rows, PackedCollator(), TOKENS_PER_BATCH, "crash")
    broadcast_object_list([None])  # waits: rank 0 hosts the group's store, so it must exit last


@dataclass(frozen=True)
class Kill:
    """When a run is killed: ``after`` seconds from its start, or from its first batch if ``scoring``.

    Rank ``victim`` is killed first, and the other one ``grace`` seconds later.
    """

    after: float = 0.0
    scoring: bool = False
    victim: int = 0
    grace: float = 0.0


@dataclass
class Build:
    """Runs on one folder until all completions are stored."""

    model: torch.nn.Module
    rows: Dataset
    folder: Path
    flush_seconds: float
    kills: int = 0  # number of runs that were killed
    deaths: dict[int, float] = field(default_factory=dict)  # process id -> time at which it was killed
    problems: list[str] = field(default_factory=list)

    def run(self, kill: Kill | None = None) -> bool:
        """Starts a run and kills it as ``kill`` says. Returns True if the run finished before it was killed."""
        # Start both ranks on a free port.
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        log = self.folder.with_suffix(".log")
        size = log.stat().st_size if log.exists() else 0
        processes = [self._fork(rank, port) for rank in range(RANKS)]
        # Wait until both ranks end, or until the time to kill them.
        deadline = time.time() + (_LONGEST if kill is None else kill.after)
        done: dict[int, int] = {}
        while len(done) < RANKS and time.time() < deadline:
            for process in set(processes) - set(done):
                ended, status = os.waitpid(process, os.WNOHANG)
                if ended:
                    done[process] = status
            time.sleep(0.005)
            if kill and kill.scoring and not (log.exists() and log.stat().st_size > size):
                deadline = time.time() + kill.after  # no batch has been scored yet
        if len(done) == RANKS:
            if any(done.values()):
                self.problems.append(f"a rank failed: {done}")
            return True
        if kill is None:
            self.problems.append(f"an undisturbed run did not end within {_LONGEST:.0f} s")
            kill = Kill()
        # Kill the victim, then the other rank.
        self.kills += 1
        for process in (processes[kill.victim], processes[1 - kill.victim]):
            if process not in done:
                os.kill(process, signal.SIGKILL)
                self.deaths[process] = time.time()
                done[process] = os.waitpid(process, 0)[1]
                time.sleep(kill.grace)
        return False

    def _fork(self, rank: int, port: int) -> int:
        process = os.fork()
        if process:
            return process
        world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in world.items()})
        code = 1
        tqdm.set_lock(threading.RLock())  # forks share tqdm's own lock, and a killed process never releases it
        try:
            with open(self.folder.with_suffix(".err"), "a") as errors:
                os.dup2(errors.fileno(), 2)
            build(self.model, self.rows, self.folder, self.flush_seconds)
            code = 0
        except BaseException:
            logging.exception("rank %d", rank)
        finally:
            os._exit(code)

    def warnings(self) -> int:
        """Returns the number of damaged files that readers found."""
        return self.folder.with_suffix(".err").read_text().count("is damaged")

    def scorings(self) -> list[tuple[float, int, str]]:
        """Returns (time, process id, key) of every scored completion."""
        lines = self.folder.with_suffix(".log").read_text().splitlines()
        return [(float(at), int(process), key) for at, process, key in map(str.split, lines)]

    def oldest_repeated(self) -> tuple[int, float, float]:
        """Returns the number of completions scored again, and two durations in seconds.

        The first is the longest time from the first scoring of such a completion to the death of its rank. The second
        is the longest time between two batches of a process, which includes a flush.
        """
        by_process: dict[int, list[float]] = {}
        last: dict[str, tuple[float, int]] = {}
        repeated, oldest, slack = 0, 0.0, 0.0
        for at, process, key in sorted(self.scorings()):
            times = by_process.setdefault(process, [at])
            slack = max(slack, at - times[-1])
            times.append(at)
            if key in last:
                before, scorer = last[key]
                repeated += 1
                oldest = max(oldest, self.deaths.get(scorer, float("inf")) - before)
            last[key] = at, process
        for process, died in self.deaths.items():
            slack = max(slack, died - by_process.get(process, [died])[-1])
        return repeated, oldest, slack


def stored(folder: Path) -> dict[bytes, np.ndarray]:
    """Returns all rows of the only reference in a cache folder, by key."""
    (place,) = [path for path in folder.iterdir() if path.is_dir()]
    cache = ReferenceCache(folder, place.name)
    rows: dict[bytes, np.ndarray] = {}
    for shard in cache.shards:
        rows |= shard.rows()
    return rows


def crash(kills: int, prompts: int, flush_seconds: float, folder: Path, seed: int) -> dict:
    """Kills ``kills`` runs and compares the resulting caches with an undisturbed build. Returns the result."""
    # accelerate defaults to two threads per process, which makes two ranks slow on few cores.
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    disable_progress_bars()
    draw = random.Random(seed)
    model, rows = build_model(_SHAPE).eval(), make_rows(prompts)
    # The undisturbed build gives the expected values, and the seconds from start to first batch.
    undisturbed = Build(model, rows, folder / "undisturbed", flush_seconds)
    started = time.time()
    undisturbed.run()
    start = min(at for at, *_ in undisturbed.scorings()) - started
    expected = stored(undisturbed.folder)
    result = {"kills": 0, "builds": 0, "repeated": 0, "scored": 0, "largest_difference": 0.0, "temporary_files": 0}
    result |= {"oldest_repeated_s": 0.0, "slack_s": 0.0, "flush_s": flush_seconds, "completions": len(expected)}
    problems = [*undisturbed.problems]
    progress = tqdm(total=kills, desc="kills", smoothing=0)
    while result["kills"] < kills:
        # Kill runs of one build until it is complete or enough runs were killed, then let it finish.
        one = Build(model, rows, folder / f"build{result['builds']}", flush_seconds)
        ended = False
        while not ended and result["kills"] + one.kills < kills:
            scoring = draw.random() < 0.8
            after = draw.uniform(0, 1 if scoring else start)
            ended = one.run(Kill(after, scoring, draw.randrange(RANKS), draw.uniform(0, 0.3)))
            progress.update(not ended)
        if not ended:
            one.run()
        # Compare rows and values, and the age of completions scored again.
        found = stored(one.folder)
        problems += one.problems
        if found.keys() != expected.keys():
            problems.append(
                f"build {result['builds']}: {len(found.keys() ^ expected.keys())} rows are missing or unexpected"
            )
        differences = [float(np.abs(found[key] - expected[key]).max()) for key in found.keys() & expected.keys()]
        repeated, oldest, slack = one.oldest_repeated()
        if max(differences) > TOLERANCE:
            problems.append(f"build {result['builds']}: values differ by {max(differences)}")
        if oldest > flush_seconds + 2 * slack:
            problems.append(f"build {result['builds']}: a row scored {oldest:.2f} s before a death was scored again")
        if one.warnings():
            problems.append(f"build {result['builds']}: {one.warnings()} damaged files")
        # Add the build to the totals.
        result["kills"] += one.kills
        result["builds"] += 1
        result["repeated"] += repeated
        result["scored"] += len(one.scorings())
        result["temporary_files"] += len(list(one.folder.rglob(".*.tmp")))
        result["largest_difference"] = max(result["largest_difference"], *differences)
        result["oldest_repeated_s"] = max(result["oldest_repeated_s"], oldest)
        result["slack_s"] = max(result["slack_s"], slack)
        progress.write(f"build {result['builds']}: {one.kills} kills, {repeated} completions scored again")
        shutil.rmtree(one.folder)
    progress.close()
    return result | {"problems": problems, "seconds": time.time() - started}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench crash", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="number of runs to kill")
    parser.add_argument("--prompts", type=int, default=5_000, help="number of prompts; each has four completions")
    parser.add_argument("--flush_seconds", type=float, default=0.2, help="seconds between two flushes of a rank")
    parser.add_argument("--seed", type=int, default=0, help="seed of the times at which runs are killed")
    add_output_options(parser)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="bench-crash-") as folder:
        result = crash(args.kills, args.prompts, args.flush_seconds, Path(folder), args.seed)
    finish("crash", {}, result, args)
    if result["problems"]:
        raise SystemExit("\n".join(result["problems"]))


if __name__ == "__main__":
    main()
