"""Parts of ``gpu_check`` that time training steps of published shapes, ours and TRL's.

A step has 8 pairs with lengths like UltraFeedback's. All contestants start from the same weights and train on the same
rows in the same order; the metrics of their first steps are compared with those of our default. Each has one more step
under PyTorch's profiler.

Each contestant has its own process, because Liger replaces classes and functions of transformers. The next processes
start ahead, import what they need, and wait for their turn. A dry run trains all contestants in one process, without
Liger.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from transformers import TrainerCallback

from cpt_kernels.planning.work import packed, padded

from ..lengths import pair_of, preference_rows
from ..shapes import SHAPES, Shape
from ..timing import MIB, Channel, Worker, close_all
from .meter import Context, Row, free_memory, product_rate

PAIRS, WARM, TIMED = 8, 3, 3  # pairs per step; steps before the timed ones, and timed steps
COMPARED = {"loss": 0.02, "logps/chosen": 0.01, "logps/rejected": 0.01}  # metric -> largest relative difference
_TABLE = 8  # rows of a profiler table
_AHEAD = 4  # processes at a time
_TOY = Shape(hidden=32, layers=2, heads=2, kv_heads=1, intermediate=64, vocab=500)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One contestant. ``None`` for ``checkpointing`` is the trainer's default."""

    side: str = "ours"  # or "trl"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    checkpointing: bool | None = None
    liger: bool = False
    base: torch.dtype = torch.float32  # dtype of the weights that the trainer gets
    by_name: bool = False  # treat the model as one that the trainer has loaded: frozen weights are rounded
    may_not_fit: bool = False  # running out of memory is a result

    def absent(self, device: str) -> str | None:
        """Returns the reason why the contestant cannot run here, or None if it can."""
        if self.liger and device == "cpu":
            return "Liger's kernels need a GPU"
        needed = (["trl"] if self.side == "trl" else []) + (["liger_kernel"] if self.liger else [])
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(missing)}" if missing else None


_TRL, _NO_FIT = partial(Entry, "trl"), partial(Entry, checkpointing=False, may_not_fit=True)
UNSHARED, EAGER = {"share_prompts": "false"}, {"layers": "eager"}
# The most important comparisons come first, because the last ones may have no time left.
FULL = {
    "default": Entry(),
    "TRL, padded, SDPA, Liger": _TRL(liger=True),
    "unshared, Liger (stand-in for padding-free)": Entry(options=UNSHARED, liger=True),
    "eager layers": Entry(options=EAGER),
    "no checkpointing": _NO_FIT(),
    "TRL, padded, SDPA, Liger, no checkpointing": _TRL(liger=True, checkpointing=False, may_not_fit=True),
    "unshared, Liger, no checkpointing": _NO_FIT(options=UNSHARED, liger=True),
    "checkpointing": Entry(checkpointing=True),
    "Liger layers": Entry(liger=True),
    "TRL, padded, SDPA": _TRL(),
}
# The frozen base is in bf16, in which autocast computes with it. The last contestants have it in fp32.
LORA = {name: dataclasses.replace(entry, base=torch.bfloat16) for name, entry in FULL.items()}
LORA["fp32 base by name"] = Entry(by_name=True)
LORA["fp32 base"] = Entry()
# The default compiles layers on a GPU. A dry run traces them, without the minutes of code generation.
TRACED = {"traced layers": Entry(options={"layers": "compiled", "torch_compile_backend": "aot_eager"})}


@dataclasses.dataclass(frozen=True)
class Race:
    """The shape of the model, what of it is trained, and the contestants."""

    shape: Shape
    lora_rank: int  # 0: all weights are trained
    entries: dict[str, Entry]
    lengths: str = "ultrafeedback"
    pairs: int = PAIRS  # per step

    def tiny(self) -> Race:
        """Returns the race that a CPU runs in seconds."""
        entries = self.entries | ({} if self.lora_rank else TRACED)
        return dataclasses.replace(self, shape=_TOY, entries=entries, lengths="tiny", pairs=4)

    def rows(self) -> list[dict[str, list[int]]]:
        """Returns the pairs of all steps."""
        return preference_rows(self.lengths, (WARM + TIMED + 1) * self.pairs, self.shape.vocab)

    def spec(self, entry: Entry, device: str) -> dict[str, Any]:
        """Returns the settings that :mod:`bench.trainers` takes."""
        return {
            "shape": dataclasses.asdict(self.shape),
            "steps": WARM + TIMED + 1,
            "pairs": self.pairs,
            "loss": "sigmoid",
            "learning_rate": 1e-5,
            "lora_rank": self.lora_rank,
            "device": device,
            "options": entry.options,
            "gradient_checkpointing": entry.checkpointing,
            "liger_layers": entry.liger,
            "weights_id": uuid.uuid4().hex,
        }

    def tflop(self, entry: Entry) -> float:
        """Returns the operations of the timed steps in 10^12, without those of recomputed activations."""
        pairs, total = list(map(pair_of, self.rows())), 0.0
        for start in range(WARM * self.pairs, (WARM + TIMED) * self.pairs, self.pairs):
            batch = pairs[start : start + self.pairs]
            trl = entry.side == "trl"
            work = padded(batch, True) if trl else packed(batch, "share_prompts" not in entry.options)
            total += work.flops(self.shape, adapters=self.lora_rank > 0)["total"]
        return total / 1e12


