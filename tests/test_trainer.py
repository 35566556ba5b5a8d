"""The trainer: the mean over a step's pairs, the choice of the reference, resuming, streams, evaluation, errors."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset

from cpt_kernels import ContrastiveTrainer, PairLogps, user_loss
from tests.helpers.architectures import tiny_model
from tests.helpers.toy import losses, make_trainer, preference_data, preference_rows


@pytest.mark.parametrize("loss_type", ["sigmoid", "slic", "sft", "ipo", "hinge"])
def test_the_first_step_starts_from_the_reference(tmp_path, loss_type):
    trainer = make_trainer(tmp_path, max_steps=1, loss_type=loss_type, beta=0.3)
    trainer.train()
    (first, *_) = trainer.state.log_history
    if trainer.loss.needs_reference:
        expected = {"sigmoid": np.log(2), "ipo": (1 / 0.6) ** 2, "hinge": 1.0}[loss_type]
        assert first["loss"] == pytest.approx(expected, abs=1e-4)
        assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert first["logps/chosen"] < 0 and 0 < first["entropy"] < np.log(61)


def test_micro_batches_do_not_change_a_step(tmp_path):
    runs = {
        "one": {"per_device_train_batch_size": 8},
        "accumulated": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        "uneven": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
        "unshared": {"per_device_train_batch_size": 8, "share_prompts": "false"},
        "general": {"per_device_train_batch_size": 8, "head_mode": "general"},
        "small tiles": {"per_device_train_batch_size": 8, "head_memory_mb": 0.001},
    }
    for loss_type in ("sigmoid", "sft"):
        found = {}
        for name, options in runs.items():
            trainer = make_trainer(
                tmp_path,
                rows=8,
                num_train_epochs=2,
                loss_type=loss_type,
                train_sampling_strategy="sequential",
                **options,
            )
            trainer.train()
            found[name] = losses(trainer)
        for name, values in found.items():
            assert values == pytest.approx(found["one"], abs=2e-5), (loss_type, name)


def test_token_budget_packs_whole_rows_and_weighs_pairs_alike(tmp_path):
    trainer = make_trainer(
        tmp_path, rows=24, num_train_epochs=1, max_tokens_per_batch=120, gradient_accumulation_steps=2
    )
    batches = list(trainer.get_train_dataloader())
    assert sum(batch["num_pairs"] for batch in batches) == 24
    assert max(batch["input_ids"].numel() for batch in batches) <= 120
    trainer.train()
    assert sum(batch["num_pairs"] for batch in batches) / len(batches) > 2
    assert len(losses(trainer)) == -(-len(batches) // 2)


def test_resume_continues_the_same_run(tmp_path):
    options = dict(rows=20, num_train_epochs=2, save_strategy="steps", save_steps=3, loss_type="sigmoid")
    whole = make_trainer(tmp_path / "a", **options)
    whole.train()
    resumed = make_trainer(tmp_path / "a", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/out/checkpoint-6"))
    assert losses(resumed) == losses(whole)
    for (name, ours), theirs in zip(resumed.model.named_parameters(), whole.model.parameters()):
        assert torch.equal(ours, theirs), name


def test_streaming_equals_the_stored_dataset_in_order(tmp_path):
    options = dict(max_steps=4, train_sampling_strategy="sequential")
    stored = make_trainer(tmp_path, **options)
    stored.train()
    stream = make_trainer(tmp_path / "stream", train_dataset=preference_data(16).to_iterable_dataset(), **options)
    stream.train()
    assert losses(stream) == pytest.approx(losses(stored), abs=1e-6)
    again = make_trainer(tmp_path / "stream", train_dataset=preference_data(16).to_iterable_dataset(), **options)
    again.reference._score = None  # scoring would fail, but all log-probs are on disk
    again.train()
    assert losses(again) == losses(stream)


def test_reference_is_scored_once_ever(tmp_path):
    make_trainer(tmp_path, max_steps=1)
    again = make_trainer(tmp_path, max_steps=2, learning_rate=1e-3, beta=0.5, seed=7, loss_type="ipo")
    assert again.reference.cache.num_rows == 32
    assert len(list((tmp_path / "ref").rglob("*.arrow"))) == 1


def test_a_reference_of_its_own_equals_the_start_weights(tmp_path):
    start = make_trainer(tmp_path / "a", max_steps=3)
    start.train()
    own = make_trainer(tmp_path / "b", max_steps=3, ref_model=tiny_model("llama"))
    own.train()
    assert losses(own) == losses(start)
    other = make_trainer(tmp_path / "c", max_steps=3, ref_model=tiny_model("llama", seed=1))
    other.train()
    assert abs(losses(other)[0] - np.log(2)) > 1e-2


@pytest.mark.parametrize("arrives", ["new", "trained"])
def test_lora_reference(tmp_path, arrives):
    from peft import LoraConfig, get_peft_model

    peft_config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    if arrives == "new":
        # The reference is the model with adapters off, so an adapter that starts at non-zero values has rewards.
        trainer = make_trainer(tmp_path, peft_config=peft_config, max_steps=2)
        trainer.train()
        assert abs(trainer.state.log_history[0]["rewards/chosen"]) > 1e-3
    else:
        model = get_peft_model(tiny_model("llama"), peft_config)
        trainer = make_trainer(tmp_path, model=model, max_steps=2)
        trainer.train()
        assert trainer.state.log_history[0]["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert losses(trainer)[1] != losses(trainer)[0]
    assert all(p.grad is None for n, p in trainer.model.named_parameters() if "lora" not in n)


def test_evaluation_is_a_mean_over_pairs(tmp_path):
    sets = {"a": preference_data(10, seed=1), "b": preference_data(3, seed=2)}
    seen = {}

    def compute_metrics(prediction):
        seen[len(seen)] = prediction.predictions
        return {"margin": float((prediction.predictions[:, 0] - prediction.predictions[:, 1]).mean())}

    trainer = make_trainer(tmp_path, eval_dataset=sets, max_steps=4, compute_metrics=compute_metrics, ld_alpha=0.5)
    trainer.train()
    by_four = trainer.evaluate()
    trainer.args.per_device_eval_batch_size = 1
    by_one = trainer.evaluate()
    for name in ("eval_a_loss", "eval_b_loss", "eval_a_rewards/margins", "eval_b_entropy"):
        assert by_four[name] == pytest.approx(by_one[name], abs=1e-5), name
    assert by_four["eval_a_margin"] == pytest.approx(by_four["eval_a_rewards/margins"], abs=1e-5)
    assert seen[0].shape == (10, 2) and seen[1].shape == (3, 2)


@pytest.mark.parametrize("loss_type", ["sft", "cpo", ["sigmoid", "sft"]], ids=str)
@pytest.mark.parametrize("stream", [False, True])
def test_a_loss_over_tokens_is_a_mean_over_the_tokens_of_the_evaluation(tmp_path, loss_type, stream):
    """A batch of few tokens must not weigh as much as one of many."""
    data = preference_data(11, seed=1)
    trainer = make_trainer(tmp_path, loss_type=loss_type, max_steps=2, learning_rate=1e-2)
    tokens = sum(len(row["completion_ids"][row["chosen"][0]]) for row in trainer._prepared(data, trainer.args, "eval"))
    data = data.to_iterable_dataset() if stream else data
    by_four = trainer.evaluate(data)
    trainer.args.per_device_eval_batch_size = 1
    by_one = trainer.evaluate(data)
    trainer.args.max_tokens_per_batch = 70
    by_tokens = trainer.evaluate(data)
    for found in (by_one, by_tokens):
        assert found["eval_loss"] == pytest.approx(by_four["eval_loss"], abs=1e-5)
    if loss_type == "sft":
        assert by_four["eval_loss"] == pytest.approx(-by_four["eval_logps/chosen"] * 11 / tokens, abs=1e-5)
    trainer.train()
    assert trainer.eval_tokens_per_pair is None


def test_evaluating_new_data_needs_a_reference(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    before = trainer.evaluate(preference_data(4, seed=5))
    assert before["eval_rewards/margins"] == pytest.approx(0, abs=1e-4)
    trainer.train()
    trainer.evaluate(preference_data(4, seed=5))  # cached
    with pytest.raises(ValueError, match="start weights"):
        trainer.evaluate(preference_data(4, seed=6))


def test_a_loss_of_the_users_own(tmp_path):
    def centred(pair_logps: PairLogps) -> torch.Tensor:  # not separable: it uses a mean over the batch
        margins = pair_logps.log_ratio_difference()
        return torch.nn.functional.softplus(-(margins - margins.detach().mean()))

    own = make_trainer(tmp_path, max_steps=3, loss=centred)
    own.train()
    assert losses(own)[0] == pytest.approx(np.log(2), abs=1e-4) and losses(own)[2] != losses(own)[0]

    def dpo(pair_logps: PairLogps) -> torch.Tensor:
        return torch.nn.functional.softplus(-0.1 * pair_logps.log_ratio_difference())

    declared = make_trainer(tmp_path, max_steps=3, loss=user_loss(dpo, separable=True))
    declared.train()
    builtin = make_trainer(tmp_path, max_steps=3)
    builtin.train()
    assert losses(declared) == pytest.approx(losses(builtin), abs=1e-6)


def test_slic_takes_its_target_from_a_column(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, loss_type="slic", target_column="sampled", slic_lambda=0.5)
    batch = next(iter(trainer.get_train_dataloader()))
    assert len(batch["completion_lengths"]) == 12 and not torch.equal(batch["sft_targets"], batch["chosen"])
    trainer.train()
    default = make_trainer(tmp_path, max_steps=1, loss_type="slic", slic_lambda=0.5)
    default.train()
    assert losses(trainer)[0] != losses(default)[0]


def test_odpo_takes_gaps_from_a_column_or_from_scores(tmp_path):
    rows = preference_rows(8)
    gaps = [0.5 + i / 4 for i in range(8)]
    options = {"loss_type": "odpo", "odpo_alpha": 0.5, "max_steps": 1, "per_device_train_batch_size": 8}
    by_column = make_trainer(
        tmp_path,
        train_dataset=Dataset.from_list([row | {"gap": gap} for row, gap in zip(rows, gaps)]),
        gap_column="gap",
        **options,
    )
    by_column.train()
    expected = np.mean([np.log1p(np.exp(0.5 * np.log(gap))) for gap in gaps])  # the rewards are 0 at the start
    assert losses(by_column)[0] == pytest.approx(expected, abs=1e-4)
    ranked = [
        {"prompt": row["prompt"], "completions": [row["rejected"], row["chosen"]], "scores": [1.0, 1.0 + gap]}
        for row, gap in zip(rows, gaps)
    ]
    by_score = make_trainer(tmp_path, train_dataset=Dataset.from_list(ranked), **options)
    by_score.train()
    assert losses(by_score)[0] == pytest.approx(losses(by_column)[0], abs=1e-6)
    with pytest.raises(
        ValueError, match="loss 'odpo' needs by how much chosen is better, and row 0 of the train data has no"
    ):
        make_trainer(tmp_path, **options)


def test_a_sum_of_losses_is_the_sum_of_their_values(tmp_path):
    found = {}
    for name in ("sigmoid", "sft", "simpo"):
        trainer = make_trainer(tmp_path, loss_type=name, max_steps=1)
        trainer.train()
        found[name] = losses(trainer)[0]
    trainer = make_trainer(tmp_path, loss_type=["sigmoid", "sft", "simpo"], loss_weights=[1.0, 0.2, 0.5], max_steps=1)
    trainer.train()
    expected = found["sigmoid"] + 0.2 * found["sft"] + 0.5 * found["simpo"]
    assert losses(trainer)[0] == pytest.approx(expected, abs=1e-5)
    assert trainer.state.log_history[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)  # sigmoid needs a reference


def test_ld_alpha_shows_in_log_probs_and_needs_tokens_of_the_reference(tmp_path):
    logged = {}
    for alpha in (None, 1.0, 0.0):
        trainer = make_trainer(tmp_path, ld_alpha=alpha, max_steps=1)
        trainer.train()
        logged[alpha] = trainer.state.log_history[0]
    for name in ("logps/chosen", "logps/rejected", "rewards/chosen"):
        assert logged[1.0][name] == pytest.approx(logged[None][name], abs=1e-5)
    assert logged[0.0]["logps/chosen"] > logged[None]["logps/chosen"] + 1  # tails of the longer sides do not count
    assert logged[0.0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    cache = trainer.reference.cache
    cache.kind = "sums"
    cache.add_many([((1,), (2,))], [np.zeros(1, dtype=np.float32)])
    cache.flush()
    with pytest.raises(ValueError, match=r"ld_alpha needs the reference log-prob of every token, .* imported sums"):
        make_trainer(tmp_path, ld_alpha=0.5, max_steps=1)
    make_trainer(tmp_path, max_steps=1)


def test_micro_batches_do_not_change_a_step_of_any_separable_loss(tmp_path):
    options = {"num_train_epochs": 2, "rows": 8, "train_sampling_strategy": "sequential", "label_smoothing": 0.1}
    options |= {"loss_type": ["exo_pair", "cpo"], "ld_alpha": 0.3, "use_weighting": True}
    found = []
    for change in (
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
        {"per_device_train_batch_size": 8, "head_memory_mb": 0.001},
        {"per_device_train_batch_size": 8, "head_mode": "general"},
    ):
        trainer = make_trainer(tmp_path, **options, **change)
        trainer.train()
        found.append(losses(trainer))
    for values in found[1:]:
        assert values == pytest.approx(found[0], abs=2e-5)


def test_an_overridden_loss_cannot_lose_gradients_silently(tmp_path):
    class Regularised(ContrastiveTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, scores = super().compute_loss(model, inputs, True, num_items_in_batch)
            return loss - 0.01 * scores.completion_logps.mean()

    def run(mode):
        trainer = make_trainer(tmp_path, Regularised, rows=8, max_steps=2, head_mode=mode)
        trainer.train()
        return losses(trainer)

    with pytest.raises(RuntimeError, match="head_mode='general'"):
        run("auto")
    assert run("general")[0] > np.log(2)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    plain = make_trainer(tmp_path, max_steps=3)
    plain.train()
    recomputed = make_trainer(tmp_path, max_steps=3, gradient_checkpointing=True)
    recomputed.train()
    assert losses(recomputed) == losses(plain)


def test_mixture_of_experts_adds_its_auxiliary_loss(tmp_path):
    found = {}
    for coefficient in (0.0, 0.5):
        trainer = make_trainer(
            tmp_path,
            model=tiny_model("mixtral"),
            max_steps=1,
            router_aux_loss_coef=coefficient,
            learning_rate=0.0,
            eval_dataset=preference_data(8, seed=2),
        )
        trainer.train()
        found[coefficient] = trainer.state.log_history[0] | trainer.evaluate()
    auxiliary = found[0.5]["aux_loss"]
    assert "aux_loss" not in found[0.0] and auxiliary > 1
    assert found[0.5]["loss"] - found[0.0]["loss"] == pytest.approx(0.5 * auxiliary, rel=1e-3)
    evaluated = found[0.5]["eval_loss"] - found[0.0]["eval_loss"]
    assert evaluated == pytest.approx(0.5 * found[0.5]["eval_aux_loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ref_model": tiny_model("gpt2").__class__(copy.deepcopy(tiny_model("gpt2").config))}, None),
        ({"loss_type": "sigmod"}, "unknown: choose one of sigmoid"),
        ({"max_length": 0}, "max_length=0"),
        ({"label_smoothing": 0.7}, "flip probability"),
        ({"loss_type": "ipo", "label_smoothing": 0.1}, "label_smoothing has no effect on loss_type 'ipo'"),
        ({"router_aux_loss_coef": 0.1}, "is not a mixture of experts"),
        ({"train_sampling_strategy": "group_by_length"}, "max_tokens_per_batch"),
        ({"max_tokens_per_batch": 5, "max_steps": 1}, "more than max_tokens_per_batch=5"),
        (
            {"train_dataset": Dataset.from_list([{"messages": [{"role": "user", "content": "w1"}]}])},
            "no assistant turn",
        ),
        ({"train_dataset": Dataset.from_list([{"prompt": "w1 ", "completion": "w2"}])}, "needs pairs"),
        ({"train_dataset": Dataset.from_list([{"text": "w1"}])}, "text"),
        ({"max_length": 1}, "max_length"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, change, message):
    if message is None:  # a reference of another architecture with the same vocabulary is allowed
        make_trainer(tmp_path, **change)
        return
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **change).train()


def test_a_token_beyond_the_vocabulary(tmp_path):
    model = tiny_model("llama")
    model.resize_token_embeddings(10)
    with pytest.raises(ValueError, match="vocabulary of 10"):
        make_trainer(tmp_path, model=model, max_steps=1)


def test_rows_as_ranked_completions(tmp_path):
    rows = [{"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"], row["sampled"]]}
            for row in preference_rows(6)]  # fmt: skip
    trainer = make_trainer(tmp_path, train_dataset=Dataset.from_list(rows), max_steps=1, per_device_train_batch_size=6)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["num_pairs"] == 18 and len(batch["completion_lengths"]) == 18 and batch["shared"]
    trainer.train()
