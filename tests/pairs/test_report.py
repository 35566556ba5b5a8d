"""Tests the counts and lengths of the report against values computed by hand, and its table, lines and pictures."""

from __future__ import annotations

import json
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from cpt_kernels.pairs import report as pairs_report
from cpt_kernels.pairs.build import build_pairs
from cpt_kernels.pairs.files import load_responses
from cpt_kernels.pairs.report import make_report, report_lines, report_table, write_report
from tests.helpers.command import write_rows

ROWS = [  # prompts have 2 characters
    *({"prompt": "p1", "model": m, "response": r} for m, r in (("a", "x" * 8), ("b", "y" * 4), ("c", "z"))),
    *({"prompt": "p2", "model": m, "response": r} for m, r in (("a", "x" * 2), ("b", "y" * 4), ("c", "y" * 4))),
    {"prompt": "p3", "model": "a", "response": "alone"},
    {"prompt": "p3", "model": "b", "response": ""},
]


def make(tmp_path, names=("a", "b", "c")):
    rows = [{**row, "model": names["abc".index(row["model"])]} for row in ROWS]
    responses = load_responses([str(write_rows(tmp_path / "rows.jsonl", rows))])
    strength = dict(zip(names, (2.0, 1.0, 0.0)))
    pairs = build_pairs(
        responses.prompt_keys, responses.models, responses.response_keys, strength, drops=responses.drops
    )
    about = {"strength": strength, "form": "text"}
    return make_report(responses, pairs, pairs.prompt[pairs.chosen] == 1, "characters", about)


@pytest.fixture
def report(tmp_path):
    return make(tmp_path)


def test_figures(report):
    assert report["prompts"] == {"in": 3, "in_pairs": 2, "validation": 1}
    responses = report["responses"]
    assert (responses["in"], responses["kept"]) == (8, 6)
    assert {reason: drop["count"] for reason, drop in responses["dropped"].items()} == {
        "empty response": 1,
        "no other response": 1,
    }
    assert responses["dropped"]["empty response"]["first"] == ["b: row 7"]
    entries = {(entry["chosen"], entry["rejected"]): entry for entry in report["by_models"]}
    assert list(entries) == [("a", "b"), ("a", "c"), ("b", "c")]
    first = entries["a", "b"]
    assert (first["pairs"], first["validation"], first["prompts"], first["identical"], first["gap"]) == (
        2,
        1,
        2,
        0,
        1.0,
    )
    assert (first["chosen_length"], first["rejected_length"], first["length_ratio"]) == (5, 4, 1.25)
    assert first["length_ratio_quantiles"]["0.50"] == 1.25 and first["chosen_is_longer"] == 0.5
    assert first["prompt_share"] == pytest.approx(4 / (4 + (8 + 4 + 2 + 4) / 2))
    last = entries["b", "c"]
    assert (last["pairs"], last["identical"], last["length_ratio"]) == (1, 1, 4.0)
    pairs = report["pairs"]
    assert (pairs["pairs"], pairs["identical"], pairs["tied"], pairs["repeated"], pairs["opposed"]) == (5, 1, 0, 1, 0)
    assert pairs["validation"] == 2 and pairs["gap"] == pytest.approx((1 + 1 + 2 + 2 + 1) / 5)


def test_names_are_not_read_as_markup(tmp_path):
    names = ["a[/b]", r"$\no{math$", "[red]c"]
    report = make(tmp_path, names)
    write_report(report, tmp_path / "report.json", {"svg": tmp_path / "report.svg"})
    console = Console(width=200, file=StringIO())
    console.print(report_table(report))
    rows = [line.split()[:2] for line in console.file.getvalue().splitlines()]
    assert [rows.count(pair) for pair in (names[:2], names[::2], names[1:])] == [1, 1, 1]


def test_table_lines_and_plots(report, tmp_path):
    files = [tmp_path / f"report.{suffix}" for suffix in ("json", "png", "svg")]
    write_report(report, files[0], {path.suffix[1:]: path for path in files[1:]})
    assert json.loads(files[0].read_text()) == report
    assert files[1].read_bytes().startswith(b"\x89PNG") and "<svg" in files[2].read_text()
    console = Console(width=100, file=StringIO())
    console.print(report_table(report))
    text = console.file.getvalue()
    assert "tied" not in text and [line.split()[:4] for line in text.splitlines() if line.startswith(" a ")] == [
        ["a", "b", "2", "0"],
        ["a", "c", "2", "0"],
    ]
    lines = report_lines(report)
    assert (
        lines[0] == "6 of 8 responses are in pairs"
        and "2 of 3 prompts are in pairs; 1 of them, with 2 pairs" in lines[3]
    )
    assert "1 pairs repeat another pair and 0 pairs repeat another pair with chosen and rejected swapped" in lines[-1]


def test_many_models(tmp_path, monkeypatch):
    """The table and the picture show some pairs of models and say how many more there are."""
    monkeypatch.setattr(pairs_report, "_MOST_ROWS", 4)
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": f"p{p}", "model": f"m{m}", "response": f"{p} {m}" * (1 + m), "score": float(rng.integers(4))}
        for p in range(20)
        for m in range(5)
    ]
    responses = load_responses([str(write_rows(tmp_path / "rows.jsonl", rows))], rating="score")
    pairs = build_pairs(responses.prompt_keys, responses.models, responses.response_keys, responses.numbers("rating"))
    report = make_report(responses, pairs, np.zeros(len(pairs), bool), "characters", {"strength": None})
    assert len(report["by_models"]) > 12 and report["pairs"]["tied"] > 0
    counts = [entry["pairs"] for entry in report["by_models"]]
    assert counts == sorted(counts, reverse=True) and sum(counts) == len(pairs)
    console = Console(width=160, file=StringIO())
    console.print(report_table(report))
    assert f"... and {len(counts) - 4} more" in " ".join(console.file.getvalue().split())
    write_report(report, tmp_path / "report.json", {"svg": tmp_path / "report.svg"})
    assert (tmp_path / "report.svg").stat().st_size > 10_000
