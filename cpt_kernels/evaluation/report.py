"""Shows evaluations: tables for a terminal, pictures as PNG and SVG."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ..files import write_text
from ..plots import color_of, cut_off_outlier, distinct, head_figure, legend_above, new_figure, save_figure, shorten
from .judge import NO_VERDICT
from .pair_metrics import ALL, BALANCED
from .win_rate import LengthPrior

SummaryRow = dict[str, Any]

_FORMATS = ("png", "svg")
# Metric of a pair -> (title, factor, format).
_METRICS = {
    "rewards/accuracies": ("reward accuracy, %", 100, ".1f"),
    "rewards/margins": ("reward margin", 1, ".3f"),
    "rewards/chosen": ("reward, chosen", 1, ".3f"),
    "rewards/rejected": ("reward, rejected", 1, ".3f"),
    "logps/accuracies": ("chosen is likelier, %", 100, ".1f"),
    "logps/chosen": ("log-prob, chosen", 1, ".1f"),
    "logps/rejected": ("log-prob, rejected", 1, ".1f"),
}
# Measure of `Drift.summary` -> (title, factor, format).
DRIFT = {
    "kl": ("KL per token, nats", 1, ".4f"),
    "agreement": ("same likeliest token, %", 100, ".1f"),
    "entropy": ("entropy, nats", 1, ".2f"),
    "perplexity": ("perplexity", 1, ".2f"),
    "perplexity_ratio": ("/ the reference's", 1, ".3f"),
}


# --- Held-out pairs ---


def pair_tables(summary: Sequence[SummaryRow], confidence: float) -> list[Table]:
    """Returns a table of every metric over all pairs with a column for each model, and a table for each grouping."""
    whole = [row for row in summary if row["by"] == ALL]
    table = _table(f"{whole[0]['pairs']:,} pairs of {whole[0]['prompts']:,} prompts, mean [{confidence:.0%} interval]")
    table.add_column("", no_wrap=True)
    for row in whole:
        table.add_column(escape(row["model"]), justify="right", no_wrap=True)
    for metric, (title, factor, format) in _METRICS.items():
        table.add_row(title, *(_with_ends(row[metric], factor, format) for row in whole))
        if metric == "rewards/accuracies" and all(row[BALANCED] for row in whole):
            table.add_row(
                "  either side longer equally often", *(_with_ends(row[BALANCED], 100, ".1f") for row in whole)
            )
    # The groups leave out models that equal the reference, whose accuracy is 1/2 everywhere.
    tied = set(own_references(summary))
    grouped = [row for row in summary if row["by"] != ALL and row["model"] not in tied]
    return [table, *(_group_table(by, rows) for by, rows in _by_grouping(grouped).items())]


def drift_tables(drifts: Sequence[SummaryRow]) -> list[Table]:
    """Returns a table of what training changed for responses, and one for plain text, as far as measured."""
    tables = []
    for on in dict.fromkeys(row["on"] for row in drifts):
        rows = [row for row in drifts if row["on"] == on]
        table = _table(f"Against the reference, on {rows[0]['tokens']:,} tokens of {on}")
        table.add_column("model", no_wrap=True)
        for title, *_ in DRIFT.values():
            table.add_column(title, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(escape(row["model"]), *(_with_ends(row[name], *how) for name, (_, *how) in DRIFT.items()))
        own = {name: _with_ends(rows[0][f"start_{name}"], *DRIFT[name][1:]) for name in ("entropy", "perplexity")}
        table.add_row("reference", *(own.get(name, "") for name in DRIFT))
        tables.append(table)
    return tables


def own_references(summary: Sequence[SummaryRow]) -> list[str]:
    """Returns the models that equal the reference: all their rewards are 0, so the groups leave them out."""
    whole = [row for row in summary if row["by"] == ALL]
    return [row["model"] for row in whole if not any(row["rewards/margins"].values())]


def _group_table(by: str, rows: Sequence[SummaryRow]) -> Table:
    table = _table(f"By {escape(by)}")
    several = len({row["model"] for row in rows}) > 1
    for heading in (escape(by), "model"):
        table.add_column(heading, no_wrap=True)
    for heading in ("pairs", "accuracy, %", "margin", "log-prob, chosen", "rejected"):
        table.add_column(heading, justify="right", no_wrap=True)
    last = None
    for row in rows:
        if several and last not in (None, row["value"]):
            table.add_section()
        table.add_row(
            "" if row["value"] == last else escape(row["value"]),
            escape(row["model"]),
            f"{row['pairs']:,}",
            _with_ends(row["rewards/accuracies"], 100, ".1f"),
            _with_ends(row["rewards/margins"], 1, ".3f"),
            *(f"{row[f'logps/{side}']['mean']:.1f}" for side in ("chosen", "rejected")),
        )
        last = row["value"]
    return table


def difference_lines(differences: Iterable[SummaryRow], metrics: dict[str, tuple[str, float, str]]) -> list[str]:
    """Returns a line for each model that is compared with the first.

    Args:
        metrics: metric in the row -> (title, factor, format).
    """
    lines = []
    for row in differences:
        parts = [
            f"{title} {_with_ends(row[name], factor, format)}" for name, (title, factor, format) in metrics.items()
        ]
        lines.append(f"{row['model']} minus {row['minus']}, on the same prompts: {', '.join(parts)}")
    return lines


def draw_pairs(summary: Sequence[SummaryRow], folder: Path, title: str) -> list[Path]:
    """Draws accuracy and margin with their intervals, a row of panels for each grouping, and returns the files."""
    tied = set(own_references(summary))
    groupings = _by_grouping([row for row in summary if row["model"] not in tied] or summary)
    models = list(dict.fromkeys(row["model"] for rows in groupings.values() for row in rows))
    values = {by: list(dict.fromkeys(row["value"] for row in rows)) for by, rows in groupings.items()}
    # Inches: the height of a row of panels grows with its number of values and models.
    heights = [0.6 + 0.28 * len(names) * max(1, 0.6 * len(models)) for names in values.values()]
    figure = new_figure(11, 1 + sum(heights))
    short = distinct([*models, *(name for names in values.values() for name in names)])
    ratios = {"height_ratios": heights}
    axes = figure.subplots(len(groupings), 2, squeeze=False, sharex="col", gridspec_kw=ratios)
    metrics = (("rewards/accuracies", 100, "reward accuracy, %", 50), ("rewards/margins", 1, "reward margin", 0))
    for (by, rows), of_grouping in zip(groupings.items(), axes):
        for axis, (metric, factor, label, even) in zip(of_grouping, metrics):
            for number, model in enumerate(models):
                mine = [row for row in rows if row["model"] == model]
                places = [values[by].index(row["value"]) for row in mine]
                _draw_points(axis, [row[metric] for row in mine], places, factor, number, len(models), short[model])
            axis.axvline(even, color="grey", linewidth=0.8, linestyle=":")
            counts = {row["value"]: row["pairs"] for row in rows}
            names = [f"{short[name]}  ({counts[name]:,})" for name in values[by]]
            _label(axis, names if axis is of_grouping[0] else [""] * len(names))
            if by == list(groupings)[-1]:
                axis.set_xlabel(label)
        of_grouping[0].set_title(f"by {by} (pairs)" if by != ALL else "", loc="left", fontsize="medium")
    for axis, (metric, factor, label, _) in zip(axes[-1], metrics):
        of_models = {model: [] for model in models}
        for row in (row for rows in groupings.values() for row in rows):
            of_models[row["model"]] += [each and each * factor for each in row[metric].values()]
        if (extreme := cut_off_outlier(axis, "x", list(of_models.values()))) is not None:
            axis.set_xlabel(f"{label} (cut off: up to {extreme:,.4g})")
    head_figure(figure, title, axes[0][0])
    return save_figure(figure, *(folder / f"pairs.{format}" for format in _FORMATS))


# --- Judged outputs ---


def arms_of_study(
    summary: Sequence[SummaryRow], differences: Sequence[Sequence[SummaryRow]], lengths: dict[str, float]
) -> Table:
    """Returns a table with a line for each arm of a study: held-out pairs, and the length of its answers.

    Args:
        differences: from the first arm, once with 95 % intervals and once corrected for their number.
        lengths: arm -> mean length of its answers in characters; ``start`` is the model before training.
    """
    whole = [row for row in summary if row["by"] == ALL]
    minus = f"minus {escape(whole[0]['model'])}"
    title = f"{whole[0]['pairs']:,} held-out pairs of {whole[0]['prompts']:,} prompts, mean [95 % interval]"
    of_metric = (minus, f"corrected for {len(differences[0])}")
    table = new_table(title, "arm", "reward accuracy, %", *of_metric, "reward margin", *of_metric, "characters")
    compared = [{row["model"]: row for row in rows} for rows in differences]
    for row in whole:
        cells = []
        for metric, factor, format in (("rewards/accuracies", 100, ".1f"), ("rewards/margins", 1, ".3f")):
            cells.append(_with_ends(row[metric], factor, format))
            found = [rows[row["model"]][metric] if row["model"] in rows else None for rows in compared]
            cells += ["" if each is None else _with_ends(each, factor, f"+{format}") for each in found]
        table.add_row(escape(row["model"]), *cells, f"{lengths[row['model']]:,.0f}")
    table.caption = f"The start's answers have {lengths['start']:,.0f} characters."
    return table


def draw_lines(
    panels: dict[str, dict[str, list[tuple[float, float]]]], path: Path, title: str = "", bold: str = ""
) -> list[Path]:
    """Draws curves over steps under one legend, and returns the files.

    Args:
        panels: label of a panel -> name of a curve -> its points; a name has one color in all panels.
        path: of the files, without suffix.
        bold: the name of a curve that is drawn in bold.
    """
    figure = new_figure(max(8, 6 * len(panels)), 5)
    short = distinct(name for curves in panels.values() for name in curves)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (label, curves) in zip(axes, panels.items()):
        for name, points in curves.items():
            style = {"color": color_of([*short].index(name)), "linewidth": 3 if name == bold else 1.3}
            axis.plot(*zip(*points), marker="o", label=short[name], **style)
        axis.set(xlabel="step", ylabel=label)
        axis.grid(alpha=0.3)
    head_figure(figure, title, axes[0])
    return save_figure(figure, *(path.with_name(f"{path.name}.{format}") for format in _FORMATS))


def win_rate_table(summaries: Sequence[SummaryRow], confidence: float) -> Table:
    """Returns a table with a line for each model."""
    table = _table(f"Against {escape(summaries[0]['baseline'])}, mean [{confidence:.0%} interval]")
    table.add_column("model", no_wrap=True)
    headings = ("win rate, %", "length-controlled, %", "wins / ties / losses")
    for heading in (*headings, "prompts", "mean characters", "baseline's", "longer"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in summaries:
        controlled = row["length_controlled"]
        table.add_row(
            escape(row["model"]),
            _with_ends(row["win_rate"], 100, ".1f", "rate"),
            "not identified" if controlled is None else _with_ends(controlled, 100, ".1f", "rate"),
            f"{row['wins']} / {row['ties']} / {row['losses']}",
            f"{row['prompts']:,}",
            f"{row['characters']:,.0f}",
            f"{row['baseline_characters']:,.0f}",
            f"{row['longer']:.0%}",
        )
    return table


def win_rate_notes(summary: SummaryRow) -> list[str]:
    """Returns notes on a model's line in the table: outputs that were not compared, and the bias of the judge."""
    model, notes = summary["model"], []
    unmatched = (("without_baseline", summary["baseline"]), ("without_output", model))
    notes += [
        f"{model}: {summary[name]} prompts were left out because {other} did not answer them"
        for name, other in unmatched
        if summary[name]
    ]
    empty = (("empty_outputs", model), ("empty_baseline_outputs", summary["baseline"]))
    notes += [
        f"{model}: {summary[name]} outputs of {owner} are empty, and were judged as they are"
        for name, owner in empty
        if summary[name]
    ]
    if summary["not_judged"]:
        reasons = ", ".join(f"{count} by {reason}" for reason, count in summary["failures"].items())
        again = "; run the command again to repeat the failed requests" if {*summary["failures"]} - {NO_VERDICT} else ""
        notes.append(
            f"{model}: {summary['not_judged']} comparisons have no verdict and are left out of the rates (missing"
            f" answers: {reasons}{again})"
        )
    if summary["identical"]:
        notes.append(f"{model}: {summary['identical']} outputs equal the baseline's and count as ties")
    if summary["first_rate"] is not None:
        notes.append(
            f"{model}: the judge preferred the first position in {summary['first_rate']:.1%} (50% means no bias), and"
            f" gave the same verdict in both orders in {summary['consistency']:.1%}"
        )
    if summary["distinct_bigrams"] is not None:
        own, others = summary["distinct_bigrams"], summary["baseline_distinct_bigrams"]
        notes.append(
            f"{model}: of equally many pairs of words {own:.0%} are different, and {others:.0%} of the baseline's"
        )
    if summary["length_controlled"] is None:
        longer = "longer" if summary["longer"] else "shorter"
        notes.append(
            f"{model}: all its outputs are {longer} than the baseline's, so quality and length cannot be told apart: no"
            " length-controlled rate"
        )
    return notes


