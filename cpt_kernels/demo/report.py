"""What the runs show: a table, sentences, curves, results.json and report.html."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jinja2 import Environment, StrictUndefined
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.table import Table

from ..reports import train_records
from ..win_rate import WinRate, interval, win_rate
from .arms import ARMS, HARD
from .experiment import ARM_BATCH, BATCH, DECODINGS, Result, SeedResult, Size
from .judge import Verdict
from .teachers import STYLE_FAULTS, TEACHERS, TEMPTATIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TEMPLATE = Path(__file__).with_name("report.html.jinja")
_EXAMPLES = 6
# What the paper leads one to expect: that the first arm's win rate is above the second's.
_EXPECTED = (
    ("dpo-easy", "sft"),
    ("slic-easy", "sft"),
    ("dpo-easy", "slic-easy"),
    ("dpo-easy-to-hard", "dpo-easy"),
    ("dpo-easy-to-hard", "dpo-hard-to-easy"),
)
# What is shown of a verdict.
_SHARES = {"right": "exact", "steps": "steps", "format": "format", "brief": "brief"}


class Line(NamedTuple):
    """One model or teacher over all seeds; what a decoding did not give is missing."""

    title: str
    rates: dict[str, WinRate]  # decoding -> against the medium teacher
    by_seed: list[float]  # sampled
    shares: dict[str, dict[str, float]]  # decoding -> criterion of the judge -> share
    speed: float | None  # tokens a second
    found: int  # completions whose reference log-probs were in the cache, and
    scored: int  # those that were not

    @property
    def cached(self) -> float | None:
        """Share that the cache had; ``None`` without a reference."""
        return self.found / (self.found + self.scored) if self.found + self.scored else None


class Comparison(NamedTuple):
    """Win rate of the first arm minus the second's, on the same prompts."""

    first: str
    second: str
    differences: dict[str, tuple[float, float, float]]  # decoding -> mean and interval

    @property
    def verdict(self) -> str:
        _, low, high = self.differences["sampled"]
        if low > 0:
            return "as expected"
        return "against expectation" if high < 0 else "no difference that these prompts could show"


def rows(results: Sequence[SeedResult]) -> dict[str, Line]:
    """Teachers, start model and arms, by name."""
    first = results[0]
    groups = {name: (f"{name} teacher", [result.teachers[name] for result in results]) for name in first.teachers}
    groups["start"] = ("SFT (start)", [result.start for result in results])
    groups |= {name: (ARMS[name].title, [result.arms[name] for result in results]) for name in first.arms}
    return {name: _row(title, of_seeds) for name, (title, of_seeds) in groups.items()}


def _row(title: str, of_seeds: Sequence[Result]) -> Line:
    decodings = list(of_seeds[0].outputs)
    trained = [result.training for result in of_seeds if result.training is not None]
    return Line(
        title,
        {decoding: win_rate(_wins(of_seeds, decoding)) for decoding in decodings},
        [float(result.outputs["sampled"].wins.mean()) for result in of_seeds],
        {
            decoding: {
                name: float(np.mean([result.outputs[decoding].share(name) for result in of_seeds]))
                for name in Verdict._fields
            }
            for decoding in decodings
        },
        float(np.mean([each.tokens_per_second for each in trained])) if trained else None,
        sum(each.found for each in trained),
        sum(each.scored for each in trained),
    )


def _wins(of_seeds: Sequence[Result], decoding: str) -> NDArray[np.float64]:
    return np.concatenate([result.outputs[decoding].wins for result in of_seeds])


def comparisons(results: Sequence[SeedResult]) -> list[Comparison]:
    """The expectations whose two arms were run."""
    found = []
    for pair in _EXPECTED:
        if set(pair) <= results[0].arms.keys():
            first, second = ([result.arms[name] for result in results] for name in pair)
            differences = {}
            for decoding in DECODINGS:
                difference = _wins(first, decoding) - _wins(second, decoding)
                differences[decoding] = (float(difference.mean()), *interval(difference).tolist())
            found.append(Comparison(*(ARMS[name].title for name in pair), differences))
    return found


# --- Table, sentences, JSON ---


