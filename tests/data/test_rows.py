"""Tests that rows are what their author wrote: transforms, Arrow's nulls, and exact JSON values (data/rows.py)."""

import json

import datasets
import numpy as np
import pytest
import torch
from datasets import Dataset, Features, IterableDataset, Json, List, Value, load_dataset

from cpt_kernels.data.preparation import prepare
from cpt_kernels.data.rows import ExactJson, drop_nulls, find_null_places, visible_rows, write_rows
from cpt_kernels.data.sources import load_data
from cpt_kernels.generation.prompts import read_prompts
from tests.helpers.rows import assistant, decoded, make_tokenizer, pair, user

# Writes everything that a template can see of a message, tools and further arguments.
TEMPLATE = (
    "{{ tools | tojson if tools is defined and tools is not none }}{{ effort if effort is defined }}"
    "{% for m in messages %}[{{ m | tojson }}]{% endfor %}"
)


def call(**arguments):
    function = {"name": "f", "arguments": arguments}
    return [{"role": "assistant", "tool_calls": [{"type": "function", "function": function}]}]


def tool(name, **parameters):
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": parameters}}}


# Rows whose objects differ in their keys everywhere.
RAGGED = [
    {
        "prompt": user("weather?"),
        "chosen": call(city="Oslo", days=[{"n": 1}]),
        "rejected": assistant("No."),
        "tools": [tool("weather", city={"type": "string", "enum": ["Oslo", "Rome"]})],
        "chat_template_kwargs": {"effort": "low"},
    },
    {
        "prompt": [{"role": "system", "content": "s", "name": "n"}, *user("add")],
        "chosen": call(days=[], x=1, y={"z": 2}),
        "rejected": call(x=2),
        "tools": [tool("add", x={"type": "integer"}), {"name": "plain"}],
        "chat_template_kwargs": {"other": 1},
    },
    {"prompt": user("hi"), "chosen": assistant("a"), "rejected": assistant("b")},
]
# Nulls that the author wrote.
WITH_NULLS = [
    {
        "prompt": user("weather?"),
        "chosen": [{"role": "assistant", "content": None, **call(city=None)[0]}],
        "rejected": assistant("No."),
        "tools": [tool("weather", city={"type": "string", "default": None})],
    },
    {"prompt": user("hi"), "chosen": assistant("a"), "rejected": assistant("b"), "tools": None},
]


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def tokenizer():
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def rendered(rows, tokenizer):
    """Returns the text of each row's prompt + chosen and prompt + rejected, from the rows as they were written."""
    return [
        [
            tokenizer.apply_chat_template(
                row["prompt"] + row[side],
                tools=row.get("tools"),
                tokenize=False,
                **(row.get("chat_template_kwargs") or {}),
            )
            for side in ("chosen", "rejected")
        ]
        for row in rows
    ]


def trained(dataset, tokenizer):
    """Returns the same texts, from the tokens that are trained on."""
    groups, _ = prepare(dataset, tokenizer)
    return [[tokenizer.decode(row["prompt_ids"]) + text for text in decoded(row, tokenizer)] for row in groups]


def as_parquet(rows, folder):
    Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    return folder / "rows.parquet"


def as_jsonl(rows, folder):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def as_json_type(rows):
    columns = {name: Json() for row in rows for name in row}
    return Dataset.from_list([{**dict.fromkeys(columns), **row} for row in rows], features=Features(columns))


# Ways in which rows arrive that insert nulls.
THROUGH_ARROW = {
    "from_list": lambda rows, folder: Dataset.from_list(rows),
    "to_iterable": lambda rows, folder: Dataset.from_list(rows).to_iterable_dataset(),
    "mapped stream": lambda rows, folder: Dataset.from_list(rows).to_iterable_dataset().map(lambda row: row),
    "parquet": lambda rows, folder: load_data(as_parquet(rows, folder)),
    "parquet stream": lambda rows, folder: load_data(as_parquet(rows, folder), streaming=True),
    "transform": lambda rows, folder: Dataset.from_list(rows).with_transform(lambda batch: batch),
}
# Ways that keep rows as they are.
EXACT = {
    "jsonl": lambda rows, folder: load_data(as_jsonl(rows, folder)),
    "jsonl stream": lambda rows, folder: load_data(as_jsonl(rows, folder), streaming=True),
    "json type": lambda rows, folder: as_json_type(rows),
}


