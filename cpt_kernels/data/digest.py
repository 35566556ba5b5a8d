"""Computes digests of prepared rows, by which a run that resumes recognizes its data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from xxhash import xxh3_128

from ..errors import UserError

# The row's number in the given data and what its prompt begins with, which do not change what is trained, and images,
# which `image_ids` identify.
_LEFT_OUT = ("row", "tree", "images")
_IF_ANY = ("scored", "weights")  # left out where they are empty, as in rows that were prepared without them
_BATCH = 10_000  # rows that are digested together; a digest depends on it


def digest_rows(dataset: Dataset) -> str:
    """Returns 32 hex digits that identify the content and the order of a prepared dataset's rows.

    Reads every row once, at about half a gigabyte a second.
    """
    digest = xxh3_128()
    names = sorted(name for name in dataset.column_names if name not in _LEFT_OUT)
    for table in dataset.with_format("arrow").select_columns(names).iter(_BATCH):
        for name in names:
            values = table[name].combine_chunks()
            if name not in _IF_ANY or len(values.flatten()):
                digest.update(name.encode())
                _update(digest, values)
    return digest.hexdigest()


def _update(digest: xxh3_128, values: pa.Array) -> None:
    """Adds the values of a column, whatever the layout of their buffers."""
    digest.update(f"{values.type} {len(values)} {values.null_count}".encode())
    if values.null_count:
        digest.update(values.is_null().to_numpy(zero_copy_only=False).tobytes())
    if pa.types.is_list(values.type) or pa.types.is_large_list(values.type):
        digest.update(pc.list_value_length(values).fill_null(0).to_numpy().tobytes())
        _update(digest, values.flatten())
    elif pa.types.is_primitive(values.type) and not values.null_count:
        digest.update(values.to_numpy(zero_copy_only=False).tobytes())
    else:
        digest.update(repr(values.to_pylist()).encode())


class RowsRead(NamedTuple):
    """The first rows of a stream."""

    number: int
    digest: str


class StreamDigest:
    """A running digest of the rows that are read from a stream.

    Args:
        expected: rows that the stream must begin with.

    Attributes:
        count: rows read so far. A worker process counts in its own copy.
    """

    def __init__(self, expected: RowsRead | None = None) -> None:
        self.expected, self.count, self._digest = expected, 0, xxh3_128()

    @property
    def rows(self) -> RowsRead:
        return RowsRead(self.count, self._digest.hexdigest())

    def read(self, rows: Iterable[dict]) -> Iterator[dict]:
        """Yields rows, and digests each.

        Raises:
            UserError: the stream does not begin with the expected rows.
        """
        for row in rows:
            left_out = {*_LEFT_OUT, *(name for name in _IF_ANY if not row.get(name))}
            self._digest.update(str([row[name] for name in sorted(row) if name not in left_out]).encode())
            self.count += 1
            if self.expected is not None and self.count == self.expected.number and self.rows != self.expected:
                raise UserError(
                    f"the first {self.count} rows of the stream are not those that the checkpoint's run was trained on:"
                    " give the same stream, or set ignore_data_skip=true, which begins the given one"
                )
            yield row