def length_lines(summaries: Sequence[SummaryRow], prior: LengthPrior) -> list[str]:
    """Returns how length-controlled rates were computed, with the length effect of every model."""
    effects = [
        f"{row['model']} {row['length_controlled']['length_effect']:.2f}"
        f" ({row['length_controlled']['length_effect_without_prior']:.2f} without a prior)"
        for row in summaries
        if row["length_controlled"] is not None
    ]
    return [
        "length-controlled rates follow arXiv 2404.04475, but have no difficulty of each instruction; the judge's"
        f" preference for length has the prior {prior.mean:g} +- {prior.sd:g} instead (--length_prior)",
        *([f"length effect in log-odds: {', '.join(effects)}"] if effects else []),
    ]


def draw_judged(summaries: Sequence[SummaryRow], folder: Path) -> list[Path]:
    """Draws both win rates of every model with their intervals, and returns the files."""
    figure = new_figure(8, 1.4 + 0.5 * len(summaries))
    axis = figure.subplots()
    for number, (name, label) in enumerate((("win_rate", "win rate"), ("length_controlled", "length-controlled"))):
        there = [(place, row[name]) for place, row in enumerate(summaries) if row[name] is not None]
        if not there:
            continue
        estimates = [{"mean": rate["rate"], "low": rate["low"], "high": rate["high"]} for _, rate in there]
        _draw_points(axis, estimates, [place for place, _ in there], 100, number, 2, label)
    axis.axvline(50, color="grey", linewidth=0.8, linestyle=":")
    short = distinct(row["model"] for row in summaries)
    _label(axis, [f"{short[row['model']]}  ({row['prompts']:,})" for row in summaries])
    figure.supxlabel(f"% preferred over {shorten(summaries[0]['baseline'])} (prompts)", fontsize="medium")
    legend_above(axis, 8)
    return save_figure(figure, *(folder / f"win_rate.{format}" for format in _FORMATS))


