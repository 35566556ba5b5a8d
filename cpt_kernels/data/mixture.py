"""Loads several datasets as one: the entry ``datasets`` of a run's file, with TRL's keys and meaning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

from datasets import Dataset, IterableDataset, concatenate_datasets

from ..errors import UserError, at_place, user_error
from .formats import parse_row
from .forms import FORM_COLUMNS, Form, Roles, in_backticks, match_roles
from .messages import RowError
from .rows import read_columns
from .sources import choose_columns, load_data, load_files

_TRIED_ROWS = 100  # rows among which the first usable one is sought
_KEYS = ("path", "name", "data_dir", "data_files", "split", "columns", "fraction")


def load_mixture(parts: Sequence[Mapping[str, Any]], *, streaming: bool = False) -> Dataset | IterableDataset:
    """Loads datasets and concatenates them.

    Args:
        parts: one mapping per dataset with the keys ``path`` (a file, a folder, a name on the hub, or a loader of the
            ``datasets`` library if ``data_files`` or ``data_dir`` say what it reads), ``name`` (of a configuration),
            ``split`` (default train), ``columns``, and ``fraction``: the dataset's share of the mixture. The first rows
            of each dataset are taken, as many as the shares allow without repeating a row. Either all datasets have a
            fraction or none.
        streaming: read rows as they are needed.

    Raises:
        UserError: a part is malformed or cannot be loaded; the message names it.
    """
    # Check all parts before any is loaded, which may take long.
    if not parts:
        raise UserError("datasets is empty: give at least one mapping with a path")
    for number, part in enumerate(parts):
        _check_part(part, f"datasets[{number}]", streaming)
    if len({part.get("fraction") is None for part in parts}) > 1:
        raise UserError("datasets: fraction is set for some datasets only: set it for all, or for none")
    loaded = [_load_part(part, f"datasets[{number}]", streaming) for number, part in enumerate(parts)]
    _check_alike(loaded, [f"datasets[{number}] ({part['path']})" for number, part in enumerate(parts)])
    if parts[0].get("fraction") is not None:
        loaded = _shares(loaded, [part["fraction"] for part in parts])
    with user_error("datasets cannot be joined, because a column has other types in one than in another"):
        return concatenate_datasets(loaded)


def split_rows(dataset: Dataset, test_size: float, seed: int) -> tuple[Dataset, Dataset]:
    """Splits off a test set of ``test_size`` rows, or a share of the rows below 1, drawn with ``seed``.

    Raises:
        UserError: one of the two parts would have no rows.
    """
    rows = len(dataset)
    test = math.ceil(test_size * rows) if test_size < 1 else int(test_size)
    if not 0 < test < rows:
        raise UserError(f"test_split_size={test_size:g} of {rows} rows leaves none to train on or to evaluate on")
    halves = dataset.train_test_split(test, seed=seed)
    return halves["train"], halves["test"]


def _check_part(part: Mapping[str, Any], where: str, streaming: bool) -> None:
    if not isinstance(part, Mapping):
        raise UserError(f"{where} is {part!r}; expected a mapping such as {{path: train.jsonl}}")
    if not part.get("path"):
        raise UserError(f"{where} has no path: a file, a folder or a name on the hub")
    if unknown := [key for key in part if key not in _KEYS]:
        raise UserError(f"{where} has the unknown key {unknown[0]}; it takes {', '.join(_KEYS)}")
    fraction = part.get("fraction")
    if fraction is not None and streaming:
        raise UserError(f"{where}: fraction needs the number of rows, and a stream has none: remove it")
    if fraction is not None and not (isinstance(fraction, (int, float)) and 0 < fraction < math.inf):
        raise UserError(f"{where}: fraction is {fraction!r}; expected a number above 0")
    if isinstance(part.get("columns"), str):
        raise UserError(f"{where}: columns is {part['columns']!r}; expected a list of names")


def _load_part(part: Mapping[str, Any], where: str, streaming: bool) -> Dataset | IterableDataset:
    path, name, columns = part["path"], part.get("name"), part.get("columns")
    options = {"split": part.get("split", "train"), "streaming": streaming}
    files = {key: part[key] for key in ("data_dir", "data_files") if part.get(key) is not None}
    with at_place(where, (ValueError, FileNotFoundError)):
        if not files:
            return load_data(path, config=name, columns=columns, **options)
        dataset = load_files(path, name, **files, **options)
        return dataset if columns is None else choose_columns(dataset, columns, path)


def _check_alike(loaded: Sequence[Dataset | IterableDataset], names: Sequence[str]) -> None:
    """Raises UserError if two datasets have responses in different columns, or one has text and another messages."""
    first: tuple[str, Form, Roles, str | None] | None = None
    forms = [(match_roles(columns), {*columns}) for columns in map(read_columns, loaded)]
    several = [None if found else min({"turns", "paths"} & columns, default=None) for found, columns in forms]
    if len({*several}) > 1:
        number = next(i for i, column in enumerate(several) if column is not None)
        raise UserError(
            f"{names[number]} has rows of several pairs (`{several[number]}`), and other datasets have none: train on"
            " it alone, or give all datasets this column"
        )
    for name, dataset, (found, _) in zip(names, loaded, forms):
        if found is None:
            continue
        form, roles = found
        kind = _kind_of_rows(dataset, form, roles)
        first = first or (name, form, roles, kind)
        theirs = first[2]
        if kind and first[3] and kind != first[3]:
            raise UserError(
                f"{name} has {kind}, and {first[0]} has {first[3]}: rewrite the text as messages, such as"
                ' [{"role": "user", "content": ...}], or train on one of the two'
            )
        if form is not first[1] or {*FORM_COLUMNS[form]} & {role for role in roles if roles[role] != theirs.get(role)}:
            renamed = {column: theirs[role] for role, column in roles.items() if role in theirs}
            mend = ", ".join(f"{old}: {new}" for old, new in renamed.items())
            mend = f"give {name.split()[0]} columns: {{{mend}}}" if form is first[1] else "train on one of the two"
            raise UserError(
                f"{name} has {form.value} rows with {in_backticks(roles.values())}, and {first[0]} has"
                f" {first[1].value} rows with {in_backticks(theirs.values())}: {mend}"
            )


def _kind_of_rows(dataset: Dataset | IterableDataset, form: Form, roles: Roles) -> str | None:
    """Returns "text" or "conversations", by the first row that can be read; None if there is none."""
    if form in (Form.GROUP, Form.TOKENS):
        return None
    for row in islice(dataset, _TRIED_ROWS):
        with suppress(RowError):  # counted when the data is prepared
            return "conversations" if parse_row(row, form, roles=roles).is_chat else "text"
    return None


def _shares(loaded: Sequence[Dataset], fractions: Sequence[float]) -> list[Dataset]:
    """Takes the first rows of each dataset, so that their numbers are as the fractions and no row is repeated."""
    weights = [fraction / sum(fractions) for fraction in fractions]
    total = min(len(dataset) / weight for dataset, weight in zip(loaded, weights))
    return [dataset.select(range(round(weight * total))) for dataset, weight in zip(loaded, weights)]
