"""Reads JSON and CSV files as rows in which text is text. All files of text that the package reads go through here.

The readers of `datasets` guess types: an answer such as "2024-01-02" becomes a timestamp, and in CSV files "NA" becomes
null and "1e5" a number. Here a JSON value keeps its type, and a CSV value is text; an empty CSV cell is null. A column
of JSON values has a type of Arrow if that keeps all its values exactly, else ``ExactJson``.

The classes are builders of `datasets`, which downloads, caches and splits the data.
"""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import IO, Any

import pyarrow as pa
from datasets import ArrowBasedBuilder, BuilderConfig, DatasetInfo, Features, List, SplitGenerator, Value

from ..errors import UserError, at_place
from .image_files import resolve_images
from .rows import ExactJson

VERSION = "2"  # of the rows that are read; `datasets` keys its cache by it

_ROWS = 1000  # rows of a table
_HEAD = 1000  # rows of a streamed JSON file that tell its columns

FileRow = dict[str, Any]

# --- Rows of a JSON file ---


def read_json(file: IO[bytes]) -> Iterator[FileRow]:
    """Yields the rows of a file that holds one JSON object per line, or a list of objects.

    Raises:
        UserError: the file is malformed; the message says where, but does not name the file.
    """
    is_start = True
    for number, line in enumerate(file, start=1):
        line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
        if not line.strip():
            continue
        if is_start and line.lstrip().startswith(b"["):
            text = line + file.read()
            for index, row in enumerate(_parse(text, number)):
                yield _check_row(row, text, f"item {index}")
            return
        is_start = False
        yield _check_row(_parse(line, number), line, f"line {number}")