RACES = {
    "llama-1b": Race(SHAPES["llama-1b"], 0, FULL),
    "llama-8b, LoRA": Race(SHAPES["llama-8b"], 16, LORA),
}


def full(context: Context) -> Iterator[Row]:
    """Trains all weights of a model of llama-1b's shape."""
    yield from _steps(context, "llama-1b")


def lora(context: Context) -> Iterator[Row]:
    """Trains adapters on all linear layers of a model of llama-8b's shape."""
    yield from _steps(context, "llama-8b, LoRA")


def _steps(context: Context, title: str) -> Iterator[Row]:
    """Measures the rate of the head's product, then every contestant."""
    race = RACES[title].tiny() if context.tiny else RACES[title]
    absent = {name: entry.absent(context.device) for name, entry in race.entries.items()}
    waiting = [] if context.tiny else [name for name, reason in absent.items() if reason is None]
    workers: dict[str, Worker] = {}

    def start() -> None:
        while waiting and len(workers) < _AHEAD:
            name = waiting.pop(0)
            workers[name] = Worker(name, "bench.gpu.steps", {"race": title, "name": name})

    try:
        start()
        yield from product_rate(context, 64 if context.tiny else 8192, race.shape.hidden, race.shape.vocab)
        free_memory()
        finished: dict[str, Row] = {}
        for name, entry in race.entries.items():
            if reason := absent[name]:
                yield {"what": f"{title}: {name}", "result": reason}
                continue
            work = partial(_turn, context, race, name, workers.get(name), finished)
            yield from context.attempt(f"{title}: {name}", work, seconds=8.0, peer=_excused(entry))
            if name in workers:
                workers.pop(name).close()  # frees the device's memory
            start()
    finally:
        close_all(list(workers.values()))


def _excused(entry: Entry) -> bool:
    """Returns True if it is no failure that the contestant runs out of memory."""
    return entry.side == "trl" or entry.may_not_fit


def _turn(context: Context, race: Race, name: str, worker: Worker | None, finished: dict[str, Row]) -> Row:
    """Trains one contestant, in its worker if it has one, and compares it with our default, which runs first."""
    row = _ask(worker, context.left) if worker else train(race, race.entries[name], context.device)
    if "ms" not in row:  # it failed, or ran out of memory
        return row
    finished[name] = row
    tflop_s = race.tflop(race.entries[name]) / TIMED / row["ms"] * 1e3
    notes = [f"{row['ms']:.1f} ms a step"]
    if "peak_mib" in row:
        notes.append(f"{row['peak_mib'] / 1024:.1f} GiB, device busy {row['busy']:.0%}")
    found = {"tflop_s": tflop_s}
    if "matmul_tflop_s" in context.rates:
        found["floor_share"] = tflop_s / context.rates["matmul_tflop_s"]
        notes.append(f"{found['floor_share']:.0%} of the rate of products")
    if "default" not in finished:
        notes.append("not compared, because our default did not finish")
    else:
        notes.append(f"{row['ms'] / finished['default']['ms']:.2f}x our default")
        if wrong := differences(finished["default"]["metrics"], row["metrics"]):
            found["failed"] = wrong
    return {**row, **found, "result": ", ".join(notes)}


def _ask(worker: Worker, seconds: float) -> Row:
    """Lets a worker train. It is killed after ``seconds``, so that the rows behind it are reported as skipped.

    Raises:
        RuntimeError: The worker was killed, or ended.
    """
    limit, started = threading.Timer(seconds, worker.process.kill), time.monotonic()
    limit.start()
    try:
        return worker.ask("run")
    except RuntimeError as error:
        if time.monotonic() - started < seconds:
            raise
        raise RuntimeError(f"{error}\nkilled after {seconds:.0f} s") from None
    finally:
        limit.cancel()


