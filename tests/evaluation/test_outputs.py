"""Tests of evaluation/outputs.py: both forms of output files, joining by prompt, and the export."""

from __future__ import annotations

import json

import pytest

from cpt_kernels.evaluation.outputs import ModelOutputs, as_alpaca_outputs, join, read_outputs, select_models
from cpt_kernels.generation.exports import write_alpaca_eval
from tests.helpers.command import write_rows
from tests.helpers.rows import user


def rows(model: str, responses: dict[str, str]) -> list[dict]:
    return [{"prompt": prompt, "model": model, "response": text} for prompt, text in responses.items()]


def test_both_forms_give_the_same_outputs(tmp_path):
    ours = write_rows(tmp_path / "ours.jsonl", rows("a", {"p": "x", "q": "y"}))
    theirs = tmp_path / "model_outputs.json"
    theirs.write_text(
        json.dumps(
            [{"instruction": p, "output": o, "generator": "a", "dataset": "d"} for p, o in (("p", "x"), ("q", "y"))]
        )
    )
    assert read_outputs(ours) == read_outputs(theirs) == {"a": ModelOutputs("a", {"p": ["x"], "q": ["y"]})}


def test_several_models_and_conversations(tmp_path):
    made = [*rows("a", {"p": "x"}), *rows("b", {"p": ""}), *rows("a", {"p": "again"})]
    chats = [{"prompt": user("p"), "model": "a", "response": "x"}]
    chats.append({"prompt": user("p") + user("q"), "model": "a", "response": "y"})
    found = read_outputs(write_rows(tmp_path / "o.jsonl", made))
    assert found == {"a": ModelOutputs("a", {"p": ["x", "again"]}), "b": ModelOutputs("b", {"p": [""]})}
    assert len(found["a"]) == 2
    of_chats = read_outputs(write_rows(tmp_path / "c.jsonl", chats))["a"]
    assert list(of_chats.responses) == ["p", json.dumps(user("p") + user("q"))], (
        "a chat of one user turn is identified by its text"
    )
    with pytest.raises(ValueError, match="1 prompts of a have several turns"):
        as_alpaca_outputs(of_chats)
    system = [{"role": "system", "content": "Be brief."}, *user("p")]
    made = [{"prompt": system, "model": "a", "response": "x"}]
    assert read_outputs(write_rows(tmp_path / "s.jsonl", made)) == {"a": ModelOutputs("a", {"p": ["x"]})}


def test_a_file_without_model_names_is_named_after_the_file(tmp_path):
    made = [{"prompt": "p", "response": "x"}]
    assert list(read_outputs(write_rows(tmp_path / "mine.jsonl", made))) == ["mine"]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([{"prompt": "p", "chosen": "x"}], "has the columns .*outputs have prompt, model, response or instruction"),
        ([{"prompt": "p", "response": "x"}, {"prompt": "q", "response": None}], "row 1 .*response is None"),
        ([{"prompt": "", "response": "x"}], "row 0 .*prompt is ''"),
        ([{"prompt": ["p"], "response": "x"}], "row 0 .*`prompt` is a list of str; expected text or a list of"),
    ],
)
def test_invalid_files(tmp_path, made, message):
    with pytest.raises(ValueError, match=message):
        read_outputs(write_rows(tmp_path / "o.jsonl", made))


def test_outputs_are_joined_by_the_text_of_the_prompt():
    outputs = ModelOutputs("a", {"q": ["aq"], "only a": ["x"], "p": ["ap"]})
    baseline = ModelOutputs("b", {"p": ["bp"], "q": ["bq"], "only b": ["y"], "b too": ["z"]})
    found = join(outputs, baseline)
    assert (found.prompts, found.outputs, found.baseline_outputs) == (["p", "q"], ["ap", "aq"], ["bp", "bq"])
    assert (found.without_baseline, found.without_output, len(found)) == (1, 2, 2)


def test_join_of_several_responses():
    one, two = ModelOutputs("a", {"p": ["x"]}), ModelOutputs("b", {"p": ["y", "z"]})
    assert join(one, two).outputs == ["x", "x"] and join(one, two).baseline_outputs == ["y", "z"]
    assert join(two, one).outputs == ["y", "z"] and join(two, one).baseline_outputs == ["x", "x"]
    assert join(two, two).outputs == join(two, two).baseline_outputs == ["y", "z"]
    with pytest.raises(ValueError, match="b has 2 responses to 'p', c has 3"):
        join(two, ModelOutputs("c", {"p": ["1", "2", "3"]}))


def test_no_common_prompt():
    with pytest.raises(ValueError, match="no prompt of a is among those of b: the first are 'p ' and 'p'"):
        join(ModelOutputs("a", {"p ": ["x"]}), ModelOutputs("b", {"p": ["y"]}))


def test_export(tmp_path):
    outputs = ModelOutputs("a", {"p": ["x"], "q": ["ü"]})
    write_alpaca_eval(tmp_path / "o.json", "a", as_alpaca_outputs(outputs))
    assert json.loads((tmp_path / "o.json").read_text()) == [
        {"instruction": "p", "output": "x", "generator": "a"},
        {"instruction": "q", "output": "ü", "generator": "a"},
    ]
    assert read_outputs(tmp_path / "o.json") == {"a": outputs}
    with pytest.raises(ValueError, match="2 responses to 'p'; alpaca_eval takes one"):
        as_alpaca_outputs(ModelOutputs("a", {"p": ["x", "y"]}))


def test_choose():
    found = {"a": ModelOutputs("a", {}), "b": ModelOutputs("b", {})}
    assert select_models(found, ["b"], "models") == [found["b"]]
    with pytest.raises(ValueError, match="models=c: the file has outputs of a, b"):
        select_models(found, ["b", "c"], "models")
