"""Plots recorded results: ``python -m bench plot RESULT.json --out FOLDER`` draws a PNG and an SVG per subject."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cpt_kernels.plots import legend_above

TITLES = {
    "pairs": "pairs per step",
    "tokens": "tokens of the prompt and of each completion",
    "vocab": "vocabulary",
    "prompt_share": "share of the prompt in a sequence of 512",
    "completions": "completions of a prompt, all pairs",
    "lengths": "lengths",
    "ranks": "ranks",
}
STORES = {
    "Ours": "reference cache, by key",
    "OursByTokens": "the same, from tokens",
    "LMDB": "LMDB, by key",
    "SQLite": "SQLite, by key",
    "ArrowColumn": "an Arrow column, by row number",
}
_OURS, _VARIANT, _PEERS = "#1f6fb4", "#7fb3de", ("#b4562f", "#d9a441", "#7a7a7a", "#6b8f3a", "#8f5aa3")
_TRL = {"trl-tuned": _PEERS[0], "trl": _PEERS[1]}  # the same colors in every plot
_PREDICTED = "predicted from operations"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m bench plot", description=__doc__)
    parser.add_argument("results", type=Path, help="result file, written by --json or --record")
    parser.add_argument("--out", type=Path, help="folder for the plots; default: that of the result file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    import matplotlib

    matplotlib.use("Agg")
    options = parse(arguments)
    results = json.loads(options.results.read_text())
    folder = options.out or options.results.parent
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for subject in DRAWINGS.keys() & results.keys():
        try:
            drawn += map(str, DRAWINGS[subject](results[subject], folder))
        except KeyError as error:  # earlier commits recorded other fields
            drawn.append(f"{subject} is not drawn: {options.results} lacks its field {error}; measure it again")
    print("\n".join(sorted(drawn)) or f"nothing to draw in {options.results}: it has {sorted(results)}")


def draw_step(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draws seconds per step and peak memory as bars, with marks for the time predicted from ours by operations."""
    import matplotlib.pyplot as plt

    measured, predicted = result["measured"], result["predicted"]
    names = list(measured)[::-1]
    seconds = [statistics.median(measured[name]["seconds"]) for name in names]
    ours = seconds[names.index("ours")] / predicted["ours"]["total_gflop"]
    expected = [ours * predicted[name]["total_gflop"] for name in names]
    memory = [measured[name]["peak_mib"] / 1024 for name in names]
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.5 * len(names) + 1.4), sharey=True)
    colors = [_color(name, i) for i, name in enumerate(names)]
    for axis, values, label in zip(axes, (seconds, memory), ("seconds per step", "peak memory, GiB")):
        bars = axis.barh(names, values, color=colors)
        axis.bar_label(bars, [f"{value:.2f}" for value in values], padding=8)  # beside the mark of a bar's end
        axis.set_xlabel(label)
        _fit(axis, values, 1.2)
    axes[0].plot(expected, names, "k|", markersize=14, label=_PREDICTED)
    legend_above(axes[0], 4)
    return _save(figure, result, folder / "step")


