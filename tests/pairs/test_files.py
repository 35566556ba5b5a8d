"""Tests reading responses in chunks, rows written in batches, and that files are written whole or not at all."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pytest

from cpt_kernels.files import replacing
from cpt_kernels.pairs import files as pairs_data
from cpt_kernels.pairs.build import DropReason, build_pairs
from cpt_kernels.pairs.files import (
    group_batches,
    is_conversational,
    load_responses,
    pair_batches,
    take,
    write_batches,
)
from tests.helpers.command import write_rows
from tests.helpers.rows import assistant, grouped_rows, user


def load(tmp_path, rows, **options):
    return load_responses([str(write_rows(tmp_path / "rows.jsonl", rows))], **options)


def many_rows(prompts=30):
    return [
        {"prompt": f"p{p}", "model": model, "response": f"{model} {p}"}
        for model in ("a", "b", "c")
        for p in range(prompts)
    ]


@pytest.mark.parametrize("kind", [pa.large_string(), pa.int64()])
def test_take(kind):
    chunks = [[0, 1, 2], [], [3], [4, 5]]
    column = pa.chunked_array([pa.array(chunk).cast(kind) for chunk in chunks], kind)
    for rows in ([5, 0, 3, 3, 1], [], [2], list(range(6)), [4, 4]):
        assert take(column, np.array(rows, np.int64)).equals(pa.array(rows, pa.int64()).cast(kind))


@pytest.mark.parametrize("batch", [1, 7, 1000])
@pytest.mark.parametrize("chat", [False, True])
def test_batches_hold_what_the_pure_functions_give(tmp_path, monkeypatch, batch, chat):
    monkeypatch.setattr(pairs_data, "_BATCH", batch)
    rows = many_rows()
    responses = load(tmp_path, rows)
    columns = [[row[name] for row in rows] for name in ("prompt", "model", "response")]
    pairs = build_pairs(*columns, "a > b > c")
    part = np.arange(len(pairs)) % 90 < 60  # the first 20 prompts
    if chat:
        columns[0], columns[2] = [user(text) for text in columns[0]], [assistant(text) for text in columns[2]]
    flat = [row for table in pair_batches(responses, pairs, part, chat) for row in table.to_pylist()]
    assert flat == [row for row, kept in zip(pairs.rows(*columns), part) if kept]
    grouped = [row for table in group_batches(responses, pairs, part, chat) for row in table.to_pylist()]
    assert grouped == list(grouped_rows(pairs, *columns))[:20]


def test_the_source_of_a_response(tmp_path):
    names = [str(write_rows(tmp_path / name, many_rows(4))) for name in ("a.jsonl", "b.jsonl")]
    responses = load_responses([*names, names[0]])
    assert len(responses) == 24 and responses.sources == {names[0]: 0, names[1]: 12}
    assert responses.where(11) == f"{names[0]} row 11" and responses.where(12) == f"{names[1]} row 0"
    assert responses.where(23) == f"{names[1]} row 11"


def test_the_name_of_a_response(tmp_path):
    models = {"a.jsonl": ["weak", "both"], "b.jsonl": ["both", None]}
    files = [
        write_rows(tmp_path / name, [{"prompt": "p", "model": m, "response": "x"} for m in models[name]])
        for name in models
    ]
    responses = load_responses(list(map(str, files)))
    assert [responses.name(i) for i in range(4)] == [
        *("weak: row 0", "both: row 1 of a.jsonl", "both: row 0 of b.jsonl", "unknown: row 1"),
    ]


def test_unusable_responses_are_marked_with_a_reason(tmp_path):
    rows = [
        {"prompt": "p", "model": "a", "response": "fits"},
        {"prompt": "p", "model": "a", "response": "does not fit"},
        {"prompt": "p", "model": None, "response": "fits"},
        {"prompt": "p", "model": "a", "response": None},
    ]
    responses = load(tmp_path, rows, max_length={"characters": 5})
    assert responses.drops.tolist() == [
        DropReason.KEPT,
        DropReason.TOO_LONG,
        DropReason.NO_MODEL_NAMED,
        DropReason.EMPTY_RESPONSE,
    ]
    assert responses.models.tolist() == ["a", "a", "unknown", "a"] and not is_conversational(responses)
    rated = load(tmp_path, [{**row, "score": 1} for row in rows], rating="score")
    assert rated.drops.tolist() == [DropReason.KEPT, DropReason.KEPT, DropReason.KEPT, DropReason.EMPTY_RESPONSE]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_failed_run_leaves_the_old_file(tmp_path, suffix):
    path = tmp_path / f"pairs{suffix}"
    path.write_text("old")

    def batches():
        yield pa.table({"prompt": ["é\u2028\r\n"]})
        raise RuntimeError("no space left")

    with pytest.raises(RuntimeError, match="no space left"), replacing(path) as (temporary,):
        write_batches(temporary, suffix, batches(), 2, "")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as (temporary,):
        write_batches(temporary, suffix, iter([pa.table({"prompt": ["é\u2028\r\n"]})] * 2), 2, "")
    if suffix == ".jsonl":
        assert [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]] == [
            {"prompt": "é\u2028\r\n"}
        ] * 2
    assert list(tmp_path.iterdir()) == [path]
