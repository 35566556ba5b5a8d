"""A training step of ours against TRL's ``DPOTrainer``: seconds, peak memory, and whether both compute the same.

    python -m bench step --peers trl,trl-tuned

Every contestant trains the same Qwen2-shaped model on the same random tokens, same order, seed and optimizer, reference
log-probs precomputed beforehand (not timed), one step a round, rounds interleaved. Medians and quartiles are over
rounds. Gradient checkpointing is off for all unless asked for (on is the default of TRL and ours).

Peak memory is VmHWM of the process during the timed steps. "beyond" is that minus what was resident once the libraries
were imported and the model built, and minus AdamW's two moments: gradients, activations, logits, and what the allocator
keeps. On CUDA both count the device's allocator, beyond weights and moments.

``trl`` is TRL as it installs; ``trl-tuned`` scores completion rows only and runs under the allocator settings below;
``ours-tuned`` has the same settings. ``ratio_trl`` is trl / ours, ``ratio_trl_tuned`` is trl-tuned / ours-tuned.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Sequence
from typing import Any

from .lengths import PRESETS, preference_rows, row_lengths
from .timing import Contestant, add_output_options, finish, interleave, summarise, table
from .work import Shape, Work, packed, padded

# glibc gives every large block back and faults its pages in again at the next step; these settings keep them.
ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "20000000000",
    "MALLOC_TOP_PAD_": "500000000",
    "MALLOC_ARENA_MAX": "1",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """How a contestant is run."""

    side: str  # trl or ours
    completion_rows_only: bool = True
    share_prompts: bool = True
    tuned_allocator: bool = False

    def spec(self) -> dict[str, Any]:
        if self.side == "trl":
            return {"side": "trl", "completion_rows_only": self.completion_rows_only}
        return {"side": "ours", "options": {} if self.share_prompts else {"share_prompts": "false"}}

    def work(self, pairs: Sequence[tuple[int, int, int]], cuda: bool) -> Work:
        if self.side == "trl":
            return padded(pairs, self.completion_rows_only or cuda)
        return packed(pairs, self.share_prompts)


CONTESTANTS = {
    "ours": Entry("ours"),
    "ours-tuned": Entry("ours", tuned_allocator=True),
    "ours-unshared": Entry("ours", share_prompts=False),
    "trl": Entry("trl", completion_rows_only=False),
    "trl-tuned": Entry("trl", tuned_allocator=True),
    "trl-completion-rows": Entry("trl"),
    "trl-allocator": Entry("trl", completion_rows_only=False, tuned_allocator=True),
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    shape = Shape()
    parser = argparse.ArgumentParser("bench step", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    peers = ", ".join(name for name in CONTESTANTS if name not in ("ours", "ours-tuned"))
    parser.add_argument("--peers", default="trl,trl-tuned", help=f"comma-separated, of: {peers}")
    parser.add_argument("--steps", type=int, default=20, help="training steps of every contestant")
    parser.add_argument("--rounds", type=int, help="timed steps, the last ones; default all but two")
    parser.add_argument("--pairs", type=int, default=8, help="pairs a step")
    parser.add_argument("--lengths", choices=PRESETS, default="mixed")
    parser.add_argument("--loss", choices=["sigmoid", "hinge", "ipo", "sft"], default="sigmoid")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a toy model and four steps: does it run?")
    for field in dataclasses.fields(Shape):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=getattr(shape, field.name))
    add_output_options(parser)
    options = parser.parse_args(arguments)
    options.peers = [name for name in options.peers.split(",") if name]
    if unknown := set(options.peers) - set(CONTESTANTS):
        parser.error(f"unknown peers {sorted(unknown)}: choose of {peers}")
    if options.quick:
        toy = Shape(hidden=32, layers=2, heads=2, kv_heads=1, intermediate=64, vocab=500)
        vars(options).update({**dataclasses.asdict(toy), "steps": 4, "pairs": 4, "lengths": "tiny", "rounds": None})
    options.rounds = options.rounds or max(1, options.steps - 2)
    if options.rounds > options.steps:
        parser.error(f"--rounds {options.rounds} is more than --steps {options.steps}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    shape = Shape(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Shape)})
    names = ["ours", *(["ours-tuned"] if any("tuned" in peer for peer in options.peers) else []), *options.peers]
    names = list(dict.fromkeys(names))
    measured = run(names, options, shape)
    predicted = predict(names, options, shape)
    agreement = {name: difference(measured["ours"], measured[name]) for name in names if name != "ours"}
    print(report(names, options, shape, measured, predicted, agreement))
    summary = summarise_run(names, measured, predicted, agreement)
    details = {
        "options": {name: value for name, value in vars(options).items() if name not in ("json", "record")},
        "measured": measured,
        "predicted": predicted,
        "differences": agreement,
        "allocator": ALLOCATOR,
        "gemm_gflops": gemm_rate(shape) if options.device == "cpu" else None,
    }
    finish("step", details, summary, options)


def run(names: Sequence[str], options: argparse.Namespace, shape: Shape) -> dict[str, dict[str, Any]]:
    """Every contestant's seconds of timed steps, peak memory, and all steps' metrics."""
    common = {name: getattr(options, name) for name in ("steps", "pairs", "lengths", "loss", "device")}
    common |= {name: getattr(options, name) for name in ("learning_rate", "gradient_checkpointing")}
    contestants: list[Contestant] = []
    try:
        for name in names:
            entry = CONTESTANTS[name]
            spec = {**common, **entry.spec(), "shape": dataclasses.asdict(shape)}
            environment = ALLOCATOR if entry.tuned_allocator else {}
            contestants.append(Contestant(name, "bench.trainers", spec, environment))
        if len({contestant.hello["checksum"] for contestant in contestants}) > 1:
            raise RuntimeError("the contestants did not start from the same weights")
        untimed = interleave(contestants, options.steps - options.rounds, "step")
        resets = {contestant.name: contestant.ask("reset") for contestant in contestants}
        timed = interleave(contestants, options.rounds, "step")
    finally:
        for contestant in contestants:
            contestant.close()
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


def predict(names: Sequence[str], options: argparse.Namespace, shape: Shape) -> dict[str, dict[str, float]]:
    """Every contestant's mean work of a timed step, in GFLOP by part and in tokens."""
    lengths = row_lengths(preference_rows(options.lengths, options.steps * options.pairs, shape.vocab))
    steps = [lengths[i : i + options.pairs] for i in range(0, len(lengths), options.pairs)][-options.rounds :]
    predicted = {}
    for name in names:
        works = [CONTESTANTS[name].work(step, options.device == "cuda") for step in steps]
        flops = [work.flops(shape, options.gradient_checkpointing) for work in works]
        predicted[name] = {f"{part}_gflop": statistics.mean(f[part] for f in flops) / 1e9 for part in flops[0]} | {
            part: statistics.mean(work.asdict()[part] for work in works) for part in works[0].asdict()
        }
    return predicted


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Largest difference over all steps of every metric that both log."""
    steps = list(zip(ours["metrics"], theirs["metrics"]))
    shared = set(steps[0][0]) & set(steps[0][1])
    return {name: max(abs(a[name] - b[name]) for a, b in steps) for name in sorted(shared)}


def summarise_run(names, measured, predicted, agreement) -> dict[str, Any]:
    """The last line: ratios, measured and predicted, and the largest differences."""
    summary: dict[str, Any] = {}
    for name in names:
        if name in ("ours", "ours-tuned"):
            continue
        own = "ours-tuned" if CONTESTANTS[name].tuned_allocator and "ours-tuned" in names else "ours"
        key = name.replace("-", "_")
        seconds = [statistics.median(measured[side]["seconds"]) for side in (name, own)]
        summary |= {
            f"ratio_{key}": round(seconds[0] / seconds[1], 3),
            f"predicted_ratio_{key}": round(predicted[name]["total_gflop"] / predicted[own]["total_gflop"], 3),
            f"memory_ratio_{key}": round(measured[own]["peak_mib"] / measured[name]["peak_mib"], 3),
            f"memory_beyond_ratio_{key}": round(measured[own]["beyond_mib"] / measured[name]["beyond_mib"], 3),
        }
    for key, metric in (("max_loss_difference", "loss"), ("max_margin_difference", "rewards/margins")):
        summary[key] = max((found[metric] for found in agreement.values()), default=0.0)
    return summary


def report(names, options, shape, measured, predicted, agreement) -> str:
    """The header and the table."""
    ours = statistics.median(measured["ours"]["seconds"])
    rows = []
    for name in names:
        seconds = summarise(measured[name]["seconds"])
        work = predicted[name]
        rows.append(
            [
                name,
                f"{seconds['median']:.3f}",
                f"{seconds['low']:.3f}-{seconds['high']:.3f}",
                f"{seconds['median'] / ours:.2f}",
                f"{work['total_gflop'] / predicted['ours']['total_gflop']:.2f}",
                f"{measured[name]['peak_mib']:.0f}",
                f"{measured[name]['beyond_mib']:.0f}",
                f"{work['tokens']:.0f}",
                f"{work['head_rows']:.0f}",
                f"{work['total_gflop']:.0f}",
                f"{work['total_gflop'] / seconds['median']:.0f}",
            ]
        )
    header = ["contestant", "s/step", "quartiles", "x ours", "predicted", "peak MiB", "beyond MiB", "tokens"]
    header += ["head rows", "GFLOP", "GFLOP/s"]
    precision = "bf16 autocast" if options.device == "cuda" else "fp32"
    checkpointing = "on" if options.gradient_checkpointing else "off"
    lines = [
        f"Qwen2-shaped {dataclasses.asdict(shape)}, {options.lengths} lengths, {options.pairs} pairs a step,"
        f" {options.loss}, {precision} on {options.device}, gradient checkpointing {checkpointing}",
        f"{options.steps} steps, the last {options.rounds} timed, one a round, rounds interleaved; predicted = GFLOP /"
        " ours; GFLOP = 6 p tokens + 14 L Hq D attended + 2 H V rows x GEMMs of the head (4; ours 3), bench/work.py",
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


def gemm_rate(shape: Shape, rows: int = 2048) -> dict[str, float]:
    """GFLOP/s of the two kinds of product that a step is made of, alone, into memory that is there."""
    import torch

    rates = {}
    for name, inner, columns in (("layers", shape.hidden, shape.intermediate), ("head", shape.hidden, shape.vocab)):
        a, b, out = torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns)
        seconds = []
        for _ in range(7):
            started = time.perf_counter()
            torch.mm(a, b, out=out)
            seconds.append(time.perf_counter() - started)
        rates[name] = round(2 * rows * inner * columns / statistics.median(seconds) / 1e9, 1)
    return rates


if __name__ == "__main__":
    main()