def draw_scaling(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draws one panel per axis: seconds per step; dotted lines show the time predicted from ours by operations."""
    import matplotlib.pyplot as plt

    columns = min(3, len(result["axes"]))
    rows = -(-len(result["axes"]) // columns)
    figure, panels = plt.subplots(rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False)
    for panel, (name, points) in zip(panels.flat, result["axes"].items()):
        values = list(points)
        for i, contestant in enumerate(next(iter(points.values()))):
            found = [point[contestant] for point in points.values()]
            seconds = [one["seconds"]["median"] for one in found]
            spread = [[abs(one["seconds"][end] - one["seconds"]["median"]) for one in found] for end in ("low", "high")]
            color = _color(contestant, i)
            line = "none" if name == "lengths" else "-"  # presets have no order, so no line connects them
            style = {"color": color, "marker": _marker(contestant), "linestyle": line}
            panel.errorbar(values, seconds, spread, label=contestant, **style)
            if contestant != "ours":
                expected = [
                    p["ours"]["seconds"]["median"] * p[contestant]["gflop"] / p["ours"]["gflop"]
                    for p in points.values()
                ]
                panel.plot(values, expected, "_" if name == "lengths" else ":", color=color, markersize=14)
        panel.set_xlabel(TITLES[name])
        panel.set_ylim(bottom=0)
        if name == "lengths":
            panel.tick_params("x", rotation=20)
    for panel in panels.flat[len(result["axes"]) :]:
        panel.axis("off")
    panels[0, 0].set_ylabel("seconds per step")
    panels[0, 0].plot([], [], "k:", label=_PREDICTED)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, fontsize=8, frameon=False, loc="outside lower left", ncols=len(labels))
    return _save(figure, result, folder / "scaling")


def draw_cache(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draws look-ups per second and MB written per second of every store as bars."""
    import matplotlib.pyplot as plt

    stores = result["stores"]
    names = [name for name in STORES if name in stores][::-1]  # without TRL's columns, which hold sums and not values
    texts = [STORES[name] for name in names]
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.45 * len(names) + 1.4), sharey=True)
    colors = [_OURS if name.startswith("Ours") else _PEERS[i % len(_PEERS)] for i, name in enumerate(names)]
    for axis, key, label in zip(
        axes, ("lookups_per_s", "fill_mb_per_s"), ("look-ups per second", "MB per second, filling")
    ):
        values = [stores[name].get(key, 0) for name in names]
        bars = axis.barh(texts, values, color=colors)
        axis.bar_label(bars, [f"{v:,.0f}" if v else "reads the files of the first" for v in values], padding=3)
        axis.set_xlabel(label)
        if _fit(axis, values, 1.25):
            axis.locator_params("x", nbins=4)
            axis.xaxis.set_major_formatter("{x:,.0f}")
    return _save(figure, result, folder / "cache")


def draw_packing(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draws the filled share of the budget, and the imbalance between ranks."""
    import matplotlib.pyplot as plt

    names = [f"{r['budget']:,} tokens, {r['ranks']} rank{'s' * (r['ranks'] > 1)}" for r in result["results"]][::-1]
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.35 * len(names) + 1.4), sharey=True)
    labels = "budget filled, mean of all steps, %", "most - fewest tokens of a rank, worst step, %"
    for axis, key, label in zip(axes, ("fill", "imbalance_worst"), labels):
        values = [100 * r[key] for r in result["results"]][::-1]
        axis.bar_label(axis.barh(names, values, color=_OURS), [f"{value:.1f}" for value in values], padding=3)
        axis.set_xlabel(label)
        axis.set_xlim(0, 1.15 * (max(values) or 1))
    return _save(figure, result, folder / "packing")


def draw_tokenize(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draws pairs per second of TRL in one process, TRL in several processes, and ours."""
    import matplotlib.pyplot as plt

    found = result["results"][::-1]
    pairs = result["rows"]
    figure, axis = plt.subplots(figsize=(7, 0.9 * len(found) + 1.2))
    sides = {
        "trl": ("trl", _PEERS[0]),
        "trl_processes": (f"trl, {result['processes']} processes", _PEERS[1]),
        "ours": ("ours, one process", _OURS),
    }
    for offset, (side, (label, color)) in zip((0.27, 0, -0.27), sides.items()):
        values = [pairs / one[side] for one in found]
        bars = axis.barh([i + offset for i in range(len(found))], values, 0.27, color=color, label=label)
        axis.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3)
    axis.set_yticks(range(len(found)), [f"{one['form']}, {one['pairs']}" for one in found])
    axis.set_xlabel("pairs per second")
    _fit(axis, [pairs / one[side] for one in found for side in sides], 1.15)
    legend_above(axis, 7)
    return _save(figure, result, folder / "tokenize")


