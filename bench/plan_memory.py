"""Is the memory that ``cpt plan`` predicts right? Predicted and measured peaks of training on a CPU.

    python -m bench plan_memory --record

Six settings differ in lengths, pairs, what is trained, checkpointing, and micro-batches of a step. Each is
predicted in one process, without weights, and trained for two steps in another. The measured peak is the largest
resident memory during training, without what the process had before it made the model: it has run a toy by then, so
libraries, threads and their buffers are there. glibc gives freed memory back at once (``ALLOCATOR``), because by
default it keeps some of it for later.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

from .lengths import preference_rows
from .shapes import Shape
from .timing import (
    MIB,
    Channel,
    Worker,
    add_output_options,
    close_all,
    finish,
    peak_mib,
    reset_peak,
    resident_mib,
    table,
)

ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
_BOUND = 0.15
_BASE = Shape(hidden=384, layers=6, heads=6, kv_heads=2, intermediate=1024, vocab=16000)
_TOY = Shape(hidden=32, layers=2, heads=2, kv_heads=1, intermediate=64, vocab=500)


@dataclasses.dataclass(frozen=True)
class Setting:
    """A run of two steps. Its options are those of ``ContrastiveConfig``."""

    name: str
    lengths: str
    batch_size: int
    shape: Shape = _BASE
    lora_rank: int = 0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


_CHECKPOINTS = {"gradient_checkpointing": True}
SETTINGS = [
    Setting("full", "mixed", 4),
    Setting("full, checkpointing", "mixed", 12, options=_CHECKPOINTS),
    Setting("LoRA", "uniform:300:200", 6, lora_rank=16),
    Setting("LoRA, checkpointing", "long-prompt", 6, lora_rank=16, options=_CHECKPOINTS),
    Setting("two micro-batches", "hh", 12, options={"gradient_accumulation_steps": 2}),
    Setting("a budget, checkpointing", "uniform:64:128", 1, options={**_CHECKPOINTS, "max_tokens_per_batch": 6000}),
]

QUICK = Setting("quick", "mixed", 4, Shape(hidden=256, layers=2, heads=4, kv_heads=2, intermediate=704, vocab=12000))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench plan_memory", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--settings", help=f"comma-separated numbers, 1 to {len(SETTINGS)}; default all")
    parser.add_argument("--quick", action="store_true", help="one small setting")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    numbers = map(int, options.settings.split(",")) if options.settings else range(1, len(SETTINGS) + 1)
    options.chosen = [QUICK] if options.quick else [SETTINGS[number - 1] for number in numbers]
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    found, rows = {}, []
    for setting in options.chosen:
        found[setting.name] = one = measure(setting)
        predicted, measured = (f"{one[part] / MIB:,.1f}" for part in ("predicted", "measured"))
        rows.append([setting.name, predicted, measured, f"{one['ratio']:.3f}"])
        print(*rows[-1], sep="  ", flush=True)
    print(table(["setting", "predicted, MiB", "measured, MiB", "predicted / measured"], rows))
    error = max(abs(one["ratio"] - 1) for one in found.values())
    summary = {"largest_error": round(error, 3), "within_bound": error <= _BOUND}
    finish("plan_memory", {"settings": found, "allocator": ALLOCATOR}, summary, options)


def measure(setting: Setting) -> dict[str, Any]:
    """Returns the bytes that are predicted and measured for a setting."""
    spec = dataclasses.asdict(setting)
    answers = {}
    for side in ("plan", "train"):
        worker = Worker(side, "bench.plan_memory", {**spec, "side": side}, ALLOCATOR)
        try:
            answers[side] = worker.ask("run")
        finally:
            close_all([worker])
    predicted, measured = answers["plan"]["peak"], answers["train"]["peak"]
    return {"predicted": predicted, "measured": measured, "ratio": predicted / measured, **answers, "setting": spec}


# --- The workers ---


def work(spec: dict[str, Any]) -> None:
    """Answers one request with the predicted or the measured peak."""
    import torch

    torch.set_num_threads(1)
    channel = Channel()
    channel.reply(ready=True)
    channel.receive()
    channel.reply(**{"plan": _plan, "train": _train}[spec["side"]](spec))


def _trainer(spec: dict[str, Any], folder: str, cls: Any, device: str) -> Any:
    """Returns our trainer, or one that only plans, on a model with or without weights."""
    import torch
    from datasets import Dataset

    from cpt_kernels import ContrastiveConfig

    from .trainers import adapter, build_model, tokenizer

    shape = Shape(**spec["shape"])
    options = {
        "gradient_checkpointing": False,
        "bf16": False,
        "per_device_train_batch_size": spec["batch_size"],
        **spec["options"],
    }
    steps = options.get("gradient_accumulation_steps", 1) * 2
    args = ContrastiveConfig(
        folder,
        max_steps=2,
        max_length=None,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        ref_cache_dir=f"{folder}/cache",
        **options,
    )
    rows = steps * (40 if "max_tokens_per_batch" in options else spec["batch_size"])
    data = Dataset.from_list(preference_rows(spec["lengths"], rows, shape.vocab))
    with torch.device(device):
        model = build_model(shape)
    words = tokenizer(shape.vocab)
    return cls(model, None, args, train_dataset=data, processing_class=words, peft_config=adapter(spec))


def _plan(spec: dict[str, Any]) -> dict[str, Any]:
    from cpt_kernels.cli.planned import PlannedTrainer
    from cpt_kernels.planning.budget import expected_memory
    from cpt_kernels.planning.counts import count_run
    from cpt_kernels.planning.engines import state_bytes

    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(spec, folder, PlannedTrainer, "meta")
        counts = count_run(trainer.get_train_dataloader(), trainer.train_dataset, trainer.collator, trainer.args)
        found = expected_memory(trainer, counts.largest_rows)
    side = found[("with" if trainer.args.gradient_checkpointing else "without") + " checkpointing"]
    return {**side, "state": state_bytes(trainer.packed.model, trainer.args), "tokens": counts.largest.tokens}


def _train(spec: dict[str, Any]) -> dict[str, Any]:
    from cpt_kernels import ContrastiveTrainer

    toy = {**spec, "shape": dataclasses.asdict(_TOY), "lengths": "tiny"}
    with tempfile.TemporaryDirectory() as folder:
        _trainer(toy, folder, ContrastiveTrainer, "cpu").train()
    before = resident_mib()
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(spec, folder, ContrastiveTrainer, "cpu")
        resident_mib()  # gives the memory of the reference pass back
        is_reset = reset_peak()
        trainer.train()
        peak = peak_mib()
    return {"peak": (peak - before) * MIB, "before_mib": before, "is_reset": is_reset}


if __name__ == "__main__":
    work(json.loads(sys.argv[sys.argv.index("--worker") + 1]))
