"""Presents the findings: a table, figures, results.json and report.html."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from ..evaluation.report import draw_lines, write_page
from ..evaluation.win_rate import WinRate
from ..plots import legend_above, new_figure, save_figure
from ..training.report import train_records
from .arms import ARM_OPTIONS, ARMS, HARD
from .experiment import ARM_BATCH, BATCH, DECODINGS, FULL, SeedResult, Size
from .findings import SHARES, Findings
from .teachers import STYLE_FAULTS, TEACHERS, TEMPTATIONS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def draw_arm_curves(result: SeedResult, folder: Path) -> list[Path]:
    """Draws margins, accuracies and the share of hard pairs of a seed's DPO arms, and returns the files, if any."""
    # SLiC has no reference, so its rewards are not comparable with those of DPO.
    arms = {name: arm for name, arm in result.arms.items() if ARMS[name].options["loss_type"] == "sigmoid"}
    panels = {
        title: {
            ARMS[name].title: points
            for name, arm in arms.items()
            if (points := [(r["step"], r[metric]) for r in train_records(arm.training.records) if metric in r])
        }
        for title, metric in _CURVES.items()
    }
    shown = {title: curves for title, curves in panels.items() if curves}
    return draw_lines(shown, folder / "curves") if shown else []


# --- Files ---

_LIMITS = (
    "Anything about large models or people's preferences. The model is tiny, a prompt has a dozen tokens, and a program"
    " decides which response is better.",
    "How results vary between trainings. The intervals cover the choice of prompts; each seed has one start model, one"
    " draw of faults and one order of data. --seeds 0 1 2 shows the variation.",
    "That contrast teaches right answers. Slips differ each time, while faults of style recur; the table shows the two"
    " separately.",
    "A fair race between losses. All arms have the same number of steps and of prompts per step, but not of tokens: a"
    " pair has two responses, an SFT row one. The learning rate, β, δ and λ come from a few trials on seeds 100 to 102."
    " The teachers' faults were chosen so that imitation keeps some of them. The judge was never changed for an arm.",
    "That decoding does not matter. At temperature 1 a sharper distribution alone wins more often, so the table shows"
    " both decodings.",
)
_TASK = (
    "An exercise is one or two steps on a word. The model solution shows each step's result, then the answer:",
    "    reverse, then count c: cadcb\nreverse: bcdac; count c: 2; answer: 2.",
    "Three teachers solve it with independent faults. A slip in a step makes the answer wrong. The faults of style are"
    f" {', '.join(STYLE_FAULTS)}. The first step of some exercises tempts all teachers to one of these faults:"
    f" {', '.join(f'{step} to {fault}' for step, fault in TEMPTATIONS.items())}. On such exercises the strong teacher"
    " has the fault more often than not, so imitation learns it.",
)
_JUDGED = (
    "The judge gives one point each if all steps are shown and right, if the answer has its format, and if there is no"
    " further text. A right answer beats a wrong one; between two right or two wrong answers the points decide. Pairs"
    " follow the teachers' order alone, so in some of them the rejected response is the better one:"
)
_BY_HAND = """    cpt pairs responses.jsonl --order "strong > medium > weak" --pairs "strong > weak" --output easy.jsonl
cpt-train --model_name_or_path sft --dataset_name easy.jsonl --loss_type sigmoid --beta 0.5 --learning_rate 5e-5 \\
          --lr_scheduler_type constant --per_device_train_batch_size {batch} --max_steps {steps} --output_dir mine
cpt generate --model_name_or_path mine --dataset_name held_out.jsonl --max_new_tokens 40 --output mine.jsonl
cpt eval win-rate --outputs mine.jsonl --baseline held_out.jsonl --judge cpt_kernels.demo.judge:prefer"""


