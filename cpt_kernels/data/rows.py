"""The values of a dataset's rows as their author wrote them, although `datasets` stores rows as Arrow tables.

Arrow changes values in three ways, and each has its remedy here:

- It gives a column one type, so an integer becomes a float beside floats. A column of ``ExactJson`` keeps any value.
- It gives every object of a column the keys of all of them, with null as the value. ``drop_nulls`` removes these keys.
- A format or transform (``with_transform``) is not part of the table. ``visible_rows`` applies it to the rows.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset, Json, LargeList, List
from datasets.features.features import register_feature
from datasets.fingerprint import Hasher

from ..errors import UserError
from .forms import image_column
from .image_files import as_files, image_text

_APPLIED_ROWS = 1000  # rows that a transform gets at a time

# Where a value may hold nulls that Arrow inserted: nowhere, at any depth, or in the items of a list or object.
NullPlaces = bool | list | dict | None


def _as_list(value: Any) -> Any:
    """Returns arrays, tensors and numpy's numbers as lists and numbers, for JSON."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is not a JSON value")


_encode = json.JSONEncoder(ensure_ascii=False, default=_as_list).encode


@dataclass
class ExactJson:
    """Feature type of a column whose values are kept exactly: any JSON value, stored as JSON text in UTF-8.

    The feature type `datasets.Json` rounds floats, refuses large integers, and reads the text "12" as a number.
    """

    pa_type: ClassVar[Any] = pa.binary()  # bytes are no JSON value, so encoded values are known from others
    _type: str = field(default="ExactJson", init=False, repr=False)

    def __call__(self) -> pa.DataType:
        return self.pa_type

    def encode_example(self, value: Any) -> bytes | None:
        """Returns the stored form of a value. A stored value is returned as it is."""
        if value is None or isinstance(value, bytes):
            return value
        return _encode(value).encode()

    def decode_example(self, value: Any, token_per_repo_id: Any = None) -> Any:
        """Returns the value of a stored form. Other values are returned as they are, as streams may decode twice."""
        return json.loads(value) if isinstance(value, bytes) else value


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # `datasets` warns that feature types of other packages are experimental
    register_feature(ExactJson, "ExactJson")


# --- Nulls ---


def find_null_places(features: Features | None, columns: Iterable[str]) -> dict[str, NullPlaces]:
    """Returns for each column where its values may hold nulls that Arrow inserted; columns without them are left out.

    Arrow inserts nulls into structs only: a column of JSON has the nulls that its author wrote. In a stream of unknown
    types, all objects may come from structs.
    """
    if features is None:
        return dict.fromkeys(sorted(columns), True)
    places = {name: _null_places(features[name]) for name in sorted(columns) if name in features}
    return {name: where for name, where in places.items() if where is not None}


def _null_places(feature: Any) -> NullPlaces:
    if isinstance(feature, dict):
        return {name: _null_places(inner) for name, inner in feature.items()}
    if isinstance(feature, (List, LargeList)):
        inner = _null_places(feature.feature)
        return None if inner is None else [inner]
    return None


def drop_nulls(value: Any, places: NullPlaces) -> Any:
    """Returns a value without the object keys whose value is null, where ``places`` says so.

    Nulls in lists stay, because Arrow inserts none there.
    """
    if isinstance(value, dict) and places:
        inner = places if isinstance(places, dict) else dict.fromkeys(value, True)
        return {name: drop_nulls(item, inner.get(name)) for name, item in value.items() if item is not None}
    if isinstance(value, list) and places:
        return [drop_nulls(item, places[0] if isinstance(places, list) else True) for item in value]
    return value


# --- Formats and transforms ---


def read_columns(dataset: Dataset | IterableDataset) -> list[str]:
    """Returns the columns of a dataset without transform. For a stream of unknown columns, the first row is read."""
    return dataset.column_names or list(next(iter(dataset), {}))


