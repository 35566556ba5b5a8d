"""A curriculum in training: draws, logs, resuming and errors, with token budgets, streams and a killed run."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset

from cpt_kernels import ContrastiveTrainer
from tests.helpers import ROOT, toy
from tests.helpers.command import (
    bpe_tokenizer,
    one_error,
    read_metrics,
    run,
    word_pairs,
    write_model,
    write_options,
    write_rows,
)
from tests.helpers.toy import losses, pairs_of, preference_data, preference_rows

PAIRS = {"levels": ["a>b", "a>c"]}


class Recording(ContrastiveTrainer):
    """Keeps the pairs of every micro-batch."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.__dict__.setdefault("seen", []).append(sorted(pairs_of(inputs)))
        return super().training_step(model, inputs, num_items_in_batch)


def make_trainer(folder, rows=30, data=None, stream=False, **arguments) -> Recording:
    data = preference_data(rows) if data is None else data
    return toy.make_trainer(
        folder, Recording, train_dataset=data.to_iterable_dataset() if stream else data, **arguments
    )


def shares(trainer, name="curriculum/a>c") -> list[float]:
    return [record[name] for record in trainer.state.log_history if "loss" in record]


def test_shares_are_logged_and_rows_accounted_for(tmp_path, caplog):
    """10 of 30 rows are hard. Half of the draws of the first epoch are hard, and all draws after it."""
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, num_train_epochs=2, curriculum=PAIRS, per_device_train_batch_size=3)
        trainer.train()
    found = shares(trainer)
    assert len(found) == 20 and found[10:] == [1.0] * 10 and sum(found[:3]) < sum(found[7:10])
    easy = [record["curriculum/a>b"] for record in trainer.state.log_history if "loss" in record]
    assert [a + b for a, b in zip(easy, found)] == [1.0] * 20
    by_pair = Counter(pair for pairs in trainer.seen for pair in pairs)
    drawn = sum(found) * 3
    assert sum(by_pair.values()) == 60
    text = caplog.text
    assert "curriculum, linear over 1 epochs: an epoch is 30 draws; levels from easy to hard:" in text
    never = 20 - round(60 - drawn)
    assert f"a>b: 20 rows, drawn {never} never, {20 - never} once" in text
    assert f"a>c: 10 rows, drawn 10 more often, up to {-(-round(drawn) // 10)} times" in text


def test_the_reference_scores_every_pair_once_whatever_the_curriculum(tmp_path):
    make_trainer(tmp_path, max_steps=1, curriculum={**PAIRS, "schedule": "staged"})
    again = make_trainer(tmp_path, max_steps=2, curriculum={"levels": 3})
    assert again.reference.cache.num_rows == 60 and len(list((tmp_path / "ref").rglob("*.arrow"))) == 1


@pytest.mark.parametrize(
    "options",
    [
        {"num_train_epochs": 3, "curriculum": {**PAIRS, "epochs": 3}},
        {"num_train_epochs": 3, "curriculum": PAIRS, "max_tokens_per_batch": 100, "gradient_accumulation_steps": 2},
        {"max_steps": 7, "curriculum": {"levels": "gap"}, "per_device_train_batch_size": 2},
        {"max_steps": 20, "curriculum": PAIRS, "stream": True},
        {"max_steps": 20, "curriculum": {"levels": 2, "buffer": 8}, "max_tokens_per_batch": 100, "stream": True},
    ],
    ids=["rows", "budget", "max_steps", "stream", "stream, budget"],
)
def test_a_resumed_run_draws_the_pairs_that_remained(tmp_path, options):
    """The checkpoint lies within an epoch, or within a pass over the stream."""
    saving = dict(save_strategy="steps", save_steps=5, **options)
    whole = make_trainer(tmp_path, **saving)
    whole.train()
    resumed = make_trainer(tmp_path, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-5"))
    taken = 5 * options.get("gradient_accumulation_steps", 1)
    assert resumed.seen == whole.seen[taken:] and len(resumed.seen) > 1
    assert losses(resumed) == losses(whole)
    (name, *_) = [name for name in whole.state.log_history[0] if name.startswith("curriculum/")]
    assert shares(resumed, name) == shares(whole, name)


def test_a_budget_and_accumulation_train_on_what_is_drawn(tmp_path):
    held_out = preference_data(5, seed=1).remove_columns(["chosen_model", "rejected_model", "gap"])
    trainer = make_trainer(
        tmp_path,
        num_train_epochs=2,
        curriculum=PAIRS,
        max_tokens_per_batch=100,
        gradient_accumulation_steps=3,
        eval_dataset=held_out,
    )
    rows = preference_rows(30)
    trainer.train()
    assert not [name for name in trainer.evaluate() if "curriculum" in name]
    drawn = [row for epoch in (0, 1) for row in trainer.draws.epoch(epoch)]
    assert sum(map(len, trainer.seen)) == len(drawn) == 60
    hard = sum(rows[row]["rejected_model"] == "c" for row in drawn[:30])
    counts = Counter(pair for pairs in trainer.seen for pair in pairs)
    assert len(counts) == len(set(drawn)) and 0 < hard < 30


def test_none_is_an_epoch_of_the_levels_in_random_order(tmp_path):
    plain = make_trainer(tmp_path, num_train_epochs=1)
    plain.train()
    control = make_trainer(tmp_path, num_train_epochs=1, curriculum={**PAIRS, "schedule": "none"})
    control.train()
    once = [Counter(pair for pairs in trainer.seen for pair in pairs) for trainer in (plain, control)]
    assert once[0] == once[1] and control.seen != plain.seen


def test_streams_draw_by_the_schedule(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, stream=True, max_steps=30, curriculum={**PAIRS, "schedule": "reversed"})
        trainer.train()
    found = shares(trainer)
    assert sum(found[:10]) / 10 > 0.7 and sum(found[-10:]) / 10 < 0.3
    assert "a>c: " in caplog.text and "rows read" in caplog.text and "whole passes over the stream" in caplog.text


def test_a_stream_that_a_worker_reads(tmp_path, caplog):
    own = make_trainer(tmp_path, stream=True, max_steps=4, curriculum=PAIRS)
    own.train()
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, stream=True, max_steps=4, curriculum=PAIRS, dataloader_num_workers=1)
        trainer.train()
    assert trainer.seen == own.seen and shares(trainer) == shares(own)
    assert "because a worker read them: set dataloader_num_workers=0" in caplog.text
    nothing = Dataset.from_list([{"prompt": "w1 ", "chosen": "w2", "rejected": "w2"}] * 3)
    for workers in (0, 1):
        with pytest.raises(ValueError, match="no row of the stream can be trained on"):
            make_trainer(tmp_path, data=nothing, stream=True, max_steps=1, dataloader_num_workers=workers).train()


