"""Tests loading datasets from files, folders and the hub: data/sources.py."""

import json
import sys

import datasets
import pytest
from datasets import Dataset, DatasetDict, IterableDataset

from cpt_kernels.data.sources import load_data, parse_columns

ROWS = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    path = tmp_path / "data"
    path.mkdir()
    return path


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_rows(path):
    dataset = Dataset.from_list(ROWS)
    if path.suffix == ".parquet":
        dataset.to_parquet(path)
    elif path.suffix == ".csv":
        dataset.to_csv(path)
    else:
        write(path, LINES if path.suffix == ".jsonl" else json.dumps(ROWS, indent=2))
    return path


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.csv"])
def test_files(folder, name, streaming):
    dataset = load_data(write_rows(folder / name), streaming=streaming)
    assert isinstance(dataset, IterableDataset if streaming else Dataset)
    assert list(dataset) == ROWS


def test_json_lines_in_a_json_file(folder):
    assert list(load_data(write(folder / "a.json", "\ufeff" + LINES))) == ROWS


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", LINES + '{"prompt": "p"\n' + LINES, "a.jsonl: line 4, column 15: Expecting ',' delimiter"),
        ("a.jsonl", LINES + "\n\n[1, 2]\n", "a.jsonl: line 6: list; expected an object"),
        ("a.jsonl", b'{"prompt": "\xe9"}\n' + LINES.encode(), "a.jsonl: line 1: not UTF-8, at the byte 0xe9"),
        (
            "a.jsonl",
            LINES + '{"prompt": "\\ud800", "chosen": "", "rejected": ""}\n',
            "is half of a surrogate pair",
        ),
        ("a.jsonl", LINES + '{"prompt": "a\0b"}\n', "line 4, column 14: Invalid control character"),
        ("a.json", json.dumps(ROWS, indent=1)[:-2] + ",\n]", "a.json: line 17, column 1: "),
        ("a.json", '[{"prompt": "p"}, "text"]', "a.json: item 1: str; expected an object"),
        ("a.json", "[]", "a.json: no rows"),
        ("a.jsonl", "\n \n", "a.jsonl: no rows"),
        ("a.jsonl", "", "a.jsonl is an empty file"),
        ("a.parquet", "no parquet", "a.parquet cannot be read: .*Parquet magic bytes"),
    ],
)
def test_malformed_files(folder, name, content, message, streaming):
    with pytest.raises(ValueError, match=message):
        load_data(write(folder / name, content), streaming=streaming)


def test_malformed_json_far_inside_a_file(folder):
    path = write(folder / "a.jsonl", LINES * 20_000 + "{" + LINES)
    with pytest.raises(ValueError, match=r"a\.jsonl: line 60001, column 2: "):
        load_data(path)


def test_text_that_is_not_utf8_far_inside_a_file(folder):
    path = write(folder / "a.jsonl", LINES.encode() * 20_000 + b'{"prompt": "\xe9"}\n')
    with pytest.raises(ValueError, match=r"a\.jsonl: line 60001: not UTF-8"):
        load_data(path)


def test_missing_paths(folder):
    for path in (folder / "a.jsonl", folder / "b", "a.jsonl", "./a", "~/no such folder"):
        with pytest.raises(ValueError, match=r"does not exist \(looked for /"):
            load_data(path)
    with pytest.raises(ValueError, match=r"a\.txt is not a \.json, \.jsonl, \.ndjson, \.csv, \.tsv, \.parquet file"):
        load_data(write(folder / "a.txt", "text"))


def test_hub_name_without_network(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="'no-such-owner/no-such-data' is not a local file or folder, and the hub"):
        load_data("no-such-owner/no-such-data")