def table(results: Sequence[SeedResult]) -> Table:
    """The closing table, of percentages; it fits into 80 columns."""
    prompts = sum(len(result.prompts) for result in results)
    table = Table(
        title=f"Win rate against the medium teacher, {prompts} held-out prompts",
        title_justify="left",
        box=SIMPLE,
        caption="right, steps, format, brief: of sampled responses. cached: reference log-probs that were there",
        caption_justify="left",
        padding=0,
        pad_edge=False,
    )
    table.add_column("%", no_wrap=True)
    for name in (*DECODINGS, *_SHARES, "tok/s", "cached"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in rows(results).items():
        table.add_row(
            row.title,
            *(rate_text(row.rates[decoding]) if decoding in row.rates else "" for decoding in DECODINGS),
            *(f"{100 * row.shares['sampled'][criterion]:.0f}" for criterion in _SHARES.values()),
            "" if row.speed is None else f"{row.speed:,.0f}",
            "" if row.cached is None else f"{100 * row.cached:.0f}",
            end_section=name in ("weak", "start"),
        )
    return table


def rate_text(rate: WinRate) -> str:
    return f"{100 * rate.rate:.1f} ({100 * rate.low:.0f}–{100 * rate.high:.0f})"


def findings(results: Sequence[SeedResult]) -> list[str]:
    """What came out, in sentences; each follows from the numbers."""
    lines = []
    for each in comparisons(results):
        sampled, greedy = (_points(each.differences[decoding]) for decoding in ("sampled", "greedy"))
        lines.append(f"{each.first} against {each.second}: {sampled} points, greedily {greedy}: {each.verdict}.")
    of = rows(results)
    strong = of["strong"].rates["sampled"].rate
    for name in [name for name in ("sft", "dpo-easy") if name in of]:
        gap = 100 * (of[name].rates["sampled"].rate - strong)
        side = "above" if gap > 0 else "below"
        lines.append(f"{of[name].title} is {abs(gap):.1f} points {side} the strong teacher that it learned from.")
    if {"sft", "dpo-easy"} <= of.keys():
        shares = [of[name].shares["greedy"] for name in ("dpo-easy", "sft")]
        changes = [f"{text} {100 * (shares[0][name] - shares[1][name]):+.1f}" for text, name in _SHARES.items()]
        lines.append(f"What DPO easy changes, greedily, in points of responses: {', '.join(changes)}.")
    return lines


def _points(difference: tuple[float, float, float]) -> str:
    mean, low, high = (100 * value for value in difference)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def as_json(results: Sequence[SeedResult], size: Size, seconds: float) -> dict[str, Any]:
    """The numbers of the report."""
    return {
        "seeds": [result.seed for result in results],
        "size": asdict(size),
        "seconds": seconds,
        "pairs": {str(result.seed): result.pairs for result in results},
        "results": {
            name: row._asdict() | {"rates": {decoding: rate._asdict() for decoding, rate in row.rates.items()}}
            for name, row in rows(results).items()
        },
        "comparisons": [each._asdict() | {"verdict": each.verdict} for each in comparisons(results)],
    }


# --- Pictures ---


def draw_win_rates(results: Sequence[SeedResult]) -> Figure:
    """Win rates with their intervals, both decodings."""
    from matplotlib.figure import Figure

    named = rows(results)
    figure = Figure(figsize=(9, 0.42 * len(named) + 1), layout="constrained")
    axis = figure.subplots()
    for number, (decoding, marker) in enumerate(zip(DECODINGS, "os")):
        shown = [(at, row.rates[decoding]) for at, row in enumerate(named.values()) if decoding in row.rates]
        axis.errorbar(
            [100 * rate.rate for _, rate in shown],
            [at + 0.12 * (2 * number - 1) for at, _ in shown],
            xerr=100 * np.array([(rate.rate - rate.low, rate.high - rate.rate) for _, rate in shown]).T,
            fmt=marker,
            markersize=5,
            capsize=3,
            label=decoding,
        )
    axis.axvline(50, color="grey", linewidth=0.8)
    axis.set(yticks=range(len(named)), yticklabels=[row.title for row in named.values()], xlabel="win rate, %")
    axis.invert_yaxis()
    axis.grid(axis="x", alpha=0.3)
    axis.legend()
    return figure


def draw_curves(result: SeedResult) -> Figure | None:
    """Margins, accuracies and the share of hard pairs of one seed's arms; ``None`` where no arm trains on pairs."""
    from matplotlib.figure import Figure

    panels = {
        "reward margin": "rewards/margins",
        "reward accuracy": "rewards/accuracies",
        "share of hard pairs": f"curriculum/{HARD}",
    }
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    axes = dict(zip(panels, figure.subplots(1, len(panels))))
    for number, (name, arm) in enumerate(result.arms.items()):
        if ARMS[name].options["loss_type"] == "sigmoid":  # without a reference a reward is another thing
            for title, metric in panels.items():
                _plot(axes[title], arm, metric, ARMS[name].title, f"C{number}")
    if not axes["reward margin"].has_data():
        return None
    for title, axis in axes.items():
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small") if axis.has_data() else axis.set_visible(False)
    return figure


def _plot(axis: Axes, arm: Result, metric: str, label: str, color: str) -> None:
    points = [(record["step"], record[metric]) for record in train_records(arm.training.records) if metric in record]
    if points:
        axis.plot(*zip(*points), label=label, color=color)


def _embedded(figure: Figure | None) -> str | None:
    """A picture as the source of an HTML image."""
    if figure is None:
        return None
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


# --- HTML ---


def write(results: Sequence[SeedResult], size: Size, seconds: float, folder: Path, command: str) -> None:
    """Write results.json and report.html, which needs no other file."""
    (folder / "results.json").write_text(json.dumps(as_json(results, size, seconds), indent=2) + "\n", encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    html = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(
        results=results,
        rows=rows(results),
        findings=findings(results),
        shares=_SHARES,
        decodings=DECODINGS,
        rate_text=rate_text,
        examples=_examples(results[0]),
        arms={name: ARMS[name] for name in results[0].arms},
        teachers=TEACHERS,
        style_faults=STYLE_FAULTS,
        temptations=TEMPTATIONS,
        size=size,
        batch=BATCH,
        arm_batch=ARM_BATCH,
        seconds=seconds,
        command=command,
        win_rates=_embedded(draw_win_rates(results)),
        curves=_embedded(draw_curves(results[0])),
    )
    (folder / "report.html").write_text(html, encoding="utf-8")


def _examples(result: SeedResult) -> list[dict[str, Any]]:
    """The first held-out prompts with what everyone says to them."""
    everyone = {"medium teacher": None, "start": result.start}
    everyone |= {ARMS[name].title: arm for name, arm in result.arms.items()}
    return [
        {
            "prompt": result.prompts[at],
            "outputs": [
                (name, result.baseline[at], None, None)
                if model is None
                else (
                    name,
                    model.outputs["sampled"].texts[at],
                    model.outputs["sampled"].verdicts[at],
                    model.outputs["sampled"].wins[at],
                )
                for name, model in everyone.items()
            ],
        }
        for at in range(min(_EXAMPLES, len(result.prompts)))
    ]