@pytest.mark.parametrize("stream", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(
    ("change", "option", "message"),
    [
        ({}, {"levels": ["a>b", "a>d"]}, r"level a>d has no rows; the data has a>b \(.*, a>c \("),
        ({"gap": None}, {"levels": 2}, "reads the column gap, but the data has the columns"),
        ({"gap": "wide"}, {"levels": 2}, "gap of row 0 is 'wide', not a number"),
        (
            {"chosen_model": ["a", "b"]},
            PAIRS,
            r"chosen_model of row 0 is .'a', 'b'., .* several pairs|level a>b has no rows; the data has .'a', 'b'.>b",
        ),
        ({"gap": 1.0}, {"levels": 2}, "have 1 different values: choose another column"),
    ],
)
def test_data_without_the_levels_is_one_clear_error(tmp_path, stream, change, option, message):
    rows = [row | change for row in preference_rows(12)]
    if change == {"gap": None}:
        rows = [{name: value for name, value in row.items() if name != "gap"} for row in rows]
    with pytest.raises(ValueError, match=message):
        make_trainer(
            tmp_path, data=Dataset.from_list(rows), stream=stream, max_steps=20, curriculum=option, logging_steps=20
        ).train()


def test_options_that_only_one_kind_of_data_has(tmp_path):
    with pytest.raises(ValueError, match="buffer has an effect only on streams"):
        make_trainer(tmp_path, curriculum={**PAIRS, "buffer": 10})
    with pytest.raises(ValueError, match="a stream's schedule ends with max_steps: remove epochs"):
        make_trainer(tmp_path, stream=True, max_steps=2, curriculum={**PAIRS, "epochs": 1})
    for option in ({"keep": 0.5}, {"stages": 2}, {"schedule": "sorted"}):
        ((name, value),) = option.items()
        with pytest.raises(ValueError, match=f"curriculum: {name}={value} needs all rows, which a stream does not"):
            make_trainer(tmp_path, stream=True, max_steps=2, curriculum={"column": "gap", **option})


KEEP = {"column": "gap", "keep": 0.4}


def test_the_hardest_rows_are_left_out_and_not_scored(tmp_path, caplog):
    rows = preference_rows(30)
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, curriculum={**KEEP, "schedule": "sorted"}, num_train_epochs=2)
        trainer.train()
    seen = [pair for pairs in trainer.seen for pair in pairs]
    assert len(seen) == 24 and len(set(seen)) == 12 and trainer.reference.cache.num_rows == 24
    kept = [rows[row]["gap"] for row in trainer.train_dataset["row"]]
    assert sorted(kept) == sorted(row["gap"] for row in rows)[-12:]  # a large gap is easy
    assert "keep 0.4 keeps the 12 easiest of 30 rows, up to gap 4.0; the 18 hardest are left out" in caplog.text
    drawn = [kept[row] for row in trainer.draws.epoch(0)]
    assert drawn == sorted(drawn, reverse=True)


