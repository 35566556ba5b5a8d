"""Reads files of responses and writes files of pairs, in Arrow columns. Texts stay on disk until they are written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, Image, List, concatenate_datasets
from numpy.typing import NDArray
from tqdm.auto import tqdm

from ..data.forms import image_column
from ..data.image_files import as_files, image_file, image_text
from ..data.messages import as_list
from ..data.sources import load_data
from ..errors import UserError
from .build import DropReason, PairTable, drop_where
from .responses import TEXT, as_messages, read_responses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BATCH, _IMAGE_BATCH = 8192, 256  # rows, or responses in grouped rows, that are written at a time
_MESSAGES = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
_PARTS = pa.list_(pa.struct({"type": pa.string(), "text": pa.string()}))
_MESSAGES_IN_PARTS = pa.list_(pa.struct({"role": pa.string(), "content": _PARTS}))  # of prompts, if some have images
_IMAGES = pa.list_(Image.pa_type)
_UNKNOWN_MODEL = "unknown"


@dataclass(frozen=True)
class Responses:
    """n responses of one or several sources."""

    table: pa.Table = field(repr=False)  # columns of RESPONSE_FEATURES
    sources: dict[str, int]  # name -> index of its first response
    models: NDArray[np.object_]  # (n,) names
    prompt_keys: NDArray[np.bytes_]  # (n,) digests
    response_keys: NDArray[np.bytes_]  # (n,) digests
    drops: NDArray[np.int8]  # (n,) DropReason of responses that cannot be used in any pair
    images: Sequence[Dataset | None] = field(repr=False)  # the column of images of each source

    @property
    def has_images(self) -> bool:
        return bool((self.numbers("images")[self.drops == DropReason.KEPT] > 0).any())

    @property
    def batch(self) -> int:
        """The number of rows that are written at a time."""
        return _IMAGE_BATCH if self.has_images else _BATCH

    def __len__(self) -> int:
        return len(self.table)

    def numbers(self, column: str) -> NDArray:
        """Returns (n,) the values of a numeric column."""
        return self.table[column].to_numpy()

    def where(self, index: int) -> str:
        """Returns the source and the row of a response, for messages."""
        return f"{list(self.sources)[self.source(index)]} row {self.table['row'][index].as_py()}"

    def name(self, index: int) -> str:
        """Returns the model and the row of a response, with its file if several have responses of the model."""
        model, source = self.models[index], self.source(index)
        shared = (self.source(np.flatnonzero(self.models == model)) != source).any()
        file = f" of {Path(list(self.sources)[source]).name}" if shared else ""
        return f"{model}: row {self.table['row'][index].as_py()}{file}"

    def source(self, index: Any) -> Any:
        """Returns the number of the source of each response."""
        return np.searchsorted(list(self.sources.values()), index, side="right") - 1


def load_responses(
    names: Sequence[str],
    *,
    config: str | None = None,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
    models: Sequence[str] = (),
    rating: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: dict[str, int] | None = None,
    num_proc: int | None = None,
) -> Responses:
    """Reads all responses of the named files, folders or hub datasets.

    Args:
        names, config, split: see ``data.sources.load_data``.
        columns: {name in the data: new name}, applied to the sources that have the column.
        models, rating, tokenizer, num_proc: see ``responses.read_responses``.
        max_length: {"characters" or "tokens": the most that prompt and response may have together}.

    Raises:
        UserError: a source cannot be read or has a rating that is not a number, or no source has a column to rename;
            the message names the source.
    """
    # Read every source.
    parts, sources, images, total = [], {}, [], 0
    unknown = list(columns or ())
    for name in dict.fromkeys(names):
        dataset = load_data(name, config=config, split=split)
        renamed = {old: new for old, new in (columns or {}).items() if old in dataset.column_names}
        unknown = [old for old in unknown if old not in renamed]
        if taken := [new for new in renamed.values() if new in dataset.column_names]:
            raise UserError(f"{name} has a column `{taken[0]}` already: rename to another name")
        dataset = dataset.rename_columns(renamed)
        part = read_responses(dataset, models, rating, tokenizer=tokenizer, num_proc=num_proc, name=name)
        column = image_column(dataset.column_names)
        images.append(None if column is None else as_files(dataset).select_columns([column]))
        sources[name], total = total, total + len(part)
        parts.append(part)
    if unknown:
        there = ", ".join(dataset.column_names)
        raise UserError(f"columns names `{unknown[0]}`, which no source has; {name} has {there}")

    # Drop the responses that cannot be used.
    table = concatenate_datasets(parts).with_format("arrow")[:]
    drops = table["drop"].to_numpy().astype(np.int8)
    if rating is None:
        drop_where(drops, table["model"].is_null().to_numpy(), DropReason.NO_MODEL_NAMED)
    for unit, most in (max_length or {}).items():
        length = table[f"prompt_{unit}"].to_numpy() + table[f"response_{unit}"].to_numpy()
        drop_where(drops, length > most, DropReason.TOO_LONG)
    prompt_keys, response_keys = (_fixed_width_keys(table[name]) for name in ("prompt_key", "response_key"))
    responses = Responses(table, sources, _model_names(table["model"]), prompt_keys, response_keys, drops, images)
    if wrong := np.flatnonzero(drops == DropReason.NO_RATING).tolist():
        raise UserError(f"{responses.where(wrong[0])}: {table['detail'][wrong[0]].as_py()}")
    return responses


def _model_names(column: pa.ChunkedArray) -> NDArray[np.object_]:
    """Returns (n,) names, `_UNKNOWN_MODEL` for null. Responses of one model share one string."""
    encoded = column.combine_chunks().dictionary_encode()
    names = np.array([*encoded.dictionary.to_pylist(), _UNKNOWN_MODEL], object)
    return names[encoded.indices.fill_null(len(names) - 1).to_numpy(zero_copy_only=False)]


def _fixed_width_keys(column: pa.ChunkedArray) -> NDArray[np.bytes_]:
    return np.concatenate([np.array(chunk.to_pylist(), "S16") for chunk in column.chunks])


# --- Rows to write ---


def pair_batches(responses: Responses, pairs: PairTable, part: NDArray, chat: bool) -> Iterator[pa.Table]:
    """Yields rows of a preference dataset for the pairs where ``part`` (P,) is true."""
    numbers = np.flatnonzero(part)
    for start in range(0, len(numbers), responses.batch):
        some = numbers[start : start + responses.batch]
        chosen, rejected = pairs.chosen[some], pairs.rejected[some]
        yield pa.table(
            {
                "prompt": _texts(responses, "prompt", chosen, chat),
                "chosen": _texts(responses, "response", chosen, chat),
                "rejected": _texts(responses, "response", rejected, chat),
                "chosen_model": pa.array(responses.models[chosen], pa.string()),
                "rejected_model": pa.array(responses.models[rejected], pa.string()),
                "gap": pairs.gap[some],
                **_images(responses, chosen),
            }
        )


def group_batches(responses: Responses, pairs: PairTable, part: NDArray, chat: bool) -> Iterator[pa.Table]:
    """Yields rows of a ranked dataset, one per prompt, for the pairs where ``part`` (P,) is true."""
    groups = pairs.group()
    numbers = np.flatnonzero(part[groups.cu_edges[:-1]])
    size = max(responses.batch * len(groups) // len(groups.members), 1)
    for start in range(0, len(numbers), size):
        some = numbers[start : start + size]
        at, offsets = _ranges(groups.cu_members, some)
        edges, edge_offsets = _ranges(groups.cu_edges, some)
        members = groups.members[at]
        ends = pa.array(np.arange(0, 2 * len(edges) + 1, 2), pa.int32())
        positions = pa.ListArray.from_arrays(ends, groups.edges[edges].reshape(-1))
        yield pa.table(
            {
                "prompt": _texts(responses, "prompt", groups.members[groups.cu_members[some]], chat),
                "completions": pa.ListArray.from_arrays(offsets, _texts(responses, "response", members, chat)),
                "scores": pa.ListArray.from_arrays(offsets, pairs.strength[members]),
                "models": pa.ListArray.from_arrays(offsets, pa.array(responses.models[members], pa.string())),
                "pairs": pa.ListArray.from_arrays(edge_offsets, positions),
                **_images(responses, groups.members[groups.cu_members[some]]),
            }
        )


def sft_rows(responses: Responses, pairs: PairTable, part: NDArray) -> NDArray[np.int64]:
    """Returns the chosen responses of the pairs where ``part`` (P,) is true, each text of a prompt once."""
    chosen = np.unique(pairs.chosen[part])
    keys = np.stack([responses.prompt_keys[chosen], responses.response_keys[chosen]], axis=1)
    _, first = np.unique(keys, axis=0, return_index=True)
    return chosen[np.sort(first)]


def sft_batches(responses: Responses, rows: NDArray[np.int64], chat: bool) -> Iterator[pa.Table]:
    """Yields rows of a dataset for supervised training, one for each of the numbered responses."""
    for start in range(0, len(rows), responses.batch):
        some = rows[start : start + responses.batch]
        yield pa.table(
            {
                "prompt": _texts(responses, "prompt", some, chat),
                "completion": _texts(responses, "response", some, chat),
                "model": pa.array(responses.models[some], pa.string()),
                **_images(responses, some),
            }
        )


def _ranges(boundaries: NDArray[np.int64], numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], pa.Array]:
    """Returns the concatenated contents of the numbered ranges, and where each range begins in them."""
    lengths = boundaries[numbers + 1] - boundaries[numbers]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    inside = np.arange(offsets[-1]) - np.repeat(offsets[:-1], lengths)
    return np.repeat(boundaries[numbers], lengths) + inside, pa.array(offsets, pa.int32())


def _texts(responses: Responses, name: str, rows: NDArray[np.int64], chat: bool) -> pa.Array:
    texts = take(responses.table[name], rows)
    if not chat:
        return texts.cast(pa.string())
    role = "user" if name == "prompt" else "assistant"
    in_parts = name == "prompt" and responses.has_images
    shapes = take(responses.table[f"{name}_shape"], rows)
    messages = [as_messages(*row, role, in_parts) for row in zip(texts.to_pylist(), shapes.to_pylist())]
    return pa.array(messages, _MESSAGES_IN_PARTS if in_parts else _MESSAGES)


def _images(responses: Responses, rows: NDArray[np.int64]) -> dict[str, pa.Array]:
    """Returns the column `images` of the prompts of some responses, or nothing if no prompt has images."""
    if not responses.has_images:
        return {}
    images: list[list] = [[] for _ in rows]
    numbers, sources = take(responses.table["row"], rows).to_numpy(), responses.source(rows)
    for source, dataset in enumerate(responses.images):
        places = np.flatnonzero(sources == source).tolist()
        if dataset is not None and places:
            (values,) = dataset[numbers[places].tolist()].values()
            for place, value in zip(places, values):
                images[place] = [image_file(image) for image in as_list(value)]
    return {"images": pa.array(images, _IMAGES)}


def take(column: pa.ChunkedArray, rows: NDArray[np.int64]) -> pa.Array:
    """Returns the values at ``rows``. Chunks are not joined, so most of a large column stays on disk."""
    starts = np.cumsum([0, *(len(chunk) for chunk in column.chunks)])
    order = np.argsort(rows, kind="stable")
    ends = np.searchsorted(rows[order], starts)
    parts = [
        column.chunk(number).take(pa.array(rows[order[ends[number] : ends[number + 1]]] - starts[number]))
        for number in np.flatnonzero(np.diff(ends))
    ]
    return pa.concat_arrays(parts).take(pa.array(np.argsort(order))) if parts else pa.array([], column.type)


# --- Files ---


def write_batches(path: Path, suffix: str, batches: Iterator[pa.Table], total: int, title: str) -> None:
    """Writes rows as JSONL or Parquet, by ``suffix``, with a progress bar."""
    with ExitStack() as stack:
        file = stack.enter_context(path.open("wb"))
        bar = stack.enter_context(tqdm(total=total, desc=title, unit=" rows", dynamic_ncols=True, disable=None))
        writer = None
        for batch in batches:
            if suffix == ".jsonl":
                _write_lines(file, batch)
            else:
                writer = writer or stack.enter_context(pq.ParquetWriter(file, _schema(batch)))
                writer.write_table(batch)
            bar.update(len(batch))


def _schema(batch: pa.Table) -> pa.Schema:
    """Returns the schema of a Parquet file, whose metadata tell `datasets` that a column holds images."""
    if "images" not in batch.column_names:
        return batch.schema
    return Features({**Features.from_arrow_schema(batch.schema), "images": List(Image())}).arrow_schema


def _write_lines(file: IO[bytes], batch: pa.Table) -> None:
    for row in batch.to_pylist():
        if "images" in row:
            row["images"] = [image_text(image) for image in row["images"]]
            for turn in row["prompt"]:  # Arrow gives all parts the same keys
                turn["content"] = [{key: v for key, v in part.items() if v is not None} for part in turn["content"]]
        file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())


def is_conversational(responses: Responses) -> bool:
    """Returns whether some usable prompt or response was given as messages."""
    usable = responses.drops == DropReason.KEPT
    return any((responses.numbers(f"{name}_shape")[usable] != TEXT).any() for name in ("prompt", "response"))
