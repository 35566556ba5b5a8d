"""Parts of ``gpu_check`` that time training steps of published shapes, ours and TRL's, in one process.

A step has 8 pairs with lengths like UltraFeedback's. All contestants start from the same weights and train on the same
rows in the same order; the metrics of their first steps are compared with those of our default. Each has one more step
under PyTorch's profiler.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from transformers import TrainerCallback

from cpt_kernels.planning.work import packed, padded

from ..lengths import pair_of, preference_rows
from ..shapes import SHAPES, Shape
from ..timing import MIB
from .meter import Context, Row, free_memory, product_rate

PAIRS, WARM, TIMED = 8, 3, 4  # pairs per step; steps before the timed ones, and timed steps
COMPARED = {"loss": 0.02, "logps/chosen": 0.01, "logps/rejected": 0.01}  # metric -> largest relative difference
_TABLE = 8  # rows of a profiler table
_TOY = Shape(hidden=32, layers=2, heads=2, kv_heads=1, intermediate=64, vocab=500)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One contestant. ``None`` for ``checkpointing`` is the trainer's default."""

    side: str = "ours"  # or "trl"
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    checkpointing: bool | None = None
    liger: bool = False
    base: torch.dtype = torch.float32  # dtype of the weights that the trainer gets
    may_not_fit: bool = False  # running out of memory is a result

    def absent(self, device: str) -> str | None:
        """Returns the reason why the contestant cannot run here, or None if it can."""
        if self.liger and device == "cpu":
            return "Liger's kernels need a GPU"
        needed = (["trl"] if self.side == "trl" else []) + (["liger_kernel"] if self.liger else [])
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(missing)}" if missing else None


_TRL, _NO_FIT = partial(Entry, "trl"), partial(Entry, checkpointing=False, may_not_fit=True)
UNSHARED = {"share_prompts": "false"}
# The most important comparisons come first, because the last ones may have no time left.
FULL = {
    "default": Entry(),
    "TRL, padded, SDPA, Liger": _TRL(liger=True),
    "unshared, Liger (stand-in for padding-free)": Entry(options=UNSHARED, liger=True),
    "no checkpointing": _NO_FIT(),
    "TRL, padded, SDPA, Liger, no checkpointing": _TRL(liger=True, checkpointing=False, may_not_fit=True),
    "unshared, Liger, no checkpointing": _NO_FIT(options=UNSHARED, liger=True),
    "checkpointing": Entry(checkpointing=True),
    "Liger layers": Entry(liger=True),
    "TRL, padded, SDPA": _TRL(),
}
# The package itself keeps a frozen base in bf16, so the contestants get it in bf16.
LORA = {name: dataclasses.replace(entry, base=torch.bfloat16) for name, entry in FULL.items()}
LORA["fp32 base"] = Entry()


def full(context: Context) -> Iterator[Row]:
    """Trains all weights of a model of llama-1b's shape."""
    yield from _steps(context, "llama-1b", FULL, lora_rank=0)


def lora(context: Context) -> Iterator[Row]:
    """Trains adapters on all linear layers of a model of llama-8b's shape."""
    yield from _steps(context, "llama-8b", LORA, lora_rank=16)


@dataclasses.dataclass(frozen=True)
class Race:
    """What the contestants have in common."""

    shape: Shape
    lora_rank: int
    rows: list[dict[str, list[int]]]
    pairs: int  # per step
    finished: dict[str, StepMeter] = dataclasses.field(default_factory=dict)  # contestant -> its steps

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
        }

    def tflop(self, entry: Entry) -> float:
        """Returns the operations of the timed steps in 10^12, without those of recomputed activations."""
        first, total = WARM * self.pairs, 0.0
        for start in range(first, first + TIMED * self.pairs, self.pairs):
            batch = [pair_of(row) for row in self.rows[start : start + self.pairs]]
            trl = entry.side == "trl"
            work = padded(batch, True) if trl else packed(batch, "share_prompts" not in entry.options)
            total += work.flops(self.shape, adapters=self.lora_rank > 0)["total"]
        return total / 1e12