@pytest.mark.parametrize("way", [*THROUGH_ARROW, *EXACT, "generator"])
def test_nulls_of_arrow_are_not_trained(tmp_path, tokenizer, way):
    ways = THROUGH_ARROW | EXACT | {"generator": lambda rows, _: IterableDataset.from_generator(lambda: iter(rows))}
    assert trained(ways[way](RAGGED, tmp_path), tokenizer) == rendered(RAGGED, tokenizer)


@pytest.mark.parametrize("way", EXACT)
def test_nulls_of_the_author_are_trained(tmp_path, tokenizer, way):
    texts = trained(EXACT[way](WITH_NULLS, tmp_path), tokenizer)
    assert texts == rendered(WITH_NULLS, tokenizer)
    assert '{"city": null}' in texts[0][0] and '"default": null' in texts[0][0]


def test_arguments_as_json_text_keep_their_nulls(tmp_path, tokenizer):
    rows = [row | {"tools": json.dumps(row["tools"])} for row in WITH_NULLS]
    rows[0]["chosen"] = call(city="Oslo")
    rows[0]["chosen"][0]["tool_calls"][0]["function"]["arguments"] = '{"city": null}'
    texts = trained(Dataset.from_list(rows), tokenizer)
    assert '"default": null' in texts[0][0] and json.dumps('{"city": null}') in texts[0][0]


def test_implicit_prompts_and_other_forms(tmp_path, tokenizer):
    """Nulls are dropped in every column of messages, and in nested lists."""
    messages = [{"messages": row["prompt"] + row["chosen"]} for row in RAGGED]
    wholes = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in messages]
    assert [text for (text,) in trained(Dataset.from_list(messages), tokenizer)] == wholes
    implicit = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in RAGGED]
    plain = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in RAGGED]
    assert trained(Dataset.from_list(implicit), tokenizer) == rendered(plain, tokenizer)
    ranked = [{"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]]} for row in RAGGED]
    assert trained(Dataset.from_list(ranked), tokenizer) == rendered(plain, tokenizer)


@pytest.mark.parametrize("way", ["from_list", "parquet", "jsonl", "json type", "transform"])
def test_prompts_to_generate_for_have_no_nulls_of_arrow(tmp_path, way):
    prompts, _ = read_prompts((THROUGH_ARROW | EXACT)[way](RAGGED, tmp_path))
    for prompt, row in zip(prompts, RAGGED, strict=True):
        assert prompt.content == row["prompt"] and prompt.tools == row.get("tools")
        assert prompt.template_kwargs == row.get("chat_template_kwargs", {})


def test_drop_nulls_follows_the_types():
    value = {"a": None, "b": [None, {"c": None, "d": 1}], "e": {"f": {"g": None}}, "h": {}}
    assert drop_nulls(value, True) == {"b": [None, {"d": 1}], "e": {"f": {}}, "h": {}}
    features = Features({"x": {"a": Value("null"), "b": List(Json()), "e": {"f": ExactJson()}, "h": Json()}})
    places = find_null_places(features, ["x", "y"])
    assert drop_nulls(value, places["x"]) == {"b": [None, {"c": None, "d": 1}], "e": {"f": {"g": None}}, "h": {}}
    plain = Features({"p": Value("string"), "ids": List(List(Value("int32"))), "j": ExactJson()})
    assert find_null_places(plain, plain) == {} and find_null_places(None, ["b", "a"]) == {"a": True, "b": True}


def test_an_empty_list_of_tools_is_no_tools(tokenizer):
    rows = [pair(user("a"), assistant("b"), assistant("c"), tools=[])]
    assert trained(Dataset.from_list(rows), tokenizer) == rendered([rows[0] | {"tools": None}], tokenizer)


# --- Formats and transforms ---

RAW = [{"q": f"the sky {i}", "good": " is blue", "bad": " is bright", "note": None} for i in range(5)]


def as_pairs(batch):
    return {"prompt": [q.upper() for q in batch["q"]], "chosen": batch["good"], "rejected": batch["bad"]}


def test_a_transform_is_applied_once_to_every_row():
    seen = []

    def transform(batch):
        seen.extend(batch["q"])
        return as_pairs(batch)

    dataset = Dataset.from_list(RAW * 700).with_transform(transform)
    rows = visible_rows(dataset)
    assert seen == [row["q"] for row in RAW * 700]
    assert rows.format["type"] is None and rows.column_names == ["prompt", "chosen", "rejected"]
    assert rows[:] == as_pairs(Dataset.from_list(RAW * 700)[:])
    assert list(visible_rows(dataset.select([3, 1]))) == [rows[3], rows[1]]
    assert list(visible_rows(rows)) == list(rows)


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ({}, ["prompt", "chosen", "rejected"]),
        ({"columns": ["q", "good", "bad"]}, ["prompt", "chosen", "rejected"]),
        ({"columns": ["q", "good", "bad"], "output_all_columns": True}, ["prompt", "chosen", "rejected", "note"]),
    ],
)
def test_set_transform_with_columns(options, columns):
    dataset = Dataset.from_list(RAW)
    dataset.set_transform(as_pairs, **options)
    rows = visible_rows(dataset)
    assert rows.column_names == columns and rows[4] == {name: dataset[4][name] for name in columns}


