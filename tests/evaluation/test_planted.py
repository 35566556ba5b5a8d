"""Cross-fitted difficulty: two cross-fits agree, and planted wrong labels are the hardest pairs of the demo's world."""

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
from cpt_kernels.pairs.build import build_pairs, factorize
from tests.helpers.command import bpe_tokenizer, run, write_model, write_rows
from tests.helpers.rows import real_rows

# A shorter start than the demo's, and the pairs of 1,024 prompts.
SIZE = Size(pretraining_steps=300, sft_steps=60, arm_steps=32, held_out=4)
PLANTED = 0.05
_COLUMNS = ("prompt", "model", "response")


def auc(planted: np.ndarray, difficulty: np.ndarray) -> float:
    """Returns the probability that a planted pair is harder than another one."""
    return float((difficulty[planted][:, None] > difficulty[~planted][None]).mean())


def two_cross_fits(folder: Path, model: str, pairs: str, **options: Any) -> list[np.ndarray]:
    """Returns (P,) difficulties by two runs of ``cpt difficulty`` whose seeds share no run."""
    given = {"lr_scheduler_type": "constant", "ref_cache_dir": folder / "reference", "gradient_checkpointing": "false"}
    flags = [part for name, value in (given | options).items() for part in (f"--{name}", str(value))]
    found = []
    for cross_fit in (100, 200):
        output = folder / f"scored-{cross_fit}.jsonl"
        argv = ["difficulty", str(folder / model), str(folder / pairs), "--output", str(output), *flags]
        assert main([*argv, "--seed", str(cross_fit), "--use_cpu", "--disable_tqdm"]) == 0
        rows = [json.loads(line) for line in output.open(encoding="utf-8")]
        found.append(np.array([np.nan if row.get("difficulty") is None else row["difficulty"] for row in rows]))
    return found


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
    given = {"learning_rate": 5e-5, "per_device_train_batch_size": 32, "beta": 0.5, "max_length": 128}
    found = two_cross_fits(folder, "sft", "planted.jsonl", **given | options)
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


# --- Real prompts ---


def write_real_pairs(folder: Path, prompts: int, sft_steps: int, length: int) -> None:
    """Writes pairs of real responses, and a Llama of 0.2 million parameters after SFT on those of the best model."""
    columns = [[row[name] for row in real_rows("responses.jsonl")[: 4 * prompts]] for name in _COLUMNS]
    order = "gpt4 > gpt-3.5-turbo-0301 > text_davinci_003 > text_davinci_001"
    write_rows(folder / "pairs.jsonl", build_pairs(*columns, order, which="all").rows(*columns))
    best = [dict(zip(("prompt", "completion"), (p, r))) for p, m, r in zip(*columns) if m == "gpt4"]
    write_model(folder / "config", bpe_tokenizer(columns[2], size=2000), hidden_size=64, intermediate_size=192)
    argv = ["--model_name_or_path", folder / "config", "--from_scratch", "--output_dir", folder / "start", "--use_cpu"]
    argv += ["--dataset_name", write_rows(folder / "best.jsonl", best), "--loss_type", "sft", "--learning_rate", "3e-3"]
    argv += ["--max_steps", sft_steps, "--per_device_train_batch_size", 16, "--max_length", length, "--disable_tqdm"]
    assert run(*argv) == 0


def measure_real(folder: Path, prompts: int = 300, sft_steps: int = 150, length: int = 256) -> dict[str, float]:
    """Scores pairs of real prompts twice; the intervals are bootstrap intervals over prompts."""
    write_real_pairs(folder, prompts, sft_steps, length)
    options = {"per_device_train_batch_size": 16, "learning_rate": 2e-4, "beta": 0.1, "num_train_epochs": 1}
    scores = np.stack(two_cross_fits(folder, "start", "pairs.jsonl", max_length=length, **options))
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").open(encoding="utf-8")]
    kept = np.flatnonzero(~np.isnan(scores).any(axis=0))
    scores, pairs = scores[:, kept], [pairs[row] for row in kept]
    longer = np.array([len(pair["rejected"]) - len(pair["chosen"]) for pair in pairs], np.float64)
    kinds = factorize([f"{pair['chosen_model']} > {pair['rejected_model']}" for pair in pairs])
    within = scores - np.stack([[row[kinds == k].mean() for k in kinds] for row in scores])
    members = factorize([pair["prompt"] for pair in pairs])
    groups, rng = [np.flatnonzero(members == prompt) for prompt in np.unique(members)], np.random.default_rng(0)
    drawn = [np.concatenate([groups[g] for g in rng.integers(len(groups), size=len(groups))]) for _ in range(1000)]
    found: dict[str, float] = {
        "pairs": len(pairs),
        "prompts": len(groups),
        "with length": spearman(scores[0], longer)[0],
    }
    for name, (one, other) in {"": scores, "within kinds ": within}.items():
        ends = np.quantile([spearman(one[rows], other[rows])[0] for rows in drawn], (0.025, 0.975))
        found |= {f"{name}Spearman": spearman(one, other)[0], f"{name}low": ends[0], f"{name}high": ends[1]}
    return found


@pytest.mark.slow
def test_two_cross_fits_agree_on_real_prompts(tmp_path):
    """In small: 60 prompts, a shorter start, and at most 128 tokens."""
    found = measure_real(tmp_path, prompts=60, sft_steps=60, length=128)
    assert found["low"] > 0.5 and found["within kinds low"] > 0.3, found
