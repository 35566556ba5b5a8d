"""Stages of a curriculum whose reference is renewed: values, resuming in every stage, scoring once, and errors."""

from __future__ import annotations

import copy
import itertools
import logging
import pickle
import shutil

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from cpt_kernels.training.stages import stage_starts
from tests.helpers.architectures import tiny_model
from tests.helpers.forked import run_ranks
from tests.helpers.killed_stages import run_killed
from tests.helpers.toy import losses, make_trainer, preference_data
from tests.training.test_distributed import run

STAGES = {"column": "gap", "keep": 0.6, "schedule": "sorted", "stages": 3, "refresh_reference": True}
# 18 rows are kept: 5 steps an epoch, of up to 2 micro-batches of 2 rows.
OPTIONS = {
    **{"rows": 30, "curriculum": STAGES, "num_train_epochs": 2, "save_strategy": "steps", "save_steps": 1},
    **{"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
}
STARTS = [0, 4, 7]


class Policies(TrainerCallback):
    """Keeps the policy after every step."""

    def __init__(self) -> None:
        self.models = []

    def on_step_end(self, args, state, control, model=None, **_) -> None:
        self.models.append(copy.deepcopy(model))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    policies = Policies()
    trainer = make_trainer(folder, callbacks=[policies], eval_dataset=preference_data(3, seed=1), **OPTIONS)
    trainer.train()
    return folder, trainer, policies.models


def same(one, other) -> bool:
    return all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))


def test_stages_begin_at_equal_parts_of_the_run():
    assert stage_starts(3, 10) == STARTS and stage_starts(2, 2) == [0, 1]
    with pytest.raises(ValueError, match="stages=3 exceeds the 2 optimizer steps"):
        stage_starts(3, 2)


def test_rewards_are_against_the_policy_at_the_start_of_the_stage(whole):
    """Rewards and the loss of a stage equal those of a run with that policy as its reference."""
    folder, trainer, models = whole
    logs = [record for record in trainer.state.log_history if "loss" in record]
    assert [i for i, record in enumerate(logs) if abs(record["rewards/margins"]) < 1e-6] == STARTS
    held_out = trainer.evaluate()
    for stage, start in enumerate(STARTS):
        reference = None if start == 0 else models[start - 1]
        fixed = make_trainer(
            folder / f"fixed{stage}", model=copy.deepcopy(models[-1]), ref_model=copy.deepcopy(reference),
            eval_dataset=preference_data(3, seed=1), rows=30,
        )  # fmt: skip
        found = fixed.evaluate()["eval_rewards/margins"] == pytest.approx(held_out["eval_rewards/margins"], abs=1e-5)
        assert found == (start == STARTS[-1])


def test_each_reference_scores_the_rows_of_its_stage_once(whole, caplog):
    folder, trainer, _ = whole
    caches = {path.parent.name for path in (folder / "ref").rglob("reference.json")}
    shards = list((folder / "ref").rglob("*.arrow"))
    assert len(caches) == 3 and len({shard.parent for shard in shards}) == 3
    before = {shard: shard.stat().st_mtime_ns for shard in shards}
    with caplog.at_level(logging.WARNING):
        again = make_trainer(folder, eval_dataset=preference_data(3, seed=1), **OPTIONS)
        again.train()
    assert {shard: shard.stat().st_mtime_ns for shard in (folder / "ref").rglob("*.arrow")} == before
    assert losses(again) == losses(trainer)
    assert "stage 3 of 3 begins at step 7: the policy becomes the reference" in caplog.text
    assert "all 14 stage 2 reference log-probs were cached" in caplog.text  # 7 of the 18 rows


@pytest.mark.parametrize("checkpoint", [2, 4, 5, 8])  # within a stage, and where one begins
def test_a_run_resumes_in_every_stage(whole, tmp_path, checkpoint):
    folder, trainer, _ = whole
    shutil.copytree(folder / "ref", tmp_path / "ref")
    shards = set((tmp_path / "ref").rglob("*.arrow"))
    resumed = make_trainer(tmp_path, eval_dataset=preference_data(3, seed=1), **OPTIONS)
    resumed.train(resume_from_checkpoint=str(folder / f"out/checkpoint-{checkpoint}"))
    assert losses(resumed) == losses(trainer) and same(resumed.model, trainer.model)
    assert set((tmp_path / "ref").rglob("*.arrow")) == shards