@pytest.mark.parametrize("kind", ["numpy", "torch", "pandas", "arrow", None])
def test_a_format_hides_columns_but_changes_no_value(kind):
    dataset = Dataset.from_list([{"prompt_ids": [1, 2], "x": "a", "y": 1.5}] * 3)
    assert visible_rows(dataset.with_format(kind)).to_list() == dataset.to_list()
    assert visible_rows(dataset.with_format(kind, columns=["x"])).to_list() == [{"x": "a"}] * 3
    both = dataset.with_format(kind, columns=["x"], output_all_columns=True)
    assert visible_rows(both).to_list() == dataset.to_list()
    stream = dataset.to_iterable_dataset()
    assert list(visible_rows(stream.with_format(kind))) == dataset.to_list()


def test_a_transform_may_return_arrays():
    def transform(batch):
        count = len(batch["q"])
        return {"a": np.arange(count), "b": torch.ones(count, 2), "c": [np.float32(0.5)] * count, "d": [(1, 2)] * count}

    rows = visible_rows(Dataset.from_list(RAW).with_transform(transform))
    assert rows[4] == {"a": 4, "b": [1.0, 1.0], "c": 0.5, "d": [1, 2]}


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda batch: {"prompt": ["a"] * 9}, "does not return 5 values per column for 5 rows"),
        (lambda batch: {"prompt": "abcde"}, "does not return 5 values per column"),
        (lambda batch: ["a"] * 5, "does not return 5 values per column"),
        (lambda batch: {"prompt": [object()] * 5}, "column `prompt` that cannot be stored .object is not a JSON value"),
        (lambda batch: {"prompt": [b"a"] * 5}, "column `prompt` that cannot be stored .bytes is not a JSON value"),
    ],
)
def test_transforms_that_are_refused(transform, message):
    with pytest.raises(ValueError, match=message):
        visible_rows(Dataset.from_list(RAW).with_transform(transform))


def test_a_transform_with_other_columns_for_other_rows():
    def transform(batch):
        return {name: values for name, values in batch.items() if name != "bad" or batch["q"][0] == "the sky 0"}

    rows = [{"q": f"the sky {i}", "bad": "x"} for i in range(1500)]
    with pytest.raises(ValueError, match=r"returns the columns \['q'\] for row 1000, but \['bad', 'q'\] for row 0"):
        visible_rows(Dataset.from_list(rows).with_transform(transform))


def test_tokens_are_those_of_the_transformed_rows(tokenizer):
    """Nulls that a transform returns are the author's."""

    def as_chats(batch):
        return {
            "prompt": [user(q) for q in batch["q"]],
            "chosen": [call(city=None, n=i) for i in range(len(batch["q"]))],
            "rejected": [assistant(text) for text in batch["bad"]],
        }

    raw = Dataset.from_list(RAW)
    for transform in (as_pairs, as_chats):
        columns = transform(raw[:])
        rows = [dict(zip(columns, values)) for values in zip(*columns.values())]
        expected = rendered(rows, tokenizer) if transform is as_chats else trained(Dataset.from_list(rows), tokenizer)
        assert trained(raw.with_transform(transform), tokenizer) == expected


# --- Files ---


def test_written_rows_are_read_back(tmp_path):
    rows = [{"a": "12", "x": {"b": 0.5, "c": None}}, {"a": "2024-01-02", "x": "12"}, {"a": None, "x": None}]
    exact = load_data(as_jsonl(rows, tmp_path))
    for suffix in (".jsonl", ".parquet"):
        write_rows(exact, tmp_path / f"out{suffix}", suffix)
        assert list(load_data(tmp_path / f"out{suffix}")) == rows
    assert load_dataset("parquet", data_files=str(tmp_path / "out.parquet"), split="train").features["x"] == Json()
    write_rows(Dataset.from_list([{"x": {"a": 1}}, {"x": {"b": 2}}]), tmp_path / "out.jsonl", ".jsonl")
    assert (tmp_path / "out.jsonl").read_text() == '{"x": {"a": 1}}\n{"x": {"b": 2}}\n'
