"""How long does a training step take and how much memory, compared with TRL's ``DPOTrainer``? Do both losses agree?

    python -m bench step --peers trl,trl-tuned,ours-unshared,ours-padded

Every contestant trains the same model, Qwen2-shaped or a hybrid, on the same random tokens, in the same order, with the
same seed and optimizer. Reference log-probs are computed before the timed steps. A round is one step; rounds are
interleaved. Medians and quartiles are over rounds. Gradient checkpointing is off for all unless asked for (TRL and ours
default to on). With ``--model image`` a LLaVA is trained, and an image takes the first tokens of every prompt. TRL
precomputes no references of images, so it runs its reference in every step. ``images`` are those that the vision tower
encodes in a step.

    trl                 TRL as installed
    trl-tuned           TRL with its head limited to completion rows (off by default on a CPU), and a tuned allocator
    trl-completion-rows, trl-allocator    only one of these two settings
    ours, ours-tuned    cpt_kernels as installed, and with the same tuned allocator
    ours-prompts        packed, a prompt runs once, and no other beginning
    ours-unshared       packed, each completion after its own copy of the prompt
    ours-padded         as ours-unshared, but right-padded to the longest sequence of the step

On CUDA all run under bf16 autocast, with flash attention if it is installed. ``predicted`` is the ratio of operations,
counted from the lengths by cpt_kernels.planning.work. ``of it`` is measured / predicted: 100 % if all contestants run
their operations at the same rate. ``of floor`` is the time of the step's operations at the rate of large matrix
products, measured in the same run, divided by the step's time.

Peak memory is VmHWM of the process during the timed steps. "beyond" is the peak minus the resident memory after imports
and model construction, and minus AdamW's two moments. It consists of gradients, activations, logits, and memory that
the allocator keeps. On CUDA, both are counted by the device's allocator; "beyond" excludes weights and moments.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from cpt_kernels.data.collate import PackedCollator
from cpt_kernels.data.trees import MINIMUM_SHARED
from cpt_kernels.planning.work import Pair, Work, packed, padded

from .lengths import HELP, TREE_HELP, checked, pair_of, rows_of
from .shapes import SHAPES, Shape
from .timing import Worker, add_output_options, close_all, finish, interleave, summarize, table

# By default, glibc returns every large block to the system, and each step faults its pages in again. These settings
# keep the blocks.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "MALLOC_TOP_PAD_": "500000000",
    "MALLOC_ARENA_MAX": "1",
}
_PEERS, _IMAGE_PEERS = "trl,trl-tuned", "trl,ours-unshared"
_QUICK_PEERS = "trl"
_IMAGE = 64  # tokens of an image with --model image
_TOY = Shape(hidden=32, layers=2, heads=2, kv_heads=1, intermediate=64, vocab=500)
_BYTES = 16  # per trained parameter: weight, gradient and two moments in fp32


@dataclasses.dataclass(frozen=True)
class Entry:
    """Settings of one contestant."""

    side: str  # "trl" or "ours"
    completion_rows_only: bool = True
    sharing: str = "auto"
    padded: bool = False
    tuned_allocator: bool = False

    def spec(self) -> dict[str, Any]:
        """Returns the settings for the worker."""
        if self.side == "trl":
            return {"side": "trl", "completion_rows_only": self.completion_rows_only}
        options = {} if self.sharing == "auto" else {"sharing": self.sharing}
        return {"side": "ours", "options": options, "padded": self.padded}

    def work(self, pairs: Sequence[Pair], cuda: bool) -> Work:
        """Returns the work of one step on these pairs. On CUDA, TRL always limits its head to completion rows."""
        if self.side == "trl":
            return padded(pairs, self.completion_rows_only or cuda)
        if self.padded:
            return padded(pairs, True, head_gemms=3)
        return tree_work(pairs) if self.sharing == "auto" else packed(pairs, self.sharing == "prompt")


CONTESTANTS = {
    "ours": Entry("ours"),
    "ours-tuned": Entry("ours", tuned_allocator=True),
    "ours-prompts": Entry("ours", sharing="prompt"),
    "ours-unshared": Entry("ours", sharing="none"),
    "ours-padded": Entry("ours", sharing="none", padded=True),
    "trl": Entry("trl", completion_rows_only=False),
    "trl-tuned": Entry("trl", tuned_allocator=True),
    "trl-completion-rows": Entry("trl"),
    "trl-allocator": Entry("trl", completion_rows_only=False, tuned_allocator=True),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench step", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    peers = ", ".join(name for name in CONTESTANTS if name not in ("ours", "ours-tuned"))
    parser.add_argument("--peers", help=f"comma-separated list of: {peers}; default {_PEERS}")
    parser.add_argument("--steps", type=int, default=20, help="training steps of every contestant")
    parser.add_argument("--rounds", type=int, help="number of timed steps, the last ones; default: all but two")
    parser.add_argument("--pairs", type=int, default=8, help="pairs per step")
    parser.add_argument(
        "--completions", type=int, default=2, help="completions per prompt; all their pairs are trained"
    )
    parser.add_argument("--lengths", help=f"{TREE_HELP}, {HELP}; default mixed, with --quick tiny")
    add_model_options(parser)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--loss", choices=["sigmoid", "hinge", "ipo", "sft"], default="sigmoid")
    parser.add_argument("--quick", action="store_true", help=f"smoke test: a toy model, four steps, {_QUICK_PEERS}")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    default = _QUICK_PEERS if options.quick else _IMAGE_PEERS if options.model == "image" else _PEERS
    peers_asked = default if options.peers is None else options.peers
    options.peers = [name for name in peers_asked.split(",") if name]
    if unknown := set(options.peers) - set(CONTESTANTS):
        parser.error(f"unknown peers {sorted(unknown)}: choose from {peers}")
    options.lengths = options.lengths or ("tiny" if options.quick else "mixed")
    if options.quick:
        toy = {name: size for name, size in dataclasses.asdict(_TOY).items() if name != "image"}
        vars(options).update(toy | {"steps": 4, "pairs": 4, "rounds": None})
    options.rounds = options.rounds or max(1, options.steps - 2)
    if options.model == "image" and any(name not in ("trl", "ours-unshared") for name in options.peers):
        parser.error("--model image: choose the peers trl and ours-unshared")
    if options.rounds > options.steps:
        parser.error(f"--rounds {options.rounds} is more than --steps {options.steps}")
    pairs_of_prompt = options.completions * (options.completions - 1) // 2
    if options.completions < 2 or options.pairs % pairs_of_prompt:
        of_prompt = f"{pairs_of_prompt}, the pairs of {options.completions} completions"
        parser.error(f"--pairs {options.pairs}: must be a multiple of {of_prompt}")
    return options


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--device``, ``--shape``, options that override parts of the shape, and options of training."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--shape", choices=SHAPES, default="small", help="shape of the model, with as many layers as fit"
    )
    for field in dataclasses.fields(Shape):
        if field.type == "int":
            name = field.name.replace("_", "-")
            parser.add_argument(f"--{name}", type=int, help=f"overrides the shape's {name}")
    parser.add_argument(
        "--model",
        choices=["dense", "hybrid", "image"],
        default="dense",
        help="Qwen2-shaped, gated delta nets as Qwen3.5, or a LLaVA",
    )
    parser.add_argument("--cpu-time", action="store_true", help="time by one thread's CPU time, on a busy machine")
    parser.add_argument("--lora-rank", type=int, default=0, help="train adapters on all linear layers; 0: all weights")
    parser.add_argument("--liger-layers", action="store_true", help="Liger's layer kernels for all contestants")
    parser.add_argument("--gradient-checkpointing", action="store_true")


def shape_of(options: argparse.Namespace, contestants: int) -> Shape:
    """Returns the preset with the overrides applied. Without ``--layers``, it has as many layers as fit.

    All contestants hold their models at the same time.
    """
    changes = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(Shape)}
    shape = dataclasses.replace(SHAPES[options.shape], **{k: v for k, v in changes.items() if v is not None})
    image = (getattr(options, "image", None) or _IMAGE) if options.model == "image" else 0
    shape = dataclasses.replace(shape, hybrid=options.model == "hybrid", image=image)
    if options.layers is not None:
        return shape
    # Half of the memory is for parameters, the other half for activations and logits of a step.
    per_parameter = 4 if options.lora_rank else _BYTES
    return shape.fitted(memory_of(options.device) / 2 / contestants / per_parameter)


def memory_of(device: str) -> int:
    """Returns the total memory of the device in bytes."""
    import torch

    if device == "cuda":
        return torch.cuda.mem_get_info()[1]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    names = ["ours", *(["ours-tuned"] if any("tuned" in peer for peer in options.peers) else []), *options.peers]
    names = list(dict.fromkeys(names))
    shape = shape_of(options, len(names))
    with tempfile.TemporaryDirectory() as folder:
        try:
            lengths = checked(options.lengths, options.completions, Path(folder))
        except ValueError as error:
            sys.exit(f"bench step: error: {error}")
        rates = matmul_rates(shape, options.device)
        told = argparse.Namespace(**vars(options) | {"lengths": lengths})
        measured = run(names, told, shape)
        predicted = predict(names, told, shape, rates)
    agreement = {name: difference(measured["ours"], measured[name]) for name in names if name != "ours"}
    summary = summarize_run(names, measured, predicted, agreement)
    print(report(names, options, shape, measured, predicted, agreement))
    details = {
        "options": {k: v for k, v in vars(options).items() if k not in ("json", "record")} | dataclasses.asdict(shape),
        "measured": measured,
        "predicted": predicted,
        "differences": agreement,
        "allocator": ALLOCATOR,
        "matmul_gflops": rates,
    }
    subject = "step" if options.model == "dense" else f"step-{options.model}"  # the README shows dense ones
    finish(subject, details, summary, options)


def run(names: Sequence[str], options: argparse.Namespace, shape: Shape, **more: Any) -> dict[str, dict[str, Any]]:
    """Runs all contestants. Returns seconds of the timed steps, memory, and the metrics of all steps, by contestant.

    ``more`` is passed to the workers (``ranks``, ``threads``).
    """
    told = ("steps", "pairs", "completions", "lengths", "loss", "device", "learning_rate", "lora_rank")
    common = {name: getattr(options, name) for name in (*told, "gradient_checkpointing", "liger_layers")}
    if getattr(options, "cpu_time", False):
        common |= {"cpu_time": True, "threads": 1}
    # Workers see as many GPUs as they have ranks.
    workers: list[Worker] = []
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(more.get("ranks", 1)))))
    try:
        for name in names:
            entry = CONTESTANTS[name]
            spec = {**common, **entry.spec(), "shape": dataclasses.asdict(shape), **more}
            environment = {"CUDA_VISIBLE_DEVICES": gpus} | (ALLOCATOR if entry.tuned_allocator else {})
            workers.append(Worker(name, "bench.trainers", spec, environment))
        if len({worker.hello["checksum"] for worker in workers}) > 1:
            raise RuntimeError("the contestants did not start from the same weights")
        # Warm up, reset the peaks of memory, then time.
        untimed = interleave(workers, options.steps - options.rounds, "step")
        resets = {worker.name: worker.ask("reset") for worker in workers}
        timed = interleave(workers, options.rounds, "step")
    finally:
        close_all(workers)
    return {
        name: {
            "seconds": [answer["seconds"] for answer in timed[name]],
            "peak_mib": timed[name][-1]["peak_mib"],
            "beyond_mib": timed[name][-1]["peak_mib"] - resets[name]["baseline_mib"],
            "peak_is_of_timed_steps": resets[name]["peak_is_of_timed_steps"],
            "metrics": [answer["metrics"] for answer in untimed[name] + timed[name]],
        }
        for name in names
    }


def predict(
    names: Sequence[str], options: argparse.Namespace, shape: Shape, rates: dict[str, float], ranks: int = 1
) -> dict[str, dict[str, float]]:
    """Returns each contestant's mean work per timed step (GFLOP, tokens) and ``floor_s``, its time at ``rates``.

    With several ranks, a padded step waits for the rank with the most work; our sampler balances the ranks.
    """
    # The batches of every timed step, one per rank.
    wanted = {name: getattr(options, name) for name in ("steps", "pairs", "completions", "lengths")}
    pairs = list(map(pair_of, rows_of({**wanted, "ranks": ranks, "shape": dataclasses.asdict(shape)})))
    batches = [pairs[i : i + options.pairs] for i in range(0, len(pairs), options.pairs)]
    steps = [batches[i : i + ranks] for i in range(0, len(batches), ranks)][-options.rounds :]
    # Count the work of every batch, combine the ranks of a step, and average over the steps.
    predicted = {}
    for name in names:
        entry, cuda = CONTESTANTS[name], options.device == "cuda"
        slowest = entry.side == "trl" or entry.padded
        found = []
        for step in steps:
            works = [with_images(entry, entry.work(batch, cuda), batch, shape) for batch in step]
            flops = [work.flops(shape, options.gradient_checkpointing, bool(options.lora_rank)) for work in works]
            if shape.image and entry.side == "trl":  # its reference runs in the step
                forward = [work.forward_flops(shape) for work in works]
                flops = [{part: f[part] + of[part] for part in f} for f, of in zip(flops, forward)]
            both = [{f"{part}_gflop": v / 1e9 for part, v in f.items()} | w.asdict() for f, w in zip(flops, works)]
            if slowest:
                found.append(max(both, key=lambda one: one["total_gflop"]))
            else:
                found.append({part: statistics.mean(one[part] for one in both) for part in both[0]})
        mean = {part: statistics.mean(one[part] for one in found) for part in found[0]}
        rest = mean["total_gflop"] - mean["head_gflop"]
        mean["floor_s"] = rest / rates["layers"] + mean["head_gflop"] / rates["head"]
        predicted[name] = mean
    return predicted


def tree_work(pairs: Sequence[Pair]) -> Work:
    """Returns the work of a packed row in which sequences share what they begin with, counted from such a row."""
    sequences = [(tuple(prompt), tuple(side)) for prompt, *sides in pairs for side in sides]
    batch = PackedCollator(minimum_shared=MINIMUM_SHARED).pack(sequences, [], [], [])
    attended = sum(queries * keys - queries * (queries - 1) // 2 for queries, keys in batch["segment_lengths"])
    return Work(batch["input_ids"].numel(), attended, len(batch["targets"]), head_gemms=3)


def with_images(entry: Entry, work: Work, pairs: Sequence[Pair], shape: Shape) -> Work:
    """Returns the work with that of the images: TRL encodes one for each side of a pair, ours each different one."""
    images = 2 * len(pairs) if entry.side == "trl" else len({tuple(prompt) for prompt, *_ in pairs})
    return dataclasses.replace(work, image_tokens=images * shape.image)


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Returns the largest difference over all steps, for every metric that both log."""
    steps = list(zip(ours["metrics"], theirs["metrics"]))
    shared = set(steps[0][0]) & set(steps[0][1])
    return {name: max(abs(a[name] - b[name]) for a, b in steps) for name in sorted(shared)}


