"""Tests of ``python -m bench scale`` on few rows."""

from __future__ import annotations

import json

import pytest

from bench import scale


def test_the_loader_keeps_ranks_busy(tmp_path):
    file = tmp_path / "rows.arrow"
    tokens = scale.write_rows(file, "ultrafeedback", 3000)
    assert 1.7e6 < tokens < 2.5e6
    for budget, group, most in ((8192, 1, 0.03), (8192, 4, 0.03), (None, 1, 0.06)):
        found = scale.plan(file, 16, group, budget, 8, 2048)
        assert found["idle"] < most and found["idle"] <= found["worst"], budget
        assert found["tokens"] == pytest.approx(3000 * 850 / 16 / found["turns"], rel=0.05)


def test_a_million_pairs_are_counted():
    few, many = (scale.count_files(560_000_000, 2_000_000, ranks, 20_000) for ranks in (8, 512))
    assert (few["seconds"], few["files"]) == (3500, 8 * 117)
    assert (many["seconds"], many["files"]) == (55, 512 * 2)
    assert many["opened_by_all"] == 512 * many["files"]


@pytest.mark.slow
def test_quick(tmp_path, capsys):
    scale.main(["--quick", "--json", str(tmp_path / "out.json")])
    text, last = capsys.readouterr().out.rstrip().rsplit("\n", 1)
    assert "idle %" in text and "look-ups a second" in text
    saved = json.loads((tmp_path / "out.json").read_text())["scale"]
    assert json.loads(last)["idle"].keys() == {"4", "8"}
    assert len(saved["plans"]) == 6 and [each["rows"] for each in saved["preparation"]] == [3, 300]
