"""Makes the plan of a run: a trainer whose model has shapes but no weights, and what follows from it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import get_keys_to_not_convert
from transformers.quantizers.quantizers_utils import should_convert_module

from ..config import ContrastiveConfig
from ..data.loader import micro_batch_tokens
from ..errors import UserError
from ..model.frozen import rounded_layers
from ..model.loading import is_quantised, wrap_in_adapter
from ..model.pretrained import ADAPTER_CONFIG, SavedAdapters, find_adapters, find_base, local_adapters
from ..planning.budget import MOST, expected_memory, find_budget, free_memory, without_checkpointing
from ..planning.calibration import NotTimedError, calibrate, predict_seconds, ratios
from ..planning.counts import Counts, RowLengths, count_run
from ..planning.engines import checkpoint_bytes, state_bytes
from ..planning.memory import LiveBytes, ShapesOnly
from ..planning.model_sizes import sizes_of
from ..planning.work import Work
from ..trainer import ContrastiveTrainer
from ..training.token_budget import unpredictable
from .console import print_results
from .decoded import decoded_pair
from .models import from_pretrained, quantized_compute_dtype, random_model
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


def show_plan(options: Options, picture: Path | None = None, device_gib: float | None = None) -> dict[str, Any]:
    """Prints the plan of a run, with a decoded pair, draws it to ``picture``, and returns it as plain data for JSON.

    Args:
        device_gib: memory of the device that each process will have; default what is free on this one.
    """
    args = options.training
    free = free_memory(args.device) if device_gib is None else int(device_gib * 2**30)
    if options.script.dataset_streaming:
        raise UserError("dataset_streaming=true: the rows of a stream are not known before training; leave it out")
    check_options(options)
    quieten(args)
    args.report_to, args.push_to_hub = [], False
    trainer = make_trainer(options, PlannedTrainer, policy=shapes_of, reference=lambda *_: None)
    if args.chooses_checkpointing and unpredictable(trainer) is None:
        with _frozen_rounded(trainer):
            found = without_checkpointing(trainer, free, has_weights=False)
        args.gradient_checkpointing = found is None or found[0] > found[1]
    counts = count_run(trainer.get_train_dataloader(), trainer.train_dataset, trainer.collator, args)
    counts = replace(counts, reference=_whole_reference(trainer, counts))
    time = _time(trainer, counts)
    data = {name: _row_counts(report) for name, report in trainer.reports.items()}
    with _frozen_rounded(trainer):
        plan = {"data": data, "run": _run(trainer, counts, free), "time": time}
    plan["run"]["memory"]["device"] = args.device.type if device_gib is None else None
    row = trainer.train_dataset[counts.largest_rows[0]]
    drops = [line for report in trainer.reports.values() for line in report.summary()]
    memory = _memory_table(plan["run"]["bytes"], plan["run"]["memory"]), _budget_line(plan["run"]["memory"])
    saved = [f"{part} {size / 2**20:,.1f} MiB" for part, size in plan["run"]["checkpoint"].items() if size is not None]
    tables = [_plan_table(plan["run"]), *memory, f"a checkpoint: {', '.join(saved)}", *_time_tables(plan["time"])]
    print_results([*decoded_pair(row, trainer.processing_class, trainer.collator), *tables], drops)
    if picture is not None:
        draw_plan(plan, counts, args.max_tokens_per_batch, picture)
    return plan


def _whole_reference(trainer: PlannedTrainer, counts: Counts) -> Work:
    """Returns the work of the reference, also on evaluation sets; none for a loss without a reference."""
    if not trainer.loss.needs_reference:
        return Work(tokens=0, attended=0, head_rows=0, head_gemms=3)
    lengths = [RowLengths(data, trainer.collator) for name, data in trainer.datasets.items() if name != "train"]
    return reduce(add, (each.scored_work(range(len(each.pairs))) for each in lengths), counts.reference)


@contextmanager
def _frozen_rounded(trainer: PlannedTrainer) -> Iterator[None]:
    """Context in which frozen weights have the dtype in which training holds them, see :mod:`.model.frozen`."""
    args, model = trainer.args, trainer.packed.model
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    held = {}
    if dtype is not None and args.planned.engine == "DDP" and not all(p.requires_grad for p in model.parameters()):
        with FakeTensorMode(allow_non_fake_inputs=True):
            shapes = ShapesOnly(trainer.packed, LiveBytes(args.device), None)
        layers = rounded_layers(shapes, dtype)
        names = [name for name, layer in shapes.model.named_modules() if layer in layers]
        held = {weight: weight.data for weight in (model.get_submodule(name).weight for name in names)}
    for weight in held:
        weight.data = weight.data.to(dtype)
    try:
        yield
    finally:
        for weight, data in held.items():
            weight.data = data


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
        if model.load_in_4bit or model.load_in_8bit:
            _quantize(shapes, model, args)
        return shapes if adapters is None else _with_adapters(shapes, adapters)


def _quantize(shapes: Any, model: ModelArguments, args: ContrastiveConfig) -> None:
    """Gives weights the bytes that bitsandbytes quantizes them to, and the dtype that it computes with."""
    shapes.is_loaded_in_4bit, shapes.is_loaded_in_8bit = model.load_in_4bit, model.load_in_8bit
    kept = [*get_keys_to_not_convert(shapes), *(shapes._keep_in_fp32_modules or ())]
    for name, layer in shapes.named_modules():
        if type(layer) in (nn.Linear, Conv1D) and should_convert_module(name, kept):
            size = layer.weight.numel()
            blocks = math.ceil(size / 64)  # each has a scale in fp32, or in 8 bits with scales of their own
            scales = blocks + 4 * math.ceil(blocks / 256) + 4 if model.use_bnb_nested_quant else 4 * blocks
            layer.weight = nn.Parameter(layer.weight.to(quantized_compute_dtype(model, args)), requires_grad=False)
            layer.weight.quantized_bytes = (
                math.ceil(size / 2) + scales if model.load_in_4bit else size + 4 * len(layer.weight)
            )


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


def _run(trainer: PlannedTrainer, counts: Counts, free: int) -> dict[str, Any]:
    model, args = trainer.packed.model, trainer.args
    with_images = [row for row in counts.largest_rows if counts.lengths.images[row]]
    with_images = with_images or [row for row, images in enumerate(counts.lengths.images) if images][:1]
    batch = trainer.collator(trainer.train_dataset.__getitems__(with_images)) if with_images else None
    sizes, ways = sizes_of(model, batch), (args.gradient_checkpointing, hasattr(model, "peft_config"))
    operations = {name: getattr(counts, name).flops(sizes, *ways)["total"] for name in ("work", "unshared", "peer")}
    return {
        "processes": args.planned.count,
        "engine": args.planned.engine,
        "sp_size": args.sp_size,
        "layout": "padded" if trainer.packed.padded else "packed",
        "operations": operations,
        "operations of a padded run / ours": operations["peer"] / operations["work"],
        "bytes": state_bytes(model, args),
        "memory": _memory(trainer, counts, free),
        "checkpoint": checkpoint_bytes(model, args),
        **counts.asdict(),
    }


def _time(trainer: PlannedTrainer, counts: Counts) -> dict[str, Any]:
    """Returns the predicted seconds, or the reason why there are none."""
    if is_quantised(trainer.packed.model):
        return {"unknown": "a plan has no weights to quantize"}
    if trainer.args.planned.count > 1:
        return {"unknown": "this machine's one process does not tell how long several exchange weights and gradients"}
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


def _memory(trainer: PlannedTrainer, counts: Counts, free: int) -> dict[str, Any]:
    """Returns the expected memory of the largest micro-batch, and the largest budget that fits into ``free`` bytes."""
    found = expected_memory(trainer, counts.largest_rows)
    known = found["with checkpointing"] is not None
    tokens, sequences = micro_batch_tokens(trainer.train_dataset, trainer.collator)
    return {
        **found,
        "free": free,
        "largest max_tokens_per_batch": find_budget(trainer, free, has_weights=False) if known else None,
        "tokens of all rows": int((tokens if sequences is None else tokens * sequences).sum()),
    }


def _plan_table(run: dict[str, Any]) -> Table:
    """Returns the counts of a run as a table."""
    work, unshared, peer, reference = (run[name] for name in ("work", "unshared", "peer", "reference"))
    table = Table("", "", title=f"the run, in {run['layout']} rows", title_justify="left", show_header=False)
    table.add_row("optimizer steps", f"{run['steps']:,}")
    count, group = run["processes"], run["sp_size"]
    on = "" if count == 1 else " on each process" if group == 1 else f" on each group of {group} processes"
    if count > 1:
        table.add_row("processes", f"{count}, {run['engine']}")
    each = run["pairs"] / (run["micro_batches"] * count // group)
    table.add_row("micro-batches", f"{run['micro_batches']:,}{on}, {each:.1f} pairs each")
    if run["fill"] < 1:
        table.add_row("fill of max_tokens_per_batch", f"{run['fill']:.1%}")
    table.add_row("tokens", f"{work['tokens']:,}, {work['tokens'] / run['steps']:,.0f} a step")
    if count > 1:
        table.add_row("tokens on each process", f"{work['tokens'] / run['steps'] / count:,.0f} a step")
        table.add_row("processes that wait for others", f"{run['idle']:.1%} of the time, by tokens")
    table.add_row("tokens without shared prompts", f"{unshared['tokens']:,}")
    table.add_row(f"tokens padded, {run['peer_pairs']} pairs a batch", f"{peer['tokens']:,}")
    if work["images"]:
        table.add_row("images, encoded", f"{work['images']:,}; padded {peer['images']:,}")
        table.add_row("tokens of images, encoded", f"{work['image_tokens']:,.0f}; padded {peer['image_tokens']:,.0f}")
    table.add_row("operations", f"{run['operations']['work']:.3g}")
    table.add_row("operations padded / ours", f"{run['operations of a padded run / ours']:.2f}")
    table.add_row("scored tokens", f"{work['head_rows']:,}")
    table.add_row("largest micro-batch", f"{run['largest']['tokens']:,} tokens")
    if reference["tokens"]:
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
        row({"engine": "gathered and buckets", "host": "on the host"}.get(part, part), size, size)
    for part in ("activations", "head", "peak"):
        row(part, *(None if memory[way] is None else memory[way][part] for way in ways))
    return table


def _budget_line(memory: dict[str, Any]) -> str:
    """Returns what a micro-batch takes, and may have at most on its device, in a sentence."""
    budget, free = memory["largest max_tokens_per_batch"], f"{memory['free'] / 2**30:,.1f} GiB"
    if (step := memory["with checkpointing" if memory["checkpointing"] else "without checkpointing"]) is None:
        return "activations and the largest max_tokens_per_batch are not known: this model's forward depends on values"
    where = "are free on this " + memory["device"] if memory["device"] else "on each device"
    if budget is None:
        taken = (
            "" if step["peak"] is None else f"; the largest micro-batch takes {step['peak'] / 2**30:,.1f} GiB in all"
        )
        return f"not even one row fits into nine tenths of the memory ({free} {where}){taken}"
    more = ", all rows at once" if budget >= memory["tokens of all rows"] else " or more" if budget == MOST else ""
    return f"largest max_tokens_per_batch: {budget:,}{more} ({free} {where})"
