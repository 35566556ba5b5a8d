"""Reads every accepted form of model responses as one row per response, with the keys and lengths for pairing.

    long     prompt, model, response               or as AlpacaEval has it: instruction, generator, output
    wide     prompt, and a column for each model
    pairs    prompt, chosen, rejected              with chosen_model, rejected_model and ratings; also chosen-model,
                                                   model_chosen or model-chosen
    nested   prompt, completions                   a list of {model, response, ...}, as in UltraFeedback
    lists    prompt, generations, generation_models, ratings      parallel lists, as distilabel writes them

The prompt may be in the form of any trainer, see ``data.forms.find_prompt``: `input` adds to `instruction`, and a row
with `system` or `history` has a conversation as its prompt. Prompts and responses are text or chat messages. Text and a
single turn with this text are the same prompt or response, see ``one_turn_as_text``. A column `images` or `image` holds
images of the prompt, as in training; two prompts are the same only if their images are.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from datasets import Dataset, Features, Json, Value

from ..data.formats import one_turn_as_text, whole_prompt, without_nulls
from ..data.forms import IMAGE_COLUMNS, Roles, find_prompt
from ..data.image_files import DIGEST_BYTES, DIGESTS, with_digests
from ..data.messages import MALFORMED, RowError, Text, has_images, read_text_or_messages, text_as_turns, with_images
from ..data.response_columns import MODEL_NAMES, RESPONSE_NAMES
from ..data.rows import ExactJson, NullPlaces, drop_nulls, find_null_places, visible_rows
from ..data.weights import read_number
from ..errors import UserError, at_place
from .build import DropReason, prompt_key

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# large_string, because a batch of long responses may exceed the 2 GiB of Arrow's `string`.
RESPONSE_FEATURES = Features(
    {
        **{"prompt": Value("large_string"), "prompt_shape": Value("int8"), "prompt_key": Value("binary")},
        **{"response": Value("large_string"), "response_shape": Value("int8"), "response_key": Value("binary")},
        **{"model": Value("string"), "rating": Value("float64"), "row": Value("int64")},
        **{"drop": Value("int8"), "detail": Value("string"), "images": Value("int32")},
        **{f"{text}_{unit}": Value("int64") for text in ("prompt", "response") for unit in ("characters", "tokens")},
    }
)
TEXT, TURN, TURNS = range(3)  # the `shape` of a stored text: text; text of one turn; JSON of [[role, content], ...]
_IMAGE_PART = {"type": "image"}

_LISTS = ("completions", "generations", "responses")
_MODEL_LISTS = ("models", "generation_models", "model_names")
_SIDES = ("chosen", "rejected")
_UNRATED = {"", "n/a", "na", "nan", "none", "null"}


class Side(NamedTuple):
    """One response of a row: the columns of its text, its model and its rating."""

    response: str
    model: str | None = None
    name: str | None = None  # the model's name, if no column holds it
    rating: str | None = None


@dataclass(frozen=True)
class Reading:
    """A way to read the responses of a row.

    If `is_list`, there is one side, whose columns hold lists. If `is_nested` too, the items of the list are objects
    with `rating` as a key.
    """

    prompt: Roles  # the columns that make the prompt
    sides: tuple[Side, ...]
    is_list: bool = False
    is_nested: bool = False

    def columns(self) -> set[str]:
        """Returns the columns that are read."""
        sides = [side._replace(rating=None) for side in self.sides] if self.is_nested else self.sides
        return {
            *self.prompt.values(),
            *(name for side in sides for name in (side.response, side.model, side.rating) if name),
        }


# Column -> the keys of the objects in its lists, for lists of text no key; None if the column holds no lists.
ColumnKeys = Mapping[str, Collection[str] | None]


def find_readings(columns: ColumnKeys, models: Sequence[str] = (), rating: str | None = None) -> tuple[Reading, ...]:
    """Finds the ways to read rows with these columns. Each row uses the first one in which some response is not null.

    Args:
        columns: see ``describe_columns``.
        models: the ranked models, which may have columns named after them.
        rating: the column or key with the ratings (of pairs, the part after `chosen_`); None if models are ranked.

    Raises:
        UserError: there is no prompt, no response or no such rating; the message names the columns found.
    """
    there = ", ".join(f"`{name}`" for name in columns)
    if several := {"turns", "paths"} & columns.keys() - {*models}:
        raise UserError(
            f"rows of `{min(several)}` hold pairs and name no model of a response, so no order of models makes pairs of"
            " them: train on these rows as they are"
        )
    prompt = find_prompt([name for name in columns if name not in models])
    if DIGESTS in columns:
        prompt["images"] = DIGESTS
    if "prompt" not in prompt:
        raise UserError(f"there is no column `prompt` or `instruction`, but {there}: rename one with --columns")
    readings = []
    if (column := _first(_LISTS, columns)) and (keys := columns[column]) is not None:
        is_nested = _first(RESPONSE_NAMES, keys) is not None
        lists = Side(column, _first(_MODEL_LISTS, columns), rating=rating)
        readings.append(Reading(prompt, (Side(column, rating=rating) if is_nested else lists,), True, is_nested))
    if columns.keys() >= set(_SIDES):
        sides = (Side(s, _first(_spellings(s, "model"), columns), s, _rating_of(s, rating, columns)) for s in _SIDES)
        readings.append(Reading(prompt, tuple(sides)))
    response, model = _first(RESPONSE_NAMES, columns), _first(MODEL_NAMES, columns)
    if response and (model or rating):
        readings.append(Reading(prompt, (Side(response, model, rating=rating),)))
    own = [name for name in models if name in columns]
    if not readings and own:
        readings.append(Reading(prompt, tuple(Side(name, name=name) for name in own)))
    if not readings:
        ranked = f" nor columns for the models {', '.join(models)}" if models else ""
        raise UserError(
            f"there are the columns {there}, but no `model` with `response`, no list of `completions`, no `chosen` and"
            f" `rejected`{ranked}: rename columns with --columns"
        )
    if rating is None:
        return tuple(readings)
    rated = [reading for reading in readings if _has_rating(reading, columns)]
    if not rated:
        raise UserError(f"there is no rating `{rating}` of responses; the columns are {_name_columns(columns)}")
    return tuple(rated)


@dataclass(frozen=True)
class ReadResponses:
    """Batched `datasets.map` function (with indices): rows -> RESPONSE_FEATURES, one row per response.

    A row that cannot be read becomes one dropped response. A response whose rating is not a number is dropped too.
    `detail` says what is wrong.

    The fields are everything that the result depends on, because `datasets` keys its cache by them. Raise `version`
    whenever the output of this module changes.
    """

    readings: tuple[Reading, ...]
    nulls: Mapping[str, NullPlaces]  # where Arrow may have inserted nulls
    tokenizer: PreTrainedTokenizerBase | None = None
    version: int = 5

    def __call__(self, batch: Mapping[str, list], indices: Sequence[int]) -> dict[str, list]:
        names = set().union(*(reading.columns() for reading in self.readings))
        columns = {name: [drop_nulls(value, self.nulls.get(name)) for value in batch[name]] for name in names}
        records = []
        for index, values in zip(indices, zip(*columns.values())):
            records += self._read(dict(zip(columns, values)), index)
        for name in ("prompt", "response"):
            plain = [_plain_text(record[name], record[f"{name}_shape"]) for record in records]
            tokens = self._count_tokens(plain)
            for record, text in zip(records, plain):
                record[f"{name}_characters"], record[f"{name}_tokens"] = len(text), tokens[text]
                record[f"{name}_key"] = prompt_key(record[name] + (record["digests"] if name == "prompt" else ""))
                if record["drop"] == DropReason.KEPT and not text.strip():
                    record["drop"] = DropReason.EMPTY_PROMPT if name == "prompt" else DropReason.EMPTY_RESPONSE
        return {name: [record[name] for record in records] for name in RESPONSE_FEATURES}

    def _read(self, row: dict[str, Any], index: int) -> list[dict[str, Any]]:
        reading = next((r for r in self.readings if any(row[side.response] for side in r.sides)), self.readings[-1])
        nothing = {"prompt": "", "prompt_shape": TEXT, "response": "", "response_shape": TEXT, "model": None}
        nothing |= {"rating": math.nan, "row": index, "drop": DropReason.KEPT, "detail": ""}
        digests = row.get(DIGESTS) or b""
        nothing |= {"images": len(digests) // DIGEST_BYTES, "digests": digests.hex()}
        records = []
        try:
            given = whole_prompt(row, reading.prompt)
            prompt = _read_text(reading.prompt["prompt"], _place_images(given, nothing["images"]), "user")
            for where, value, model, rating in _items(row, reading):
                record = {**nothing, "model": None if model is None else str(model)}
                try:
                    response = _read_text(where, _without_prompt(value, given), "assistant")
                    record |= dict(zip(("prompt", "prompt_shape", "response", "response_shape"), (*prompt, *response)))
                except RowError as error:
                    record |= {"drop": DropReason.MALFORMED_ROW, "detail": error.detail}
                try:
                    record["rating"] = _read_rating(rating)
                except ValueError:
                    record |= {
                        "drop": DropReason.NO_RATING,
                        "detail": f"the rating of `{where}` is {rating!r}; expected a number",
                    }
                records.append(record)
        except RowError as error:
            return [nothing | {"drop": DropReason.MALFORMED_ROW, "detail": error.detail}]
        return records or [
            nothing | {"drop": DropReason.MALFORMED_ROW, "detail": f"`{reading.sides[0].response}` is empty"}
        ]

    def _count_tokens(self, texts: list[str]) -> dict[str, int | None]:
        unique = list(dict.fromkeys(texts))
        if self.tokenizer is None or not unique:
            return dict.fromkeys(unique)
        # verbose=False: no warning about texts longer than the model's maximum, which --max_tokens drops.
        ids = self.tokenizer(text=unique, add_special_tokens=False, return_attention_mask=False, verbose=False)
        return {text: len(tokens) for text, tokens in zip(unique, ids["input_ids"])}


def read_responses(
    dataset: Dataset,
    models: Sequence[str] = (),
    rating: str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    num_proc: int | None = None,
    name: str = "responses",
) -> Dataset:
    """Reads the responses in a dataset of any form above, as RESPONSE_FEATURES.

    Raises:
        UserError: the columns have no known form, or an image cannot be decoded; the message begins with `name`.
    """
    dataset = with_digests(visible_rows(dataset), name)
    dataset = dataset.remove_columns([column for column in IMAGE_COLUMNS if column in dataset.column_names])
    with at_place(name, (ValueError,)):
        readings = find_readings(describe_columns(dataset), models, rating)
    return dataset.map(
        ReadResponses(readings, find_null_places(dataset.features, dataset.column_names), tokenizer),
        with_indices=True,
        batched=True,
        remove_columns=dataset.column_names,
        features=RESPONSE_FEATURES,
        num_proc=num_proc,
        writer_batch_size=8192,  # large chunks: random access later costs one call per chunk
        desc=f"Reading {name}",
    )


def as_messages(text: str, shape: int, role: str, in_parts: bool = False) -> list[dict[str, Any]]:
    """Returns the messages of a stored prompt (role "user") or response (role "assistant") of any shape.

    Args:
        in_parts: all contents become lists of parts, which is what the contents of prompts with images are.
    """
    turns = json.loads(text) if shape == TURNS else [[role, text]]
    return [
        {"role": role, "content": [{"type": "text", "text": c}] if in_parts and isinstance(c, str) else c}
        for role, c in turns
    ]


# --- ColumnKeys ---


def _first(names: Sequence[str], there: Collection[str]) -> str | None:
    return next((name for name in names if name in there), None)


def _spellings(side: str, name: str) -> list[str]:
    return [f"{side}_{name}", f"{side}-{name}", f"{name}_{side}", f"{name}-{side}"]


def _rating_of(side: str, rating: str | None, columns: ColumnKeys) -> str | None:
    return _first(_spellings(side, rating), columns) if rating else None


def _has_rating(reading: Reading, columns: ColumnKeys) -> bool:
    there = columns[reading.sides[0].response] if reading.is_nested else columns
    return all(side.rating in (there or ()) for side in reading.sides)


def describe_columns(dataset: Dataset) -> ColumnKeys:
    """Describes the columns of a dataset. The keys of JSON objects are found by reading them all."""
    return {name: _item_keys(dataset, name, kind) for name, kind in dataset.features.items()}


def _item_keys(dataset: Dataset, name: str, kind: Any) -> Collection[str] | None:
    item = getattr(kind, "feature", None)  # of a list
    if isinstance(item, dict):
        return tuple(item)
    if name not in _LISTS or not isinstance(item or kind, (ExactJson, Json)):
        return None if item is None else ()
    lists = [value for value in dataset[name] if isinstance(value, list)]
    keys = {key: None for items in lists for item in items if isinstance(item, dict) for key in item}
    return tuple(keys) if lists else None


def _name_columns(columns: ColumnKeys) -> str:
    """Returns the column names as text; a list of objects with their keys."""
    return ", ".join(f"`{name}`" + (f" of {{{', '.join(keys)}}}" if keys else "") for name, keys in columns.items())


# --- Values ---


class _Item(NamedTuple):
    """A response of a row, as the row holds it."""

    name: str  # for errors
    response: Any
    model: Any
    rating: Any


def _items(row: dict[str, Any], reading: Reading) -> Iterator[_Item]:
    """Yields the responses of a row."""
    # One column per response.
    if not reading.is_list:
        for side in reading.sides:
            model = row[side.model] if side.model else side.name
            yield _Item(side.response, row[side.response], model, row[side.rating] if side.rating else None)
        return

    # One list of responses: of objects, or beside lists of models and ratings.
    (side,) = reading.sides
    items = row[side.response]
    if not isinstance(items, list):
        raise RowError(MALFORMED, f"`{side.response}` is {type(items).__name__}; expected a list")
    names = [f"{side.response}[{i}]" for i in range(len(items))]
    if reading.is_nested:
        for where, item in zip(names, items):
            values = item or {}
            model = values.get(_first(MODEL_NAMES, values))
            yield _Item(where, values.get(_first(RESPONSE_NAMES, values)), model, values.get(side.rating))
        return
    more = [row[column] if column else [None] * len(items) for column in (side.model, side.rating)]
    for column, values in zip((side.model, side.rating), more):
        if not isinstance(values, list) or len(values) != len(items):
            raise RowError(
                MALFORMED, f"`{column}` is not a list of {len(items)} values, one for each of `{side.response}`"
            )
    yield from map(_Item, names, items, *more)


def _place_images(prompt: Text | None, count: int) -> Text | None:
    """Returns a prompt with a part for each of its images; text becomes a turn of the user."""
    if not count and not has_images(prompt):
        return prompt
    return with_images(prompt if isinstance(prompt, list) else text_as_turns(prompt or "", [])[0], count)


def _read_text(name: str, value: Any, role: str) -> tuple[str, int]:
    """Returns the text to store and its shape. Null is empty text."""
    if isinstance(value, (list, dict)):
        value = read_text_or_messages(name, value, images=role == "user")
    if value is None or isinstance(value, str):
        return value or "", TEXT
    turns = []
    for message in value if isinstance(value, list) else [value]:
        given = without_nulls(message) if isinstance(message, dict) else {}
        content = _read_parts(given["content"]) if isinstance(given.get("content"), list) else given.get("content")
        if given.keys() != {"role", "content"} or not isinstance(content, (str, list)):
            raise RowError(MALFORMED, f"`{name}` is neither text nor a list of messages with text as role and content")
        turns.append([given["role"], content])
    if isinstance(turn := one_turn_as_text([{"role": who, "content": content} for who, content in turns], role), str):
        return turn, TURN
    if turns and role == "assistant" and turns[0][0] in ("system", "user"):
        raise RowError(MALFORMED, f"`{name}` begins with a turn of {turns[0][0]} that the prompt does not begin with")
    return json.dumps(turns, ensure_ascii=False) if turns else "", TURNS if turns else TEXT


def _read_parts(parts: list) -> list[dict[str, str]] | None:
    """Returns parts of text and images in one spelling, or None if there are others."""
    given = [without_nulls(part) for part in parts]
    texts = [{"type": "text", "text": part.get("text")} for part in given]
    if not all(part in (_IMAGE_PART, text) for part, text in zip(given, texts)):
        return None
    return [_IMAGE_PART if part == _IMAGE_PART else text for part, text in zip(given, texts)]


def _without_prompt(response: Any, prompt: Any) -> Any:
    """Returns a response without the prompt's turns, if it is a conversation that begins with them."""
    if not isinstance(response, list) or not all(isinstance(message, dict) for message in response):
        return response
    turns = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    start = list(map(without_nulls, response[: len(turns)]))
    return response[len(turns) :] if start == list(map(without_nulls, turns)) else response


def _plain_text(text: str, shape: int) -> str:
    if shape != TURNS:
        return text
    contents = (content for _, content in json.loads(text))
    return "\n".join(c if isinstance(c, str) else "".join(part.get("text", "") for part in c) for c in contents)


def _read_rating(value: Any) -> float:
    """Reads a rating: a number, its text, or an object of ratings, which are averaged. Returns nan if there is none."""
    if isinstance(value, dict):
        aspects = [_read_rating(v.get("Rating") if isinstance(v, dict) else v) for v in value.values()]
        known = [aspect for aspect in aspects if not math.isnan(aspect)]
        return sum(known) / len(known) if known else math.nan
    if value is None or (isinstance(value, str) and value.strip().lower() in _UNRATED):
        return math.nan
    number = read_number(value)
    if number is None or math.isinf(number):
        raise ValueError("not a finite number")
    return number