# --- Pages ---


def new_table(title: str, *names: str) -> Table:
    """Returns a table whose first column is aligned to the left, and the others to the right."""
    table = _table(title)
    for number, name in enumerate(names):
        table.add_column(name, no_wrap=True, justify="right" if number else "left")
    return table


_STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ddd; vertical-align: top }
th:first-child, td:first-child, .texts td, .texts th { text-align: left } .texts td { white-space: pre-wrap }
img { max-width: 100% } code { background: #f5f5f5 }"""


def table_cells(table: Table) -> tuple[list[str], list[list[str]]]:
    """Returns the header and the rows of a table as plain text."""
    columns = [[column.header, *column.cells] for column in table.columns]
    head, *rows = ([Text.from_markup(str(cell)).plain for cell in row] for row in zip(*columns))
    return head, rows


def to_markdown(table: Table) -> str:
    """Returns a table in Markdown, with its title in front."""
    head, rows = table_cells(table)
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return f"{table.title}\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def write_page(path: Path, title: str, parts: Iterable[str | Table | Path | Sequence[Sequence[str]]]) -> None:
    """Writes a self-contained HTML page.

    Args:
        parts: paragraphs, tables, SVG files, and rows of texts with their header, in the order of the page. A
            paragraph that starts with "# " is a heading, one that starts with four spaces is code.
    """
    found = []
    for part in parts:
        if isinstance(part, str):
            tag = "h2" if part.startswith("# ") else "pre" if part.startswith("    ") else "p"
            found.append(f"<{tag}>{html.escape(part.removeprefix('# ').removeprefix('    '))}</{tag}>")
        elif isinstance(part, Path):
            found.append(f'<img alt="" src="data:image/svg+xml;base64,{base64.b64encode(part.read_bytes()).decode()}">')
        else:
            head, rows = table_cells(part) if isinstance(part, Table) else (part[0], part[1:])
            name = f"<p><em>{html.escape(str(part.title))}</em></p><table>" if isinstance(part, Table) else None
            cells = [[("th" if row is head else "td", html.escape(cell)) for cell in row] for row in (head, *rows)]
            lines = ["<tr>" + "".join(f"<{tag}>{text}</{tag}>" for tag, text in row) + "</tr>" for row in cells]
            found.append(f"{name or '<table class=texts>'}{''.join(lines)}</table>")
    top = f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title><style>{_STYLE}</style>"
    write_text(path, "\n".join([top, f"<h1>{html.escape(title)}</h1>", *found, "</html>"]) + "\n")


# --- Shared by both ---


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))


