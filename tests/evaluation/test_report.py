"""Tests of evaluation/report.py: tables, lines and plots."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

from rich.console import Console

from cpt_kernels.evaluation.report import (
    difference_lines,
    draw_judged,
    draw_pairs,
    length_lines,
    own_references,
    pair_tables,
    win_rate_notes,
    win_rate_table,
)
from cpt_kernels.evaluation.win_rate import LengthPrior


def estimate(mean: float, half: float = 0.1) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": mean + half}


def summary(models=("a", "b")) -> list[dict]:
    """Returns rows of evaluated models. A model named `start` equals the reference."""
    rows = []
    for by, value in (("all pairs", "all pairs"), ("topic", "first"), ("topic", "second")):
        for number, model in enumerate(models):
            row = {"model": model, "by": by, "value": value, "pairs": 1000 if by == "all pairs" else 500, "prompts": 40}
            row |= {"rewards/accuracies": estimate(0.6 + number / 10), "logps/accuracies": estimate(0.5)}
            row["rewards/length_balanced"] = estimate(0.5) if by == "all pairs" else None
            names = ("rewards/margins", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected")
            row |= {name: estimate(-12.345 * place - number) for place, name in enumerate(names)}
            if model == "start":
                row["rewards/margins"] = {"mean": 0.0, "low": 0.0, "high": 0.0}
            rows.append(row)
    return rows


def rates(**changes) -> dict:
    rate = {"rate": 0.625, "low": 0.5, "high": 0.75, "n": 8}
    row = {"model": "m", "baseline": "base", "win_rate": rate, "length_controlled": rate | {"rate": 0.4}, "prompts": 8}
    row |= {"wins": 4, "ties": 2, "losses": 2, "characters": 1234.5, "baseline_characters": 99.0, "longer": 0.75}
    row |= {"first_rate": None, "consistency": None, "identical": 0, "not_judged": 0, "failures": {}}
    row |= {"distinct_bigrams": 0.25, "baseline_distinct_bigrams": 0.5}
    return row | {"without_baseline": 0, "without_output": 0, "empty_outputs": 0, "empty_baseline_outputs": 0} | changes


def one_prompt() -> list[dict]:
    """Returns rows of which only accuracies have an interval."""
    ends = {"low": None, "high": None}
    return [
        {k: v | ends if isinstance(v, dict) and "accuracies" not in k else v for k, v in row.items()}
        for row in summary()
    ]


def text(*tables) -> str:
    console = Console(file=io.StringIO(), width=140)
    for table in tables:
        console.print(table)
    return console.file.getvalue()


def test_pair_tables():
    out = text(*pair_tables(summary(), 0.9))
    assert "1,000 pairs of 40 prompts, mean [90% interval]" in out and "By topic" in out
    assert "60.0 [50.0, 70.0]" in out and "-12.345 [-12.445, -12.245]" in out
    assert re.search(r"either side longer equally often +50.0 \[40.0, 60.0\]", out)
    lines = [line.split() for line in out.splitlines()]
    assert [line[:3] for line in lines if "500" in line] == [
        ["first", "a", "500"],
        ["b", "500", "70.0"],
        ["second", "a", "500"],
        ["b", "500", "70.0"],
    ]


def test_one_prompt_has_no_interval():
    out = text(*pair_tables(one_prompt(), 0.95))
    assert "60.0 [50.0, 70.0]" in out and "-12.345 (one prompt)" in out and "nan" not in out


def test_own_references_are_left_out_of_groups():
    rows = summary(("start", "a"))
    assert own_references(rows) == ["start"] and own_references(summary()) == []
    whole, grouped = pair_tables(rows, 0.95)
    assert "start" in text(whole) and "start" not in text(grouped)


def test_lines():
    differences = [{"model": "b", "minus": "a", "win_rate": estimate(0.05, 0.01)}]
    assert difference_lines(differences, {"win_rate": ("win rate", 100, "+.1f")}) == [
        "b minus a, on the same prompts: win rate +5.0 [+4.0, +6.0]"
    ]


def test_win_rate_table_and_notes():
    out = text(win_rate_table([rates(), rates(model="n", length_controlled=None)], 0.95))
    assert "Against base" in out and "62.5 [50.0, 75.0]" in out and "40.0 [50.0, 75.0]" in out
    assert "not identified" in out and "4 / 2 / 2" in out and "1,234" in out and "75%" in out
    distinct = "m: of equally many pairs of words 25% are different, and 50% of the baseline's"
    assert win_rate_notes(rates()) == [distinct] and win_rate_notes(rates(distinct_bigrams=None)) == []
    notes = win_rate_notes(
        rates(
            without_baseline=3,
            without_output=4,
            empty_outputs=2,
            not_judged=2,
            failures={"HTTP 400": 3},
            identical=1,
            first_rate=0.61,
            consistency=0.9,
            length_controlled=None,
            longer=0.0,
        )
    )
    for expected in (
        "m: 3 prompts were left out because base did not answer them",
        "m: 4 prompts were left out because m did not answer them",
        "m: 2 outputs of m are empty, and were judged as they are",
        "2 comparisons have no verdict and are left out of the rates (missing answers: 3 by HTTP 400; run the command",
        "m: 1 outputs equal the baseline's and count as ties",
        "the first position in 61.0% (50% means no bias), and gave the same verdict in both orders in 90.0%",
        "all its outputs are shorter than the baseline's",
    ):
        assert any(expected in note for note in notes), expected
    assert len(notes) == 8


def test_length_lines():
    effect = {"length_effect": 1.04, "length_effect_without_prior": 2.5}
    rows = [rates(length_controlled=effect), rates(model="n", length_controlled=None)]
    method, effects = length_lines(rows, LengthPrior(1, 0.25))
    assert "arXiv 2404.04475" in method and "prior 1 +- 0.25 instead (--length_prior)" in method
    assert effects == "length effect in log-odds: m 1.04 (2.50 without a prior)"
    assert length_lines(rows[1:], LengthPrior())[1:] == []


def test_plots(tmp_path):
    """A dollar sign in a name does not start a formula."""
    files = draw_pairs(summary(("start", r"a$\no{math$", "b")), tmp_path / "new", r"a$\b$")
    files += draw_pairs(summary(("start",)), tmp_path / "tied", "title")
    files += draw_pairs(one_prompt(), tmp_path / "one", "title")
    files += draw_judged([rates(), rates(model=r"$\n$", length_controlled=None)], tmp_path)
    assert [file.name for file in files] == [*["pairs.png", "pairs.svg"] * 3, "win_rate.png", "win_rate.svg"]
    for file in files:
        if file.suffix == ".svg":
            ElementTree.parse(file)
        else:
            assert file.read_bytes().startswith(b"\x89PNG") and file.stat().st_size > 5_000