def train(race: Race, entry: Entry, device: str) -> Row:
    """Trains one contestant. Returns its times, memory, metrics and profile."""
    from datasets import Dataset

    from ..trainers import build_model, our_trainer, trl_trainer

    model = build_model(race.shape, attention="sdpa", device=device).to(entry.base)
    meter = StepMeter(device == "cuda")
    build = trl_trainer if entry.side == "trl" else our_trainer
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(race.spec(entry, device), model, Dataset.from_list(race.rows()), [meter], folder)
        trainer.is_loaded_here = entry.by_name
        trainer.train()
    found: Row = {"ms": 1e3 * statistics.mean(meter.seconds[WARM : WARM + TIMED])}
    found |= {"steps_ms": [1e3 * seconds for seconds in meter.seconds], "metrics": meter.metrics}
    if device == "cuda":
        found |= {"peak_mib": round(torch.cuda.max_memory_allocated() / MIB, 1), "busy": meter.busy}
    return found | {"profile": meter.table}


def differences(ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]]) -> str | None:
    """Describes the first metric of the first steps that differs by more than ``COMPARED`` allows, or returns None.

    A step that logged no metric, or NaN, differs.
    """
    if len(ours) != WARM + TIMED + 1 or len(theirs) != len(ours):
        return f"{len(theirs)} steps were logged, expected {WARM + TIMED + 1}"
    for step, (a, b) in enumerate(zip(ours[:WARM], theirs), 1):
        for name, tolerance in COMPARED.items():
            if not abs(a[name] - b[name]) <= tolerance * abs(a[name]):
                return f"step {step}: {name} is {b[name]:.6g}, with our default {a[name]:.6g}"
    return None


class StepMeter(TrainerCallback):
    """Measures every step of a trainer, and profiles the last one.

    A step's time runs from the log of the step before to its own, which waits for the device. It includes fetching and
    collating the batch, forward, backward, optimizer and metrics.
    """

    def __init__(self, cuda: bool):
        self.cuda = cuda
        self.seconds: list[float] = []
        self.metrics: list[dict[str, float]] = []
        self.table: list[str] = []
        self.busy: float | None = None  # share of the profiled step in which the device ran kernels
        activity = torch.profiler.ProfilerActivity.CUDA if cuda else torch.profiler.ProfilerActivity.CPU
        self.profiler = torch.profiler.profile(activities=[activity])

    def on_train_begin(self, args, state, control, **_) -> None:
        self._start()

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if "loss" not in (logs or {}):  # the summary that the trainer logs after the last step
            return
        if self.cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.started)
        self.metrics.append({name: float(logs[name]) for name in COMPARED})
        if len(self.seconds) == state.max_steps:
            self._finish()
        else:
            self._start()

    def _start(self) -> None:
        if len(self.seconds) == WARM and self.cuda:
            torch.cuda.reset_peak_memory_stats()
        if len(self.seconds) == WARM + TIMED:
            self.profiler.start()
        self.started = time.perf_counter()

    def _finish(self) -> None:
        """Reads the profile: the kernels with the most time, and on a CPU the operators."""
        self.profiler.stop()
        found = self.profiler.key_averages()
        if self.cuda:
            found = [one for one in found if _is_kernel(one)]
        column = "self_device_time_total" if self.cuda else "self_cpu_time_total"
        own = [(getattr(one, column) / 1e3, one.count, one.key) for one in found]
        total = sum(ms for ms, *_ in own)
        self.table = [
            f"{ms:8.2f} ms {ms / total:4.0%} {count:5d}x {key[:70]}"
            for ms, count, key in sorted(own, reverse=True)[:_TABLE]
        ]
        if self.cuda:
            self.busy = total / 1e3 / self.seconds[-1]


def _is_kernel(average: Any) -> bool:
    """Returns False for operators and annotated regions, whose device time is that of their kernels."""
    return average.device_type != torch.autograd.DeviceType.CPU and not average.is_user_annotation


def main(spec: dict[str, Any]) -> None:
    """Runs one contestant's process: it imports, waits for its turn, trains, and answers with its row."""
    channel, race = Channel(), RACES[spec["race"]]
    entry, device = race.entries[spec["name"]], spec.get("device", "cuda")
    race = race.tiny() if device == "cpu" else race
    __import__("trl" if entry.side == "trl" else "cpt_kernels.trainer")
    channel.reply(ready=True)
    if channel.receive() == "run":
        context = Context(device, False, float("inf"))
        (row,) = context.attempt(spec["name"], partial(train, race, entry, device), peer=_excused(entry))
        del row["what"]  # the parent names the row
        channel.reply(**row)


if __name__ == "__main__":
    main(json.loads(sys.argv[sys.argv.index("--worker") + 1]))
