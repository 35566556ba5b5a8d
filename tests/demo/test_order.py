"""Tests of ``cpt demo --study order``: a cell is the same whenever it runs, and a stopped study continues."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from cpt_kernels.demo import order
from cpt_kernels.demo.order import MAIN, ORDER_ARMS, QUICK_ORDER, TUNING_SEEDS, Cell, OrderStudy, Setting
from cpt_kernels.demo.order_report import COMPARISONS, Outcomes, write_order_report
from cpt_kernels.evaluation.report import table_cells


@pytest.fixture(autouse=True)
def _quiet(caplog):
    caplog.set_level("ERROR", logger="cpt_kernels")


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A folder with the start of seed 0."""
    folder = tmp_path_factory.mktemp("started")
    study(folder)._start(0)
    return folder


def study(folder, started=None) -> OrderStudy:
    if started is not None:
        shutil.copytree(started, folder, dirs_exist_ok=True)
    return OrderStudy(folder, [0], QUICK_ORDER, lambda line: None)


def numbers(result: dict) -> str:
    return json.dumps({name: value for name, value in result.items() if name != "seconds"})


def test_a_cell_run_again_gives_the_same_numbers(tmp_path, started, monkeypatch):
    """In another folder and after other cells: from the start model and the pairs to the last digit of its result."""
    monkeypatch.setattr(OrderStudy, "rate", lambda self, setting: 1e-3)
    found = []
    for number, arms in enumerate((["stages-sqrt", "sft-hardest"], ["sft-hardest", "stages-sqrt"])):
        ours = study(tmp_path / str(number), started if number else None)
        found.append({arm: numbers(ours.run_cell(Cell(MAIN, 1e-3, arm, 0))) for arm in arms})
    assert found[0] == found[1] and len(set(found[0].values())) == 2


@pytest.mark.slow
def test_a_stopped_study_continues(tmp_path, started, monkeypatch):
    """It is stopped in its third cell; then it finds two cells and runs the others."""
    monkeypatch.setattr(order, "BLOCKS", {"arms": (MAIN,)})
    monkeypatch.setattr(order, "TUNING_SEEDS", (0,))
    arms = ("random-all", "easy-only", "hard-only")
    monkeypatch.setattr(order, "ORDER_ARMS", {arm: ORDER_ARMS[arm] for arm in arms})
    ours = study(tmp_path, started)
    run_cell, ran = OrderStudy.run_cell, []

    def stopping(self, cell):
        ran.append(cell.arm)
        if len(ran) == 3:
            raise KeyboardInterrupt
        return run_cell(self, cell)

    monkeypatch.setattr(OrderStudy, "run_cell", stopping)
    with pytest.raises(KeyboardInterrupt):
        list(ours.run())
    assert "2 cells are done" in ours.cost() and ran == list(arms)
    assert list(study(tmp_path).run()) == ["arms"] and ran[3:] == ["hard-only"]
    results = [json.loads(path.read_text()) for path in sorted((tmp_path / "cells").iterdir())]
    assert {result["arm"] for result in results} == {*arms}
    assert all([point["step"] for point in result["curve"]] == [1, 2, 3, 4] for result in results)


def test_noise_swaps_the_same_pairs_and_more(started):
    ours = study(started)
    clean, some, more = (ours._pairs(Setting(noise=noise), 0) for noise in (0.0, 0.1, 0.2))
    swapped = [
        {i for i, (pair, other) in enumerate(zip(clean, pairs)) if pair["chosen"] == other["rejected"]}
        for pairs in (some, more)
    ]
    assert swapped[0] < swapped[1] and 0.1 < len(swapped[1]) / len(clean) < 0.3
    assert all(pair["chosen_model"] == other["chosen_model"] for pair, other in zip(clean, more))


@pytest.mark.slow
def test_a_pool_that_is_too_small_is_refused(tmp_path):
    ours = study(tmp_path)
    ours.size = replace(ours.size, steps=100)
    with pytest.raises(ValueError, match="too few pairs"):
        ours._start(0)


# --- The report ---


def cell(arm: str, seed: int, win: float, **setting) -> dict:
    points = [{"step": step, "win": win, "right": win / 2, "characters": 20.0} for step in (12, 48)]
    setting = {"beta": 0.1, "noise": 0.0, "start": "sft", "learning_rate": 1e-4} | setting
    return {"arm": arm, "seed": seed, **setting, "curve": points, "greedy": points[0], "seconds": 1.0}


def write_cells(folder, cells) -> None:
    (folder / "cells").mkdir()
    for number, each in enumerate(cells):
        (folder / "cells" / f"{number}.json").write_text(json.dumps(each))


def test_differences_are_paired_by_seed_and_corrected_for_their_number():
    """Seeds differ by 10 points, arms by 2 points in each seed."""
    random = np.random.default_rng(0)
    base, noise = random.normal(0.5, 0.1, 12), random.normal(0, 0.01, 12)
    cells = [cell("random-all", seed, base[seed]) for seed in range(12)]
    cells += [cell("sorted-all", seed, base[seed] + 0.02 + noise[seed]) for seed in range(11)]
    found = Outcomes([*cells, cell("sorted-all", TUNING_SEEDS[0], 0.0)]).difference(MAIN, "sorted-all", "random-all")
    values = 0.02 + noise[:11]
    assert found.seeds == 11 and found.mean == pytest.approx(values.mean())
    # Student's t of 10 degrees of freedom: 2.228 for 95 %, 4.33 for 1 - 0.05 / 36.
    error = values.std(ddof=1) / 11**0.5
    assert found.high - found.mean == pytest.approx(2.228 * error, rel=0.1)
    assert found.all_high - found.mean == pytest.approx(4.33 * error, rel=0.2) and len(COMPARISONS) == 36
    assert found.is_found == (found.all_low > 0)


def test_the_report_of_a_study_that_has_not_ended(tmp_path):
    cells = [cell(arm, seed, 0.5 + 0.01 * seed) for arm in ("random-all", "easy-only") for seed in (0, 1)]
    write_cells(tmp_path, [*cells, cell("random-all", 0, 0.4, beta=0.5), cell("random-all", 100, 0.6)])
    compared, tuned = (table_cells(table)[1] for table in write_order_report(tmp_path))
    assert [row[:6] for row in compared] == [
        ["β 0.1, noise 0%, from SFT", "easy-only", "50.5", "random-all", "2", "+0.0 [+0.0, +0.0]"]
    ]
    assert tuned == [["β 0.1, noise 0%, from SFT", "60.0"]]
    page = (tmp_path / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 2 and "easy-only" in page
    assert len((tmp_path / "cells.jsonl").read_text().splitlines()) == 6
    assert "| easy-only | 50.5 | random-all |" in (tmp_path / "results.md").read_text()