def _steps(context: Context, name: str, entries: dict[str, Entry], lora_rank: int) -> Iterator[Row]:
    """Measures the rate of the head's product, then every contestant."""
    shape, lengths, pairs = (_TOY, "tiny", 4) if context.tiny else (SHAPES[name], "ultrafeedback", PAIRS)
    yield from product_rate(context, 64 if context.tiny else 8192, shape.hidden, shape.vocab)
    free_memory()
    race = Race(shape, lora_rank, preference_rows(lengths, (WARM + TIMED + 1) * pairs, shape.vocab), pairs)
    for contestant, entry in entries.items():
        what = f"{name}{', LoRA' if lora_rank else ''}: {contestant}"
        if reason := entry.absent(context.device):
            yield {"what": what, "result": reason}
            continue
        work = partial(_train, context, race, contestant, entry)
        yield from context.attempt(what, work, seconds=8.0, peer=entry.side == "trl" or entry.may_not_fit)
        gc.collect()  # trainers refer to themselves
        free_memory()


def _train(context: Context, race: Race, name: str, entry: Entry) -> Row:
    """Trains one contestant and compares its steps with those of our default."""
    from datasets import Dataset

    from ..trainers import build_model, our_trainer, trl_trainer

    cuda = context.device == "cuda"
    model = build_model(race.shape, attention="sdpa", device=context.device).to(entry.base)
    meter = StepMeter(cuda)
    build = trl_trainer if entry.side == "trl" else our_trainer
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(race.spec(entry, context.device), model, Dataset.from_list(race.rows), [meter], folder)
        trainer.train()
    # Time, memory, and the share of the rate of large products.
    seconds = meter.seconds[WARM : WARM + TIMED]
    ms = 1e3 * statistics.mean(seconds)
    found: Row = {"ms": ms, "steps_ms": [1e3 * s for s in meter.seconds], "tflop_s": race.tflop(entry) / sum(seconds)}
    notes = [f"{ms:.1f} ms a step"]
    if cuda:
        found["peak_mib"] = round(torch.cuda.max_memory_allocated() / MIB, 1)
        notes.append(f"{found['peak_mib'] / 1024:.1f} GiB")
    if "matmul_tflop_s" in context.rates:
        found["floor_share"] = found["tflop_s"] / context.rates["matmul_tflop_s"]
        notes.append(f"{found['floor_share']:.0%} of the rate of products")
    if meter.busy is not None:
        notes.append(f"device busy {meter.busy:.0%}")
    found |= {"profile": meter.table, "busy": meter.busy, "metrics": meter.metrics}
    # Comparison with our default, which runs first.
    race.finished[name] = meter
    default = race.finished.get("default")
    if default is None:
        notes.append("not compared, because our default failed")
    else:
        notes.append(f"{sum(seconds) / sum(default.seconds[WARM : WARM + TIMED]):.2f}x our default")
        if wrong := differences(default.metrics, meter.metrics):
            found["failed"] = wrong
    return {"result": ", ".join(notes), **found}


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
        activities = [torch.profiler.ProfilerActivity.CPU, *([torch.profiler.ProfilerActivity.CUDA] if cuda else [])]
        self.profiler = torch.profiler.profile(activities=activities)

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
        averages = self.profiler.key_averages()
        column = "self_device_time_total" if self.cuda else "self_cpu_time_total"
        own = [
            (getattr(one, column) / 1e3, one.count, one.key) for one in averages if not (self.cuda and _on_host(one))
        ]
        total = sum(ms for ms, *_ in own)
        self.table = [
            f"{ms:8.2f} ms {ms / total:4.0%} {count:5d}x {key[:70]}"
            for ms, count, key in sorted(own, reverse=True)[:_TABLE]
        ]
        if self.cuda:
            self.busy = total / 1e3 / self.seconds[-1]


def _on_host(average: Any) -> bool:
    """Returns True for an operator: its device time is that of its kernels, which have rows of their own."""
    return average.device_type == torch.autograd.DeviceType.CPU
