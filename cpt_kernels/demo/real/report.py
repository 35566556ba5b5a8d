"""Presents the results of ``cpt demo-real``: a table, sentences, results.json and report.html."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE
from rich.table import Table

from ...evaluation.drift import TEXT
from ...evaluation.outputs import distinct_bigrams
from ...evaluation.report import write_page
from ...evaluation.win_rate import Bootstrap, interval, win_rate
from ...files import write_text
from .experiment import BATCH, LORA, REAL_ARMS, REAL_FULL, ModelAnswers, RealResult, RealSize
from .instructions import RULES, UNSEEN, Checked, words

_TITLES = {"chat": "chat model", "start": "SFT (start)"} | {name: arm.title for name, arm in REAL_ARMS.items()}
# (model, the one that it is compared with).
_COMPARED = (
    *(("start", "chat"), ("sft-continued", "start"), ("slic", "start"), ("dpo", "start"), ("slic", "sft-continued")),
    *(("dpo", "sft-continued"), ("curriculum", "dpo"), ("selected", "dpo")),
)
# All intervals of differences hold together with 95 % (Bonferroni).
_TOGETHER = Bootstrap(confidence=1 - 0.05 / len(_COMPARED))
_EXAMPLES = 8
_MEASURES = (
    "A response passes if its content is right and it follows all rules of the instruction. Wins are against SFT: a"
    " right one beats a wrong one, and then the number of rules decides. New rules are in no training prompt. Words"
    " (mean number) and rules show gains of form alone. Distinct: different pairs of consecutive words among equally"
    " many. KL per token, the share of equal likeliest tokens and the change of the entropy are against the chat model"
    " before any training, on responses of each model. The perplexity is of paragraphs of the manual that comes with"
    " Python, divided by the chat model's."
)
_LIMITS = (
    "That the model became more helpful: the checks are of form and of a few facts, and no person read a response.",
    "How results vary between trainings: there is one seed. The intervals cover the choice of instructions only.",
    "A fair race between losses: all arms have equal steps and responses per step, so SFT sees twice as many prompts."
    " The learning rate, beta, delta and lambda were not tuned for each arm.",
    "Other wordings: every rule has one wording, in training and in held-out instructions.",
    "The original weights: the package holds SmolLM2 quantized to 4 bits, and training starts from those values.",
)


@dataclass
class Report:
    """What the experiment found."""

    result: RealResult
    size: RealSize
    dtype: str
    about: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def rows(self) -> dict[str, dict[str, Any]]:
        """The figures of every model."""
        examined, start = self.result.examined, self.result.examined["start"]
        distinct = distinct_bigrams(*(each.texts for each in examined.values()))
        return {
            name: {
                "title": _TITLES[name],
                "passed": win_rate(each.passed)._asdict(),
                "wins": win_rate(_outcomes(each, start))._asdict(),  # against the start of the arms
                "right": float(_right(each).mean()),
                "rules": float(_rules(each).mean()),
                "seen": self._share(each, unseen=False),
                "unseen": self._share(each, unseen=True),
                "by_kind": self._by_kind(each),
                "words": float(np.mean([len(words(text)) for text in each.texts])),
                "distinct": share,
                "drift": {on: drift.summary() for on, drift in each.drift.items()},
                "seconds": each.seconds,
                "tokens_per_second": each.training and each.training.tokens_per_second,
            }
            for (name, each), share in zip(examined.items(), distinct)
        }

    @cached_property
    def differences(self) -> list[dict[str, Any]]:
        """The comparisons of `_COMPARED`, on the same instructions."""
        found, rows = self.result.examined, []
        for model, other in (pair for pair in _COMPARED if {*pair} <= found.keys()):
            measures = {"passed": ModelAnswers.passed.fget, "right": _right, "rules": _rules}
            row: dict[str, Any] = {"model": model, "minus": other}
            for name, measure in measures.items():
                values = measure(found[model]) - measure(found[other])
                low, high = interval(values, bootstrap=_TOGETHER, bounds=(-1, 1)).tolist()
                row[name] = {"mean": float(values.mean()), "low": low, "high": high}
            rows.append(row)
        return rows

    def _share(self, examined: ModelAnswers, unseen: bool) -> float | None:
        of = [UNSEEN.isdisjoint(each.rules) != unseen for each in self.result.instructions]
        return float(examined.passed[of].mean()) if any(of) else None

    def _by_kind(self, examined: ModelAnswers) -> dict[str, float]:
        found: dict[str, list[bool]] = {}
        for instruction, check in zip(self.result.instructions, examined.checks):
            for rule, followed in zip(instruction.rules, check.followed):
                found.setdefault(RULES[rule].kind, []).append(followed)
        return {kind: float(np.mean(found[kind])) for kind in sorted(found)}

    def sentences(self) -> list[str]:
        """Returns the findings as sentences, computed from the numbers."""
        if self.size != REAL_FULL:
            return ["This run was too short to learn anything: it only shows that every stage runs."]
        found = []
        for row in self.differences:
            passed, right, rules = (row[name] for name in ("passed", "right", "rules"))
            names = f"{_TITLES[row['model']]} against {_TITLES[row['minus']]}"
            verdict = "more" if passed["low"] > 0 else "fewer" if passed["high"] < 0 else "no difference that shows"
            text = f"{names}: {_gain(passed)} of responses that pass: {verdict}."
            if rules["low"] > 0 and not right["low"] > 0:
                text += f" The gain is in form alone: rules {_gain(rules)}, content {_gain(right)}."
            found.append(text)
        return found

    def table(self) -> Table:
        """Returns the table of all models, in percent."""
        names = ("passed", "wins", "right", "rules", "new rules", "words", "distinct")
        names += ("KL", "same", "entropy", "perplexity")
        table = _titled(f"{len(self.result.instructions)} held-out instructions, %", names)
        for row in self.rows.values():
            moved = [""] * 4
            if row["drift"]:
                own, text = (row["drift"][on] for on in ("own", TEXT))
                moved = [f"{own['kl']['mean']:.2f}", _percent(own["agreement"]["mean"])]
                moved += [f"{own['entropy_change']['mean']:+.2f}", f"×{text['perplexity_ratio']['mean']:.2f}"]
            table.add_row(
                row["title"],
                "{:.0f} ({:.0f}–{:.0f})".format(*(100 * row["passed"][name] for name in ("rate", "low", "high"))),
                *map(_percent, (row["wins"]["rate"], row["right"], row["rules"], row["unseen"])),
                *(f"{row['words']:.0f}", _percent(row["distinct"]), *moved),
            )
        return table

    def write(self, folder: Path) -> None:
        """Writes results.json and a self-contained report.html to ``folder``."""
        found = {"about": self.about, "size": asdict(self.size), "dtype": self.dtype, "pairs": self.result.pairs}
        found |= {"results": self.rows, "differences": self.differences, "findings": self.sentences()}
        write_text(folder / "results.json", json.dumps(found, indent=2) + "\n")
        kinds = _titled("rules followed, %", list(self.rows["chat"]["by_kind"]))
        for row in self.rows.values():
            kinds.add_row(row["title"], *map(_percent, row["by_kind"].values()))
        pairs = _titled("chosen > rejected", ("pairs", "chosen passes, %", "rejected passes, %"))
        for kind, row in self.result.pairs.items():
            pairs.add_row(kind, str(row["pairs"]), _percent(row["chosen"]), _percent(row["rejected"]))
        examples = [
            (instruction.prompt, _TITLES[name], each.texts[at], "passes" if each.checks[at].passed else "fails")
            for at, instruction in enumerate(self.result.instructions[:_EXAMPLES])
            for name, each in self.result.examined.items()
        ]
        parts = [
            "Made by {command} in {seconds} s, {cpu_seconds} s of CPU time, with up to {peak_memory_gib} GiB of memory"
            ", in {dtype}.".format(**self.about, dtype=self.dtype),
            *("# What this run shows", *self.sentences()),
            "Differences are on the same instructions; their intervals hold together with 95 % (Bonferroni).",
            *(self.table(), _MEASURES, kinds, "# What it does not show", *_LIMITS),
            "# Responses side by side",
            [("instruction", "model", "response", ""), *examples],
            "# Data and settings",
            "Teachers are programs: each ignores a rule, adds a phrase, or mistakes the topic, at rates of its own."
            " Pairs follow the order of strength, never the checks. The weakest, model, is the SFT model itself. Topics"
            f" are never in both parts. New rules: {' '.join(sorted(UNSEEN))}",
            pairs,
            f"SFT: {self.size.sft_steps} steps, then {self.size.steps} per arm, of {BATCH} rows or {BATCH // 2} pairs."
            f" LoRA: {LORA}",
            *(f"{arm.title}: {dict(arm.options)}" for arm in REAL_ARMS.values()),
        ]
        write_page(folder / "report.html", f"Contrastive post-training of {self.about['model']}", parts)


def _titled(title: str, names: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for at, name in enumerate(("", *names)):
        table.add_column(name, justify="right" if at else "left", no_wrap=True)
    return table


def _right(examined: ModelAnswers) -> NDArray[np.float64]:
    return np.array([check.right for check in examined.checks], np.float64)


def _rules(examined: ModelAnswers) -> NDArray[np.float64]:
    return np.array([np.mean(check.followed) for check in examined.checks])


def _outcomes(examined: ModelAnswers, other: ModelAnswers) -> list[float]:
    """Returns 1, 1/2 or 0 per instruction: a right response beats a wrong one, then the followed rules decide."""

    def rank(check: Checked) -> tuple[bool, int]:
        return check.right, sum(check.followed)

    ranks = ((rank(mine), rank(theirs)) for mine, theirs in zip(examined.checks, other.checks))
    return [0.5 if mine == theirs else float(mine > theirs) for mine, theirs in ranks]


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}"


def _gain(difference: dict[str, float]) -> str:
    mean, low, high = (100 * difference[name] for name in ("mean", "low", "high"))
    return f"{mean:+.1f} points ({low:+.1f} to {high:+.1f})"