def compared_with(name: str, names: Collection[str]) -> str:
    """Returns the name of our contestant that has the allocator settings of ``name``."""
    return "ours-tuned" if CONTESTANTS[name].tuned_allocator and "ours-tuned" in names else "ours"


def summarize_run(names, measured, predicted, agreement) -> dict[str, Any]:
    """Returns the summary: measured and predicted ratios, and the largest differences."""
    summary: dict[str, Any] = {}
    for name in names:
        if name in ("ours", "ours-tuned"):
            continue
        own, key = compared_with(name, names), name.replace("-", "_")
        seconds = [statistics.median(measured[side]["seconds"]) for side in (name, own)]
        work = predicted[name]["total_gflop"] / predicted[own]["total_gflop"]
        summary |= {
            f"ratio_{key}": round(seconds[0] / seconds[1], 3),
            f"predicted_ratio_{key}": round(work, 3),
            f"of_predicted_{key}": round(seconds[0] / seconds[1] / work, 3),
            f"memory_ratio_{key}": round(measured[own]["peak_mib"] / measured[name]["peak_mib"], 3),
            f"memory_beyond_ratio_{key}": round(measured[own]["beyond_mib"] / measured[name]["beyond_mib"], 3),
        }
    for key, metric in (("max_loss_difference", "loss"), ("max_margin_difference", "rewards/margins")):
        summary[key] = max((found[metric] for found in agreement.values()), default=0.0)
    return summary


