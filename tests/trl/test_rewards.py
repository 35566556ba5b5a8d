"""Rewards follow the loss: those of losses per token are per token, as in TRL's CPOTrainer and ORPOTrainer."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from cpt_kernels.evaluation.pairs import evaluate_pairs
from cpt_kernels.evaluation.win_rate import Bootstrap
from cpt_kernels.losses import LOSSES, build_loss, user_loss
from cpt_kernels.trainer import ContrastiveTrainer
from tests.helpers.architectures import tiny_model
from tests.helpers.toy import config, preference_rows, word_tokenizer

_BETA = 0.3


def rows() -> Dataset:
    """Returns pairs whose shorter side is the likelier one in sum, so that sums and means often disagree."""
    made = preference_rows(16)
    for i, row in enumerate(made):
        side = ("chosen", "rejected")[i % 2]
        row[side] = " ".join([row[side]] * (2 + i % 3))
    return Dataset.from_list(made)


def policy():
    torch.manual_seed(3)
    model = tiny_model("llama")
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def trls_rewards(average: bool) -> dict[str, float]:
    """Returns what TRL's CPOTrainer logs: beta times the log-probs of its own function, means for SimPO and ORPO."""
    trainer = pytest.importorskip("trl.experimental.cpo").CPOTrainer
    model, tokenizer, sides = policy(), word_tokenizer(), {}
    for side in ("chosen", "rejected"):
        found = []
        for row in rows():
            prompt, whole = (tokenizer(text).input_ids for text in (row["prompt"], row["prompt"] + row[side]))
            labels = [-100] * len(prompt) + whole[len(prompt) :] + [tokenizer.eos_token_id]
            ids = torch.tensor([[*whole, tokenizer.eos_token_id]])
            logps = trainer.get_batch_logps(model(ids).logits, torch.tensor([labels]), average_log_prob=average)
            found.append(_BETA * logps)
        sides[side] = torch.cat(found)
    margins = sides["chosen"] - sides["rejected"]
    means = {side: values.mean().item() for side, values in sides.items()}
    return means | {"margins": margins.mean().item(), "accuracies": (margins > 0).float().mean().item()}


@pytest.mark.parametrize("loss", ["simpo", "orpo", "cpo"])
def test_rewards_are_those_of_trls_trainers(tmp_path, loss):
    expected = trls_rewards(average=loss != "cpo")
    assert expected["accuracies"] != trls_rewards(average=loss == "cpo")["accuracies"], "sums and means must differ"
    args = config(tmp_path, loss_type=loss, beta=_BETA, max_steps=1, logging_steps=1, learning_rate=0.0)
    args.per_device_train_batch_size = 16
    trainer = ContrastiveTrainer(
        policy(), args=args, train_dataset=rows(), eval_dataset=rows(), processing_class=word_tokenizer()
    )
    trainer.train()
    evaluated, predicted = trainer.evaluate(), trainer.predict(rows()).predictions
    summary = evaluate_pairs({"policy": policy()}, rows(), word_tokenizer(), args=args).summary(Bootstrap(10))[0]
    for name, value in expected.items():
        for found in (
            trainer.state.log_history[0][f"rewards/{name}"],
            evaluated[f"eval_rewards/{name}"],
            summary[f"rewards/{name}"]["mean"],
        ):
            assert found == pytest.approx(value, abs=2e-5), name
    assert predicted.mean(0).tolist() == pytest.approx([expected["chosen"], expected["rejected"]], abs=2e-5)
    assert evaluated["eval_logps/chosen"] < 2 * evaluated["eval_rewards/chosen"] / _BETA or loss == "cpo"


def test_which_rewards_are_per_token():
    assert [name for name in LOSSES if build_loss(name).per_token] == ["simpo", "orpo"]
    assert build_loss("slic", slic_length_normalize=True).per_token
    assert not build_loss("slic").per_token
    assert build_loss(["sft", "simpo"]).per_token and build_loss(["simpo", "cpo"], [0.5, 1.0]).per_token
    assert not build_loss(["simpo", "sigmoid"]).per_token  # the loss with a reference goes first
    assert not build_loss(["cpo", "simpo"]).per_token
    assert user_loss(lambda p: p.chosen / p.chosen_length, per_token=True).per_token
