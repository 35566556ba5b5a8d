"""Tests that text in files stays text: data/readers.py, through load_data."""

import json
import time

import datasets
import pytest
from datasets import Value

from cpt_kernels.data.readers import read_csv
from cpt_kernels.data.rows import ExactJson
from cpt_kernels.data.sources import load_data
from tests.helpers.text_files import ROWS, TEXTS, as_csv, write

STREAMING = pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@STREAMING
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_text_stays_text(tmp_path, name, streaming):
    """Also in a file of which all rows look like one other type."""
    assert list(load_data(write(tmp_path, name, ROWS), streaming=streaming)) == ROWS
    for text in TEXTS:
        rows = [{"chosen": text, "rejected": "x"}] * 3
        assert list(load_data(write(tmp_path, name, rows), streaming=streaming)) == rows, text
        time.sleep(0.001)  # so that the file has another time


@STREAMING
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_column_that_looks_numeric_at_first(tmp_path, name, streaming):
    """A reader that decides by the first block of a file would fail, or drop or change the later text."""
    rows = [{"chosen": str(i), "rejected": "2024-01-02"} for i in range(2500)] + ROWS[:1]
    rows = [{"chosen": row["chosen"], "rejected": row["rejected"]} for row in rows]
    assert list(load_data(write(tmp_path, name, rows), streaming=streaming)) == rows


@STREAMING
def test_json_values_keep_their_types(tmp_path, streaming):
    rows = [
        {"a": 12, "b": 1, "c": 2**60, "d": True, "e": [1, 2], "f": None, "g": {"x": 1, "y": None}, "h": 2**53 + 1},
        {"a": "12", "b": 0.1, "c": 2**70, "d": None, "e": [], "f": None, "g": {"y": 0.8713219165802002}, "h": 1.5},
        {"a": None, "b": 2, "c": -1, "d": False, "e": None, "f": None, "g": [{"role": "user"}, "text"], "h": None},
        {"a": [1, "1"], "b": 1e300, "c": 0, "d": True, "e": [2**40], "f": None, "g": "{}", "h": 0},
    ]
    dataset = load_data(write(tmp_path, "a.jsonl", rows), streaming=streaming)
    assert list(map(repr, dataset)) == [
        repr(row | {"b": row["b"] if streaming else float(row["b"])}) for row in rows
    ]  # repr tells 1 from 1.0 and from True
    if not streaming:
        assert dataset.features["b"] == Value("float64") and dataset.features["e"].feature == Value("int64")
        assert {name for name in "abcdefgh" if isinstance(dataset.features[name], ExactJson)} == {"a", "c", "g", "h"}


def test_objects_of_all_rows_in_one_form_keep_the_order_of_their_keys(tmp_path):
    rows = [{"tools": [{"name": "f", "x": 1}]}, {"tools": [{"x": 1, "name": "f"}]}]
    read = list(load_data(write(tmp_path, "a.jsonl", rows)))
    assert [json.dumps(row) for row in read] == [json.dumps(row) for row in rows]


@STREAMING
def test_columns_that_begin_late(tmp_path, streaming):
    """A stream's columns are those of its first rows; a later one is an error, because it would be ignored."""
    few = [{"a": "x"}] * 900 + [{"b": "y"}]
    found = list(load_data(write(tmp_path, "a.jsonl", few), streaming=streaming))
    assert found == [{"a": "x", "b": None}] * 900 + [{"a": None, "b": "y"}]
    late = load_data(write(tmp_path, "b.jsonl", [{"a": "x"}] * 1500 + [{"b": "y"}]), streaming=streaming)
    if streaming:
        with pytest.raises(ValueError, match=r"b\.jsonl: row 1500 has the column `b`, which the stream's first 1000"):
            list(late)
    else:
        assert late[1500] == {"a": None, "b": "y"}


@STREAMING
def test_files_of_a_folder_may_differ(tmp_path, streaming):
    """A column may be missing in one file, and look numeric in another."""
    folder = tmp_path / "data"
    folder.mkdir()
    write(folder, "train-0.jsonl", [{"prompt": "1", "gap": 1}])
    write(folder, "train-1.jsonl", [{"prompt": "x", "gap": 0.5, "tools": [{"a": None}]}])
    write(folder, "test.jsonl", [{"prompt": "2024-01-02"}])
    expected = [{"prompt": "1", "gap": 1, "tools": None}, {"prompt": "x", "gap": 0.5, "tools": [{"a": None}]}]
    assert list(load_data(folder, streaming=streaming)) == expected
    assert list(load_data(folder, split="test", streaming=streaming)) == [
        {"prompt": "2024-01-02", "gap": None, "tools": None}
    ]


@STREAMING
def test_a_folder_with_a_readme(tmp_path, streaming):
    """The README of a dataset may name files and a separator; other options for reading are refused."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "rows.txt").write_text(as_csv(ROWS, ";"), newline="")
    readme = "---\nconfigs:\n- config_name: default\n  data_files: rows.txt\n  sep: ';'\n{}---\n"
    (folder / "rows.txt").rename(folder / "rows.csv")
    (folder / "README.md").write_text(readme.format("").replace("rows.txt", "rows.csv"))
    assert list(load_data(folder, streaming=streaming)) == ROWS
    (folder / "README.md").write_text(readme.format("  skiprows: 1\n").replace("rows.txt", "rows.csv"))
    with pytest.raises(ValueError, match="sets skiprows=1 for reading its files, which is not supported"):
        load_data(folder, streaming=streaming)


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path, "a.jsonl", ROWS[:2])
    first = load_data(path)
    assert load_data(path)._fingerprint == first._fingerprint  # so that the tokens are found in the cache
    time.sleep(0.01)
    write(tmp_path, "a.jsonl", ROWS[2:4])
    assert list(load_data(path)) == ROWS[2:4]


@STREAMING
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n\n1,2,3\n", r"a\.csv: line 4: 3 cells, but the header has 2: put text with commas"),
        ("a,b\n1\n", r"a\.csv: line 2: 1 cells, but the header has 2"),
        ("a,a\n1,2\n", r"a\.csv: line 1: two columns are named 'a'"),
        ('a,b\n1,"2\n', r"a\.csv: line 2: unexpected end of data"),
        ('a,b\n1,"2"3\n', r"a\.csv: line 2: ',' expected after '\"'"),
        (b"a,b\n1,\xe9\n", r"a\.csv: after line 0: not UTF-8, at the byte 0xe9"),
        ("a,b\n", r"a\.csv: no rows"),
    ],
)
def test_malformed_csv(tmp_path, content, message, streaming):
    path = tmp_path / "a.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        load_data(path, streaming=streaming)


def test_csv_details(tmp_path):
    """An empty cell is null; a column without a name gets one; a mark of UTF-8 and empty lines are no text."""
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbf,b\r\n,""\r\n\r\n x , "y"\r\n')
    with path.open("rb") as file:
        assert list(read_csv(file)) == [{"Unnamed: 0": None, "b": None}, {"Unnamed: 0": " x ", "b": ' "y"'}]


@STREAMING
def test_numbers_that_python_does_not_read(tmp_path, streaming):
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n{"a": ' + "9" * 5000 + "}\n")
    with pytest.raises(ValueError, match=r"a\.jsonl: line 2: Exceeds the limit"):
        list(load_data(path, streaming=streaming))
