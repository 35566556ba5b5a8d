"""A run of 20 steps equals, bit for bit on a CPU, one that is killed by SIGKILL in step 14 and resumed from step 10."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.forked import run_ranks
from tests.helpers.killed_run import CASES, KILLED, SAVED, STEPS, make_trainer, run_all


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("killed")
    run_ranks(folder, 1, run_all, folder)
    return folder


@pytest.mark.parametrize("case", CASES)
def test_a_killed_run_resumes_as_if_nothing_had_been(folder, tmp_path, case):
    checkpoint = folder / case / "out" / f"checkpoint-{SAVED}"
    assert checkpoint.is_dir() and not checkpoint.with_name(f"checkpoint-{STEPS}").exists() and SAVED < KILLED < STEPS
    whole, resumed = make_trainer(tmp_path, case), make_trainer(folder, case)
    whole.train()
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == whole.state.global_step == STEPS
    logged = [[(e["step"], e["loss"]) for e in t.state.log_history if "loss" in e] for t in (whole, resumed)]
    assert logged[0] == logged[1] and len({loss for _, loss in logged[0]}) > STEPS / 2
    for (name, expected), found in zip(whole.model.state_dict().items(), resumed.model.state_dict().values()):
        assert torch.equal(found, expected), name