def _parse(text: bytes, number: int) -> Any:
    """Parses JSON that begins in this line of a file."""
    try:
        return json.loads(text.decode().rstrip("\n"))
    except UnicodeDecodeError as error:
        line = number + text[: error.start].count(b"\n")
        raise UserError(f"line {line}: not UTF-8, at the byte {text[error.start]:#04x}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"line {number + error.lineno - 1}, column {error.colno}: {error.msg}") from error
    except ValueError as error:  # an integer of more digits than Python reads
        raise UserError(f"line {number}: {error}") from error


def _check_row(row: Any, text: bytes, where: str) -> FileRow:
    if not isinstance(row, dict):
        raise UserError(f"{where}: {type(row).__name__}; expected an object with the columns as keys")
    if b"\\ud" in text or b"\\uD" in text:  # the escape of a surrogate, which need not be half of a pair
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise UserError(f"{where}: {half!r} is half of a surrogate pair, which is not valid text") from error
    return row


# --- Rows of a CSV file ---


def read_csv(file: IO[bytes], delimiter: str = ",") -> Iterator[FileRow]:
    """Yields the rows of a file whose first line is a header. Values are text, and an empty cell is None.

    A column without a name is called "Unnamed: 0", with its number, as pandas does.

    Raises:
        UserError: the file is malformed; the message says where, but does not name the file.
    """
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is less than a long response
    lines = csv.reader(io.TextIOWrapper(file, "utf-8-sig", newline=""), delimiter=delimiter, strict=True)
    header: list[str] = []
    try:
        for cells in lines:
            if not header:
                header = [name or f"Unnamed: {i}" for i, name in enumerate(cells)]
                if twice := [name for name in header if header.count(name) > 1]:
                    raise UserError(f"line {lines.line_num}: two columns are named {twice[0]!r}")
            elif len(cells) == len(header):
                yield {name: cell or None for name, cell in zip(header, cells)}
            elif cells:  # not an empty line
                raise UserError(
                    f"line {lines.line_num}: {len(cells)} cells, but the header has {len(header)}: put text with"
                    " commas, quotes or newlines in quotes"
                )
    except csv.Error as error:
        raise UserError(f"line {lines.line_num}: {error}") from error
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(f"after line {lines.line_num}: not UTF-8, at the byte {byte:#04x}") from error


# --- Types of JSON columns ---

# A kind is the name of an Arrow type, "small" (integers that a float keeps exactly), "json" (no Arrow type keeps the
# values exactly), or (kind of the items,) of a list.
_Kind = str | tuple
_INT64, _EXACT_FLOAT = 2**63, 2**53
_JOINED: dict[tuple[_Kind, _Kind], _Kind] = {("small", "int64"): "int64", ("small", "float64"): "float64"}
_FEATURES: dict[_Kind, Any] = {"small": Value("int64"), "json": ExactJson()}


def _kind(value: Any) -> _Kind:
    if value is None:
        return "null"
    if isinstance(value, str):
        return "string"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "small" if abs(value) <= _EXACT_FLOAT else "int64" if -_INT64 <= value < _INT64 else "json"
    if isinstance(value, float):
        return "float64"
    if isinstance(value, list):
        # The extremes of a long list of token ids tell its kind.
        items = (min(value), max(value)) if set(map(type, value)) == {int} else value
        inner: _Kind = "null"
        for kind in set(map(_kind, items)):
            inner = _join(inner, kind)
        return "json" if inner == "json" else (inner,)
    return "json"


def _join(one: _Kind, other: _Kind) -> _Kind:
    """Returns the kind of a column that has values of both kinds."""
    if one == other or other == "null":
        return one
    if one == "null":
        return other
    if isinstance(one, tuple) and isinstance(other, tuple):
        inner = _join(one[0], other[0])
        return "json" if inner == "json" else (inner,)
    return _JOINED.get((one, other), _JOINED.get((other, one), "json"))


def _feature(kind: _Kind) -> Any:
    if isinstance(kind, tuple):
        return List(_feature(kind[0]))
    return _FEATURES.get(kind) or Value(kind)


# --- Files ---

_COMPRESSIONS = (".gz", ".zst", ".xz", ".bz2")


def file_type(name: str | Path) -> str:
    """Returns the suffix of a file or URL in lower case, without that of its compression: ".jsonl" of "A.JSONL.gz"."""
    path = PurePath(str(name).partition("?")[0].lower())
    return PurePath(path.stem).suffix if path.suffix in _COMPRESSIONS else path.suffix


def _is_zstd(name: str) -> bool:
    return str(name).partition("?")[0].lower().endswith(".zst")


def _decompressed(file: IO[bytes], name: str) -> IO[bytes]:
    """Returns the content of a zstd file. `datasets` decompresses other files; for zstd it needs another package."""
    if not _is_zstd(name):
        return file
    stream: Any = pa.CompressedInputStream(pa.PythonFile(file, "r"), "zstd")
    return io.BufferedReader(stream)


# --- Builders ---


class _Files(ArrowBasedBuilder):
    """Reads files of one kind. A file that lacks a column of another file has nulls in it."""

    BUILDER_CONFIG_CLASS = BuilderConfig

    def _info(self) -> DatasetInfo:
        return DatasetInfo()

    def _split_generators(self, dl_manager: Any) -> list[SplitGenerator]:
        dl_manager.download_config.extract_on_the_fly = True
        downloaded = dl_manager.download(self.config.data_files)
        extracted = {
            split: [
                path if _is_zstd(name) else dl_manager.extract(path)
                for path, name in zip(paths, self.config.data_files[split], strict=True)
            ]
            for split, paths in downloaded.items()
        }
        splits = []
        for split, archives in extracted.items():
            named = zip(archives, self.config.data_files[split], strict=True)
            files = [(path, str(name)) for archive, name in named for path in dl_manager.iter_files(archive)]
            paths, names = ([file[i] for file in files] for i in (0, 1))
            splits.append(SplitGenerator(name=split, gen_kwargs={"paths": paths, "names": names}))
        everything = [file for split in splits for file in zip(*split.gen_kwargs.values())]
        self.info.features = self._find_features(everything, dl_manager.is_streaming)
        if not self.info.features:
            raise UserError(f"{everything[0][1]}: no rows")
        return splits

    def _parse(self, file: IO[bytes], name: str) -> Iterator[FileRow]:
        """Yields the rows of a file."""
        raise NotImplementedError

    def _find_features(self, files: Sequence[tuple[str, str]], streaming: bool) -> Features:
        """Returns the columns of (path, name) files. The files of a stream are not read to their ends."""
        raise NotImplementedError

    def _generate_tables(self, paths: Sequence[str], names: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
        schema = self.info.features.arrow_schema
        encode = ExactJson().encode_example
        stored = [name for name, feature in self.info.features.items() if isinstance(feature, ExactJson)]
        numbers = itertools.count()
        for path, name in zip(paths, names):
            rows = self._rows(path, name)
            while batch := list(itertools.islice(rows, _ROWS)):
                columns: dict[str, list] = {column: [row.get(column) for row in batch] for column in schema.names}
                columns |= {column: list(map(encode, columns[column])) for column in stored}
                yield next(numbers), pa.table(columns, schema=schema)

    def _rows(self, path: str, name: str) -> Iterator[FileRow]:
        """Yields the rows of a file, which error messages call ``name``."""
        # For a stream, `datasets` replaces the `open` of this module by one that reads remote files.
        with at_place(name, (UserError, pa.ArrowException)), open(path, "rb") as file:
            for number, row in enumerate(self._parse(_decompressed(file, name), name)):
                if self.info.features and (unknown := row.keys() - self.info.features.keys()):
                    raise UserError(
                        f"row {number} has the column `{min(unknown)}`, which the stream's first {_HEAD} rows lack:"
                        " add it to the first row with the value null, or read the data without streaming"
                    )
                yield resolve_images(row, name)


class JsonFiles(_Files):
    """Rows of JSON files, one object per line or a list of objects."""

    def _parse(self, file: IO[bytes], name: str) -> Iterator[FileRow]:
        return read_json(file)

    def _find_features(self, files: Sequence[tuple[str, str]], streaming: bool) -> Features:
        kinds: dict[str, _Kind] = {}
        for path, name in files:
            for row in itertools.islice(self._rows(path, name), _HEAD if streaming else None):
                for column, value in row.items():
                    kinds[column] = _join(kinds.get(column, "null"), _kind(value))
        # The rest of a stream may have other types.
        return Features({column: _feature("json" if streaming else kind) for column, kind in kinds.items()})


@dataclass
class CsvConfig(BuilderConfig):
    """Configuration of ``CsvFiles``: ``sep`` separates cells."""

    sep: str = ","


class CsvFiles(_Files):
    """Rows of CSV files with a header."""

    BUILDER_CONFIG_CLASS = CsvConfig

    def _parse(self, file: IO[bytes], name: str) -> Iterator[FileRow]:
        return read_csv(file, "\t" if file_type(name) == ".tsv" else self.config.sep)

    def _find_features(self, files: Sequence[tuple[str, str]], streaming: bool) -> Features:
        first = [next(self._rows(path, name), {}) for path, name in files]
        return Features({column: Value("string") for row in first for column in row})
