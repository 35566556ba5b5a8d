"""Sequence groups train as one rank does: reference pass, steps, gradients, evaluation and metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig

from tests.helpers.architectures import tiny_model
from tests.helpers.distributed_run import Recording
from tests.helpers.forked import run_ranks
from tests.helpers.toy import losses, make_trainer, preference_data

COMMON = {"max_steps": 3, "train_sampling_strategy": "sequential", "learning_rate": 1e-3}


def train(folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """Trains, evaluates and predicts on one rank; returns its numbers."""
    options = dict(options)
    model = tiny_model(options.pop("model", "llama"))
    if options.pop("lora", False):
        options["peft_config"] = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj", "up_proj"], init_lora_weights=False
        )
    torch.manual_seed(0)
    data = preference_data(13)
    if options.pop("stream", False):
        data = data.to_iterable_dataset()
    trainer = make_trainer(
        Path(folder), Recording, model, train_dataset=data, eval_dataset=preference_data(5, seed=1), **COMMON, **options
    )
    trainer.pairs = {}
    trainer.train()
    return {
        "losses": losses(trainer),
        "metrics": trainer.evaluate(),
        "rewards": trainer.predict(preference_data(5, seed=1)).predictions,
        "history": trainer.state.log_history,
        "gradients": {name: gradient.numpy() for name, gradient in trainer.gradients.items()},
        "weights": {name: p.detach().numpy().copy() for name, p in trainer.model.named_parameters()},
        "pairs": trainer.pairs,
    }


def assert_same(found: dict[str, Any], alone: dict[str, Any]) -> None:
    assert len(alone["losses"]) == 3
    assert found["losses"] == pytest.approx(alone["losses"], abs=2e-5)
    for name, value in alone["metrics"].items():
        if not name.endswith(("runtime", "per_second")):
            assert found["metrics"][name] == pytest.approx(value, abs=1e-4), name
    np.testing.assert_allclose(found["rewards"], alone["rewards"], atol=1e-4)
    unlike = ("runtime", "per_second", "gib", "flos", "accuracies")  # at equal weights an accuracy is noise
    for ours, theirs in zip(found["history"], alone["history"], strict=True):
        for name, value in theirs.items():
            if not name.endswith(unlike):
                assert ours[name] == pytest.approx(value, abs=1e-3), name
    for part, tolerance in (("gradients", 1e-6), ("weights", 2e-5)):
        assert found[part].keys() == alone[part].keys()
        for name, value in alone[part].items():
            np.testing.assert_allclose(found[part][name], value, rtol=1e-4, atol=tolerance, err_msg=f"{part} {name}")


CASES = {
    "two groups of two, experts, stream": (
        4,
        {"model": "mixtral", "stream": True, "loss_type": "slic"},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 4},
    ),
    "rows, sigmoid, general head": (
        2,
        {"head_mode": "general", "per_device_train_batch_size": 4, "gradient_checkpointing": True},
        {},
        {},
    ),
    "lora, tokens": (2, {"lora": True, "max_tokens_per_batch": 120, "gradient_accumulation_steps": 2}, {}, {}),
}
SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in list(CASES)[1:]]


@pytest.mark.parametrize("case", [next(iter(CASES)), *SLOW])
def test_sequence_groups_take_the_steps_of_one_rank(tmp_path, case):
    ranks, common, one, many = CASES[case]
    (alone,) = run_ranks(tmp_path, 1, train, str(tmp_path / "one"), {**common, **one})
    found = run_ranks(tmp_path, ranks, train, str(tmp_path / "many"), {**common, **many, "sp_size": 2})
    for each in found:
        assert_same(each, alone)
    assert found[0]["pairs"] == found[1]["pairs"], "the ranks of a group run the same micro-batches"