def draw_head(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draws time and peak memory against tokens, one row per vocabulary.

    Only contestants with the most matrix products are shown: those that train the head, if any were measured.
    """
    import matplotlib.pyplot as plt

    measured = result["measured"]
    figure, panels = plt.subplots(len(measured), 2, figsize=(10, 3.6 * len(measured)), squeeze=False)
    for (time, memory), (vocab, sizes) in zip(panels, measured.items()):
        tokens = [int(n) for n in sizes]
        one_matrix = memory.plot(tokens, [result["logits_mib"][vocab][n] for n in sizes], "k:")
        every = next(iter(sizes.values()))
        most = max(one["products"] for one in every.values())
        for i, name in enumerate(name for name, one in every.items() if one["products"] == most):
            ours = name in ("trained", "general", "frozen", "score")
            style = {"marker": "o", "color": (_OURS, _VARIANT)[i % 2]} if ours else {"marker": "s", "linestyle": "--"}
            style |= {} if ours else {"color": _PEERS[i % len(_PEERS)]}
            found = [size[name] for size in sizes.values()]
            seconds = [one["seconds"]["median"] for one in found]
            spread = [[abs(one["seconds"][end] - one["seconds"]["median"]) for one in found] for end in ("low", "high")]
            time.errorbar(tokens, seconds, spread, label=name, **style)
            memory.plot(tokens, [one["mib"] for one in found], label=name, **style)
        time.set_ylabel("seconds, forward and backward")
        memory.set_ylabel("peak memory beyond the inputs, MiB")
        for axis in (time, memory):
            axis.set_xlabel(
                f"completion tokens, vocabulary {int(vocab):,}, hidden size {result['options']['hidden']:,}"
            )
            axis.set_ylim(bottom=0)
        legend_above(time, 5)
        memory.legend(
            one_matrix, ["one matrix of logits"], fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1)
        )
    return _save(figure, result, folder / "head")


def draw_attention(result: dict[str, Any], folder: Path) -> list[Path]:
    """Draws time, with marks for the time predicted by attended pairs; a column per size, a row per way."""
    import matplotlib.pyplot as plt

    measured = result["measured"]
    every = next(iter(measured.values()))["forward"]  # "forward" has all contestants; some have no backward
    colors = {name: _OURS if name.startswith("ours") else _PEERS[2:][i % 3] for i, name in enumerate(every)}
    figure, panels = plt.subplots(2, len(measured), figsize=(1 + 3.4 * len(measured), 5), squeeze=False)
    for column, (size, ways) in enumerate(measured.items()):
        _, prompt, completions = size.split()
        for panel, (way, found) in zip(panels[:, column], ways.items()):
            names = list(found)[::-1]
            milliseconds = [1e3 * found[name]["seconds"]["median"] for name in names]
            fastest = min(ms for ms, name in zip(milliseconds, names) if name.startswith("ours"))
            panel.barh(names, milliseconds, color=[colors[name] for name in names])
            for name, ms in zip(names, milliseconds):  # inside the bar, where no mark hides the text
                panel.text(0, name, f" {ms:.1f}", color="white", va="center", fontsize=9)
            expected = [fastest * found[name]["pairs"] for name in names]
            panel.plot(expected, names, "k|", markersize=12, label="predicted from attended pairs")
            panel.set_xlim(0, 1.2 * max(milliseconds + expected))
            panel.set_xlabel(f"ms, {way}")
        panels[0, column].set_title(f"prompt {prompt}, completions {completions}", fontsize=9)
    panels[1, 0].legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)
    return _save(figure, result, folder / "attention")


DRAWINGS = {
    "step": draw_step,
    "scaling": draw_scaling,
    "head": draw_head,
    "attention": draw_attention,
    "cache": draw_cache,
    "packing": draw_packing,
    "tokenize": draw_tokenize,
}


def _fit(axis, values: Sequence[float], room: float) -> bool:
    """Fits an axis to bars from 0 with room for their labels; a scale of logarithms keeps the shorter ones visible.

    Returns:
        Whether the axis begins at 0.
    """
    shortest = min((value for value in values if value > 0), default=1)
    if max(values) <= 100 * shortest:
        axis.set_xlim(0, room * max(values))
        return True
    axis.set_xscale("log")
    axis.set_xlim(shortest / 2, max(values) ** room / shortest ** (room - 1))
    return False


def _is_peer(name: str) -> bool:
    return name.startswith(("trl", "eager"))


def _marker(name: str) -> str:
    return "s" if _is_peer(name) else "o"


def _color(name: str, index: int) -> str:
    if _is_peer(name):
        return _TRL.get(name, _PEERS[index % len(_PEERS)])
    return _VARIANT if name.partition("-")[2] in ("unshared", "padded") else _OURS


def _title(result: dict[str, Any]) -> str:
    """Returns machine, versions, commit and date of a result."""
    machine = result["machine"]
    versions = ", ".join(
        f"{name} {result['versions'][name]}" for name in ("torch", "trl") if name in result["versions"]
    )
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    return f"{where}; {versions}; commit {result['commit']}, {result['date'][:10]}"


def _save(figure, result: dict[str, Any], stem: Path) -> list[Path]:
    """Saves a figure as PNG and SVG and returns both paths."""
    import matplotlib.pyplot as plt

    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_title(result), fontsize=9)
    figure.set_layout_engine("constrained")
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    with plt.rc_context({"svg.hashsalt": stem.name}):  # makes the file reproducible byte by byte
        for path in paths:
            figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return paths


if __name__ == "__main__":
    main()
