"""Are the predictions of ``cpt plan`` right? Steps, tokens, seconds, and TRL's seconds, predicted and measured.

    python -m bench plan --record

Settings differ in lengths, pairs, what is trained, checkpointing, and images. A round calibrates, trains with
``ContrastiveTrainer`` (the reference pass included), and trains with TRL's ``DPOTrainer`` as installed, which runs its
reference in every step. Rounds repeat; the table has medians. Seconds are of CPU time with one thread, so that other
work on the machine counts little. Steps and tokens must be equal.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from .lengths import preference_rows
from .shapes import Shape
from .timing import Channel, Worker, add_output_options, close_all, finish, interleave, summarize, table

_SMALL = Shape(hidden=192, layers=4, heads=4, kv_heads=2, intermediate=512, vocab=6000)
_TOY = Shape(hidden=32, layers=2, heads=2, kv_heads=1, intermediate=64, vocab=500)
_BOUND = 0.25  # largest error of seconds and ratios


@dataclasses.dataclass(frozen=True)
class Setting:
    """A run, with as many pairs as one epoch has."""

    name: str
    lengths: str
    pairs: int
    shape: Shape = _SMALL
    lora_rank: int = 0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)  # of both trainers
    ours: dict[str, Any] = dataclasses.field(default_factory=dict)


SETTINGS = [
    Setting("full", "mixed", 16, options={"per_device_train_batch_size": 4}),
    Setting("checkpointing", "mixed", 16, options={"per_device_train_batch_size": 4, "gradient_checkpointing": True}),
    Setting(
        "LoRA, budget",
        "ultrafeedback",
        16,
        lora_rank=8,
        options={"per_device_train_batch_size": 4},
        ours={"max_tokens_per_batch": 4096},
    ),
    Setting("long prompts", "long-prompt", 12, options={"per_device_train_batch_size": 2}),
    Setting(
        "short, LoRA, checkpointing",
        "hh",
        32,
        lora_rank=16,
        options={
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "gradient_checkpointing": True,
            "num_train_epochs": 2,
        },
    ),
    Setting(
        "24 layers",
        "mixed",
        12,
        Shape(hidden=256, layers=24, heads=4, kv_heads=2, intermediate=1024, vocab=4000),
        options={"per_device_train_batch_size": 4},
    ),
    Setting(
        "images",
        "long-prompt",
        12,
        dataclasses.replace(_SMALL, image=64),
        options={"per_device_train_batch_size": 2},
    ),
]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench plan", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="rounds of every setting")
    parser.add_argument("--settings", help=f"comma-separated numbers, 1 to {len(SETTINGS)}; default all")
    parser.add_argument("--quick", action="store_true", help="smoke test: a toy model, one round of two settings")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    numbers = (
        [int(number) for number in options.settings.split(",")] if options.settings else range(1, len(SETTINGS) + 1)
    )
    options.chosen = [SETTINGS[number - 1] for number in numbers]
    if options.quick:
        options.rounds = 1
        options.chosen = [
            dataclasses.replace(setting, shape=_TOY, lengths="tiny", pairs=8, ours={}) for setting in SETTINGS[1:3]
        ]
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    found = {}
    for setting in options.chosen:
        found[setting.name] = measure(setting, options.rounds)
        print(describe({setting.name: found[setting.name]}), flush=True)
    print("\n" + describe(found))
    errors = {
        part: max(abs(one[part]["predicted"] / one[part]["measured"] - 1) for one in found.values()) for part in PARTS
    }
    exact = all(one["counts"]["predicted"] == one["counts"]["measured"] for one in found.values())
    summary = {"counts_exact": exact, **{f"largest_error_{part}": round(error, 3) for part, error in errors.items()}}
    summary["within_bound"] = exact and max(errors.values()) <= _BOUND
    finish("plan", {"settings": found, "rounds": options.rounds}, summary, options)


PARTS = ("training", "reference", "trl", "ratio")


def measure(setting: Setting, rounds: int) -> dict[str, Any]:
    """Returns predicted and measured numbers of a setting, medians over the rounds."""
    spec = dataclasses.asdict(setting)
    workers = [Worker(side, "bench.plan", {**spec, "side": side}) for side in ("plan", "ours", "trl")]
    try:
        answers = interleave(workers, rounds, "run")
    finally:
        close_all(workers)

    def median(side: str, part: str) -> float:
        return summarize([answer[part] for answer in answers[side]])["median"]

    predicted = {part: median("plan", part) for part in ("training", "reference", "trl")}
    measured = {part: median("ours", part) for part in ("training", "reference")} | {"trl": median("trl", "training")}
    for side in (predicted, measured):
        side["ratio"] = side["trl"] / (side["training"] + side["reference"])
    return {
        "counts": {"predicted": answers["plan"][0]["counts"], "measured": answers["ours"][0]["counts"]},
        **{part: {"predicted": predicted[part], "measured": measured[part]} for part in PARTS},
        "calibration": answers["plan"][0]["calibration"],
        "answers": answers,
        "setting": spec,
    }


def describe(found: dict[str, dict[str, Any]]) -> str:
    """Returns the table: predicted / measured of every part."""
    rows = []
    for name, one in found.items():
        counts = one["counts"]
        cells = [
            f"{one[part]['predicted']:.2f} / {one[part]['measured']:.2f} "
            f"({one[part]['predicted'] / one[part]['measured'] - 1:+.0%})"
            for part in PARTS
        ]
        same = "equal" if counts["predicted"] == counts["measured"] else f"{counts['predicted']} {counts['measured']}"
        rows.append([name, same, *cells, "{train}, {peer}".format_map(one["calibration"]["layers"])])
    header = ["predicted / measured", "steps, tokens", "training, s", "reference, s", "TRL, s", "TRL / ours"]
    return table([*header, "layers timed"], rows)


# --- The workers ---


def work(spec: dict[str, Any]) -> None:
    """Answers every request with one run, or one calibration, of a setting."""
    import torch

    torch.set_num_threads(1)
    run = {"plan": _plan, "ours": _train, "trl": _train_trl}[spec["side"]]
    channel = Channel()
    channel.reply(ready=True)
    while channel.receive():
        with tempfile.TemporaryDirectory() as folder:
            channel.reply(**run(spec, folder))


def _arguments(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "num_train_epochs": 1,
        "gradient_checkpointing": False,
        "max_length": None,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        **spec["options"],
    }


def _rows(spec: dict[str, Any]) -> Any:
    from datasets import Dataset

    from .trainers import image_rows

    shape, rows = Shape(**spec["shape"]), preference_rows(spec["lengths"], spec["pairs"], spec["shape"]["vocab"])
    return Dataset.from_list(image_rows(rows, shape) if shape.image else rows)


def _trainer(spec: dict[str, Any], folder: str, cls: Any, device: str) -> Any:
    """Returns our trainer, or one that only plans, on a model with or without weights."""
    from cpt_kernels import ContrastiveConfig

    from .trainers import adapter, build_model, processing_class

    args = ContrastiveConfig(**_arguments(spec, folder), ref_cache_dir=f"{folder}/cache", **spec["ours"])
    shape = Shape(**spec["shape"])
    model = build_model(shape, device=device)
    words = processing_class(spec)
    return cls(model, None, args, train_dataset=_rows(spec), processing_class=words, peft_config=adapter(spec))


def _plan(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    from cpt_kernels.cli.planned import PlannedTrainer
    from cpt_kernels.planning.calibration import calibrate, predict_seconds
    from cpt_kernels.planning.counts import count_run

    trainer = _trainer(spec, folder, PlannedTrainer, "meta")
    counts = count_run(trainer.get_train_dataloader(), trainer.train_dataset, trainer.collator, trainer.args)
    found = calibrate(trainer, counts, clock=time.process_time)
    seconds = predict_seconds(trainer, counts, found)
    return {
        "counts": {"steps": counts.steps, "tokens": counts.work.tokens, "scored": counts.work.head_rows},
        "training": seconds["training"],
        "reference": seconds["reference pass"],
        "trl": seconds["TRL, training"] + seconds["TRL, reference in every step"],
        "parts": seconds,
        "calibration": {
            "layers": found.layers,
            "rounds": found.rounds,
            "shares": found.shares,
            "optimizer": found.optimizer,
        },
    }


def _train(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    from cpt_kernels import ContrastiveTrainer

    class Measured(ContrastiveTrainer):
        tokens = scored = 0
        reference_seconds = 0.0

        def _fill(self, reference: Any) -> None:
            started = time.process_time()
            super()._fill(reference)
            self.reference_seconds = time.process_time() - started

        def training_step(self, model: Any, inputs: Any, *args: Any) -> Any:
            self.tokens += inputs["input_ids"].numel()
            self.scored += len(inputs["targets"])
            return super().training_step(model, inputs, *args)

    trainer = _trainer(spec, folder, Measured, "cpu")
    seconds = _timed_training(trainer)
    counts = {"steps": trainer.state.global_step, "tokens": trainer.tokens, "scored": trainer.scored}
    return {"training": seconds, "reference": trainer.reference_seconds, "counts": counts}


def _train_trl(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    from trl import DPOConfig, DPOTrainer

    from .trainers import adapter, build_model, processing_class

    class Tokenized(DPOTrainer):
        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

    shape = Shape(**spec["shape"])
    models = {"model": build_model(shape)} | ({} if spec["lora_rank"] else {"ref_model": build_model(shape)})
    args = DPOConfig(**_arguments(spec, folder))
    words = processing_class(spec)
    cls = DPOTrainer if shape.image else Tokenized
    trainer = cls(**models, args=args, train_dataset=_rows(spec), processing_class=words, peft_config=adapter(spec))
    return {"training": _timed_training(trainer), "counts": {"steps": trainer.state.global_step}}


def _timed_training(trainer: Any) -> float:
    """Trains, and returns the seconds from the first step to the end, without what transformers does once before."""
    from transformers import TrainerCallback

    times = []

    class Times(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            times.append(time.process_time())

        def on_train_end(self, *_: Any, **__: Any) -> None:
            times.append(time.process_time())

    trainer.add_callback(Times())
    trainer.train()
    started, ended = times
    return ended - started


if __name__ == "__main__":
    work(json.loads(sys.argv[sys.argv.index("--worker") + 1]))
