"""Tests that files of every kind, compressed or not, and URLs are read alike: data/sources.py and data/readers.py."""

import bz2
import functools
import gzip
import http.server
import json
import threading

import datasets
import fsspec
import pyarrow as pa
import pytest

from cpt_kernels.data.sources import load_data
from cpt_kernels.errors import UserError


@pytest.fixture(autouse=True)
def _private_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # offline, `datasets` opens no URL


ROWS = [{"prompt": f"p{i}", "chosen": "2024-01-02", "rejected": "NA"} for i in range(3)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
TABLE = "".join("\t".join(cells) + "\n" for cells in (ROWS[0], *(row.values() for row in ROWS))).encode()


def zstd(content):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


FILES = {
    "rows.ndjson": LINES,
    "rows.JSONL": LINES,
    "rows.tsv": TABLE,
    "rows.jsonl.gz": gzip.compress(LINES),
    "rows.json.bz2": bz2.compress(json.dumps(ROWS).encode()),
    "rows.TSV.gz": gzip.compress(TABLE),
    "rows.jsonl.zst": zstd(LINES),
    "rows.csv.zst": zstd(TABLE.replace(b"\t", b",")),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_kinds_of_files(name, streaming, tmp_path):
    (tmp_path / name).write_bytes(FILES[name])
    assert list(load_data(tmp_path / name, streaming=streaming)) == ROWS
    # A URL is read through fsspec.
    fsspec.filesystem("memory").pipe(f"/{tmp_path.name}/{name}", FILES[name])
    assert list(load_data(f"memory://{tmp_path.name}/{name}", streaming=streaming, columns=["prompt"])) == [
        {"prompt": row["prompt"]} for row in ROWS
    ]


@pytest.mark.parametrize("streaming", [False, True])
def test_a_file_of_an_http_server(streaming, tmp_path):
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(LINES))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert list(load_data(f"{url}/rows.jsonl.gz", streaming=streaming)) == ROWS
        with pytest.raises(UserError, match=r"/none.jsonl cannot be read"):
            load_data(f"{url}/none.jsonl", streaming=streaming)
        server.shutdown()


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "rows.jsonl.zst").write_bytes(zstd(LINES)[:-9])
    with pytest.raises(ValueError, match=r"rows.jsonl.zst"):
        load_data(tmp_path / "rows.jsonl.zst")
    for url, message in (
        ("memory://none/rows.jsonl", "memory://none/rows.jsonl cannot be read: Unable to find"),
        ("unknown://x/rows.jsonl", "unknown://x/rows.jsonl: Protocol not known"),
        ("https://x/rows.txt", r"https://x/rows.txt is not a .json, .jsonl, .ndjson, .csv, .tsv, .parquet file"),
    ):
        with pytest.raises(ValueError, match=message):
            load_data(url)
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "ROWS.JSONL").write_bytes(LINES)
    with pytest.raises(ValueError, match=r"holds ROWS.JSONL, .* rename it, or name the file instead of the folder"):
        load_data(folder)
