"""The results of ``cpt demo --study order``: paired differences with intervals, tables, figures and a page."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.table import Table

from ..evaluation.report import draw_lines, new_table, to_markdown, write_page
from ..evaluation.win_rate import Bootstrap, interval
from ..files import write_text
from ..plots import new_figure, save_figure
from .order import BASELINE, BLOCKS, FEW, MAIN, ORDER_ARMS, TUNING_SEEDS, Setting

CellResult = dict[str, Any]
# Comparisons of two arms at the main setting besides those with the baseline: order among the easiest, the direction
# of the order, the renewed reference with the same order, and order with a renewed reference.
_FURTHER = (
    ("sorted-easiest", "random-easiest"),
    ("sorted-all", "reversed-all"),
    ("stages-sorted", "sorted-all"),
    ("stages-sorted", "stages-random"),
)
_SETTINGS = [setting for settings in BLOCKS.values() for setting in settings]
# (setting, arm, arm that is subtracted): decided before the study ran; their number corrects the intervals.
COMPARISONS = [
    *((MAIN, arm, BASELINE) for arm in ORDER_ARMS if arm != BASELINE),
    *((MAIN, *pair) for pair in _FURTHER),
    *((setting, arm, BASELINE) for setting in _SETTINGS if setting != MAIN for arm in FEW if arm != BASELINE),
]
_RESAMPLES = 20_000
# Measure -> function of a result. The first one is the study's; the others describe.
MEASURES_OF_ARMS = {
    "win rate": lambda result: result["curve"][-1]["win"],
    "win rate, mean of the curve": lambda result: float(np.mean([point["win"] for point in result["curve"]])),
    "win rate, greedy": lambda result: result["greedy"]["win"],
    "right answers": lambda result: result["curve"][-1]["right"],
}


class Difference(NamedTuple):
    """The mean paired difference of two arms over seeds, with its intervals; shares, not per cent."""

    mean: float
    low: float  # 95 %
    high: float
    all_low: float  # 95 % for all comparisons together (Bonferroni)
    all_high: float
    seeds: int

    @property
    def is_found(self) -> bool:
        """Whether the interval for all comparisons together excludes 0."""
        return self.all_low > 0 or self.all_high < 0


class Outcomes:
    """The results of the arms by setting, arm and seed."""

    def __init__(self, results: Iterable[CellResult]) -> None:
        self.results: dict[tuple[Setting, str], dict[int, CellResult]] = {}
        for result in results:
            if result["seed"] not in TUNING_SEEDS:
                setting = Setting(result["beta"], result["noise"], result["start"])
                self.results.setdefault((setting, result["arm"]), {})[result["seed"]] = result

    def of(self, setting: Setting, arm: str) -> Mapping[int, CellResult]:
        """Returns the results of an arm by seed; none if it has not run."""
        return self.results.get((setting, arm), {})

    def difference(self, setting: Setting, arm: str, minus: str, measure: str = "win rate") -> Difference | None:
        """Returns the difference over the seeds that both arms have; ``None`` for fewer than two."""
        ours, theirs, value = self.of(setting, arm), self.of(setting, minus), MEASURES_OF_ARMS[measure]
        seeds = sorted(ours.keys() & theirs.keys())
        if len(seeds) < 2:
            return None
        values = np.array([value(ours[seed]) - value(theirs[seed]) for seed in seeds])
        ends = [
            interval(values, bootstrap=Bootstrap(_RESAMPLES, 1 - 0.05 / family)) for family in (1, len(COMPARISONS))
        ]
        return Difference(float(values.mean()), *(float(end) for pair in ends for end in pair), len(seeds))


# --- Tables ---


def _in_points(difference: Difference, corrected: bool = False) -> str:
    low, high = difference[3:5] if corrected else difference[1:3]
    return f"{100 * difference.mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _setting_name(setting: Setting) -> str:
    start = "SFT" if setting.start == "sft" else "base"
    return f"β {setting.beta:g}, noise {setting.noise:.0%}, from {start}"


def comparisons_table(outcomes: Outcomes) -> Table:
    """Returns all comparisons that have run: the difference in win rate with both intervals, and other measures."""
    first, *others = MEASURES_OF_ARMS
    names = ("setting", "arm", f"{first}, %", "minus", "seeds", "difference", f"corrected for {len(COMPARISONS)}")
    table = new_table("Differences in points [95 %]", *names, *others, "characters")
    for setting, arm, minus in COMPARISONS:
        if (found := outcomes.difference(setting, arm, minus)) is not None:
            ends = [result["curve"][-1] for result in outcomes.of(setting, arm).values()]
            rate, characters = (np.mean([end[name] for end in ends]) for name in ("win", "characters"))
            cells = [_in_points(found), _in_points(found, corrected=True)]
            cells += [_in_points(outcomes.difference(setting, arm, minus, measure)) for measure in others]
            table.add_row(
                _setting_name(setting), arm, f"{100 * rate:.1f}", minus, str(found.seeds), *cells, f"{characters:.1f}"
            )
    return table


def rates_table(results: Sequence[CellResult]) -> Table:
    """Returns the win rates of random-all on the tuning seeds, for every learning rate and setting."""
    tuned = [result for result in results if result["seed"] in TUNING_SEEDS]
    rates = sorted({result["learning_rate"] for result in tuned})
    title = f"Win rate of {BASELINE} by learning rate on seeds {', '.join(map(str, TUNING_SEEDS))}, %"
    table = new_table(title, "setting", *(f"{rate:g}" for rate in rates))
    for setting in _SETTINGS:
        of = [r for r in tuned if Setting(r["beta"], r["noise"], r["start"]) == setting]
        won = [[r["curve"][-1]["win"] for r in of if r["learning_rate"] == rate] for rate in rates]
        if of:
            cells = (f"{100 * np.mean(each):.1f}" if each else "" for each in won)
            table.add_row(_setting_name(setting), *cells)
    return table


# --- Figures ---


def draw_map(outcomes: Outcomes, folder: Path) -> list[Path]:
    """Draws the differences from random-all: a row for each arm, a column for each setting that has results."""
    arms = [arm for arm in ORDER_ARMS if arm != BASELINE]
    settings = [setting for setting in _SETTINGS if any(outcomes.difference(setting, arm, BASELINE) for arm in arms)]
    found = [[outcomes.difference(setting, arm, BASELINE) for setting in settings] for arm in arms]
    values = np.array([[np.nan if each is None else 100 * each.mean for each in row] for row in found])
    most = max(1.0, float(np.nanmax(np.abs(values), initial=0)))
    figure = new_figure(3 + 1.4 * len(settings), 5.5)
    axis = figure.subplots()
    axis.imshow(values.reshape(len(arms), -1), cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    for row, of_arm in enumerate(found):
        for column, each in enumerate(of_arm):
            if each is not None:
                text = f"{100 * each.mean:+.1f}{'*' if each.is_found else ''}"
                color = "white" if abs(100 * each.mean) > 0.6 * most else "black"
                axis.text(column, row, text, ha="center", va="center", color=color, fontsize="small")
    names = [_setting_name(setting).replace(", ", "\n") for setting in settings]
    axis.set_xticks(range(len(names)), names, fontsize="small")
    axis.set_yticks(range(len(arms)), arms)
    mark = f"* corrected for {len(COMPARISONS)} comparisons, the interval excludes 0"
    figure.suptitle(f"win rate minus {BASELINE}, points\n{mark}", fontsize="medium")
    return save_figure(figure, *(folder / f"map.{kind}" for kind in ("png", "svg")))


def draw_order_curves(outcomes: Outcomes, folder: Path) -> list[Path]:
    """Draws the win rate of every arm of the main setting along its steps, the mean over seeds."""
    curves = {}
    for arm in ORDER_ARMS:
        if results := [each["curve"] for each in outcomes.of(MAIN, arm).values()]:
            curves[arm] = [
                (of[0]["step"], 100 * float(np.mean([point["win"] for point in of]))) for of in zip(*results)
            ]
    return draw_lines({"win rate against the medium teacher, %": curves}, folder / "curves", bold=BASELINE)


# --- Files ---


def write_order_report(folder: Path) -> list[Table]:
    """Writes cells.jsonl, results.md, figures and report.html of the cells in a folder, and returns the tables."""
    results = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "cells").glob("*.json"))]
    outcomes = Outcomes(results)
    tables = [comparisons_table(outcomes), rates_table(results)]
    starts = [json.loads(path.read_text(encoding="utf-8")) for path in sorted((folder / "examined").glob("*.json"))]
    write_text(folder / "cells.jsonl", "".join(json.dumps(result) + "\n" for result in [*starts, *results]))
    write_text(folder / "results.md", "\n".join(map(to_markdown, tables)))
    figures = [draw_map(outcomes, folder)[1], draw_order_curves(outcomes, folder)[1]]
    won = {kind: [100 * each["win"] for each in starts if each["start"] == kind] for kind in ("sft", "pretraining")}
    shown = [f"{np.mean(rates):.1f} % from {kind}" for kind, rates in won.items() if rates]
    about = (
        f"Win rates before training: {', '.join(shown) or 'not known yet'}."
        " Differences are paired by seed: a seed has its own start model, pairs, difficulties and held-out prompts."
        " Intervals are bootstrap intervals over seeds, as wide as Student's t. A difference is a finding if its"
        f" interval for all {len(COMPARISONS)} comparisons together excludes 0. Only the win rate at the end is tested."
    )
    title = "Which pairs, in which order, against which reference?"
    write_page(folder / "report.html", title, [about, *tables, *figures])
    return tables