def write_findings(
    findings: Findings, results: Sequence[SeedResult], size: Size, seconds: float, folder: Path, command: str
) -> None:
    """Writes results.json, figures and a self-contained report.html to ``folder``.

    Args:
        seconds: duration of the whole run.
        command: the command line, as typed.
    """
    seeds, first = [result.seed for result in results], results[0]
    about = {"command": command, "seeds": seeds, "seconds": round(seconds, 1), "size": asdict(size)}
    about |= {"pairs": {str(result.seed): result.pairs for result in results}}
    (folder / "results.json").write_text(json.dumps(about | findings.to_json(), indent=2) + "\n", encoding="utf-8")
    rates = save_figure(draw_arm_win_rates(findings), folder / "win_rates.svg")
    curves = [path for path in draw_arm_curves(first, folder) if path.suffix == ".svg"]
    shown = findings.sentences()
    if size != FULL:
        shown = ["Nothing: the run was too short to learn the exercises. Leave out --quick.", *shown]
    intervals = (
        f"Win rates are against the medium teacher's responses to the same {len(first.prompts)} held-out prompts of"
        " each seed, and a tie counts one half. Sampled: one response at temperature 1; the teachers' responses are"
        " random draws, too. Greedy: the likeliest token each time. Brackets hold 95 % intervals over prompts."
    )
    training = (
        f"DPO arms of seed {first.seed}, on the training batches. The pairs differ between arms: hard pairs are harder"
        " to tell apart for any model."
    )
    settings = (
        f"A Llama of {size.layers} layers and hidden size {size.hidden}, from random weights:"
        f" {size.pretraining_steps} steps of {BATCH} responses of all teachers, then {size.sft_steps} steps of {BATCH}"
        f" responses of the strong teacher. Every arm starts from that model and runs {size.arm_steps} steps of"
        f" {ARM_BATCH} prompts, which are the same for all arms, with {_options_text(ARM_OPTIONS)}:"
    )
    by_hand = "Models, data, metrics and curves are beside this file. To train an arm by hand, run in a seed's folder:"
    arms = [(name, ARMS[name].title, _options_text(ARMS[name].options)) for name in first.arms]
    parts = [
        f"Made by {command} in {seconds:.0f} s, seeds {', '.join(map(str, seeds))}. After Xu et al., arXiv 2310.02263:"
        " preference pairs without a judge, the stronger model's response chosen and the weaker one's rejected.",
        *("# What this run shows", *shown, intervals, *rates, make_table(findings)),
        *("# What it does not show", *_LIMITS),
        *(("# Training", *curves, training) if curves else ()),
        *("# Responses to the first held-out prompts, sampled", _example_responses(first)),
        *("# The task", *_TASK, _teacher_rates(), _JUDGED, _pair_shares(first)),
        *("# Settings", settings, [("arm", "", "options"), *arms]),
        *(by_hand, _BY_HAND.format(batch=ARM_BATCH, steps=size.arm_steps)),
    ]
    write_page(folder / "report.html", "Contrastive post-training in miniature", parts)


def _options_text(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {value}" for name, value in options.items())


def _teacher_rates() -> list[tuple[str, ...]]:
    rates = [(t.name, *(f"{100 * rate:.0f} %" for rate in (t.wrong, t.sloppy, t.tempted))) for t in TEACHERS]
    return [("teacher", "slip", "each fault of style", "where tempted"), *rates]


def _pair_shares(result: SeedResult) -> list[tuple[str, ...]]:
    rows = [("chosen > rejected", "pairs", "the judge agrees", "disagrees", "sees a tie")]
    for kind, counts in result.pairs.items():
        agrees, disagrees = counts["judge agrees"], counts["judge disagrees"]
        shares = (agrees, disagrees, 1 - agrees - disagrees)
        rows.append((kind, f"{counts['pairs']:,}", *(f"{100 * share:.0f} %" for share in shares)))
    return rows


def _example_responses(result: SeedResult) -> list[tuple[str, ...]]:
    """Returns the first held-out prompts, each with every model's response and its verdict."""
    models = {"SFT (start)": result.start} | {ARMS[name].title: arm for name, arm in result.arms.items()}
    rows = [("prompt", "model", "response", "verdict")]
    for at, prompt in enumerate(result.prompts[:_EXAMPLES]):
        rows.append((prompt, "medium teacher", result.baseline[at], ""))
        for title, each in models.items():
            judged = each.responses["sampled"]
            verdict, win = judged.verdicts[at], {0.0: "loses", 1.0: "wins"}.get(float(judged.wins[at]), "tie")
            right = "right" if verdict.exact else "wrong"
            rows.append(("", title, judged.texts[at], f"{right}, {verdict.rank[1]} of 3 for style, {win}"))
    return rows
