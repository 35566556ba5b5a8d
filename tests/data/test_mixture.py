"""Tests ``datasets`` of a run's file: order, shares, a test set, and errors."""

from __future__ import annotations

import pytest
from datasets import load_dataset

from cpt_kernels.data.mixture import load_mixture, split_rows
from cpt_kernels.data.pair_rows import one_pair_rows
from cpt_kernels.errors import UserError
from tests.helpers.command import write_rows

ANSWER = [{"role": "assistant", "content": "y"}]


@pytest.fixture
def folder(tmp_path):
    for name, count in (("a", 10), ("b", 30)):
        write_rows(
            tmp_path / f"{name}.jsonl", [{"prompt": f"{name}{i}", "chosen": "x", "rejected": "y"} for i in range(count)]
        )
    return tmp_path


def prompts(dataset) -> list[str]:
    return [row["prompt"] for row in dataset]


@pytest.mark.parametrize("streaming", [False, True])
def test_datasets_are_concatenated(folder, streaming):
    parts = [
        {"path": str(folder / "a.jsonl")},
        {"path": "json", "data_files": str(folder / "b.jsonl"), "columns": ["prompt"]},
    ]
    whole = load_mixture(parts, streaming=streaming)
    assert prompts(whole) == [f"a{i}" for i in range(10)] + [f"b{i}" for i in range(30)]


def test_fractions_are_shares_of_the_mixture_as_in_trl(folder):
    parts = [
        {"path": "json", "data_files": str(folder / f"{name}.jsonl"), "fraction": share}
        for name, share in (("a", 2), ("b", 3))
    ]
    whole = load_mixture(parts)
    assert prompts(whole) == [f"a{i}" for i in range(10)] + [f"b{i}" for i in range(15)]  # a limits the mixture
    trl = pytest.importorskip("trl.scripts.utils")
    theirs = trl.get_dataset(trl.DatasetMixtureConfig(datasets=[trl.DatasetConfig(**part) for part in parts]))
    assert prompts(whole) == prompts(theirs["train"])


def test_a_test_set_is_split_off_reproducibly(folder):
    train, test = split_rows(load_mixture([{"path": str(folder / "b.jsonl")}]), 0.2, seed=7)
    assert len(test) == 6 and sorted(prompts(train) + prompts(test)) == sorted(f"b{i}" for i in range(30))
    again = load_dataset("json", data_files=str(folder / "b.jsonl"), split="train").train_test_split(0.2, seed=7)
    assert prompts(test) == prompts(again["test"])


def test_columns_are_chosen_and_renamed_however_a_part_is_read(folder):
    columns = {"prompt": "prompt", "chosen": "completion"}
    for part in ({"path": str(folder / "a.jsonl")}, {"path": "json", "data_files": str(folder / "a.jsonl")}):
        whole = load_mixture([{**part, "columns": columns}])
        assert whole[0] == {"prompt": "a0", "completion": "x"}


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"path": "c.jsonl"}, r"datasets\[1\]: .*c.jsonl does not exist"),
        ({"path": "json", "data_files": "c.jsonl"}, r"datasets\[1\]: .*c.jsonl"),
        ({"path": "json", "data_files": "b.jsonl", "columns": ["answer"]}, r"datasets\[1\]: .*\['answer'\].*prompt"),
    ],
)
def test_parts_that_cannot_be_loaded(folder, monkeypatch, part, message):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=message):
        load_mixture([{"path": "a.jsonl"}, part])


@pytest.mark.parametrize(
    ("second", "options", "message"),
    [
        ({"name": "x"}, {}, r"datasets\[1\] has no path"),
        ("b.jsonl", {}, r"datasets\[1\] is 'b.jsonl'; expected a mapping"),
        ({"path": "b.jsonl", "columns": "prompt"}, {}, r"datasets\[1\]: columns is 'prompt'; expected a list of names"),
        ({"path": "b.jsonl", "fraction": float("inf")}, {}, r"datasets\[1\]: fraction is inf"),
        ({"path": "b.jsonl", "weight": 2}, {}, r"datasets\[1\] has the unknown key weight; it takes path, name"),
        ({"path": "b.jsonl", "fraction": 1}, {}, "fraction is set for some datasets only"),
        ({"path": "b.jsonl", "fraction": -1}, {}, r"datasets\[1\]: fraction is -1; expected a number above 0"),
        ({"path": "b.jsonl", "fraction": 1}, {"streaming": True}, r"datasets\[1\]: fraction needs the number of rows"),
    ],
)
def test_bad_parts(second, options, message):
    with pytest.raises(ValueError, match=message):
        load_mixture([{"path": "a.jsonl"}, second], **options)


def test_no_parts():
    with pytest.raises(ValueError, match="datasets is empty"):
        load_mixture([])


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_several_pairs_are_mixed_with_their_like(folder, streaming):
    """Rows stay whole until they are tokenized, so a test set shares no conversation with the training data."""
    for name in "cd":
        turns = [{"prompt": f"{name}{i}", "chosen": "x", "rejected": "y"} for i in range(2)]
        write_rows(folder / f"{name}.jsonl", [{"turns": turns}])
    parts = [{"path": str(folder / f"{name}.jsonl")} for name in "cda"]
    whole = load_mixture(parts[:2], streaming=streaming)
    found = [row["prompt"][-1]["content"] for row in one_pair_rows(whole)]
    assert found == ["c0", "c1", "d0", "d1"] and len([*whole]) == 2
    write_rows(folder / "e.jsonl", [{"prompt": "p", "paths": [["x"], ["y"]], "pairs": [[0, 1]]}])
    for other in (parts[2], {"path": str(folder / "e.jsonl")}):
        with pytest.raises(
            UserError, match=r"datasets\[.\] .* has rows of several pairs \(`(turns|paths)`\), and other"
        ):
            load_mixture([other, *parts[:1]], streaming=streaming)


def test_parts_of_different_forms_name_the_part_and_the_mend(folder):
    a = {"path": str(folder / "a.jsonl")}
    for name, row in (
        ("chat", {"prompt": [{"role": "user", "content": "x"}], "chosen": ANSWER, "rejected": ANSWER}),
        ("argilla", {"instruction": "x", "chosen_response": "y", "rejected_response": "z"}),
        ("sft", {"prompt": "x", "completion": "y"}),
    ):
        write_rows(folder / f"{name}.jsonl", [row])
    for name, message in (
        (
            "chat",
            r"datasets\[1\] \(.*chat.jsonl\) has conversations, and datasets\[0\] \(.*has text: rewrite the text as",
        ),
        ("argilla", r"columns: \{instruction: prompt, chosen_response: chosen, rejected_response: rejected\}"),
        ("sft", r"datasets\[1\] .* has prompt and completion rows .*, and datasets\[0\] .* train on one of the two"),
    ):
        with pytest.raises(ValueError, match=message):
            load_mixture([a, {"path": str(folder / f"{name}.jsonl")}])
    columns = {"instruction": "prompt", "chosen_response": "chosen", "rejected_response": "rejected"}
    whole = load_mixture([a, {"path": str(folder / "argilla.jsonl"), "columns": columns}])
    assert prompts(whole)[-1] == "x"
