"""Test of `python -m bench win_rate` on a small copy of AlpacaEval's files."""

from __future__ import annotations

import json

import pytest

from bench import win_rate
from cpt_kernels.evaluation.win_rate import length_controlled_win_rate


def test_win_rates_are_compared_with_published_ones(tmp_path, capsys):
    published = {"m": (62.5, 50.0), "unpublished": (10.0, ""), win_rate._BASELINE: (50.0, 50.0)}
    board = tmp_path / win_rate._LEADERBOARD
    board.parent.mkdir(parents=True)
    lines = [f"{name},{plain},{controlled}" for name, (plain, controlled) in published.items()]
    board.write_text("\n".join([",win_rate,length_controlled_winrate", *lines]))
    rows = [
        {"preference": preference, "output_1": "x" * 4, "output_2": "x" * length}
        for preference, length in [(2.0, 8), (1.0, 2), (0, 3), (2.0, 4), (None, 9)]
    ]
    for name in published:
        path = tmp_path / "results" / name / win_rate._ANNOTATIONS
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(rows))
    out = tmp_path / "out.json"
    win_rate.main([str(tmp_path), "--resamples", "20", "--json", str(out)])
    assert "1 models; plain win rates differ by at most 0.0e+00 points" in capsys.readouterr().out
    found = json.loads(out.read_text())["win_rate"]
    assert found["models"] == 1 and found["worst_model"] == "m"
    assert found["worst"] == found["mean"] == pytest.approx(abs(found["results"]["prior"]["rates"]["m"] - 50), abs=0.01)
    for name, prior in win_rate._PRIORS.items():
        expected = length_controlled_win_rate([1, 0, 0.5, 1], [8, 2, 3, 4], [4] * 4, prior=prior)
        assert found["results"][name]["rates"]["m"] == pytest.approx(100 * expected.rate, abs=0.01)
    (tmp_path / "results" / "m" / win_rate._ANNOTATIONS).unlink()
    with pytest.raises(SystemExit):
        win_rate.main([str(tmp_path)])
