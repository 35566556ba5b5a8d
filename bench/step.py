"""A training step of ours against TRL's ``DPOTrainer``: seconds, peak memory, and whether both compute the same.

    python -m bench step --peers trl,trl-tuned,ours-unshared,ours-padded

Every contestant trains the same Qwen2-shaped model on the same random tokens, same order, seed and optimizer, reference
log-probs precomputed beforehand (not timed), one step a round, rounds interleaved. Medians and quartiles are over
rounds. Gradient checkpointing is off for all unless asked for (on is the default of TRL and ours).

    trl                 TRL as it installs
    trl-tuned           completion rows only (its switch, off on a CPU), the allocator settings below
    trl-completion-rows, trl-allocator    one of the two
    ours, ours-tuned    cpt_kernels as it installs, and with the same allocator settings
    ours-unshared       packed, every completion behind its own copy of the prompt
    ours-padded         the same right-padded to the longest of the step

On CUDA both run under bf16 autocast, with flash attention where it is installed. ``predicted`` is the ratio of the
operations that the lengths ask for (bench/work.py), ``of it`` measured / predicted: 100 % where all contestants do
their operations at the same rate. ``of floor`` is the time that a step's operations take at the rate of large matrix
products alone, measured in the same run, over the step's time.

Peak memory is VmHWM of the process during the timed steps. "beyond" is that minus what was resident once the libraries
were imported and the model built, and minus AdamW's two moments: gradients, activations, logits, and what the allocator
keeps. On CUDA both count the device's allocator, beyond weights and moments.
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

from .lengths import HELP, checked, pair_of, rows_of
from .timing import Contestant, add_output_options, close_all, finish, interleave, summarise, table
from .work import SHAPES, Pair, Shape, Work, packed, padded

# glibc gives every large block back and faults its pages in again at the next step; these settings keep them.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "MALLOC_TOP_PAD_": "500000000",
    "MALLOC_ARENA_MAX": "1",
}
_PEERS = "trl,trl-tuned"
_QUICK_PEERS = "trl"
_TOY = Shape(hidden=32, layers=2, heads=2, kv_heads=1, intermediate=64, vocab=500)
_BYTES = 16  # a parameter in training: weight, gradient, two moments, fp32


@dataclasses.dataclass(frozen=True)
class Entry:
    """How a contestant is run."""

    side: str  # trl or ours
    completion_rows_only: bool = True
    share_prompts: bool = True
    padded: bool = False
    tuned_allocator: bool = False

    def spec(self) -> dict[str, Any]:
        if self.side == "trl":
            return {"side": "trl", "completion_rows_only": self.completion_rows_only}
        options = {} if self.share_prompts else {"share_prompts": "false"}
        return {"side": "ours", "options": options, "padded": self.padded}

    def work(self, pairs: Sequence[Pair], cuda: bool) -> Work:
        if self.side == "trl":
            return padded(pairs, self.completion_rows_only or cuda)
        return padded(pairs, True, head_gemms=3) if self.padded else packed(pairs, self.share_prompts)


CONTESTANTS = {
    "ours": Entry("ours"),
    "ours-tuned": Entry("ours", tuned_allocator=True),
    "ours-unshared": Entry("ours", share_prompts=False),
    "ours-padded": Entry("ours", share_prompts=False, padded=True),
    "trl": Entry("trl", completion_rows_only=False),
    "trl-tuned": Entry("trl", tuned_allocator=True),
    "trl-completion-rows": Entry("trl"),
    "trl-allocator": Entry("trl", completion_rows_only=False, tuned_allocator=True),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench step", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    peers = ", ".join(name for name in CONTESTANTS if name not in ("ours", "ours-tuned"))
    parser.add_argument("--peers", help=f"comma-separated, of: {peers}; default {_PEERS}")
    parser.add_argument("--steps", type=int, default=20, help="training steps of every contestant")
    parser.add_argument("--rounds", type=int, help="timed steps, the last ones; default all but two")
    parser.add_argument("--pairs", type=int, default=8, help="pairs a step")
    parser.add_argument("--completions", type=int, default=2, help="of every prompt; all their pairs are trained")
    parser.add_argument("--lengths", default="mixed", help=HELP)
    add_model_options(parser)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--loss", choices=["sigmoid", "hinge", "ipo", "sft"], default="sigmoid")
    parser.add_argument("--quick", action="store_true", help=f"a toy model, four steps, {_QUICK_PEERS}: does it run?")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    peers_asked = (_QUICK_PEERS if options.quick else _PEERS) if options.peers is None else options.peers
    options.peers = [name for name in peers_asked.split(",") if name]
    if unknown := set(options.peers) - set(CONTESTANTS):
        parser.error(f"unknown peers {sorted(unknown)}: choose of {peers}")
    if options.quick:
        vars(options).update(dataclasses.asdict(_TOY) | {"steps": 4, "pairs": 4, "lengths": "tiny", "rounds": None})
    options.rounds = options.rounds or max(1, options.steps - 2)
    if options.rounds > options.steps:
        parser.error(f"--rounds {options.rounds} is more than --steps {options.steps}")
    pairs_of_prompt = options.completions * (options.completions - 1) // 2
    if options.completions < 2 or options.pairs % pairs_of_prompt:
        parser.error(f"--pairs {options.pairs}: {options.completions} completions a prompt are {pairs_of_prompt} pairs")
    return options


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """``--device``, ``--shape`` and what of it can be changed."""
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="small", help="of the model; layers as many as fit")
    for field in dataclasses.fields(Shape):
        if field.name != "tied":
            name = field.name.replace("_", "-")
            parser.add_argument(f"--{name}", type=int, help=f"instead of the shape's {name}")
    parser.add_argument("--lora-rank", type=int, default=0, help="train adapters on all linear layers; 0: all weights")
    parser.add_argument("--liger-layers", action="store_true", help="Liger's layer kernels for all contestants")
    parser.add_argument("--gradient-checkpointing", action="store_true")


def shape_of(options: argparse.Namespace, contestants: int) -> Shape:
    """The preset, changed as asked for; where layers are not given, as many of its as fit beside each other."""
    changes = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(Shape)}
    shape = dataclasses.replace(SHAPES[options.shape], **{k: v for k, v in changes.items() if v is not None})
    if options.layers is not None:
        return shape
    # Half of the memory for parameters, the other half for what a step adds.
    per_parameter = 4 if options.lora_rank else _BYTES
    return shape.fitted(memory_of(options.device) / 2 / contestants / per_parameter)


def memory_of(device: str) -> int:
    """Bytes that are there."""
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
    summary = summarise_run(names, measured, predicted, agreement)
    print(report(names, options, shape, measured, predicted, agreement))
    details = {
        "options": {k: v for k, v in vars(options).items() if k not in ("json", "record")} | dataclasses.asdict(shape),
        "measured": measured,
        "predicted": predicted,
        "differences": agreement,
        "allocator": ALLOCATOR,
        "matmul_gflops": rates,
    }
    finish("step", details, summary, options)


def run(names: Sequence[str], options: argparse.Namespace, shape: Shape, **more: Any) -> dict[str, dict[str, Any]]:
    """Every contestant's seconds of timed steps, peak memory, and all steps' metrics; ``more`` is told to workers."""
    told = ("steps", "pairs", "completions", "lengths", "loss", "device", "learning_rate", "lora_rank")
    common = {name: getattr(options, name) for name in (*told, "gradient_checkpointing", "liger_layers")}
    contestants: list[Contestant] = []
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(more.get("ranks", 1)))))
    try:
        for name in names:
            entry = CONTESTANTS[name]
            spec = {**common, **entry.spec(), "shape": dataclasses.asdict(shape), **more}
            environment = {"CUDA_VISIBLE_DEVICES": gpus} | (ALLOCATOR if entry.tuned_allocator else {})
            contestants.append(Contestant(name, "bench.trainers", spec, environment))
        if len({contestant.hello["checksum"] for contestant in contestants}) > 1:
            raise RuntimeError("the contestants did not start from the same weights")
        untimed = interleave(contestants, options.steps - options.rounds, "step")
        resets = {contestant.name: contestant.ask("reset") for contestant in contestants}
        timed = interleave(contestants, options.rounds, "step")
    finally:
        close_all(contestants)
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
    """Every contestant's mean work of a timed step, in GFLOP by part and in tokens, and its time at ``rates``.

    Of several ranks: a padded step waits for the rank with most to do, ours are balanced.
    """
    wanted = {name: getattr(options, name) for name in ("steps", "pairs", "completions", "lengths")}
    pairs = list(map(pair_of, rows_of({**wanted, "ranks": ranks, "shape": dataclasses.asdict(shape)})))
    batches = [pairs[i : i + options.pairs] for i in range(0, len(pairs), options.pairs)]
    steps = [batches[i : i + ranks] for i in range(0, len(batches), ranks)][-options.rounds :]
    predicted = {}
    for name in names:
        entry, cuda = CONTESTANTS[name], options.device == "cuda"
        slowest = entry.side == "trl" or entry.padded
        found = []
        for step in steps:
            works = [entry.work(batch, cuda) for batch in step]
            flops = [work.flops(shape, options.gradient_checkpointing, bool(options.lora_rank)) for work in works]
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


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Largest difference over all steps of every metric that both log."""
    steps = list(zip(ours["metrics"], theirs["metrics"]))
    shared = set(steps[0][0]) & set(steps[0][1])
    return {name: max(abs(a[name] - b[name]) for a, b in steps) for name in sorted(shared)}


