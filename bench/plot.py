"""Pictures of results: ``python -m bench plot RESULT.json --out FOLDER`` draws a PNG and an SVG per subject."""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_OURS, _PEERS = "#1f6fb4", ("#b4562f", "#d9a441", "#7a7a7a", "#6b8f3a", "#8f5aa3")


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
    """Bars: seconds a step, and peak memory."""
    import matplotlib.pyplot as plt

    measured = result["measured"]
    names = list(measured)[::-1]
    seconds = [statistics.median(measured[name]["seconds"]) for name in names]
    memory = [measured[name]["peak_mib"] / 1024 for name in names]
    figure, axes = plt.subplots(1, 2, figsize=(9, 0.5 * len(names) + 1.4), sharey=True)
    colours = [_colour(name, i) for i, name in enumerate(names)]
    for axis, values, label, digits in zip(axes, (seconds, memory), ("seconds a step", "peak memory, GiB"), (2, 2)):
        bars = axis.barh(names, values, color=colours)
        axis.bar_label(bars, [f"{value:.{digits}f}" for value in values], padding=3)
        axis.set_xlabel(label)
        axis.set_xlim(0, 1.15 * max(values))
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(_title(result), fontsize=9)
    return _save(figure, folder / "step")


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
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8, frameon=False)
    figure.suptitle(_title(result), fontsize=9)
    return _save(figure, folder / "head")


DRAWINGS = {"step": draw_step, "head": draw_head}


def _is_peer(name: str) -> bool:
    return name.startswith(("trl", "eager"))


def _colour(name: str, index: int) -> str:
    return _PEERS[index % len(_PEERS)] if _is_peer(name) else _OURS


def _title(result: dict[str, Any]) -> str:
    machine = result["machine"]
    versions = ", ".join(
        f"{name} {result['versions'][name]}" for name in ("torch", "trl") if name in result["versions"]
    )
    where = machine["gpu"] or f"{machine['cpu']}, {machine['cores']} cores"
    return f"{where}; {versions}; commit {result['commit']}, {result['date'][:10]}"


def _save(figure, stem: Path) -> list[Path]:
    figure.tight_layout()
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=150)
    return paths


if __name__ == "__main__":
    main()
