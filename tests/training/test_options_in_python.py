"""What the configuration and the trainer refuse from Python before rows are tokenized or a reference scores them."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

from cpt_kernels import ContrastiveConfig, user_loss
from cpt_kernels import trainer as trainer_module
from cpt_kernels.errors import UserError
from tests.helpers.architectures import VOCAB, tiny_model
from tests.helpers.toy import config, make_trainer, preference_data


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("learning_rate", math.nan, "learning_rate=nan: must be finite"),
        ("learning_rate", math.inf, "learning_rate=inf: must be finite"),
        ("learning_rate", "1e-5", "learning_rate='1e-5': must be a number, not text"),
        ("weight_decay", -1.0, "weight_decay=-1.0: must not be negative"),
        ("num_train_epochs", 0, "num_train_epochs=0: must be positive"),
        ("max_steps", 0, "max_steps=0: must be positive, or -1"),
        ("logging_steps", 0, "logging_steps=0: must be positive"),
        ("gamma_beta_ratio", 0.5, "gamma_beta_ratio has another name here: set simpo_gamma"),
        ("use_lora", True, "use_lora has another name here: set use_peft"),
    ],
)
def test_numbers_and_names(tmp_path, option, value, message):
    with pytest.raises(UserError, match=message):
        ContrastiveConfig(str(tmp_path), use_cpu=True, **{option: value})


def test_zero_is_a_learning_rate_and_steps_that_are_off_are_not_checked(tmp_path):
    args = config(tmp_path, learning_rate=0.0, logging_strategy="no", logging_steps=0, max_steps=3, num_train_epochs=0)
    assert args.learning_rate == 0.0 and args.max_steps == 3


@pytest.fixture
def untokenized(monkeypatch):
    monkeypatch.setattr(trainer_module, "prepare", lambda *_, **__: pytest.fail("rows are tokenized"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric_for_best_model": "foo"}, "metric_for_best_model=foo: there is no such metric; choose one of loss, "),
        ({"metric_for_best_model": "eval_rewards/margins", "loss_type": "sft"}, "there is no such metric"),
        ({"report_to": "comet_ml"}, "report_to=comet_ml: this tracker is not installed"),
        ({"report_to": "wandbb"}, "report_to=wandbb: wandbb is not supported; choose one of"),
        ({"optim": "lomo"}, "optim=lomo: You need to install `lomo_optim`"),
        ({"attention_backend": "flash_attn"}, "attention backend 'flash_attn'"),
        ({"loss": lambda logps: 1 / 0}, r"loss '<lambda>' failed on a trial with 8 pairs: ZeroDivisionError: division"),
        ({"loss": lambda logps: logps.chosen.mean()}, r"returned a tensor of shape \(\) for 8 pairs: return one loss"),
        ({"loss": lambda logps: 3.0}, "returned float: return a tensor, one loss per pair"),
        ({"curriculum": {"levels": ["a>b", "b>c"]}}, "level b>c has no rows; the data has a>b .10 rows."),
    ],
)
def test_what_the_trainer_names(tmp_path, untokenized, options, message):
    with pytest.raises(UserError, match=message):
        make_trainer(tmp_path, eval_dataset=preference_data(4), eval_strategy="steps", eval_steps=1, **options)


def test_metrics_of_a_users_own_are_accepted(tmp_path):
    options = dict(eval_dataset=preference_data(4), eval_strategy="steps", eval_steps=1, max_steps=1)
    trainer = make_trainer(
        tmp_path,
        metric_for_best_model="share",
        greater_is_better=True,
        compute_metrics=lambda predictions: {"share": 0.5},
        **options,
    )
    trainer.train()
    assert trainer.state.log_history[0]["loss"] is not None
    make_trainer(tmp_path, metric_for_best_model="rewards/accuracies", greater_is_better=True, **options)


def gpt2(positions: int) -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_positions=positions, n_embd=16, n_layer=1, n_head=2))


def test_positions_of_a_table(tmp_path, untokenized):
    with pytest.raises(
        UserError, match=r"max_length=65: GPT2LMHeadModel has 64 positions .*: set max_length=64 or less"
    ):
        make_trainer(tmp_path, model=gpt2(64), max_length=65)


def long_rows(count: int, words: int):
    text = " ".join(["w1"] * words)
    rows = preference_data(count).to_list()
    rows[2]["prompt"] = text
    return Dataset.from_list(rows)


def test_positions_of_the_data(tmp_path, caplog):
    """The default of max_length may exceed the positions of a model, as long as no row does."""
    make_trainer(tmp_path, model=gpt2(64), max_steps=1).train()
    with pytest.raises(
        UserError, match=r"row 2 of the train data has \d+ tokens, and GPT2LMHeadModel has 64 positions"
    ):
        make_trainer(tmp_path, model=gpt2(64), train_dataset=long_rows(4, 80))
    model = tiny_model("llama")
    model.config.max_position_embeddings = 64
    with caplog.at_level(logging.WARNING):
        make_trainer(tmp_path, model=model, train_dataset=long_rows(4, 80), max_length=100, max_steps=1).train()
    assert "max_length=100: LlamaForCausalLM has 64 positions" in caplog.text
    assert "row 2 of the train data has" in caplog.text


def test_rows_beyond_the_budget_are_named_before_the_reference_scores(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer_module, "Reference", lambda *_, **__: pytest.fail("a reference is made"))
    rows = long_rows(4, 80)
    rows = rows.map(lambda row, index: row | {"chosen": "" if index == 0 else row["chosen"]}, with_indices=True)
    for where in ("train", "eval", "held"):
        held = rows if where == "eval" else {"held": rows}
        data = {"train_dataset": rows} if where == "train" else {"eval_dataset": held}
        with pytest.raises(UserError, match=rf"row 2 of the {where} data takes \d+ tokens, more than max_tokens"):
            make_trainer(tmp_path, max_tokens_per_batch=80, **data)


def test_speeds_are_of_the_pairs_and_micro_batches_that_ran(tmp_path):
    trainer = make_trainer(
        tmp_path,
        rows=12,
        eval_dataset=preference_data(9),
        max_tokens_per_batch=200,
        num_train_epochs=2,
        logging_steps=1,
    )
    closing = trainer.train().metrics
    batches = len(trainer.get_eval_dataloader())
    evaluated = trainer.evaluate()
    assert closing["train_samples_per_second"] * closing["train_runtime"] == pytest.approx(24, rel=1e-2)
    assert batches != math.ceil(9 / 4)
    assert evaluated["eval_steps_per_second"] * evaluated["eval_runtime"] == pytest.approx(batches, rel=1e-2)
    predicted = trainer.predict(preference_data(9)).metrics
    assert predicted["test_steps_per_second"] * predicted["test_runtime"] == pytest.approx(batches, rel=1e-2)


def test_a_users_loss_is_tried_once():
    loss = user_loss(lambda logps: torch.relu(1 - logps.chosen + logps.rejected), needs_reference=False)
    assert loss.name == "<lambda>"
    with pytest.raises(UserError, match=r"shape \(4,\) for 8 pairs"):
        user_loss(lambda logps: logps.chosen[:4])