def test_hub_arguments(monkeypatch):
    """Hub datasets are found by `datasets` with name and configuration, and the split is read."""
    seen = []

    class Builder:
        def download_and_prepare(self):
            seen.append("prepared")

        def as_dataset(self, split):
            seen.append(split)
            return DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1]))

    def find(*names, **options):
        seen.append((names, options))
        return Builder()

    monkeypatch.setattr("cpt_kernels.data.sources.load_dataset_builder", find)
    assert len(load_data("owner/data", config="small")) == 3
    assert seen == [(("owner/data", "small"), {"data_files": None, "data_dir": None}), "prepared", None]


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_folder_of_files(folder, streaming):
    write_rows(folder / "train-0.jsonl")
    write_rows(folder / "train-1.jsonl")
    write(folder / "test.jsonl", LINES.splitlines()[0])
    assert list(load_data(folder, streaming=streaming)) == ROWS + ROWS
    assert list(load_data(folder, split="test", streaming=streaming)) == ROWS[:1]
    with pytest.raises(ValueError, match=r"(?i)split.*validation.*(train.*test|test.*train)"):
        load_data(folder, split="validation", streaming=streaming)


def test_folders_that_cannot_be_read(folder):
    with pytest.raises(ValueError, match=r"holds no \.json, \.jsonl"):
        load_data(folder)
    write_rows(folder / "a.jsonl")
    write(folder / "b.jsonl", "{")
    with pytest.raises(ValueError, match=r"b\.jsonl: line 1, column 2"):
        load_data(folder)
    (folder / "b.jsonl").unlink()
    write_rows(folder / "b.parquet")
    with pytest.raises(ValueError, match="mixes json and parquet files: name one file"):
        load_data(folder)


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_saved_datasets(folder, streaming):
    Dataset.from_list(ROWS).save_to_disk(folder / "one")
    DatasetDict(train=Dataset.from_list(ROWS), test=Dataset.from_list(ROWS[:1])).save_to_disk(folder / "many")
    assert list(load_data(folder / "one", streaming=streaming)) == ROWS
    assert list(load_data(folder / "many", streaming=streaming)) == ROWS
    assert list(load_data(folder / "many", split="test", streaming=streaming)) == ROWS[:1]
    with pytest.raises(ValueError, match="only the split 'train', not 'test'"):
        load_data(folder / "one", split="test", streaming=streaming)
    with pytest.raises(ValueError, match="has the splits 'train', 'test', not 'dev'"):
        load_data(folder / "many", split="dev", streaming=streaming)


def test_splits_of_a_file(folder):
    path = write_rows(folder / "a.jsonl")
    assert list(load_data(path, split="train[:2]")) == ROWS[:2]
    with pytest.raises(ValueError, match=r"a\.jsonl is one file and has only the split 'train', not 'test'"):
        load_data(path, split="test")
    with pytest.raises(ValueError, match="config='small' chooses a configuration of a hub dataset"):
        load_data(path, config="small")


@pytest.mark.parametrize("streaming", [False, True], ids=["map", "stream"])
def test_columns(folder, streaming):
    path = write_rows(folder / "a.jsonl")
    assert list(load_data(path, columns=["chosen"], streaming=streaming)) == [{"chosen": "a"}] * 3
    renamed = load_data(path, columns={"prompt": "prompt", "chosen": "completion"}, streaming=streaming)
    assert list(renamed) == [{"prompt": row["prompt"], "completion": "a"} for row in ROWS]
    with pytest.raises(
        ValueError, match=r"columns names \['best'\], but .*a\.jsonl has the columns \['prompt', 'chosen'"
    ):
        load_data(path, columns=["prompt", "best"], streaming=streaming)


def test_parse_columns(folder):
    assert parse_columns(None) is None
    columns = parse_columns(["prompt", "chosen=completion"])
    assert columns == {"prompt": "prompt", "chosen": "completion"} and parse_columns(["a=b=c"]) == {"a": "b=c"}
    assert load_data(write_rows(folder / "a.jsonl"), columns=columns).column_names == ["prompt", "completion"]


@pytest.mark.parametrize(("scheme", "package"), [("gs", "gcsfs"), ("az", "adlfs"), ("s3", "s3fs")])
def test_data_on_a_store_whose_package_is_not_installed(monkeypatch, scheme, package):
    monkeypatch.setitem(sys.modules, package, None)
    known = sys.modules["fsspec.registry"]._registry  # fsspec keeps what it has imported
    monkeypatch.delitem(known, scheme, raising=False)
    with pytest.raises(ValueError, match=rf"{scheme}://bucket/x.jsonl needs another package .*cpt-kernels\[{scheme}\]"):
        load_data(f"{scheme}://bucket/x.jsonl")