def _by_grouping(summary: Sequence[SummaryRow]) -> dict[str, list[SummaryRow]]:
    return {by: [row for row in summary if row["by"] == by] for by in dict.fromkeys(row["by"] for row in summary)}


def _with_ends(estimate: dict[str, Any], factor: float, format: str, mean: str = "mean") -> str:
    value = estimate[mean] * factor
    if estimate["low"] is None:
        return f"{value:{format}} (one prompt)"
    low, high = (estimate[end] * factor for end in ("low", "high"))
    return f"{value:{format}} [{low:{format}}, {high:{format}}]"


def _draw_points(
    axis: Any, estimates: Sequence[SummaryRow], places: Sequence[int], factor: float, number: int, of: int, label: str
) -> None:
    # The series of one value are spread over 0.6 of the distance between two values.
    heights = [place + 0.6 * (number - (of - 1) / 2) / of for place in places]
    # (3, n); an interval of None becomes NaN, which draws no whisker.
    means, low, high = factor * np.array(
        [[each[name] for each in estimates] for name in ("mean", "low", "high")], float
    )
    ends = [abs(means - low), abs(means - high)]
    axis.errorbar(means, heights, xerr=ends, fmt="o", markersize=4, capsize=2, color=color_of(number), label=label)


def _label(axis: Any, names: Sequence[str]) -> None:
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.grid(axis="x", alpha=0.3)
