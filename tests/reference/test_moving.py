"""A reference that follows the policy: its weights after every step, resuming, evaluation, and refused set-ups."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from cpt_kernels.reference.moving import MovingReference
from tests.helpers.architectures import tiny_model
from tests.helpers.toy import losses, make_trainer, preference_data
from tests.training.test_distributed import run

OPTIONS = {"sync_ref_model": True, "ref_model_sync_steps": 2, "ref_model_mixup_alpha": 0.3, "max_steps": 5}


class Record(TrainerCallback):
    """Records the weights of policy and reference after every step."""

    def __init__(self) -> None:
        self.policy, self.reference = [], []

    def on_step_end(self, args, state, control, **_) -> None:
        for kept, model in ((self.policy, self.trainer.model), (self.reference, self.trainer.reference.packed.model)):
            kept.append(copy.deepcopy(model.state_dict()))


@pytest.mark.parametrize("architecture", ["llama", "llama-tied"])
def test_it_moves_as_the_equation_says(tmp_path, architecture):
    record = Record()
    trainer = make_trainer(tmp_path, model=tiny_model(architecture), **OPTIONS)
    record.trainer = trainer
    trainer.add_callback(record)
    expected = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    for step, (policy, reference) in enumerate(zip(record.policy, record.reference), start=1):
        if step % 2 == 0:
            expected = {name: 0.3 * policy[name] + 0.7 * weight for name, weight in expected.items()}
        for name, weight in expected.items():
            torch.testing.assert_close(reference[name], weight, msg=f"step {step}, {name}")
    assert not (tmp_path / "ref").exists()  # nothing was cached


def test_until_it_moves_it_is_the_start_weights(tmp_path):
    still = make_trainer(tmp_path, **OPTIONS | {"ref_model_sync_steps": 100})
    still.train()
    cached = make_trainer(tmp_path, max_steps=5)
    cached.train()
    assert losses(still) == pytest.approx(losses(cached), abs=1e-6)
    moving = make_trainer(tmp_path, **OPTIONS)
    moving.train()
    assert losses(moving)[:2] == losses(still)[:2] and losses(moving)[2:] != losses(still)[2:]


def test_a_full_step_makes_it_the_policy(tmp_path):
    trainer = make_trainer(tmp_path, **OPTIONS | {"ref_model_mixup_alpha": 1.0, "max_steps": 4})
    trainer.train()
    metrics = trainer.evaluate(trainer.train_dataset)
    assert metrics["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)


def test_it_starts_from_a_reference_that_is_given(tmp_path):
    trainer = make_trainer(tmp_path, ref_model=tiny_model("llama", seed=1), **OPTIONS)
    assert abs(trainer.evaluate(trainer.train_dataset)["eval_rewards/margins"]) > 1e-3
    trainer.train()
    assert not any(p.requires_grad for p in trainer.reference.packed.model.parameters())


def test_resume_continues_with_the_reference_as_it_was(tmp_path):
    options = OPTIONS | {"rows": 20, "max_steps": 8, "save_strategy": "steps", "save_steps": 3}
    whole = make_trainer(tmp_path / "a", **options)
    whole.train()
    resumed = make_trainer(tmp_path / "a", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/out/checkpoint-3"))
    assert losses(resumed) == losses(whole)
    ours, theirs = (t.reference.packed.model.state_dict() for t in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    still = {name: value for name, value in options.items() if "ref_model" not in name}
    with pytest.raises(ValueError, match=r"saved with sync_ref_model, .* resume it with sync_ref_model=true"):
        make_trainer(tmp_path / "a", **still).train(resume_from_checkpoint=str(tmp_path / "a/out/checkpoint-3"))
    (tmp_path / "a/out/checkpoint-3/reference.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no reference\.safetensors: it was not saved by a run with sync"):
        make_trainer(tmp_path / "a", **options).train(resume_from_checkpoint=str(tmp_path / "a/out/checkpoint-3"))


def test_with_streams_and_token_budgets(tmp_path):
    stored = make_trainer(tmp_path, train_sampling_strategy="sequential", **OPTIONS | {"max_steps": 3})
    stored.train()
    stream = make_trainer(
        tmp_path, train_dataset=preference_data(16).to_iterable_dataset(), **OPTIONS | {"max_steps": 3}
    )
    stream.train()
    assert losses(stream) == pytest.approx(losses(stored), abs=1e-6)
    make_trainer(tmp_path, max_tokens_per_batch=80, **OPTIONS | {"max_steps": 2}).train()


def test_two_ranks_move_it_as_one_does(tmp_path):
    options = OPTIONS | {"train_sampling_strategy": "sequential"}
    alone = run(tmp_path, "one", 1, 12, per_device_train_batch_size=4, **options)
    both = run(tmp_path, "two", 2, 12, per_device_train_batch_size=2, **options)
    assert both["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    assert both["metrics"]["eval_rewards/chosen"] == pytest.approx(alone["metrics"]["eval_rewards/chosen"], abs=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"peft_config": LoraConfig(r=4, target_modules="all-linear")}, "not defined for an adapter"),
        ({"ref_model": tiny_model("qwen2")}, "must have the same architecture"),
    ],
)
def test_where_weights_cannot_be_mixed(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **arguments, **OPTIONS)


def test_sharded_weights_are_refused(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, **OPTIONS)
    monkeypatch.setattr(type(trainer.accelerator), "distributed_type", "FSDP")
    with pytest.raises(ValueError, match="whole weights on every rank"):
        MovingReference(trainer.packed, None, trainer.accelerator)
