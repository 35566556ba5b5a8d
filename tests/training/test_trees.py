"""Runs whose sequences share what they begin with: they train as without, and resume, cache and stream bit for bit."""

from __future__ import annotations

import random

import pytest
import torch
from datasets import Dataset

from tests.helpers.toy import losses, make_trainer, text


def conversations(count: int, turns: int = 3) -> Dataset:
    """Returns a pair at every turn: a prompt holds the turns before it, and both answers begin alike."""
    rng, rows = random.Random(0), []
    for _ in range(count):
        prompt = text(rng) + " "
        for _ in range(turns):
            start = text(rng, 4)
            chosen, rejected = f"{start} {text(rng)} ", f"{start} {text(rng)} "
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
            prompt += chosen + text(rng) + " "
    return Dataset.from_list(rows)


def train(folder, sharing: str, **options):
    """Trains for four steps of six rows, which are two conversations each."""
    settings = {"max_steps": 4, "per_device_train_batch_size": 6, "train_sampling_strategy": "sequential"}
    resume = options.pop("resume_from_checkpoint", None)
    arguments = {"train_dataset": conversations(8), **settings, **options}
    trainer = make_trainer(folder, sharing=sharing, **arguments)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.mark.parametrize("options", [{}, {"ld_alpha": 0.5}, {"loss_type": "sft"}, {"use_weighting": True}], ids=str)
def test_a_tree_trains_as_sequences_alone_do(tmp_path, options, caplog):
    found = {how: train(tmp_path / how, how, **options) for how in ("none", "tree")}
    assert "tokens ran for the" in caplog.text
    batches = [trainer.collator([*trainer.train_dataset]) for trainer in found.values()]
    assert batches[1]["input_ids"].numel() < 0.5 * batches[0]["input_ids"].numel()
    assert losses(found["tree"]) == pytest.approx(losses(found["none"]), abs=2e-5)
    names = {"rewards/margins", "logps/chosen", "entropy", "mean_token_accuracy", "num_tokens"}
    logged = [[{n: e[n] for n in names & e.keys()} for e in t.state.log_history if "loss" in e] for t in found.values()]
    for one, other in zip(*logged):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)


def test_a_run_of_trees_resumes_bit_for_bit(tmp_path):
    budget = {"max_tokens_per_batch": 400, "train_sampling_strategy": "random"}
    for how in ({}, budget):
        whole = train(tmp_path / f"whole{len(how)}", "tree", save_strategy="steps", save_steps=2, **how)
        checkpoint = str(tmp_path / f"whole{len(how)}/out/checkpoint-2")
        again = train(tmp_path / f"again{len(how)}", "tree", resume_from_checkpoint=checkpoint, **how)
        assert losses(again)[2:] == losses(whole)[2:]
        assert all(map(torch.equal, again.model.parameters(), whole.model.parameters()))


def test_the_cache_serves_trees_and_sequences_alone(tmp_path, caplog):
    first = train(tmp_path, "tree")
    again = train(tmp_path, "none")
    assert "all 48 reference log-probs were cached" in caplog.text
    assert losses(again) == pytest.approx(losses(first), abs=2e-5)


def test_a_stream_of_trees_trains_as_its_rows(tmp_path):
    data = conversations(8)
    stored = train(tmp_path / "stored", "tree")
    stream = train(tmp_path / "stream", "tree", train_dataset=data.to_iterable_dataset())
    assert losses(stream) == pytest.approx(losses(stored), abs=2e-5)
