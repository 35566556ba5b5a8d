"""Tests that every command reads the text of files as it is: dates, numbers and nulls in text stay text."""

import json

import pytest

from cpt_kernels import cli
from cpt_kernels.cli.evaluate import main as evaluate
from cpt_kernels.cli.pairs import main as build_pairs
from cpt_kernels.data.sources import load_data
from cpt_kernels.evaluation.outputs import join, read_outputs
from cpt_kernels.generation.prompts import read_prompts
from tests.helpers.architectures import tiny_model
from tests.helpers.rows import assistant, user
from tests.helpers.text_files import TEXTS, write
from tests.helpers.toy import losses, make_trainer, preference_rows, word_tokenizer

NAMES = pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
# "strong" answers each prompt with one of the texts.
ANSWERS = [
    {"prompt": f"answer {i} of {text}", "model": model, "response": f"{text}{mark}", "score": rating}
    for i, text in enumerate(TEXTS)
    for model, mark, rating in (("3.5", "", "1e1"), ("007", "?", "9"))
]


def pairs(*argv):
    build_pairs([str(arg) for arg in argv])
    return [json.loads(line) for line in open(argv[-1], encoding="utf-8")]


@NAMES
def test_pairs(tmp_path, name, monkeypatch):
    """Also the names of models and the ratings, which CSV files can only hold as text."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: path.write_bytes(b""))
    source, output = write(tmp_path, name, ANSWERS), tmp_path / "pairs.jsonl"
    wide = [{"prompt": row["prompt"], "3.5": row["response"], "007": f"{row['response']}?"} for row in ANSWERS[::2]]
    for found, gap in (
        (pairs(source, "--order", "3.5 > 007", "--output", output), 1),
        (pairs(write(tmp_path, f"wide-{name}", wide), "--order", "3.5 > 007", "--output", output), 1),
        (pairs(source, "--ratings", "score", "--output", output), 1.0),
    ):
        assert [row["chosen"] for row in found] == TEXTS and [row["rejected"] for row in found] == [
            t + "?" for t in TEXTS
        ]
        assert {(row["chosen_model"], row["rejected_model"], row["gap"]) for row in found} == {("3.5", "007", gap)}
    assert [row["chosen"] for row in load_data(output)] == TEXTS


def test_nested_responses_with_different_keys(tmp_path, monkeypatch):
    """The items of JSON lists need not have the same keys or types."""
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, path, **_: path.write_bytes(b""))
    items = [{"model": "a", "response": "2024-01-02", "score": 5}, {"model": "b", "response": "12", "score": "2.5"}]
    items.append({"generator": "c", "output": "null", "score": None})
    rows = [{"prompt": "p", "completions": items}, {"prompt": "q", "completions": items[:2]}]
    found = pairs(write(tmp_path, "a.jsonl", rows), "--ratings", "score", "--output", tmp_path / "pairs.jsonl")
    assert [(row["prompt"], row["chosen"], row["rejected"], row["gap"]) for row in found] == [
        (prompt, "2024-01-02", "12", 2.5) for prompt in "pq"
    ]


@NAMES
def test_win_rates(tmp_path, name):
    path = write(tmp_path, name, ANSWERS)
    outputs = read_outputs(path)
    compared = join(outputs["3.5"], outputs["007"])
    assert compared.outputs == TEXTS and compared.prompts == [row["prompt"] for row in ANSWERS[::2]]
    evaluate(["export", "--outputs", str(path), "--model", "007", "--to", str(tmp_path / "out.json")])
    assert [row["output"] for row in json.loads((tmp_path / "out.json").read_text())] == [f"{text}?" for text in TEXTS]


@NAMES
def test_prompts(tmp_path, name):
    rows = [{"prompt": text, "id": str(i)} for i, text in enumerate(TEXTS)]
    prompts, dropped = read_prompts(load_data(write(tmp_path, name, rows)))
    assert [prompt.content for prompt in prompts] == TEXTS and not dropped


@NAMES
@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_training(tmp_path, name, streaming):
    """A gap and a column of the curriculum may be text."""
    rows = preference_rows(12)
    options = dict(max_steps=3, gap_column="gap", curriculum={"levels": 2})
    for row in rows:
        row["gap"] += 1
    given = [row | {"gap": str(row["gap"])} for row in rows] if name == "a.csv" else rows
    found = []
    for data in (write(tmp_path, "exact.jsonl", rows), write(tmp_path, name, given)):
        trainer = make_trainer(tmp_path, train_dataset=load_data(data, streaming=streaming), **options)
        trainer.train()
        found.append(losses(trainer))
    assert found[0] == found[1]


def test_an_answer_that_is_a_number_is_dropped_and_reported(tmp_path):
    rows = [{"prompt": "w0", "chosen": text, "rejected": " w1"} for text in (12, " w2")]
    trainer = make_trainer(tmp_path, train_dataset=load_data(write(tmp_path, "a.jsonl", rows)))
    (drop,) = trainer.reports["train"].dropped.values()
    assert drop.rows == [0] and drop.detail.startswith("`chosen` is int; expected text")
    with pytest.raises(ValueError, match=r"row 0 \(from 0\): response is 12, expected text"):
        read_outputs(write(tmp_path, "b.jsonl", [{"prompt": "p", "model": "m", "response": 12}]))


def test_a_new_column_beside_conversations(tmp_path):
    """`cpt generate` writes a dataset with a column of responses, and leaves its other values as they are."""
    call = {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "f", "arguments": {"x": 0.1234567890123, "y": None}}}],
    }
    rows = [
        {"prompt": user("w1"), "chosen": assistant("2024-01-02"), "rejected": [call]},
        {"prompt": user("w2"), "chosen": assistant("12"), "rejected": assistant("w3"), "tools": [{"name": "f"}]},
    ]
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}w1 {{ m.content }} {% endfor %}"
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = write(tmp_path, "rows.jsonl", rows)
    command = ["generate", "--model_name_or_path", tmp_path / "model", "--dataset_name", data, "--max_new_tokens", 2]
    command += ["--output", tmp_path / "out.jsonl", "--add_column", "y", "--dataset_output", tmp_path / "new.jsonl"]
    assert cli.main(list(map(str, command))) == 0
    new = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    assert [{k: v for k, v in row.items() if k != "y" and v is not None} for row in new] == rows
    assert all(row["y"][0]["role"] == "assistant" for row in new)
