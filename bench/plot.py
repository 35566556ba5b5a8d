"""Pictures of results: ``python -m bench plot RESULT.json --out FOLDER`` draws a PNG and an SVG per subject."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TITLES = {
    "pairs": "pairs a step",
    "tokens": "tokens of the prompt and of each completion",
    "vocab": "vocabulary",
    "prompt_share": "share of the prompt in a sequence of 512",
    "completions": "completions of a prompt, all pairs",
    "lengths": "lengths",
    "ranks": "ranks",
}
_OURS, _VARIANT, _PEERS = "#1f6fb4", "#7fb3de", ("#b4562f", "#d9a441", "#7a7a7a", "#6b8f3a", "#8f5aa3")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench plot", description=__doc__)
    parser.add_argument("results", type=Path, help="a file that --json or --record wrote")
    parser.add_argument("--out", type=Path, help="folder of the pictures, default beside the file")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    import matplotlib

    matplotlib.use("Agg")
    options = parse(arguments)
    results = json.loads(options.results.read_text())
    folder = options.out or options.results.parent
    folder.mkdir(parents=True, exist_ok=True)
    drawn = [
        path for subject, draw in DRAWINGS.items() if subject in results for path in draw(results[subject], folder)
    ]
    print("\n".join(map(str, drawn)) or f"nothing to draw in {options.results}: it has {sorted(results)}")


def draw_step(result: dict[str, Any], folder: Path) -> list[Path]:
    """Bars: seconds a step, with what the operations predict from ours, and peak memory."""
    import matplotlib.pyplot as plt

    measured, predicted = result["measured"], result["predicted"]
    names = list(measured)[::-1]
    seconds = [statistics.median(measured[name]["seconds"]) for name in names]
    ours = seconds[names.index("ours")] / predicted["ours"]["total_gflop"]
    expected = [ours * predicted[name]["total_gflop"] for name in names]
    memory = [measured[name]["peak_mib"] / 1024 for name in names]
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.5 * len(names) + 1.4), sharey=True)
    colours = [_colour(name, i) for i, name in enumerate(names)]
    for axis, values, label in zip(axes, (seconds, memory), ("seconds a step", "peak memory, GiB")):
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, [f"{value:.2f}" for value in values], padding=3)
        axis.set_xlabel(label)
        axis.set_xlim(0, 1.15 * max(values))
    axes[0].plot(expected, names, "k|", markersize=14, label="operations / ours")
    axes[0].legend(fontsize=8, frameon=False)
    return _save(figure, result, folder / "step")


def draw_scaling(result: dict[str, Any], folder: Path) -> list[Path]:
    """A panel an axis: seconds a step against what grows; dotted, what the operations predict from ours."""
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
            colour = _colour(contestant, i)
            panel.errorbar(values, seconds, spread, color=colour, marker=_marker(contestant), label=contestant)
            if contestant != "ours":
                expected = [
                    p["ours"]["seconds"]["median"] * p[contestant]["gflop"] / p["ours"]["gflop"]
                    for p in points.values()
                ]
                panel.plot(values, expected, ":", color=colour)
        panel.set_xlabel(TITLES[name])
        panel.set_ylim(bottom=0)
        if name == "lengths":
            panel.tick_params("x", rotation=20)
    for panel in panels.flat[len(result["axes"]) :]:
        panel.axis("off")
    panels[0, 0].set_ylabel("seconds a step")
    panels[0, 0].legend(fontsize=8, frameon=False)
    return _save(figure, result, folder / "scaling")


def draw_cache(result: dict[str, Any], folder: Path) -> list[Path]:
    """Bars of every store: look-ups a second and MB a second written."""
    import matplotlib.pyplot as plt

    stores = result["stores"]
    names = [name for name in stores if name != "TrlColumns"][::-1]  # its columns hold sums, no values
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.45 * len(names) + 1.4), sharey=True)
    colours = [_OURS if name.startswith("Ours") else _PEERS[i % len(_PEERS)] for i, name in enumerate(names)]
    for axis, key, label in zip(
        axes, ("lookups_per_s", "fill_mb_per_s"), ("look-ups a second", "MB a second, filling")
    ):
        values = [stores[name].get(key, 0) for name in names]
        axis.bar_label(axis.barh(names, values, color=colours), [f"{v:,.0f}" if v else "" for v in values], padding=3)
        axis.set_xlabel(label)
        axis.set_xlim(0, 1.2 * max(values))
    return _save(figure, result, folder / "cache")


def draw_packing(result: dict[str, Any], folder: Path) -> list[Path]:
    """Budget filled, and how far apart the ranks of a step are."""
    import matplotlib.pyplot as plt

    names = [f"{r['budget']} tokens, {r['ranks']} ranks" for r in result["results"]][::-1]
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.35 * len(names) + 1.4), sharey=True)
    for axis, key, label in zip(
        axes, ("fill", "imbalance_worst"), ("budget filled, %", "most - fewest tokens of a rank, worst step, %")
    ):
        values = [100 * r[key] for r in result["results"]][::-1]
        axis.bar_label(axis.barh(names, values, color=_OURS), [f"{value:.1f}" for value in values], padding=3)
        axis.set_xlabel(label)
        axis.set_xlim(0, 1.15 * max(values))
    return _save(figure, result, folder / "packing")


def draw_tokenize(result: dict[str, Any], folder: Path) -> list[Path]:
    """Pairs a second, TRL's and ours."""
    import matplotlib.pyplot as plt

    found = result["results"][::-1]
    pairs = result["rows"]
    figure, axis = plt.subplots(figsize=(7, 0.7 * len(found) + 1.2))
    for offset, (side, colour) in zip((0.2, -0.2), (("trl", _PEERS[0]), ("ours", _OURS))):
        values = [pairs / one[side] for one in found]
        bars = axis.barh([i + offset for i in range(len(found))], values, 0.4, color=colour, label=side)
        axis.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3)
    axis.set_yticks(range(len(found)), [f"{one['form']}, {one['pairs']}" for one in found])
    axis.set_xlabel("pairs a second")
    axis.margins(x=0.15)
    axis.legend(fontsize=8, frameon=False)
    return _save(figure, result, folder / "tokenize")