@pytest.mark.parametrize("options", [{}, {"max_tokens_per_batch": 150}, {"head_mode": "general"}], ids=str)
def test_hard_pairs_are_trained_with_a_loss_of_their_own(tmp_path, options, caplog):
    """Before the first step, easy pairs have log 2, and hard ones their weighted likelihood per chosen token."""
    curriculum = {**KEEP, "hard_loss": "sft", "hard_weight": 0.5, "schedule": "none"}
    options = {"per_device_train_batch_size": 12, "eval_dataset": preference_data(4, seed=3), **options}
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, 12, max_steps=1, curriculum=curriculum, learning_rate=0.0, **options)
        trainer.train()
    assert "keep 0.4: the 7 hardest of 12 rows are trained with sft, weight 0.5" in caplog.text
    (logged,) = losses(trainer)
    hard = trainer.draws.hard
    assert hard.sum() == 7
    model, nll, lengths = trainer.model.eval(), [], []
    for row in trainer.train_dataset:
        prompt, chosen = row["prompt_ids"], row["completion_ids"][row["chosen"][0]]
        with torch.no_grad():
            logps = model(torch.tensor([prompt + chosen])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        nll.append(-float(logps.gather(1, torch.tensor(chosen)[:, None]).sum()))
        lengths.append(len(chosen))
    seen = sum(map(len, trainer.seen))
    if seen == 12:  # with a token budget the first step has fewer pairs
        expected = (5 * np.log(2) + 0.5 * np.array(nll)[hard].sum() / np.mean(lengths)) / 12
        assert logged == pytest.approx(expected, rel=1e-5)
    else:
        assert 0 < seen < 12 and not np.isclose(logged, np.log(2))
    assert trainer.loss.name == "sigmoid; hard pairs: 0.5 sft"
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        np.log(2), rel=1e-5
    )  # held-out pairs have the loss of the run


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({**KEEP, "hard_loss": "stf"}, "curriculum: hard_loss='stf' is unknown: choose one of"),
        (
            {"column": "gap", "stages": 2, "refresh_reference": True},
            "loss 'simpo' has no reference: remove refresh",
        ),
    ],
)
def test_options_that_the_loss_decides(tmp_path, option, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, curriculum=option, loss_type="simpo")


# --- As a user runs it ---


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("curriculum")
    rows = [
        {**row, "chosen_model": "gpt4", "rejected_model": ("td003", "chatgpt")[i % 2], "gap": float(i % 2)}
        for i, row in enumerate(word_pairs(60))
    ]
    write_model(home / "start", bpe_tokenizer(row["chosen"] + row["rejected"] for row in rows))
    write_rows(home / "pairs.jsonl", rows)
    write_options(
        home / "run.yaml",
        **{"model_name_or_path": str(home / "start"), "from_scratch": True, "dataset_name": str(home / "pairs.jsonl")},
        **{"max_steps": 40, "learning_rate": 1e-3, "logging_steps": 1, "save_steps": 4, "max_tokens_per_batch": 200},
        **{"gradient_checkpointing": False, "use_cpu": True, "disable_tqdm": True, "ref_cache_dir": str(home / "ref")},
    )
    return home


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_kill_9_and_resume(home, tmp_path, streaming):
    curriculum = {"schedule": "linear", "levels": ["gpt4>td003", "gpt4>chatgpt"]}
    curriculum |= {"buffer": 20} if streaming else {"epochs": 6.6}  # a step takes a sixth of the data, and there are 40
    options = ["--config", str(home / "run.yaml"), "--curriculum", json.dumps(curriculum)]
    options += ["--dataset_streaming", str(streaming).lower()]
    assert run(*options, "--output_dir", tmp_path / "whole") == 0
    command = [sys.executable, "-m", "cpt_kernels.cli", "train", *options, "--output_dir", str(tmp_path / "killed")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    until = time.monotonic() + 120
    while not metrics.exists() or metrics.read_text().count("\n") < 11:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert run(*options, "--output_dir", tmp_path / "killed", "--resume_from_checkpoint", "last") == 0
    keys = ("step", "loss", "curriculum/gpt4>td003", "curriculum/gpt4>chatgpt")
    runs = [
        [[r[key] for key in keys] for r in read_metrics(tmp_path / name) if "loss" in r] for name in ("whole", "killed")
    ]
    assert len(runs[0]) == 40 and runs[0] == runs[1]
    hard = [share for *_, share in runs[0]]
    assert sum(hard[:10]) < 3 and sum(hard[-10:]) > 7
    assert "<svg" in (tmp_path / "killed" / "curves.svg").read_text()


def test_errors_of_the_command(home, tmp_path, capsys):
    for value, message in (
        (
            '{"levels": ["gpt4>td003", "gpt4>gpt3"]}',
            "curriculum: level gpt4>gpt3 has no rows; the data has gpt4>chatgpt (30",
        ),
        ('{"levels": 2, "column": "score"}', "curriculum reads the column score, but the data has the columns"),
        ('{"levels": 2, "schedule": "up"}', "curriculum: schedule='up' is unknown: choose one of linear, reversed"),
    ):
        assert run("--config", home / "run.yaml", "--output_dir", tmp_path / "out", "--curriculum", value) == 2
        assert message in one_error(capsys)
