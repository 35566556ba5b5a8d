"""Transforms and formats of datasets in training and evaluation, see data/rows.py."""

import pytest
from datasets import Dataset

from cpt_kernels.data.preparation import prepare
from cpt_kernels.evaluation.pairs import evaluate_pairs
from cpt_kernels.trainer import ContrastiveTrainer
from tests.helpers.architectures import tiny_model
from tests.helpers.toy import config, losses, make_trainer, preference_rows, word_tokenizer

ROWS = preference_rows(12)
RAW = Dataset.from_list(
    [{"q": row["prompt"], "a": row["chosen"], "b": row["rejected"], "n": row["gap"]} for row in ROWS]
)


def swapped(batch):
    """Makes pairs of which the worse response is chosen, so that ignoring the transform changes every number."""
    return {"prompt": batch["q"], "chosen": batch["b"], "rejected": batch["a"], "gap": [8.0 - n for n in batch["n"]]}


def with_set_transform(dataset, **options):
    dataset = dataset.select(range(len(dataset)))
    dataset.set_transform(swapped, **options)
    return dataset


PLAIN = Dataset.from_list([dict(zip(swapped(RAW[:]), values)) for values in zip(*swapped(RAW[:]).values())])
# Datasets with the rows of PLAIN.
SEEN = {
    "with_transform": RAW.with_transform(swapped),
    "set_transform": with_set_transform(RAW),
    "columns": with_set_transform(RAW, columns=["q", "a", "b", "n"]),
    "select": RAW.with_transform(swapped).select(range(12)),
    "same columns": PLAIN.with_transform(lambda batch: batch),
    "numpy": PLAIN.with_format("numpy"),
    "hidden": PLAIN.add_column("messages", [[]] * 12).with_format(
        None, columns=["prompt", "chosen", "rejected", "gap"]
    ),
}


@pytest.mark.parametrize("name", SEEN)
def test_training_and_evaluation(tmp_path, name):
    options = dict(max_steps=3, curriculum={"levels": 2}, eval_strategy="steps", eval_steps=3)
    runs = []
    for data in (PLAIN, SEEN[name]):
        trainer = make_trainer(tmp_path, train_dataset=data, eval_dataset={"one": data}, **options)
        trainer.train()
        later = trainer.evaluate(data)["eval_rewards/margins"]
        metrics = ("rewards/margins", "eval_one_rewards/margins")
        logged = [entry[metric] for entry in trainer.state.log_history for metric in metrics if metric in entry]
        runs.append((losses(trainer), logged, later))
    assert runs[0] == runs[1] and runs[0][2] == runs[0][1][-1] != 0


@pytest.mark.parametrize("name", ["with_transform", "set_transform", "hidden"])
def test_held_out_pairs(tmp_path, name):
    found = [
        evaluate_pairs(
            {"policy": tiny_model("llama", seed=1)},
            data,
            word_tokenizer(),
            reference=tiny_model("llama"),
            args=config(tmp_path),
            by=["gap"],
        ).metrics("policy")["rewards/margins"]
        for data in (PLAIN, SEEN[name])
    ]
    assert found[0].tolist() == found[1].tolist() and abs(found[0]).min() > 0


def test_grouped_pairs_with_a_transform(tmp_path):
    groups = Dataset.from_list([{"q": row["prompt"], "c": [row["chosen"], row["rejected"]]} for row in ROWS])

    def as_groups(batch):
        count = len(batch["q"])
        return {
            "prompt": batch["q"],
            "completions": batch["c"],
            "models": [["x", 7]] * count,
            "pairs": [[[1, 0]]] * count,
        }

    options = dict(tokenizer=word_tokenizer(), args=config(tmp_path))
    expected = evaluate_pairs({"m": tiny_model("llama")}, PLAIN, **options)
    found = evaluate_pairs({"m": tiny_model("llama")}, groups.with_transform(as_groups), **options)
    assert found.logps["m"].tolist() == expected.logps["m"].tolist()
    assert found.groupings[0].values == ["7 > x"]


def test_streams_with_a_format(tmp_path):
    options = dict(max_steps=3, train_sampling_strategy="sequential")
    found = []
    for data in (PLAIN, PLAIN.to_iterable_dataset().with_format("numpy"), PLAIN.to_iterable_dataset()):
        trainer = make_trainer(tmp_path, train_dataset=data, **options)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == pytest.approx(found[1], abs=1e-6) and found[1] == found[2]


def test_an_override_may_return_a_dataset_with_a_transform(tmp_path):
    class Swapping(ContrastiveTrainer):
        def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
            return dataset.with_transform(swapped)

    class Cutting(ContrastiveTrainer):
        def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
            groups = super()._prepare_dataset(dataset, processing_class, args, dataset_name)
            one = lambda batch: batch | {"prompt_ids": [ids[:1] for ids in batch["prompt_ids"]]}  # noqa: E731
            return groups.with_transform(one)

    plain, swapping = make_trainer(tmp_path, train_dataset=PLAIN), make_trainer(tmp_path, Swapping, train_dataset=RAW)
    assert swapping.train_dataset["completion_ids"][:] == plain.train_dataset["completion_ids"][:]
    cutting = make_trainer(tmp_path, Cutting, train_dataset=PLAIN)
    assert {len(ids) for ids in cutting.train_dataset["prompt_ids"]} == {1}
    assert cutting.train_dataset["completion_ids"][:] == plain.train_dataset["completion_ids"][:]


def test_a_transform_of_the_prepared_rows_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, train_dataset=PLAIN, max_steps=1)
    trainer.train_dataset.set_transform(lambda batch: batch)
    with pytest.raises(ValueError, match="the prepared dataset has the format 'custom', which would change token ids"):
        trainer.train()


def test_prepared_rows_may_get_a_transform_before_the_trainer(tmp_path):
    prepared, _ = prepare(PLAIN, word_tokenizer())
    swapped_again = prepared.with_transform(lambda b: b | {"chosen": b["rejected"], "rejected": b["chosen"]})
    trainer = make_trainer(tmp_path, train_dataset=swapped_again)
    assert trainer.train_dataset["chosen"][:] == prepared["rejected"][:] != prepared["chosen"][:]
