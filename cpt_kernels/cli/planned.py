"""Makes the plan of a run: a trainer whose model has shapes but no weights, and what follows from it."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn

from ..config import ContrastiveConfig
from ..data.loader import micro_batch_tokens
from ..errors import UserError
from ..model.loading import wrap_in_adapter
from ..model.pretrained import ADAPTER_CONFIG, SavedAdapters, find_adapters, find_base, local_adapters
from ..planning.budget import MOST, expected_memory, find_budget, free_memory, without_checkpointing
from ..planning.calibration import NotTimedError, calibrate, predict_seconds, ratios
from ..planning.counts import Counts, count_run
from ..planning.model_sizes import sizes_of, state_bytes
from ..trainer import ContrastiveTrainer
from .console import print_results
from .decoded import decoded_pair
from .models import from_pretrained, random_model
from .options import ModelArguments, Options
from .plan_picture import draw_plan
from .run import check_options, make_trainer, quieten


class PlannedTrainer(ContrastiveTrainer):
    """A trainer of a model without weights: it prepares data and makes loaders, and can do nothing else."""

    def __init__(self, model: nn.Module, ref_model: None, args: ContrastiveConfig, peft_config: Any, **arguments: Any):
        if peft_config is not None:  # here, because the constructor takes the fingerprint of the weights below it
            model = wrap_in_adapter(model, peft_config, args)
        super().__init__(model, ref_model, args, **arguments)

    def _make_reference(self, *_: Any) -> Any:
        return None

    def _move_model_to_device(self, *_: Any) -> None:
        pass  # there is nothing to move


def show_plan(options: Options, picture: Path | None = None) -> dict[str, Any]:
    """Prints the plan of a run, with a decoded pair, draws it to ``picture``, and returns it as plain data for JSON."""
    args = options.training
    if options.script.dataset_streaming:
        raise UserError("dataset_streaming=true: the rows of a stream are not known before training; leave it out")
    check_options(options)
    quieten(args)
    args.report_to, args.push_to_hub = [], False
    if options.model.load_in_4bit or options.model.load_in_8bit:
        raise UserError("a plan has no weights to quantize: leave out load_in_4bit and load_in_8bit")
    trainer = make_trainer(options, PlannedTrainer, policy=shapes_of, reference=lambda *_: None)
    if args.chooses_checkpointing:
        found = without_checkpointing(trainer, free_memory(args.device), has_weights=False)
        args.gradient_checkpointing = found is None or found[0] > found[1]
    counts = count_run(trainer.get_train_dataloader(), trainer.train_dataset, trainer.collator, args)
    plan = {
        "data": {name: _row_counts(report) for name, report in trainer.reports.items()},
        "run": _run(trainer, counts),
        "time": _time(trainer, counts),
    }
    row = trainer.train_dataset[counts.batches[0][0]]
    drops = [line for report in trainer.reports.values() for line in report.summary()]
    memory = _memory_table(plan["run"]["bytes"], plan["run"]["memory"]), _budget_line(plan["run"]["memory"])
    tables = [_plan_table(plan["run"]), *memory, *_time_tables(plan["time"])]
    print_results([*decoded_pair(row, trainer.processing_class, trainer.collator), *tables], drops)
    if picture is not None:
        draw_plan(plan, counts, args.max_tokens_per_batch, picture)
    return plan


def shapes_of(model: ModelArguments, args: ContrastiveConfig) -> nn.Module:
    """Returns the model of a config, with an adapter to train further, on the device "meta", which holds no weights."""
    name, revision, option = model.model_name_or_path, model.model_revision, "model_name_or_path"
    folder = model.adapter_name_or_path or name
    given = model.adapter_name_or_path is not None
    adapters = from_pretrained(find_adapters, folder, "adapter_name_or_path") if given else local_adapters(folder)
    if given and adapters is None:
        raise UserError(f"adapter_name_or_path={folder} holds no adapter ({ADAPTER_CONFIG}): name the folder of one")
    if adapters is not None and not given:
        (name, revision), option = find_base(folder, adapters), f"the base model of {folder}"
    with torch.device("meta"):
        shapes = random_model(name, option, revision or "main", model.dtype, args.trust_remote_code)
        return shapes if adapters is None else _with_adapters(shapes, adapters)


def _with_adapters(base: nn.Module, adapters: SavedAdapters) -> nn.Module:
    """Returns the base model with adapters of which the active ones are trained, without their weights."""
    from peft import PeftConfig, get_peft_model

    model: Any = None
    for name, place in adapters.places.items():
        config = PeftConfig.from_pretrained(place)
        config.inference_mode = name not in adapters.active
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    active = [*adapters.active]
    model.base_model.set_adapter(active if len(active) > 1 else active[0])
    return model


def _row_counts(report: Any) -> dict[str, Any]:
    names = ("rows_in", "kept", "pairs", "pairs_dropped", "truncated", "promptless", "completion_tokens")
    names += ("scored_tokens",)
    dropped = {reason: drop.count for reason, drop in report.dropped.items()}
    return {name: getattr(report, name) for name in names} | {"dropped": dropped}


def _run(trainer: PlannedTrainer, counts: Counts) -> dict[str, Any]:
    model, args = trainer.packed.model, trainer.args
    with_images = [row for row in counts.largest_rows if counts.lengths.images[row]]
    with_images = with_images or [row for row, images in enumerate(counts.lengths.images) if images][:1]
    batch = trainer.collator(trainer.train_dataset.__getitems__(with_images)) if with_images else None
    sizes, ways = sizes_of(model, batch), (args.gradient_checkpointing, hasattr(model, "peft_config"))
    operations = {name: getattr(counts, name).flops(sizes, *ways)["total"] for name in ("work", "unshared", "peer")}
    return {
        "layout": "padded" if trainer.packed.padded else "packed",
        "operations": operations,
        "operations of a padded run / ours": operations["peer"] / operations["work"],
        "bytes": state_bytes(model, args),
        "memory": _memory(trainer, counts),
        **counts.asdict(),
    }


def _time(trainer: PlannedTrainer, counts: Counts) -> dict[str, Any]:
    """Returns the predicted seconds, or the reason why there are none."""
    try:
        found = calibrate(trainer, counts)
    except NotTimedError as error:
        return {"unknown": str(error)}
    seconds = predict_seconds(trainer, counts, found)
    return {
        "device": str(trainer.args.device),
        "seconds": seconds,
        "TRL / ours": ratios(seconds),
        "calibration": {"layers": found.layers, "rounds": found.rounds, "share of rows": found.shares},
    }


def _memory(trainer: PlannedTrainer, counts: Counts) -> dict[str, Any]:
    """Returns the expected memory of the largest micro-batch, and the largest budget that fits this device."""
    found = expected_memory(trainer, counts.largest_rows)
    free = free_memory(trainer.args.device)
    known = found["with checkpointing"] is not None
    tokens, sequences = micro_batch_tokens(trainer.train_dataset, trainer.collator)
    return {
        **found,
        "free": free,
        "device": trainer.args.device.type,
        "largest max_tokens_per_batch": find_budget(trainer, free, has_weights=False) if known else None,
        "tokens of all rows": int((tokens if sequences is None else tokens * sequences).sum()),
    }


def _plan_table(run: dict[str, Any]) -> Table:
    """Returns the counts of a run as a table."""
    work, unshared, peer, reference = (run[name] for name in ("work", "unshared", "peer", "reference"))
    table = Table("", "", title=f"the run, in {run['layout']} rows", title_justify="left", show_header=False)
    table.add_row("optimizer steps", f"{run['steps']:,}")
    table.add_row("micro-batches", f"{run['micro_batches']:,}, {run['pairs'] / run['micro_batches']:.1f} pairs each")
    if run["fill"] < 1:
        table.add_row("fill of max_tokens_per_batch", f"{run['fill']:.1%}")
    table.add_row("tokens", f"{work['tokens']:,}, {work['tokens'] / run['steps']:,.0f} a step")
    table.add_row("tokens without shared prompts", f"{unshared['tokens']:,}")
    table.add_row(f"tokens padded, {run['peer_pairs']} pairs a batch", f"{peer['tokens']:,}")
    if work["image_tokens"]:
        table.add_row("tokens of images, encoded", f"{work['image_tokens']:,.0f}; padded {peer['image_tokens']:,.0f}")
    table.add_row("operations", f"{run['operations']['work']:.3g}")
    table.add_row("operations padded / ours", f"{run['operations of a padded run / ours']:.2f}")
    table.add_row("scored tokens", f"{work['head_rows']:,}")
    table.add_row("largest micro-batch", f"{run['largest']['tokens']:,} tokens")
    table.add_row("reference pass, at most", f"{reference['tokens']:,} tokens, a forward each")
    return table


def _time_tables(found: dict[str, Any]) -> list[Any]:
    """Returns the predicted seconds as a table with a note, or a line that says why there are none."""
    if "unknown" in found:
        return [f"seconds are not predicted: {found['unknown']}"]
    title = f"predicted time on {found['device']}, TRL by an imitation of its padded step"
    table = Table("", "", title=title, title_justify="left", show_header=False)
    for part, seconds in found["seconds"].items():
        table.add_row(part, _duration(seconds))
    for runs, ratio in found["TRL / ours"].items():
        table.add_row(f"TRL / ours, {runs}", f"{ratio:.2f}")
    return [table]


def _duration(seconds: float) -> str:
    """Returns seconds to three digits, with days, hours and minutes beside a minute or more."""
    text = f"{seconds:,.0f} s" if seconds >= 100 else f"{seconds:.3g} s"
    return text if seconds < 60 else f"{text} ({timedelta(seconds=round(seconds))})"


def _memory_table(state: dict[str, int | None], memory: dict[str, Any]) -> Table:
    """Returns the memory by part, as the run has it and with the other choice of gradient checkpointing."""
    table = Table("memory", title="memory of the largest micro-batch in MiB, on one process", title_justify="left")
    ways = sorted(("with checkpointing", "without checkpointing"), reverse=not memory["checkpointing"])
    for way, note in zip(ways, (", this run", "")):
        table.add_column(way.replace("check", "gradient check") + note, justify="right")

    def row(part: str, *sizes: int | None) -> None:
        table.add_row(part, *("not known" if size is None else f"{size / 2**20:,.1f}" for size in sizes))

    for part, size in state.items():
        row(part, size, size)
    for part in ("activations", "head", "peak"):
        row(part, *(None if memory[way] is None else memory[way][part] for way in ways))
    return table


def _budget_line(memory: dict[str, Any]) -> str:
    """Returns what a micro-batch may have at most on this device, in a sentence."""
    budget, free = memory["largest max_tokens_per_batch"], f"{memory['free'] / 2**30:,.1f} GiB"
    if memory["with checkpointing"] is None:
        return "activations and the largest max_tokens_per_batch are not known: this model's forward depends on values"
    if budget is None:
        return f"not even one row fits into the {free} that are free on this {memory['device']}"
    more = ", all rows at once" if budget >= memory["tokens of all rows"] else " or more" if budget == MOST else ""
    return f"largest max_tokens_per_batch: {budget:,}{more} ({free} are free on this {memory['device']})"
