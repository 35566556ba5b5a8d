"""What the package's figures share: names that fit, legends outside of the axes, and outliers that are cut off."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FLATTENED = 20  # an outlier is cut off if without it the values span less than a 20th


def new_figure(width: float, height: float) -> Figure:
    """Returns a figure of a size in inches, whose parts make room for each other."""
    from matplotlib.figure import Figure  # imported here because it takes half a second

    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure: Figure, *files: Path, format: str | None = None) -> list[Path]:
    """Writes a figure into files, and returns them. Their suffixes name the formats, unless ``format`` does."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a dollar sign in a name would start a formula
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(file, dpi=120, format=format)
    return list(files)


def shorten(name: str, most: int = 40) -> str:
    """Returns a name of at most ``most`` characters, with an ellipsis in place of its middle if it is longer."""
    kept = most - 1
    return name if len(name) <= most else f"{name[: kept - kept // 2]}…{name[-(kept // 2) :]}"


def distinct(names: Iterable[str], most: int = 40) -> dict[str, str]:
    """Returns name -> its short form; names whose short forms are equal get their numbers in front."""
    names = list(dict.fromkeys(names))
    short = {name: shorten(name, most) for name in names}
    twice = {text for text in short.values() if list(short.values()).count(text) > 1}
    return {
        name: f"{number}: {text}" if text in twice else text for number, (name, text) in enumerate(short.items(), 1)
    }


def color_of(number: int) -> Any:
    """Returns the color of a series; 20 differ."""
    from matplotlib import colormaps

    return f"C{number}" if number < 10 else colormaps["tab20"](2 * (number % 10) + 1)


def legend_above(axis: Axes, width: float) -> None:
    """Puts the legend of an axis above its frame, in as many columns as fit into a width in inches."""
    if labels := axis.get_legend_handles_labels()[1]:
        box = {"loc": "lower left", "bbox_to_anchor": (0, 1), "frameon": False, "borderaxespad": 0.2}
        axis.legend(fontsize="small", ncols=_columns(labels, width), **box)


def head_figure(figure: Figure, title: str, axis: Axes) -> None:
    """Puts a title and the legend of one of its axes above all axes of a figure."""
    handles, labels = axis.get_legend_handles_labels()
    box = {"loc": "outside upper left", "frameon": False, "alignment": "left", "fontsize": "small"}
    width = figure.get_size_inches()[0]
    figure.legend(handles, labels, title=shorten(title, int(11 * width)), ncols=_columns(labels, width), **box)


def _columns(labels: Sequence[str], width: float) -> int:
    # Some 12 characters to an inch, and 6 for a mark.
    return max(1, min(int(12 * width) // (max(map(len, labels)) + 6), len(labels)))


def cut_off_outlier(axis: Axes, direction: str, groups: Sequence[Iterable[float]]) -> float | None:
    """Limits an axis to its values without outliers if they would flatten the rest.

    Args:
        direction: "x" or "y".
        groups: the values that belong together, such as an estimate and its interval. One group of three or more, or
            5 % of them, may be cut off.

    Returns:
        The most extreme value that is cut off, or None if all values are shown.
    """
    found = [np.array([value for value in group if value is not None and np.isfinite(value)]) for group in groups]
    found = [group for group in found if len(group)]
    if len(found) < 3:
        return None
    every = np.concatenate(found)
    middle = np.median([np.median(group) for group in found])
    order = np.argsort([np.abs(group - middle).max() for group in found])
    kept = np.concatenate([found[i] for i in order[: len(found) - max(1, len(found) // 20)]])
    span = max(np.ptp(kept), 0.1 * np.abs(kept).max(), 1e-12)
    if np.ptp(every) <= _FLATTENED * span:
        return None
    limits = (kept.min() - 0.05 * span, kept.max() + 0.05 * span)
    axis.set_xlim(*limits) if direction == "x" else axis.set_ylim(*limits)
    return float(every[np.abs(every - middle).argmax()])
