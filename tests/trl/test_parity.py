"""Every step equals TRL's, and a step does not depend on how its pairs are split into micro-batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset

from tests.helpers.architectures import VOCAB, tiny_model
from tests.helpers.trl_runs import LOGPS, PAIRS, REWARDS, TOKEN_MEANS, assert_same_steps, one_thread, run_ours, run_trl

STEPS = 20
EPOCHS = 4

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)


def tokenised_pairs(rows: int) -> Dataset:
    """Returns rows with TRL's columns of token ids; every fifth row has the prompt of the row before."""
    random = np.random.default_rng(0)

    def ids(low: int, high: int) -> list[int]:
        return random.integers(3, VOCAB, random.integers(low, high)).tolist()

    pairs = []
    for row in range(rows):
        prompt = pairs[-1]["prompt_ids"] if row % 5 == 4 else ids(1, 14)
        pairs.append({"prompt_ids": prompt, "chosen_ids": ids(1, 16), "rejected_ids": ids(1, 16)})
    return Dataset.from_list(pairs)


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge", "sft"])
def test_every_step_is_trls(loss: str, tmp_path) -> None:
    rows = tokenised_pairs(STEPS // EPOCHS * PAIRS)
    theirs = run_trl(tmp_path / "trl", rows, loss_type=loss, max_steps=STEPS)
    ours = run_ours(tmp_path / "ours", rows, loss_type=loss, max_steps=STEPS)
    rewards = () if loss == "sft" else REWARDS  # ours runs no reference for sft
    assert_same_steps(ours, theirs, (*rewards, *LOGPS, *TOKEN_MEANS))
    assert set(theirs.logs[0]) <= set(ours.logs[0])
    assert ours.logs[-1]["num_tokens"] == theirs.logs[-1]["num_tokens"]
    assert ours.logs[-1]["loss"] < 0.95 * ours.logs[0]["loss"]  # the model learns


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_every_accumulated_step_is_trls(loss: str, tmp_path) -> None:
    """Compares means over pairs only, as TRL averages token means over micro-batches and ours over tokens."""
    rows = tokenised_pairs(STEPS // EPOCHS * PAIRS)
    options = {"loss_type": loss, "per_device_train_batch_size": PAIRS // 2, "gradient_accumulation_steps": 2}
    theirs = run_trl(tmp_path / "trl", rows, **options)
    ours = run_ours(tmp_path / "ours", rows, **options)
    assert_same_steps(ours, theirs, (*REWARDS, *LOGPS))


@pytest.mark.parametrize("loss", ["sigmoid", "slic", "sft"])
def test_a_step_averages_over_its_pairs_however_they_fell_into_micro_batches(loss: str, tmp_path) -> None:
    rows = tokenised_pairs(PAIRS)
    batchings = {
        "8 x 1": {"per_device_train_batch_size": 8},
        "4 x 2": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        "2 x 4": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        "3 + 3 + 2": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
        "by tokens": {"max_tokens_per_batch": 64, "gradient_accumulation_steps": 10},
    }
    found = {
        name: run_ours(
            tmp_path,
            rows,
            tiny_model("gpt2", torch.float64),
            loss_type=loss,
            max_steps=1,
            max_grad_norm=0.0,
            **batching,
        )
        for name, batching in batchings.items()
    }
    expected = found.pop("8 x 1")
    for name, record in found.items():
        assert record.logs[0]["num_tokens"] == expected.logs[0]["num_tokens"], name
        # transformers sums the losses of micro-batches in fp32
        assert record.logs[0]["loss"] == pytest.approx(expected.logs[0]["loss"], rel=1e-6, abs=1e-6), name
        for parameter, gradient in expected.gradients.items():
            difference = (record.gradients[parameter] - gradient).abs().max()
            assert difference <= 1e-12 * gradient.abs().max() + 1e-15, f"{name}: {parameter} differs by {difference}"


def test_mixed_precision_is_trls(tmp_path) -> None:
    """In bf16 both trainers round, in different places."""
    rows = tokenised_pairs(STEPS // EPOCHS * PAIRS)
    theirs, ours, exact = (
        run(tmp_path / name, rows, bf16=bf16)
        for name, run, bf16 in (("trl", run_trl, True), ("ours", run_ours, True), ("fp32", run_ours, False))
    )
    assert len(ours.logs) == len(theirs.logs) == len(exact.logs)
    for a, b, c in zip(ours.logs, theirs.logs, exact.logs):
        for name in ("loss", "rewards/margins"):
            assert a[name] == pytest.approx(b[name], abs=2e-2) and a[name] == pytest.approx(c[name], abs=2e-2), name
    assert ours.logs[-1]["logps/chosen"] != exact.logs[-1]["logps/chosen"]
