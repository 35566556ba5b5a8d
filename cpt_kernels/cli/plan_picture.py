"""Draws a plan: lengths of the data, tokens of the micro-batches, memory by part, and seconds by part beside TRL's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..files import replacing
from ..planning.counts import Counts

_BARS = 30  # of a histogram


def draw_plan(plan: dict[str, Any], counts: Counts, max_tokens: int | None, file: Path) -> None:
    """Writes the picture of a plan to ``file``, as PNG or SVG by its ending."""
    from matplotlib.figure import Figure  # imported here because it takes half a second
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    figure = Figure(figsize=(11, 7), layout="constrained")
    (lengths, fill), (memory, time) = figure.subplots(2, 2)

    # Lengths of prompts and completions, which are of different sizes, so the axis is logarithmic.
    sides = np.array([side for pairs in counts.lengths.pairs for pair in pairs for side in pair])
    bins = np.unique(np.geomspace(sides.min(), sides.max() + 1, _BARS).round())
    for column, name in enumerate(("prompt", "completion")):
        lengths.hist(sides[:, column], bins, alpha=0.6, label=name)
    lengths.set(title="lengths of both sides of every pair", xlabel="tokens", ylabel="sides", xscale="log")
    lengths.legend(fontsize="small")

    # Tokens of the micro-batches, and the budget.
    tokens = [counts.lengths.work(rows).tokens for rows in counts.batches]
    fill.hist(tokens, _BARS)
    if max_tokens is not None:
        fill.axvline(max_tokens, color="black", linestyle="--", linewidth=1, label="max_tokens_per_batch")
        fill.legend(fontsize="small")
    fill.set(title=f"{len(tokens):,} micro-batches", xlabel="tokens of a micro-batch", ylabel="micro-batches")

    # Memory by part.
    expected = plan["run"]["memory"]
    step = expected["with checkpointing" if expected["checkpointing"] else "without checkpointing"] or {}
    sizes = plan["run"]["bytes"] | {part: step.get(part) for part in ("activations", "head")}
    parts = {part: size / 2**20 for part, size in sizes.items() if size is not None}
    bars = memory.barh(list(parts), list(parts.values()), color="#93b8dd")
    memory.bar_label(bars, [f"{size:,.3g}" if size < 100 else f"{size:,.0f}" for size in parts.values()], padding=3)
    memory.set(title="memory by part", xlabel="MiB")

    # Seconds by part, one bar for each way to run the same pairs.
    if "seconds" in plan["time"]:
        _draw_seconds(time, plan["time"]["seconds"])
    else:
        time.set_axis_off()
        time.text(0.5, 0.5, "seconds are not predicted", ha="center")
    for axis in (lengths, fill, memory):
        axis.spines[["top", "right"]].set_visible(False)
    for axis in (fill, memory):
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        axis.locator_params("x", nbins=5)
        axis.margins(x=0.15)
    lengths.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    lengths.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    lengths.xaxis.set_minor_locator(NullLocator())

    with replacing(file) as (temporary,):
        figure.savefig(temporary, format=file.suffix[1:], dpi=120)


def _draw_seconds(axis: Any, seconds: dict[str, float]) -> None:
    """Draws stacked bars, training first and the reference after it."""
    reference = seconds.get("reference pass", 0.0)
    runs = {"ours": (seconds["training"], reference), "ours, reference\ncached": (seconds["training"], 0.0)}
    for part in ("reference in every step", "reference before training"):
        if f"TRL, {part}" not in seconds:  # with images
            continue
        runs[part.replace("reference ", "TRL, reference\n")] = (
            seconds["TRL, training"],
            seconds.get(f"TRL, {part}", 0.0),
        )
    if not reference:
        runs = {"ours": runs["ours"], "TRL": (seconds["TRL, training"], 0.0)}
    names = list(runs)
    trained, scored = zip(*runs.values())
    axis.barh(names, trained, color="#1f6fb4", label="training")
    bars = axis.barh(names, scored, left=trained, color="#d9a441", label="reference")
    axis.bar_label(bars, [f"{a + b:,.3g}" for a, b in runs.values()], padding=3)
    axis.invert_yaxis()
    axis.margins(x=0.15)
    axis.set(title="predicted time", xlabel="seconds")
    axis.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)
    axis.spines[["top", "right"]].set_visible(False)
