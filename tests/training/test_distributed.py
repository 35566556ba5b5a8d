"""Two processes take the same steps as one: mean over pairs, uneven ranks, gradients, one shared cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers import distributed_run
from tests.helpers.forked import run_ranks


def run(folder: Path, name: str, processes: int, rows: int, **options) -> dict:
    run_ranks(folder, processes, distributed_run.main, folder, name, rows, options)
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize(
    ("rows", "one", "two"),
    [
        # 13 rows over 2 x 2: in the last step one rank has a single pair and the other none.
        pytest.param(13, {"per_device_train_batch_size": 4}, {"per_device_train_batch_size": 2}, id="by rows, uneven"),
        pytest.param(
            12,
            {"per_device_train_batch_size": 6, "model": "llama-tied"},
            {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3, "model": "llama-tied"},
            id="accumulated, tied head",
        ),
    ],
)
def test_two_ranks_take_the_steps_of_one(tmp_path, rows, one, two):
    common = {"max_steps": 20, "train_sampling_strategy": "sequential", "learning_rate": 1e-3}
    alone = run(tmp_path, "one", 1, rows, **common, **one)
    both = run(tmp_path, "two", 2, rows, **common, **two)
    assert len(alone["losses"]) == 20 and alone["losses"][-1] < 0.9 * alone["losses"][0]
    assert both["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    for key in ("eval_loss", "eval_rewards/margins", "eval_entropy", "eval_logps/chosen"):
        assert both["metrics"][key] == pytest.approx(alone["metrics"][key], abs=1e-3), key
    keys = {"rewards/chosen", "rewards/accuracies", "entropy", "num_tokens", "mean_token_accuracy"}
    for step, (ours, theirs) in enumerate(zip(both["history"], alone["history"])):
        # Before the first update all rewards are 0 up to rounding, so the accuracy is noise.
        for key in keys & set(theirs) - ({"rewards/accuracies"} if step == 0 else set()):
            assert ours[key] == pytest.approx(theirs[key], abs=1e-3), key
    reference = torch.load(tmp_path / "one-0.pt")
    for rank in (0, 1):
        gradients = torch.load(tmp_path / f"two-{rank}.pt")
        assert gradients.keys() == reference.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(
                gradient, reference[name], rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )


def pairs_by_step(folder: Path, name: str, ranks: int) -> list[list[str]]:
    """Returns the pairs of all ranks, sorted within each optimizer step."""
    parts = [json.loads((folder / f"{name}-{rank}-pairs.json").read_text()) for rank in range(ranks)]
    return [sorted(pair for part in parts for pair in part.get(step, [])) for step in parts[0]]


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
def test_two_ranks_draw_the_pairs_of_a_curriculum_that_one_draws(tmp_path, stream):
    common = {"max_steps": 12, "curriculum": {"levels": ["a>b", "a>c"]}, "stream": stream}
    alone = run(tmp_path, "one", 1, 30, **common, per_device_train_batch_size=4)
    both = run(tmp_path, "two", 2, 30, **common, per_device_train_batch_size=2)
    pairs = pairs_by_step(tmp_path, "one", 1)
    assert len(pairs) == 12 and pairs_by_step(tmp_path, "two", 2) == pairs
    assert both["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    shares = [[record["curriculum/a>c"] for record in r["history"] if "loss" in record] for r in (alone, both)]
    assert shares[0] == shares[1] and shares[0][0] < shares[0][-1]


def test_ranks_fill_one_cache_and_a_token_budget_evens_them(tmp_path):
    options = {"num_train_epochs": 1, "max_tokens_per_batch": 100}
    two = run(tmp_path, "two", 2, 40, **options)
    assert len(two["losses"]) > 3
    cached = run(tmp_path, "two", 2, 40, **options)
    assert cached["losses"] == two["losses"]
    assert (
        len(list((tmp_path / "two/ref").rglob("*.arrow"))) <= 4
    )  # one shard per rank and dataset, and none from the second run


RESUMED = {
    "by rows": (
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 2},
    ),
    "a curriculum by tokens": (
        {"max_tokens_per_batch": 60, "gradient_accumulation_steps": 4, "curriculum": {"levels": ["a>b", "a>c"]}},
        {"max_tokens_per_batch": 60, "gradient_accumulation_steps": 2, "curriculum": {"levels": ["a>b", "a>c"]}},
    ),
}


@pytest.mark.parametrize("case", RESUMED)
def test_a_run_goes_on_with_another_number_of_ranks(tmp_path, case):
    """From one rank to two and back: every step has the pairs and the loss of a run that was never stopped."""
    one, two = RESUMED[case]
    saving = {"save_strategy": "steps", "save_steps": 3, "learning_rate": 1e-3}
    whole = run(tmp_path, "whole", 1, 26, max_steps=9, **saving, **one)
    expected = pairs_by_step(tmp_path, "whole", 1)
    assert len(expected) == 9 and all(expected)
    for ranks, options, before, checkpoint in ((2, two, "whole", 3), (1, one, "on 2", 6)):
        folder = tmp_path / before / "out" / f"checkpoint-{checkpoint}"
        found = run(tmp_path, f"on {ranks}", ranks, 26, max_steps=9, resume=str(folder), **saving, **options)
        assert found["losses"] == pytest.approx(whole["losses"], abs=1e-4)
        assert pairs_by_step(tmp_path, f"on {ranks}", ranks) == expected[checkpoint:]
        counts = [[entry["num_tokens"] for entry in r["history"] if "loss" in entry] for r in (found, whole)]
        assert counts[0] == counts[1]