@pytest.mark.slow
def test_a_run_that_is_killed_anywhere_in_a_stage_resumes_bit_by_bit(tmp_path):
    """It scores every completion once for each reference, as the run that nothing interrupts."""
    points: dict = {"whole": None}
    for start, end in itertools.pairwise([*STARTS, 10]):
        points |= {f"before {start}": ("fills", start, 1), f"scoring {start}": ("scores", start, 3)}
        points |= {f"training {start}": ("trains", start + 1, 2), f"end {start}": ("saved", end, 1)}
    run_ranks(tmp_path, 1, run_killed, tmp_path, points, OPTIONS)
    logs, weights = pickle.loads((tmp_path / "whole/result").read_bytes())
    scored = sorted((tmp_path / "whole/scored").read_text().splitlines())
    assert len(logs) == 11 and len(set(scored)) == len(scored)
    assert len({line.split()[0] for line in scored}) == 3
    for case in points:
        found, resumed = pickle.loads((tmp_path / case / "result").read_bytes())
        assert found == logs, case
        assert all(map(torch.equal, resumed.values(), weights.values())), case
        assert sorted((tmp_path / case / "scored").read_text().splitlines()) == scored, case


def test_a_resumed_run_without_its_stage_is_one_clear_error(whole, tmp_path):
    """Scores of the start can be made again, those of a later stage cannot; a stage of another length is refused."""
    folder, trainer, _ = whole
    resumed = make_trainer(tmp_path, eval_dataset=preference_data(3, seed=1), **OPTIONS)
    with pytest.raises(ValueError, match=r"14 log-probs of the stage that began at step 4 are missing from .*restore"):
        resumed.train(resume_from_checkpoint=str(folder / "out/checkpoint-5"))
    at_start = make_trainer(tmp_path, eval_dataset=preference_data(3, seed=1), **OPTIONS)
    at_start.train(resume_from_checkpoint=str(folder / "out/checkpoint-4"))
    assert losses(at_start) == losses(trainer)
    longer = make_trainer(tmp_path, **OPTIONS | {"num_train_epochs": 4})
    with pytest.raises(ValueError, match="a stage that began at step 4, but in this run its stage begins at step 0"):
        longer.train(resume_from_checkpoint=str(folder / "out/checkpoint-5"))


@pytest.mark.parametrize("peft", [False, True], ids=["whole", "LoRA"])
def test_a_new_adapter_and_a_separate_reference(tmp_path, peft):
    """The first stage has the reference that was given, or the model without its adapter; the next have the policy."""
    given = {"peft_config": LoraConfig(target_modules=["q_proj"], r=2)} if peft else {"ref_model": tiny_model("llama")}
    trainer = make_trainer(tmp_path, **given, **OPTIONS)
    trainer.train()
    margins = [abs(record["rewards/margins"]) for record in trainer.state.log_history if "loss" in record]
    assert [i for i, margin in enumerate(margins) if margin < 1e-6] == STARTS
    assert len(set((tmp_path / "ref").iterdir())) == 3
    trainer.train()  # a second run begins with the first reference again
    assert abs(next(r for r in trainer.state.log_history if "loss" in r)["rewards/margins"]) > 1e-6


@pytest.mark.slow
def test_ranks_train_as_one(tmp_path):
    """Two ranks, which score the stages together, take the steps of one."""
    options = {"curriculum": STAGES, "num_train_epochs": 2, "per_device_train_batch_size": 2, "learning_rate": 1e-3}
    one = run(tmp_path, "one", 1, 30, gradient_accumulation_steps=2, **options)
    two = run(tmp_path, "two", 2, 30, **options)
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-4)
    assert len(set((tmp_path / "two/ref").iterdir())) == 3
    assert two["metrics"]["eval_rewards/margins"] == pytest.approx(one["metrics"]["eval_rewards/margins"], abs=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "simpo"}, "loss 'simpo' has no reference: remove refresh_reference"),
        ({"sync_ref_model": True}, "sync_ref_model and the curriculum's refresh_reference both move the reference"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 1},
            "load_best_model_at_end cannot compare them",
        ),
        (
            {"precompute_ref_log_probs": False},
            "store all data, evaluation sets too, and leave",
        ),
        ({"eval_dataset": preference_data(3).to_iterable_dataset()}, "store all data, evaluation sets too"),
    ],
)
def test_runs_that_cannot_renew_their_reference(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **OPTIONS | options)
