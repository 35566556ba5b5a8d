"""Presents the findings: a table, figures, results.json and report.html."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from rich.box import SIMPLE
from rich.table import Table

from ..evaluation.win_rate import WinRate
from ..plots import color_of, cut_off_outlier, legend_above, new_figure
from ..training.report import train_records
from .arms import ARM_OPTIONS, ARMS, HARD
from .experiment import ARM_BATCH, BATCH, DECODINGS, FULL, SeedResult, Size
from .findings import SHARES, Findings
from .teachers import STYLE_FAULTS, TEACHERS, TEMPTATIONS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_EXAMPLES = 6  # held-out prompts whose responses report.html shows
_CURVES = {
    "reward margin": "rewards/margins",
    "reward accuracy": "rewards/accuracies",
    "share of hard pairs": f"curriculum/{HARD}",
}


def make_table(findings: Findings) -> Table:
    """Returns the closing table of percentages, which fits into 80 columns."""
    prompts = findings.summaries["start"].rates["sampled"].n
    table = Table(
        title=f"Win rate against the medium teacher, {prompts} held-out prompts",
        title_justify="left",
        box=SIMPLE,
        caption="right, steps, format, brief: of sampled responses. cache: reference log-probs found in it",
        caption_justify="left",
        padding=0,
        pad_edge=False,
    )
    table.add_column("%", no_wrap=True)
    for name in (*DECODINGS, *SHARES, "tok/s", "cache"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, summary in findings.summaries.items():
        table.add_row(
            summary.title,
            *(_rate(summary.rates[decoding]) if decoding in summary.rates else "" for decoding in DECODINGS),
            *(f"{100 * summary.shares['sampled'][criterion]:.0f}" for criterion in SHARES.values()),
            "" if summary.speed is None else f"{summary.speed:,.0f}",
            "" if summary.cached is None else f"{100 * summary.cached:.0f}",
            end_section=name in ("weak", "start"),
        )
    return table


def _rate(rate: WinRate) -> str:
    return f"{100 * rate.rate:.1f} ({100 * rate.low:.0f}–{100 * rate.high:.0f})"


# --- Figures ---


def draw_arm_win_rates(findings: Findings) -> Figure:
    """Draws win rates with their intervals, for both decodings."""
    summaries = list(findings.summaries.values())
    figure = new_figure(9, 0.42 * len(summaries) + 1)
    axis = figure.subplots()
    for shift, (decoding, marker) in zip((-0.12, 0.12), zip(DECODINGS, "os")):
        shown = [(at, each.rates[decoding]) for at, each in enumerate(summaries) if decoding in each.rates]
        axis.errorbar(
            [100 * rate.rate for _, rate in shown],
            [at + shift for at, _ in shown],
            xerr=100 * np.array([(rate.rate - rate.low, rate.high - rate.rate) for _, rate in shown]).T,
            fmt=marker,
            markersize=5,
            capsize=3,
            label=decoding,
        )
    axis.axvline(50, color="grey", linewidth=0.8)
    axis.set(
        yticks=range(len(summaries)),
        yticklabels=[each.title for each in summaries],
        xlabel="win rate against the medium teacher, %",
    )
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    legend_above(axis, 9)
    return figure


def draw_arm_curves(result: SeedResult) -> Figure | None:
    """Draws margins, accuracies and the share of hard pairs of a seed's DPO arms; ``None`` without such an arm."""
    # SLiC has no reference, so its rewards are not comparable with those of DPO.
    arms = {name: arm for name, arm in result.arms.items() if ARMS[name].options["loss_type"] == "sigmoid"}
    if not arms:
        return None
    records = {name: train_records(arm.training.records) for name, arm in arms.items()}
    shown = {t: m for t, m in _CURVES.items() if any(m in record for each in records.values() for record in each)}
    if not shown:
        return None
    figure = new_figure(4 * len(shown), 3.4)
    for axis, (title, metric) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items()):
        for number, (name, each) in enumerate(records.items()):
            points = [(record["step"], record[metric]) for record in each if metric in record]
            if points:
                axis.plot(*zip(*points), label=ARMS[name].title, color=color_of(number))
        axis.set(xlabel="step", ylabel=title)
        axis.grid(alpha=0.3)
        legend_above(axis, 4)
        cut_off_outlier(axis, "y", [[record.get(metric)] for each in records.values() for record in each])
    return figure


def _embedded(figure: Figure | None) -> str | None:
    """Returns a figure as a data URL for an HTML image."""
    if figure is None:
        return None
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


# --- Files ---


def write_findings(
    findings: Findings, results: Sequence[SeedResult], size: Size, seconds: float, folder: Path, command: str
) -> None:
    """Writes results.json and a self-contained report.html to ``folder``.

    Args:
        seconds: duration of the whole run.
        command: the command line, as typed.
    """
    about = {"command": command, "seeds": [result.seed for result in results], "seconds": round(seconds, 1)}
    about |= {"size": asdict(size), "pairs": {str(result.seed): result.pairs for result in results}}
    text = json.dumps(about | findings.to_json(), indent=2) + "\n"
    (folder / "results.json").write_text(text, encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        about,
        first=results[0],
        is_quick=size != FULL,
        findings=findings,
        shares=SHARES,
        decodings=DECODINGS,
        rate_text=_rate,
        examples=_example_responses(results[0]),
        arms={name: ARMS[name] for name in results[0].arms},
        arm_options=ARM_OPTIONS,
        teachers=TEACHERS,
        style_faults=STYLE_FAULTS,
        temptations=TEMPTATIONS,
        batch=BATCH,
        arm_batch=ARM_BATCH,
        win_rates=_embedded(draw_arm_win_rates(findings)),
        curves=_embedded(draw_arm_curves(results[0])),
    )
    (folder / "report.html").write_text(html, encoding="utf-8")


def _example_responses(result: SeedResult) -> list[tuple[str, list[tuple[Any, ...]]]]:
    """Returns the first held-out prompts, each with (title, response, verdict, win) of every model."""
    models = {"SFT (start)": result.start} | {ARMS[name].title: arm for name, arm in result.arms.items()}
    examples = []
    for at, prompt in enumerate(result.prompts[:_EXAMPLES]):
        responses = [("medium teacher", result.baseline[at], None, None)]
        for title, each in models.items():
            judged = each.responses["sampled"]
            responses.append((title, judged.texts[at], judged.verdicts[at], judged.wins[at]))
        examples.append((prompt, responses))
    return examples