def report(names, options, shape, measured, predicted, agreement) -> str:
    """Formats settings, table and differences."""
    medians = {name: statistics.median(measured[name]["seconds"]) for name in names}
    peers = [seconds for name, seconds in medians.items() if CONTESTANTS[name].side == "trl"]
    # One row of the table per contestant.
    rows = []
    for name in names:
        seconds, work, own = summarize(measured[name]["seconds"]), predicted[name], compared_with(name, names)
        ratio, operations = medians[name] / medians[own], work["total_gflop"] / predicted[own]["total_gflop"]
        rows.append(
            [
                name,
                f"{seconds['median']:.3f}",
                f"{seconds['low']:.3f}-{seconds['high']:.3f}",
                f"{ratio:.2f}",
                f"{operations:.2f}",
                f"{ratio / operations:.0%}",
                f"{min(peers) / seconds['median']:.2f}" if peers else "-",
                f"{measured[name]['peak_mib']:.0f}",
                f"{measured[name]['beyond_mib']:.0f}",
                f"{work['tokens']:.0f}",
                f"{work['head_rows']:.0f}",
                f"{measured[name]['metrics'][-1].get('images', 0):.0f}",
                f"{work['total_gflop']:.0f}",
                f"{work['floor_s'] / seconds['median']:.0%}",
            ]
        )
    header = ["contestant", "s/step", "quartiles", "x ours", "predicted", "of it", "x best peer"]
    header += ["peak MiB", "beyond MiB", "tokens", "head rows", "images", "GFLOP", "of floor"]
    # The settings above the table, and the differences below it.
    precision = "bf16 autocast" if options.device == "cuda" else "fp32"
    trained = f"LoRA of rank {options.lora_rank}" if options.lora_rank else "all weights"
    checkpointing = "on" if options.gradient_checkpointing else "off"
    lines = [
        f"{options.model} {dataclasses.asdict(shape)}, {trained}, {options.lengths} lengths, {options.pairs} pairs per"
        f" step of {options.completions} completions per prompt, {options.loss}, {precision} on {options.device},"
        f" gradient checkpointing {checkpointing}",
        f"{options.steps} steps, the last {options.rounds} timed, one per round, rounds interleaved; x ours: ratio to"
        " ours with the same allocator settings; predicted: GFLOP / ours; --help explains all columns",
        "",
        table(header, rows),
        "",
    ]
    for name, found in agreement.items():
        parts = ", ".join(f"{metric} {found[metric]:.1e}" for metric in ("loss", "rewards/margins", "grad_norm"))
        lines.append(f"largest difference, ours - {name}, over {options.steps} steps: {parts}")
    if not all(entry["peak_is_of_timed_steps"] for entry in measured.values()):
        lines.append("peak memory covers the whole process, because this kernel cannot reset VmHWM")
    return "\n".join(lines)


def matmul_rates(shape: Shape, device: str, rows: int = 2048) -> dict[str, float]:
    """Measures GFLOP/s of the two kinds of matrix product in a step (layers, head), alone, into allocated memory."""
    import torch

    cuda = device == "cuda"
    options = {"device": device, "dtype": torch.bfloat16 if cuda else torch.float32}
    rates = {}
    for name, inner, columns in (("layers", shape.hidden, shape.intermediate), ("head", shape.hidden, shape.vocab)):
        a, b = torch.randn(rows, inner, **options), torch.randn(inner, columns, **options)
        out = torch.empty(rows, columns, **options)
        seconds = []
        for _ in range(7):
            started = time.perf_counter()
            torch.mm(a, b, out=out)
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        rates[name] = float(f"{2 * rows * inner * columns / statistics.median(seconds) / 1e9:.4g}")
    return rates


if __name__ == "__main__":
    main()