def compared_with(name: str, names: Collection[str]) -> str:
    """Ours, under the allocator settings of ``name``."""
    return "ours-tuned" if CONTESTANTS[name].tuned_allocator and "ours-tuned" in names else "ours"


def summarise_run(names, measured, predicted, agreement) -> dict[str, Any]:
    """The last line: ratios, measured and predicted, and the largest differences."""
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
    """The header and the table."""
    medians = {name: statistics.median(measured[name]["seconds"]) for name in names}
    peers = [seconds for name, seconds in medians.items() if CONTESTANTS[name].side == "trl"]
    rows = []
    for name in names:
        seconds, work, own = summarise(measured[name]["seconds"]), predicted[name], compared_with(name, names)
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
                f"{work['total_gflop']:.0f}",
                f"{work['floor_s'] / seconds['median']:.0%}",
            ]
        )
    header = ["contestant", "s/step", "quartiles", "x ours", "predicted", "of it", "x best peer"]
    header += ["peak MiB", "beyond MiB", "tokens", "head rows", "GFLOP", "of floor"]
    precision = "bf16 autocast" if options.device == "cuda" else "fp32"
    trained = f"LoRA of rank {options.lora_rank}" if options.lora_rank else "all weights"
    checkpointing = "on" if options.gradient_checkpointing else "off"
    lines = [
        f"Qwen2-shaped {dataclasses.asdict(shape)}, {trained}, {options.lengths} lengths, {options.pairs} pairs a step"
        f" of {options.completions} completions a prompt, {options.loss}, {precision} on {options.device},"
        f" gradient checkpointing {checkpointing}",
        f"{options.steps} steps, the last {options.rounds} timed, one a round, rounds interleaved; x ours: under the"
        " same allocator settings; predicted: GFLOP over ours; GFLOP and floor: bench/work.py, and --help",
        "",
        table(header, rows),
        "",
    ]
    for name, found in agreement.items():
        parts = ", ".join(f"{metric} {found[metric]:.1e}" for metric in ("loss", "rewards/margins", "grad_norm"))
        lines.append(f"largest difference, ours - {name}, over {options.steps} steps: {parts}")
    if not all(entry["peak_is_of_timed_steps"] for entry in measured.values()):
        lines.append("peak memory is of the whole process: this kernel does not reset VmHWM")
    return "\n".join(lines)


def matmul_rates(shape: Shape, device: str, rows: int = 2048) -> dict[str, float]:
    """GFLOP/s of the two kinds of product that a step is made of, alone, into memory that is there."""
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
        rates[name] = round(2 * rows * inner * columns / statistics.median(seconds) / 1e9, 1)
    return rates


if __name__ == "__main__":
    main()
