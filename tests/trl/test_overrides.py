"""Methods that users of TRL override have the same effect here as in TRL, or are refused."""

from __future__ import annotations

import numpy as np
import pytest
from datasets import Dataset
from transformers import TrainerCallback

from cpt_kernels import ContrastiveTrainer
from cpt_kernels.data.preparation import prepare
from cpt_kernels.training.checks import NEVER_CALLED
from tests.helpers.toy import losses, preference_data
from tests.helpers.trl_runs import both, make_trainer, one_thread

_one_thread = pytest.fixture(autouse=True, scope="module")(one_thread)
trl = pytest.importorskip("trl", reason="needs TRL: pip install trl==1.16.0")


def shifted(base):
    """Returns a trainer whose reference log-prob of every chosen side is lower by half a nat."""

    class Shifted(base):
        def compute_ref_log_probs(self, model, inputs):
            chosen, rejected = super().compute_ref_log_probs(model, inputs)
            return chosen - 0.5, rejected

    return Shifted


def test_reference_log_probs_of_the_users_own(tmp_path):
    both(tmp_path, shifted(ContrastiveTrainer), shifted(trl.DPOTrainer), beta=1.0)


def test_overridden_reference_log_probs_count_without_precomputing(tmp_path):
    """TRL does not call the method then."""
    trainer = make_trainer(tmp_path, shifted(ContrastiveTrainer), precompute_ref_log_probs=False, beta=1.0)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/chosen"] == pytest.approx(0.5, abs=1e-4)


def test_overridden_reference_log_probs_are_sums(tmp_path):
    with pytest.raises(ValueError, match="ld_alpha needs token log-probs"):
        make_trainer(tmp_path, shifted(ContrastiveTrainer), ld_alpha=0.5).train()


def test_overridden_reference_log_probs_belong_to_completions(tmp_path):
    """In w1 > w2 > w3 the shifted trainer gives w2 one value as chosen, another as rejected."""
    ranked = Dataset.from_list([{"prompt": "w4 ", "completions": ["w1 ", "w2 ", "w3 "]}])
    trainer = make_trainer(tmp_path, shifted(ContrastiveTrainer), train_dataset=ranked)
    with pytest.raises(ValueError, match="different log-probs for one completion in two of its pairs: return the same"):
        trainer.train()
    make_trainer(tmp_path, shifted(ContrastiveTrainer), train_dataset=ranked, ranked_pairs="extremes").train()


def test_preparation_of_the_users_own(tmp_path):
    class Fewer(ContrastiveTrainer):
        def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
            return super()._prepare_dataset(dataset.select(range(4)), processing_class, args, dataset_name)

    class Tokenised(ContrastiveTrainer):
        """Returns columns of token ids, as TRL's own method does."""

        def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
            ids = lambda text: processing_class(text)["input_ids"]  # noqa: E731
            return dataset.map(
                lambda row: {
                    "prompt_ids": ids(row["prompt"]),
                    **{f"{side}_ids": [*ids(row[side]), 2] for side in ("chosen", "rejected")},
                },
                remove_columns=dataset.column_names,
            )

    assert len(make_trainer(tmp_path, Fewer).train_dataset) == 4
    usual, own = make_trainer(tmp_path), make_trainer(tmp_path, Tokenised)
    for trainer in (usual, own):
        trainer.train()
    assert losses(own) == losses(usual)
    stream = make_trainer(tmp_path, Tokenised, train_dataset=preference_data(8).to_iterable_dataset())
    stream.train()
    assert len(losses(stream)) == 2


class Doubled:
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return (2 * loss[0] + self.beta, loss[1]) if return_outputs else 2 * loss + self.beta


class Tripled:
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        loss, rewards, labels = super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        return 3 * loss, rewards, labels


@pytest.mark.parametrize("compute_metrics", [None, lambda _: {"own": 1.0}], ids=["loss", "metrics"])
def test_a_loss_of_the_users_own_is_the_loss_of_evaluation(tmp_path, compute_metrics):
    class Own(Tripled, Doubled, ContrastiveTrainer):
        pass

    arguments = {"eval_dataset": preference_data(10, seed=3), "compute_metrics": compute_metrics}
    usual, own = (make_trainer(tmp_path, cls, **arguments).evaluate() for cls in (ContrastiveTrainer, Own))
    assert own["eval_loss"] == pytest.approx(3 * (2 * usual["eval_loss"] + 0.1), abs=1e-5)
    assert own["eval_rewards/margins"] == usual["eval_rewards/margins"]
    assert ("eval_own" in own) == (compute_metrics is not None)


def test_what_is_added_to_a_loss_is_added_once_however_many_micro_batches_there_are(tmp_path):
    class Own(Doubled, ContrastiveTrainer):
        pass

    class Theirs(Doubled, trl.DPOTrainer):
        pass

    both(tmp_path, Own, Theirs, per_device_train_batch_size=2, gradient_accumulation_steps=2)


def test_outputs_that_no_rewards_can_be_made_of(tmp_path):
    class Own(ContrastiveTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, False, num_items_in_batch)
            return (loss, {"mine": 1}) if return_outputs else loss

    trainer = make_trainer(tmp_path, Own, eval_dataset=preference_data(4))
    assert np.isfinite(trainer.evaluate()["eval_loss"])
    with pytest.raises(ValueError, match=r"compute_loss returned dict beside the loss.*return what super"):
        trainer.predict(preference_data(4))


@pytest.mark.parametrize("name", NEVER_CALLED)
def test_methods_that_would_never_be_called(tmp_path, name):
    own = type("Own", (ContrastiveTrainer,), {name: lambda self, *_: None})
    with pytest.raises(ValueError, match=rf"^this trainer never calls Own\.{name}: .*override"):
        make_trainer(tmp_path, own)


def test_preparation_of_a_stream_without_ours(tmp_path):
    """There is no report of dropped rows then, and training ends as usual."""

    class Prepared(ContrastiveTrainer):
        def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
            return prepare(dataset, processing_class)[0]

    stream = preference_data(8).to_iterable_dataset()
    trainers = [make_trainer(tmp_path, cls, train_dataset=stream) for cls in (ContrastiveTrainer, Prepared)]
    for trainer in trainers:
        trainer.train()
    assert losses(trainers[0]) == losses(trainers[1])


def test_callbacks_get_what_transformers_gives_them(tmp_path):
    seen = {}

    class Curious(TrainerCallback):
        def on_train_begin(self, args, state, control, **given):
            seen["begin"] = (type(given["model"]).__name__, len(given["train_dataloader"]), state.max_steps)

        def on_prediction_step(self, args, state, control, eval_dataloader=None, **_):
            seen["prediction"] = len(eval_dataloader)

        def on_evaluate(self, args, state, control, metrics=None, **_):
            seen["metrics"] = "eval_rewards/margins" in metrics

    trainer = make_trainer(tmp_path, eval_dataset=preference_data(9), callbacks=[Curious()])
    trainer.train()
    trainer.evaluate()
    assert seen == {"begin": ("LlamaForCausalLM", 2, 2), "prediction": 3, "metrics": True}


def test_beta_is_read(tmp_path):
    trainer = make_trainer(tmp_path, beta=0.3)
    assert trainer.beta == 0.3
    with pytest.raises(AttributeError):
        trainer.beta = 0.5
