"""Tests of ``cpt demo --study order``: a cell is the same whenever it runs, and a stopped study continues."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest

from cpt_kernels.demo import order
from cpt_kernels.demo.order import MAIN, ORDER_ARMS, QUICK_ORDER, Cell, OrderStudy, Setting


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


def test_a_pool_that_is_too_small_is_refused(tmp_path):
    ours = study(tmp_path)
    ours.size = replace(ours.size, steps=100)
    with pytest.raises(ValueError, match="too few pairs"):
        ours._start(0)
