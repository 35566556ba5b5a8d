"""Cross-fitted difficulty in the demo's world: two cross-fits agree, and planted wrong labels are the hardest pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cpt_kernels.cli import main
from cpt_kernels.demo.experiment import Experiment, Size, make_pairs
from cpt_kernels.demo.judge import prefer
from cpt_kernels.evaluation.difficulty import spearman
from tests.helpers.command import write_rows

# A shorter start than the demo's, and the pairs of 1,024 prompts.
SIZE = Size(pretraining_steps=300, sft_steps=60, arm_steps=32, held_out=4)
PLANTED = 0.05


def auc(planted: np.ndarray, difficulty: np.ndarray) -> float:
    """Returns the probability that a planted pair is harder than another one."""
    return float((difficulty[planted][:, None] > difficulty[~planted][None]).mean())


def measure(folder: Path, seed: int = 0, **options: Any) -> dict[str, float]:
    """Trains the start, plants wrong labels and scores the pairs twice, with seeds that share no run."""
    experiment = Experiment(seed, SIZE, folder, lambda *_: None)
    experiment.train_start()
    # The order of the teachers mislabels some pairs itself, and ties in others; those are left out.
    pairs = [p for p in make_pairs(experiment.ask_teachers()) if prefer(p["prompt"], p["chosen"], p["rejected"]) == 1]
    rng = np.random.default_rng(seed)
    planted = np.zeros(len(pairs), bool)
    planted[rng.choice(len(pairs), round(PLANTED * len(pairs)), replace=False)] = True
    for pair, wrong in zip(pairs, planted):
        if wrong:
            pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
    write_rows(folder / "planted.jsonl", pairs)
    given = {"learning_rate": 5e-5, "lr_scheduler_type": "constant", "per_device_train_batch_size": 32, "beta": 0.5}
    given |= {"max_length": 128, "ref_cache_dir": folder / "reference", "gradient_checkpointing": "false", **options}
    flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    found = []
    for cross_fit in (100, 200):
        output = folder / f"scored-{cross_fit}.jsonl"
        argv = ["difficulty", str(folder / "sft"), str(folder / "planted.jsonl"), "--output", str(output), *flags]
        assert main([*argv, "--seed", str(cross_fit), "--use_cpu", "--disable_tqdm"]) == 0
        found.append(np.array([json.loads(line)["difficulty"] for line in output.open(encoding="utf-8")]))
    value, low, high = spearman(*found)
    hardest = np.argsort(-found[0])[: len(pairs) // 10]
    return {
        "pairs": len(pairs),
        "Spearman": value,
        "low": low,
        "high": high,
        "recall": float(planted[hardest].sum() / planted.sum()),
        "AUC": auc(planted, found[0]),
    }


@pytest.mark.slow
def test_planted_labels_are_the_hardest_and_two_cross_fits_agree(tmp_path):
    found = measure(tmp_path)
    assert found["recall"] >= 0.7 and found["AUC"] > 0.9, found
    assert found["low"] > 0.7, found