def visible_rows(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Returns a dataset without format whose rows are those that the user sees in ``dataset``.

    A transform (``with_transform``, ``set_transform``) is applied once to every row, here. The result is cached by
    `datasets` under the fingerprint of the data and the transform. A format such as ``with_format("torch")`` changes
    only the types of values, so it is removed; the columns that it hides are removed, too.

    Raises:
        UserError: the transform does not return one row per row, or a value that is neither text, nor number, nor list,
            nor mapping.
    """
    if isinstance(dataset, IterableDataset):
        return dataset.with_format(None)
    if not isinstance(dataset, Dataset):
        return dataset  # `prepare` says what is wrong with it
    kind, columns = dataset.format["type"], dataset.format["columns"]
    plain = dataset.with_format(None)
    if kind == "custom" and len(dataset):
        return _apply_transform(dataset, plain)
    is_hidden = not dataset.format["output_all_columns"] and set(columns) != set(dataset.column_names)
    return plain.select_columns(columns) if is_hidden else plain


def _apply_transform(dataset: Dataset, plain: Dataset) -> Dataset:
    first = _transformed(dataset, 0, min(_APPLIED_ROWS, len(dataset)))  # tells the columns
    names = list(first)
    # A transform hands on the nulls that Arrow inserted into its input.
    nulls = bool(find_null_places(plain.features, plain.column_names))

    def apply(_: Mapping[str, list], indices: list[int]) -> dict[str, list]:
        batch = _transformed(dataset, indices[0], indices[-1] + 1) if indices[0] else first
        if set(batch) != set(names):
            raise UserError(
                f"the dataset's transform returns the columns {sorted(batch)} for row {indices[0]}, but {sorted(names)}"
                " for row 0: return the same columns for all rows"
            )
        stored: dict[str, list] = {}
        for name, values in batch.items():
            try:
                stored[name] = [
                    None if value is None else _encode(drop_nulls(value, nulls)).encode() for value in values
                ]
            except (TypeError, ValueError) as error:
                raise UserError(
                    f"the dataset's transform returns a column `{name}` that cannot be stored ({error}): return text,"
                    " numbers, lists and mappings, or leave the column out"
                ) from error
        return stored

    return plain.map(
        apply,
        with_indices=True,
        batched=True,
        batch_size=_APPLIED_ROWS,
        remove_columns=plain.column_names,
        features=Features({name: ExactJson() for name in names}),
        new_fingerprint=Hasher.hash(["visible rows 1", dataset._fingerprint]),
        desc="Applying the dataset's transform",
    )


def _transformed(dataset: Dataset, start: int, stop: int) -> Mapping[str, Sequence]:
    """Returns the columns of some rows of a dataset with a transform."""
    batch = dataset[start:stop]
    is_valid = isinstance(batch, Mapping) and not any(isinstance(values, (str, bytes)) for values in batch.values())
    if not is_valid or any(len(values) != stop - start for values in batch.values()):
        raise UserError(
            f"the dataset's transform does not return {stop - start} values per column for {stop - start} rows: return"
            " a mapping of columns with one value for each row, or use `map` to change the number of rows"
        )
    return batch


# --- Files ---


def write_rows(dataset: Dataset, path: Path, suffix: str) -> None:
    """Writes a dataset without transform as JSON lines, or as Parquet if ``suffix`` is ``.parquet``.

    JSON lines have no nulls that Arrow inserted, because a reader could not tell them from others, and images as paths,
    URLs and ``data:`` URLs.
    """
    if suffix == ".parquet":
        # `Json` is the type that every user of `datasets` can read. It stores JSON text, too.
        exact = [name for name, feature in dataset.features.items() if isinstance(feature, ExactJson)]
        features = Features({**dataset.features, **dict.fromkeys(exact, Json())})
        columns = dict(zip(features, dataset.with_format("arrow")[:].columns))
        for name in exact:
            texts = columns[name].cast(pa.string()).combine_chunks()
            columns[name] = pa.ExtensionArray.from_storage(pa.json_(), texts)
        pq.write_table(pa.Table.from_arrays(list(columns.values()), schema=features.arrow_schema), path)
        return
    images, dataset = image_column(dataset.column_names), as_files(dataset)
    nulls = find_null_places(dataset.features, dataset.column_names)
    with path.open("w", encoding="utf-8") as file:
        for given in dataset:
            row = {name: drop_nulls(value, nulls.get(name)) for name, value in given.items()}
            if images is not None and (value := row[images]) is not None:
                row[images] = [*map(image_text, value)] if isinstance(value, list) else image_text(value)
            file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
