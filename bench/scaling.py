"""How does the time of a training step grow with the work, for us and for peers?

    python -m bench scaling --axes pairs,tokens,vocab,prompt_share,completions,lengths
    python -m bench scaling --axes ranks --steps 12

Every point of an axis is a run of ``bench step``, with the same contestants and rules, that changes one setting:

    pairs           pairs per step, of "mixed" lengths
    tokens          tokens of the prompt, and of each completion
    vocab           vocabulary size of head and embeddings
    prompt_share    share of the prompt in a sequence of 512 tokens
    completions     completions per prompt, K; a step trains all their K (K - 1) / 2 pairs
    lengths         presets of lengths, see ``bench step --help``
    ranks           processes (gloo or NCCL), each with --pairs pairs and the same number of threads at every point

The report has seconds per step, peak memory and tokens of every contestant, beside the ratio predicted by operations.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import sys
from collections.abc import Sequence
from typing import Any

from .plot import TITLES
from .shapes import Shape
from .step import CONTESTANTS, add_model_options, matmul_rates, predict, run, shape_of
from .timing import add_output_options, finish, summarize, table

_PEERS = "ours-unshared,trl-tuned"
_QUICK_PEERS = "trl-completion-rows"
_SHARES = (0.125, 0.25, 0.5, 0.75, 0.875)
_SEQUENCE = 512
# axis -> name of each point -> the options of the step that it changes
AXES: dict[str, dict[str, dict[str, Any]]] = {
    "pairs": {str(n): {"pairs": n} for n in (1, 2, 4, 8)},
    "tokens": {str(n): {"lengths": f"uniform:{n}:{n}", "pairs": 2} for n in (32, 128, 512)},
    "vocab": {str(n): {"vocab": n} for n in (8000, 32000, 128000)},
    "prompt_share": {
        str(share): {"lengths": f"uniform:{int(share * _SEQUENCE)}:{int((1 - share) * _SEQUENCE)}", "pairs": 2}
        for share in _SHARES
    },
    "completions": {
        str(k): {"completions": k, "pairs": k * (k - 1) // 2, "lengths": "uniform:64:64"} for k in (2, 3, 4, 6, 8)
    },
    "lengths": {name: {"lengths": name} for name in ("mixed", "ultrafeedback", "hh", "long-prompt", "responses")},
    "ranks": {str(n): {"ranks": n} for n in (1, 2)},
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench scaling", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    single = ",".join(axis for axis in AXES if axis != "ranks")  # with gloo, the times of a few steps vary too much
    parser.add_argument("--axes", default=single, help=f"comma-separated list, see above; default {single}")
    parser.add_argument("--peers", help=f"comma-separated list of contestants of `bench step`; default {_PEERS}")
    parser.add_argument("--pairs", type=int, default=2, help="pairs per step, unless the axis sets them")
    parser.add_argument("--steps", type=int, default=3, help="steps of every point; all but the first are timed")
    add_model_options(parser)
    parser.add_argument("--quick", action="store_true", help=f"smoke test: a toy model, one point, {_QUICK_PEERS}")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    options.peers = options.peers or (_QUICK_PEERS if options.quick else _PEERS)
    options.axes, options.peers = options.axes.split(","), options.peers.split(",")
    for name, given, known in (("axes", options.axes, AXES), ("peers", options.peers, CONTESTANTS)):
        if unknown := set(given) - set(known):
            parser.error(f"unknown {name} {sorted(unknown)}: choose from {', '.join(known)}")
    if options.steps < 2:
        parser.error("--steps must be at least 2, because the first step warms up")
    options.points = {axis: dict(AXES[axis]) for axis in options.axes}
    if options.quick:
        toy = {"hidden": 32, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate": 64, "vocab": 500, "steps": 2}
        vars(options).update(toy)
        options.points = {"ranks": {"2": {"ranks": 2, "completions": 3, "pairs": 3, "lengths": "tiny"}}}
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    names = ["ours", *options.peers]
    shape = shape_of(options, len(names))
    found, skipped = {}, {}
    for axis, points in options.points.items():
        if axis == "ranks" and (lacking := ranks_lack(points, options.device)):
            skipped[axis] = lacking
            continue
        found[axis] = {}
        for value, changes in points.items():
            print(f"# {axis} {value}", file=sys.stderr, flush=True)
            found[axis][value] = measure(names, options, shape, changes, ranks_of(points))
        print(report(axis, found[axis], names), end="\n\n", flush=True)
    for axis, reason in skipped.items():
        print(f"{axis}: {reason}")
    summary = {axis: ratios(points, options.peers) for axis, points in found.items()}
    settings = {k: v for k, v in vars(options).items() if k not in ("json", "record", "points")}
    finish("scaling", {"options": settings | dataclasses.asdict(shape), "axes": found}, {"ratios": summary}, options)


def ranks_of(points: dict[str, dict[str, Any]]) -> int:
    """Returns the largest number of ranks among the points of an axis."""
    return max(changes.get("ranks", 1) for changes in points.values())


def ranks_lack(points: dict[str, dict[str, Any]], device: str) -> str | None:
    """Returns why the machine cannot run the axis, or None if it can."""
    import torch

    there = torch.cuda.device_count() if device == "cuda" else len(os.sched_getaffinity(0))
    wanted = ranks_of(points)
    return None if there >= wanted else f"needs {wanted} {'GPUs' if device == 'cuda' else 'cores'}, found {there}"


def measure(
    names: Sequence[str], options: argparse.Namespace, shape: Shape, changes: dict[str, Any], most_ranks: int
) -> dict[str, dict[str, Any]]:
    """Runs one point. Returns each contestant's time, memory and predicted work.

    Raises:
        RuntimeError: The contestants' losses differ, so that they do not do the same work.
    """
    # Settings of the step: common ones, then those of the point.
    step = {"completions": 2, "lengths": "mixed", "loss": "sigmoid", "learning_rate": 1e-5}
    step = argparse.Namespace(**{**vars(options), **step, "rounds": options.steps - 1, **changes})
    shape = dataclasses.replace(shape, vocab=changes.get("vocab", shape.vocab))
    ranks = changes.get("ranks", 1)
    more = {"ranks": ranks}
    if most_ranks > 1:
        more["threads"] = max(1, len(os.sched_getaffinity(0)) // most_ranks)
    # Measure, predict, and compare the losses of all steps.
    rates = matmul_rates(shape, options.device)
    measured = run(names, step, shape, **more)
    predicted = predict(names, step, shape, rates, ranks)
    losses = {name: [metrics["loss"] for metrics in measured[name]["metrics"]] for name in names}
    for name in names[1:]:
        worst = max(abs(a - b) for a, b in zip(losses[names[0]], losses[name]))
        if worst > (1e-3 if options.device == "cpu" else 0.05):
            raise RuntimeError(f"{name} computes other losses than {names[0]}: they differ by {worst:.2e}")
    return {
        name: {
            "seconds": summarize(measured[name]["seconds"]),
            "peak_mib": measured[name]["peak_mib"],
            "beyond_mib": measured[name]["beyond_mib"],
            "gflop": predicted[name]["total_gflop"],
            "tokens": predicted[name]["tokens"],
            "floor_s": predicted[name]["floor_s"],
        }
        for name in names
    }


def ratios(points: dict[str, dict[str, Any]], peers: Sequence[str]) -> dict[str, dict[str, float]]:
    """Returns peer -> point of the axis -> peer's time / ours."""
    return {
        peer: {
            value: round(point[peer]["seconds"]["median"] / point["ours"]["seconds"]["median"], 3)
            for value, point in points.items()
        }
        for peer in peers
    }


def report(axis: str, points: dict[str, dict[str, Any]], names: Sequence[str]) -> str:
    """Formats the table of an axis: one line per point and contestant."""
    rows = []
    for value, point in points.items():
        ours = point["ours"]
        for name in names:
            one, seconds = point[name], point[name]["seconds"]
            ratio, predicted = seconds["median"] / ours["seconds"]["median"], one["gflop"] / ours["gflop"]
            cells = [value, name, f"{seconds['median']:.3f}", f"{seconds['low']:.3f}-{seconds['high']:.3f}"]
            cells += [f"{ratio:.2f}", f"{predicted:.2f}", f"{ratio / predicted:.0%}"]
            cells += [f"{one['peak_mib']:.0f}", f"{one['tokens']:.0f}", f"{one['floor_s'] / seconds['median']:.0%}"]
            rows.append(cells)
    header = [TITLES[axis], "contestant", "s/step", "quartiles", "x ours", "predicted", "of it", "peak MiB", "tokens"]
    last = names[-1]
    median = statistics.median(ratios(points, [last])[last].values())
    return f"{table([*header, 'of floor'], rows)}\nmedian over the axis: {last} takes {median:.2f} x ours"


if __name__ == "__main__":
    main()
