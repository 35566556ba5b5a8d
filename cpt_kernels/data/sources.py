"""Loads datasets from local files, folders, URLs and the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from datasets import BuilderConfig, Dataset, IterableDataset, load_dataset_builder, load_from_disk
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.csv.csv import Csv
from datasets.packaged_modules.json.json import Json
from huggingface_hub.errors import HTTPError  # of httpx or, from version 2, of httpx2

from ..errors import UserError, user_error
from .image_files import as_files, resolve_columns
from .readers import VERSION, CsvFiles, JsonFiles, file_type
from .rows import read_columns
from .stores import filesystem, folder_copy, is_remote, list_files, shown

# Type of a file -> loader of the `datasets` library.
_LOADERS = {
    **dict.fromkeys((".json", ".jsonl", ".ndjson"), "json"),
    **dict.fromkeys((".csv", ".tsv"), "csv"),
    ".parquet": "parquet",
}
_READERS = {Json: JsonFiles, Csv: CsvFiles}  # loader of `datasets` -> ours


def load_data(
    name_or_path: str | Path,
    *,
    config: str | None = None,
    split: str | None = None,
    streaming: bool = False,
    columns: Sequence[str] | Mapping[str, str] | None = None,
) -> Dataset | IterableDataset:
    """Loads one split of a dataset.

    Args:
        name_or_path: a .json (a list of objects, or one object per line), .jsonl, .ndjson, .parquet, .csv or .tsv file,
            compressed (.gz, .zst, .xz, .bz2) or not; the URL of such a file, of any protocol of fsspec (https, s3, hf,
            ...); a folder or URL of such files, or one that `save_to_disk` wrote; or the name of a dataset on the hub.
        config: configuration of a hub dataset.
        split: name of the split. A file has only `train`. None: `train` if it exists, else the only split.
        streaming: return an `IterableDataset` that reads rows as they are needed.
        columns: keep only these columns. A mapping {name in the data: new name} also renames them.

    Raises:
        UserError: the data does not exist, is empty or malformed (the message gives the line of a JSON file), or has no
            such split or column. In a stream only the first row is checked; later errors come from `datasets`.
    """
    name = str(name_or_path).removeprefix("file://")
    path = Path(name).expanduser()
    if is_remote(name):
        filesystem(name)  # names the package of a store that is not installed
        dataset = _load_url(name, config, split, streaming)
    elif path.is_file():
        dataset = _load_file(path, config, split, streaming)
    elif path.is_dir():
        dataset = _load_folder(path, config, split, streaming)
    elif file_type(name) in _LOADERS or name.startswith((".", "/", "~")) or ("/" in name and path.parent.exists()):
        raise UserError(f"{name} does not exist (looked for {path.absolute()})")
    else:
        dataset = _load_hub(name, config, split, streaming)
    dataset = _choose_split(dataset, split, name)
    if is_one_file(name) and file_type(name) == ".parquet":
        dataset = resolve_columns(dataset, name)
    return dataset if columns is None else choose_columns(dataset, columns, name)


def is_one_file(name: str | Path) -> bool:
    """Returns whether a name of data is that of a file or of its URL, which has one split only."""
    return (is_remote(name) and file_type(name) in _LOADERS) or Path(name).expanduser().is_file()


def _load_url(url: str, config: str | None, split: str | None, streaming: bool):
    if not url.startswith("http"):
        filesystem(url)  # names the package that is missing
    if file_type(url) in _LOADERS or url.startswith("http"):
        return _load_file(url, config, split, streaming)
    files = list_files(url)
    if not files:
        raise UserError(f"{shown(url)} does not exist, or holds no file")
    if {"dataset_dict.json", "state.json"} & files.keys():
        return _load_saved(folder_copy(url), split, streaming)
    loaders = {_LOADERS[kind] for name in files if (kind := file_type(name)) in _LOADERS}
    if len(loaders) != 1:
        found = f"mixes {' and '.join(sorted(loaders))} files" if loaders else f"holds no {', '.join(_LOADERS)} file"
        raise UserError(f"the folder {shown(url)} {found}: name one file instead")
    if config is not None:
        raise UserError(f"config={config!r} chooses a configuration of a hub dataset, but {shown(url)} is a folder")
    patterns = DataFilesDict.from_patterns(get_data_patterns(url), base_path=url)  # splits by the names of files
    by_split = {part: [file for file in found if file_type(file) in _LOADERS] for part, found in patterns.items()}
    return _read_files([], loaders.pop(), streaming, url, data_files=by_split, split=split)


def _load_file(path: Path | str, config: str | None, split: str | None, streaming: bool):
    """Loads a file, or a URL if ``path`` is text."""
    if file_type(path) not in _LOADERS:
        raise UserError(f"{shown(path)} is not a {', '.join(_LOADERS)} file")
    if config is not None:
        raise UserError(f"config={config!r} chooses a configuration of a hub dataset, but {path} is a file")
    if split is not None and split.split("[")[0] != "train":
        raise UserError(f"{path} is one file and has only the split 'train', not {split!r}")
    files = [path] if isinstance(path, Path) else []
    return _read_files(files, _LOADERS[file_type(path)], streaming, data_files=str(path), split=split)


def _load_folder(path: Path, config: str | None, split: str | None, streaming: bool):
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return _load_saved(path, split, streaming)
    files = sorted(file for file in path.rglob("*") if file_type(file) in _LOADERS and file.name != "dataset_info.json")
    if not files:
        raise UserError(f"the folder {path} holds no {', '.join(_LOADERS)} file and is not from `save_to_disk`")
    if upper := [file.name for file in files if file_type(file) not in file.suffixes]:
        raise UserError(
            f"the folder {path} holds {upper[0]}, and `datasets` tells files of a folder by suffixes in lower case:"
            " rename it, or name the file instead of the folder"
        )
    # A folder with a README is a copy of a hub dataset, and its README says which files to read.
    loaders = {_LOADERS[file_type(file)] for file in files}
    if len(loaders) > 1 and not (path / "README.md").exists():
        raise UserError(f"the folder {path} mixes {' and '.join(sorted(loaders))} files: name one file instead")
    return _read_files(files, str(path), streaming, name=config, split=split)


def _load_saved(path: Path, split: str | None, streaming: bool):
    with user_error(f"{path} cannot be read"):
        saved = load_from_disk(str(path))
    if isinstance(saved, Dataset):
        own = str(saved.split or "train")
        if split not in (None, own):
            raise UserError(f"{path} was saved as one dataset and has only the split {own!r}, not {split!r}")
    chosen = _choose_split(saved, split, path)
    return chosen.to_iterable_dataset() if streaming else chosen


def _load_hub(name: str, config: str | None, split: str | None, streaming: bool):
    try:
        with user_error(name, (ValueError, ImportError)):  # an unknown configuration or split
            return load_files(name, config, split=split, streaming=streaming)
    except (FileNotFoundError, ConnectionError) as error:
        raise UserError(
            f"{name!r} is not a local file or folder, and the hub did not return a dataset of this name: {error}"
        ) from error


def _read_files(files: list[Path], loader: str, streaming: bool, what: str | None = None, **arguments):
    if empty := [str(file) for file in files if file.stat().st_size == 0]:
        raise UserError(f"{empty[0]} is an empty file")
    name = shown(what or arguments.get("data_files", loader))
    # Of a URL, the hub's client raises its HTTP client's errors.
    with user_error(f"{name} cannot be read", (ValueError, OSError, ImportError, HTTPError)):
        dataset = load_files(loader, streaming=streaming, **arguments)
        for part in dataset.values() if isinstance(dataset, dict) else [dataset]:
            # Reading the first row of a stream reports a malformed start here. Images are left to those who need them.
            if next(iter(as_files(part)), None) is None:
                raise UserError(f"{name}: no rows")
    return dataset


def load_files(
    loader: str,
    name: str | None = None,
    *,
    split: str | None = None,
    streaming: bool = False,
    data_files: Any = None,
    data_dir: str | None = None,
):
    """Loads what `datasets.load_dataset` would load with these arguments, but text in JSON and CSV files stays text.

    Raises:
        UserError: a JSON or CSV file is malformed, or the dataset's configuration has options for reading it.
    """
    builder: Any = load_dataset_builder(loader, name, data_files=data_files, data_dir=data_dir)
    own = next((own for theirs, own in _READERS.items() if isinstance(builder, theirs)), None)
    if own is not None:
        builder = own(
            config_name=builder.config.name,
            hash=VERSION,
            data_files=builder.config.data_files,
            base_path=builder.base_path,
            repo_id=builder.repo_id,
            dataset_name=builder.dataset_name,
            **_reading_options(loader, builder.config),
        )
    if streaming:
        return builder.as_streaming_dataset(split=split)
    try:
        builder.download_and_prepare()
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from error
        raise UserError(f"{loader}: {error.__cause__ or error}") from error
    return builder.as_dataset(split=split)


def _reading_options(loader: str, config: Any) -> dict[str, Any]:
    """Returns the options for our reader, from the configuration of a reader of `datasets`.

    A dataset on the hub may have set them in its README; `datasets` itself sets the separator of .tsv files.
    """
    default, general = type(config)(), {field.name for field in fields(BuilderConfig)}
    names = [field.name for field in fields(config) if field.name not in general]
    changed = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(default, name)}
    changed.pop("delimiter", None)  # another name for sep, which has the value, too
    if unknown := changed.keys() - {"sep"}:
        raise UserError(
            f"{loader} sets {min(unknown)}={changed[min(unknown)]!r} for reading its files, which is not supported:"
            " convert the files to JSON lines or Parquet"
        )
    return changed


def _choose_split(dataset, split: str | None, name: str | Path):
    if not isinstance(dataset, dict):
        return dataset
    wanted = split or ("train" if len(dataset) > 1 else next(iter(dataset)))
    if wanted not in dataset:
        raise UserError(f"{name} has the splits {', '.join(map(repr, dataset))}, not {wanted!r}: choose one of them")
    return dataset[wanted]


def parse_columns(names: Sequence[str] | None) -> dict[str, str] | None:
    """Parses `name` or `name in the data=new name` of each column into the mapping that `load_data` takes."""
    if names is None:
        return None
    return {old: new if equals else old for old, equals, new in (name.partition("=") for name in names)}


def choose_columns(
    dataset: Dataset | IterableDataset, columns: Sequence[str] | Mapping[str, str], name: str | Path
) -> Dataset | IterableDataset:
    """Keeps only these columns. A mapping {name in the data: new name} also renames them."""
    present = read_columns(dataset)
    if missing := [column for column in columns if column not in present]:
        raise UserError(
            f"columns names {missing}, but {name} has the columns {present}: keep some by --columns NAME, or rename by"
            " --columns 'name in the data=name here'"
        )
    dataset = dataset.select_columns(list(columns))
    if isinstance(columns, Mapping):
        dataset = dataset.rename_columns({old: new for old, new in columns.items() if old != new})
    return dataset