def draw_head(result: dict[str, Any], folder: Path) -> list[Path]:
    """Peak memory against tokens, and time against tokens."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4))
    tokens = sorted(map(int, result["logits_mib"]))
    axes[0].plot(tokens, [result["logits_mib"][str(n)] for n in tokens], "k:", label="one matrix of logits")
    for i, (mode, found) in enumerate(result["measured"].items()):
        style = {"color": _PEERS[i % len(_PEERS)], "linestyle": "--"} if _is_peer(mode) else {"marker": "o"}
        axes[0].plot(tokens, [found[str(n)]["mib"] for n in tokens], label=mode, **style)
        axes[1].plot(tokens, [found[str(n)]["seconds"]["median"] for n in tokens], label=mode, **style)
    axes[0].set_ylabel("peak memory beyond the inputs, MiB")
    axes[1].set_ylabel("seconds, forward and backward")
    for axis in axes:
        axis.set_xlabel(f"completion tokens (vocabulary {result['options']['vocab']})")
        axis.set_ylim(bottom=0)
    axes[0].legend(fontsize=8, frameon=False)
    return _save(figure, result, folder / "head")


DRAWINGS = {
    "step": draw_step,
    "scaling": draw_scaling,
    "head": draw_head,
    "cache": draw_cache,
    "packing": draw_packing,
    "tokenize": draw_tokenize,
}


def _is_peer(name: str) -> bool:
    return name.startswith(("trl", "eager"))


def _marker(name: str) -> str:
    return "s" if _is_peer(name) else "o"


def _colour(name: str, index: int) -> str:
    if _is_peer(name):
        return _PEERS[index % len(_PEERS)]
    return _VARIANT if name.partition("-")[2] in ("unshared", "padded") else _OURS


def _title(result: dict[str, Any]) -> str:
    machine = result["machine"]
    versions = ", ".join(
        f"{name} {result['versions'][name]}" for name in ("torch", "trl") if name in result["versions"]
    )
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    return f"{where}; {versions}; commit {result['commit']}, {result['date'][:10]}"


def _save(figure, result: dict[str, Any], stem: Path) -> list[Path]:
    import matplotlib.pyplot as plt

    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_title(result), fontsize=9)
    figure.tight_layout()
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=110, metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    return paths


if __name__ == "__main__":
    main()
