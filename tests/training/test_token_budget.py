"""``max_tokens_per_batch=auto``: steps keep their rows, micro-batches fill memory, a resumed run keeps the budget."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch

from cpt_kernels import DPOTrainer, cli
from cpt_kernels.errors import UserError
from cpt_kernels.training import token_budget
from tests.helpers import toy
from tests.helpers.command import bpe_tokenizer, read_metrics, word_pairs, write_model, write_rows
from tests.helpers.toy import losses, preference_data
from tests.training.test_distributed import run

STEPS = {"rows": 24, "max_steps": 5, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
make_trainer = partial(toy.make_trainer, **STEPS)


class Counted(DPOTrainer):
    """Records the tokens of every micro-batch, and has memory for so many."""

    memory = 10**9

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.tokens = []

    def training_step(self, model, inputs, *args):
        self.tokens.append(inputs["input_ids"].numel())
        return super().training_step(model, inputs, *args)

    def compute_loss(self, model, inputs, *args, **kwargs):
        if inputs["input_ids"].numel() > self.memory:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
        return super().compute_loss(model, inputs, *args, **kwargs)


def fixed(monkeypatch, tokens: int) -> None:
    monkeypatch.setattr(token_budget, "find_budget", lambda *_, **__: tokens)


@pytest.mark.parametrize("packing", ["true", "false"])
def test_steps_have_the_rows_that_they_had(tmp_path, monkeypatch, packing):
    by_rows = make_trainer(tmp_path, Counted, packing=packing)
    by_rows.train()
    fixed(monkeypatch, 150)
    auto = make_trainer(tmp_path, Counted, packing=packing, max_tokens_per_batch="auto")
    auto.train()
    assert losses(auto) == pytest.approx(losses(by_rows), abs=2e-5)
    assert len(by_rows.tokens) == 20 and 5 < len(auto.tokens) < 20 and max(auto.tokens) <= 150
    assert auto.args.gradient_accumulation_steps == 4 and auto.budget is None
    for name, parameter in auto.model.named_parameters():
        torch.testing.assert_close(parameter, by_rows.model.get_parameter(name), rtol=0, atol=1e-4)


def test_the_estimate_takes_whole_steps_where_memory_suffices(tmp_path, caplog):
    auto = make_trainer(tmp_path, Counted, max_tokens_per_batch="auto", num_train_epochs=2, max_steps=-1)
    auto.train()
    assert len(auto.tokens) == len(losses(auto)) == 6
    assert "a step has 8 rows in 1 micro-batch on each device" in caplog.text


def test_little_memory_gives_a_small_budget(tmp_path, monkeypatch):
    auto = make_trainer(tmp_path, Counted, max_tokens_per_batch="auto", max_steps=2)
    needed = []
    find = token_budget.find_budget
    monkeypatch.setattr(token_budget, "find_budget", lambda *a, **k: needed.append(find(*a, **k)) or needed[-1])
    monkeypatch.setattr(token_budget, "free_memory", lambda device: 1_500_000)
    auto.train()
    whole = sum(sorted(auto.tokens)[-1:])
    assert needed[0] is None or max(auto.tokens) <= needed[0] <= 8 * whole


def test_a_probe_without_memory_lowers_the_budget(tmp_path, monkeypatch, caplog):
    class Small(Counted):
        memory = 120

    fixed(monkeypatch, 200)
    trainer = make_trainer(tmp_path, Small, max_tokens_per_batch="auto")
    trainer.train()
    assert caplog.text.count("do not fit into memory, trying") in (1, 2, 3) and max(trainer.tokens) <= 120
    Small.memory = 3
    with pytest.raises(UserError, match=r"out of memory: the longest row has \d+ tokens.*lower max_length"):
        make_trainer(tmp_path, Small, max_tokens_per_batch="auto").train()


def test_a_resumed_run_keeps_its_budget(tmp_path, monkeypatch):
    fixed(monkeypatch, 150)
    options = {"save_strategy": "steps", "save_steps": 2, "max_tokens_per_batch": "auto"}
    whole = make_trainer(tmp_path / "a", Counted, **options)
    whole.train()
    checkpoint = tmp_path / "a/out/checkpoint-2"
    assert json.loads((checkpoint / "run.json").read_text())["budget"] == 150
    fixed(monkeypatch, 10**6)
    resumed = make_trainer(tmp_path / "a", Counted, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses(resumed) == losses(whole) and resumed.tokens == whole.tokens[-len(resumed.tokens) :]
    for name, parameter in resumed.model.named_parameters():
        assert torch.equal(parameter, whole.model.get_parameter(name)), name


def test_what_auto_cannot_do(tmp_path):
    with pytest.raises(UserError, match="auto needs the lengths of all rows, and a stream does not tell them"):
        stream = preference_data(8).to_iterable_dataset()
        toy.make_trainer(tmp_path, train_dataset=stream, max_steps=2, max_tokens_per_batch="auto")
    with pytest.raises(UserError, match="max_tokens_per_batch=many: must be a number of tokens, or auto"):
        make_trainer(tmp_path, max_tokens_per_batch="many")
    with pytest.raises(UserError, match="auto_find_batch_size"):
        make_trainer(tmp_path, max_tokens_per_batch="auto", auto_find_batch_size=True)


def test_two_ranks_agree(tmp_path):
    common = {"max_steps": 4, "train_sampling_strategy": "sequential", "learning_rate": 1e-3}
    one = run(tmp_path, "one", 1, 13, **common, per_device_train_batch_size=4)
    auto = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_tokens_per_batch": "auto"}
    two = run(tmp_path, "two", 2, 13, **common, **auto)
    assert two["losses"] == pytest.approx(one["losses"], abs=1e-4)


def test_by_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CPT_CACHE", str(tmp_path / "cache"))
    pairs = word_pairs(16)
    tokenizer = bpe_tokenizer(text for row in pairs for text in row.values())
    write_model(tmp_path / "model", tokenizer)
    write_rows(tmp_path / "data.jsonl", pairs)
    argv = ["--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "data.jsonl", "--from_scratch"]
    argv += ["--output_dir", tmp_path / "out", "--use_cpu", "--max_steps", 2, "--max_tokens_per_batch", "auto"]
    assert cli.train_main([str(word) for word in argv]) == 0
    assert read_metrics(tmp_path / "out")[-1]["step"] == 2
    assert "max_tokens_per_batch: auto" in (tmp_path / "out/training_config.yaml").read_text()
