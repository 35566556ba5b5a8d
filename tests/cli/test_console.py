"""Tables on a terminal of 80 columns and in a pipe: no name is broken or shortened."""

from __future__ import annotations

import pytest

from cpt_kernels.cli.console import print_results
from cpt_kernels.evaluation.report import win_rate_table
from cpt_kernels.training.report import metrics_table

LONG = "organisation/a-model-with-a-long-name-70B-Instruct-[dpo]-easy-to-hard"


@pytest.mark.parametrize("terminal", [False, True])
def test_names_are_whole(monkeypatch, capsys, terminal):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    rate = {"rate": 0.5, "low": 0.4, "high": 0.6}
    summary = {"model": LONG, "baseline": LONG + "-2", "win_rate": rate, "length_controlled": rate, "prompts": 300}
    counts = {"wins": 100, "ties": 100, "losses": 100, "characters": 1e3, "baseline_characters": 1e3, "longer": 0.5}
    losses = [{"step": step, "loss": 0.5} for step in (1, 2)]
    print_results([win_rate_table([summary | counts], 0.95), metrics_table(losses, LONG + ": sigmoid")], [LONG])
    printed = capsys.readouterr().out
    assert [line.count(LONG) for line in printed.splitlines() if LONG[:20] in line] == [1, 1, 1, 1]
    assert "50.0 [40.0, 60.0]" in printed and "…" not in printed
