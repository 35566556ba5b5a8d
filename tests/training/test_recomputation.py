"""``gradient_checkpointing=auto``: on only if the largest micro-batch does not fit into memory without it."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from accelerate.utils import DistributedType
from peft import LoraConfig

from cpt_kernels import cli
from cpt_kernels.planning.budget import SHARE, without_checkpointing
from cpt_kernels.training import recomputation
from tests.helpers import toy
from tests.helpers.command import bpe_tokenizer, word_pairs, write_model, write_rows
from tests.helpers.toy import losses, preference_data

STEPS = {"rows": 24, "max_steps": 4, "per_device_train_batch_size": 2}
make_trainer = partial(toy.make_trainer, **STEPS)
GIB = 2**30


def is_recomputed(trainer) -> bool:
    return trainer.model.is_gradient_checkpointing


def little_memory(monkeypatch, free: int = 1000) -> None:
    monkeypatch.setattr(recomputation, "rank_memory", lambda args: free)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
@pytest.mark.parametrize("peft", [None, LoraConfig(r=2, target_modules="all-linear")])
def test_memory_decides_and_the_numbers_stay(tmp_path, monkeypatch, caplog, peft):
    options = {"max_steps": 3, "peft_config": peft, "gradient_accumulation_steps": 2}
    always = make_trainer(tmp_path, gradient_checkpointing=True, **options)
    always.train()
    for free, is_on in ((GIB, False), (1000, True)):
        little_memory(monkeypatch, free)
        auto = make_trainer(tmp_path, gradient_checkpointing="auto", **options)
        auto.train()
        assert is_recomputed(auto) is is_on
        assert f"gradient_checkpointing=auto: {'on' if is_on else 'off'}, the largest micro-batch needs" in caplog.text
        assert losses(auto) == losses(always)
        for name, parameter in auto.model.named_parameters():
            assert torch.equal(parameter, always.model.get_parameter(name)), name
        assert auto.args.gradient_checkpointing is True and auto.args.chooses_checkpointing  # for another train()


@pytest.mark.parametrize("options", [{}, {"max_tokens_per_batch": 60}, {"packing": "false"}])
def test_the_limit_is_the_estimate_of_the_longest_rows(tmp_path, monkeypatch, options):
    trainer = make_trainer(tmp_path, gradient_checkpointing="auto", **options)
    needed, room = without_checkpointing(trainer, GIB, has_weights=True)
    moments = 2 * sum(4 * p.numel() for p in trainer.model.parameters())
    assert room == int(SHARE * GIB) - moments
    little_memory(monkeypatch, int((needed + moments + 10) / SHARE))
    assert not recomputation._decide(trainer)[0]
    little_memory(monkeypatch, int((needed + moments - 10) / SHARE))
    assert recomputation._decide(trainer)[0]

    gradients = moments // 2
    twice = make_trainer(tmp_path, gradient_accumulation_steps=2, **options)
    assert without_checkpointing(twice, GIB, has_weights=True)[0] == needed + gradients
    whole, _ = without_checkpointing(make_trainer(tmp_path, per_device_train_batch_size=8), GIB, has_weights=True)
    assert whole > 1.3 * needed


def test_a_rank_with_less_memory_decides_for_all(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, gradient_checkpointing="auto")
    monkeypatch.setattr(recomputation, "gather_object", lambda found: [*found, (200 * GIB, 100 * GIB)])
    is_on, reason = recomputation._decide(trainer)
    assert is_on and reason == "the largest micro-batch needs 200 GiB without it, and 100 GiB are free"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_a_resumed_run_keeps_the_choice(tmp_path, monkeypatch, caplog):
    options = {"save_strategy": "steps", "save_steps": 2, "gradient_checkpointing": "auto"}
    make_trainer(tmp_path, **options).train()
    checkpoint = tmp_path / "out/checkpoint-2"
    assert json.loads((checkpoint / "run.json").read_text())["gradient_checkpointing"] is False
    little_memory(monkeypatch)
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert not is_recomputed(resumed)
    assert "gradient_checkpointing=auto: off, as in the checkpoint" in caplog.text


def test_it_stays_on_where_memory_is_not_known(tmp_path, monkeypatch):
    stream = preference_data(8).to_iterable_dataset()
    trainer = toy.make_trainer(tmp_path, train_dataset=stream, max_steps=2, gradient_checkpointing="auto")
    is_on, reason = recomputation._decide(trainer)
    assert is_on and reason.startswith("because auto needs the lengths of all rows")
    trainer = make_trainer(tmp_path, gradient_checkpointing="auto")
    monkeypatch.setattr(trainer.accelerator.state, "distributed_type", DistributedType.FSDP)
    assert recomputation._decide(trainer) == (True, "because auto does not know the memory of weights that FSDP shards")
    monkeypatch.setattr(trainer.accelerator.state, "distributed_type", DistributedType.NO)
    monkeypatch.setattr(recomputation, "without_checkpointing", lambda *_, **__: None)
    assert recomputation._decide(trainer)[0]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")
def test_it_is_off_for_adapters_that_recomputation_breaks(tmp_path):
    peft = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"], alora_invocation_tokens=[3])
    trainer = make_trainer(tmp_path, gradient_checkpointing="auto", peft_config=peft, max_steps=1)
    trainer.train()
    assert not is_recomputed(trainer) and not trainer.args.gradient_checkpointing


def test_it_fits_together_with_a_budget_of_tokens(tmp_path, caplog):
    trainer = make_trainer(tmp_path, gradient_checkpointing="auto", max_tokens_per_batch="auto", max_steps=1)
    trainer.train()
    assert "gradient_checkpointing=auto: off" in caplog.text and "max_tokens_per_batch=auto:" in caplog.text


def test_by_command(tmp_path, capsys, monkeypatch, caplog):
    monkeypatch.setenv("CPT_CACHE", str(tmp_path / "cache"))
    pairs = word_pairs(16)
    tokenizer = bpe_tokenizer(text for row in pairs for text in row.values())
    write_model(tmp_path / "model", tokenizer)
    write_rows(tmp_path / "data.jsonl", pairs)
    argv = ["--model_name_or_path", tmp_path / "model", "--dataset_name", tmp_path / "data.jsonl", "--from_scratch"]
    argv += ["--output_dir", tmp_path / "out", "--use_cpu", "--max_steps", 1, "--gradient_checkpointing", "auto"]
    words = [str(word) for word in argv]
    assert cli.train_main(words) == 0
    assert "gradient_checkpointing=auto: off" in caplog.text + "".join(capsys.readouterr())
    assert "gradient_checkpointing: auto" in (tmp_path / "out/training_config.yaml").read_text()
    assert cli.main(["plan", *words, "--json", str(tmp_path / "plan.json")]) == 0
    memory = json.loads((tmp_path / "plan.json").read_text())["run"]["memory"]
    assert memory["checkpointing"] is False
