"""Prepares a dataset of any accepted form: tokenizes it into prompt groups, and drops and counts unusable rows."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value, concatenate_datasets

from ..errors import UserError
from .first_row import FirstRow, read_first_row
from .formats import EMPTY, IDENTICAL, IMAGE_CUT, PROMPT_FILLS, UNSCORED, PromptFormat, RankedPairs, check_ranked_pairs
from .forms import REFERENCE_SUMS, Form, Roles, find_roles, in_backticks, read_by, unused_columns
from .images import IMAGES, ImageReader, is_processor, undecoded
from .pair_rows import one_pair_rows
from .rows import ExactJson, NullPlaces, find_null_places, read_columns, visible_rows
from .tokenize import GROUP_FEATURES, REMARK_FEATURES, Tokenization, check_tokenizer
from .truncation import TruncationMode, check_truncation, truncate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

logger = logging.getLogger(__name__)

_EDGES = ("chosen", "rejected", "targets", "weights")
_DECISION_FEATURES = Features(
    {
        **{name: GROUP_FEATURES[name] for name in _EDGES},
        **REMARK_FEATURES,
        "row": Value("int64"),
        "truncated": Value("int32"),
        "promptless": Value("int32"),
        "max_token_id": Value("int64"),
        "completion_tokens": Value("int64"),
        "scored_tokens": Value("int64"),
    }
)
_EXAMPLE_ROWS = 5
_IMAGE_ROWS = 16  # rows with images that are read together
_TOKENIZED = (Form.GROUP, Form.TOKENS)


@dataclass
class Drop:
    """The rows dropped for one reason: their count, the first row numbers, and what was wrong with the first row."""

    count: int = 0
    rows: list[int] = field(default_factory=list)
    detail: str = ""

    def add(self, row: int) -> None:
        """Counts a row."""
        self.count += 1
        self.rows += [row] if len(self.rows) < _EXAMPLE_ROWS else []

    def __str__(self) -> str:
        rows = ", ".join(map(str, self.rows)) + (", ..." if self.count > len(self.rows) else "")
        return f"{self.count} (rows {rows}{f'; the first: {self.detail}' if self.detail else ''})"


@dataclass
class PreparationReport:
    """Counts of a dataset's rows. `rows_in` always equals `kept` plus the counts of all drops.

    For a stream, the process that reads it counts the rows of the first pass as they are read.
    """

    name: str = "train"
    max_length: int | None = None
    rows_in: int = 0
    kept: int = 0
    dropped: dict[str, Drop] = field(default_factory=dict)  # reason -> rows
    pairs: int = 0  # in kept rows
    pairs_dropped: int = 0  # in kept rows: equal sides, a side without tokens, or a repeated pair
    truncated: int = 0  # sequences (prompt + completion) of kept rows that max_length cuts
    completion_tokens: int = 0  # of kept rows, before truncation
    scored_tokens: int = 0  # of these
    promptless: int = 0  # sequences of kept rows whose first completion token serves as the prompt
    texts: int = 0  # kept rows of text
    chats: int = 0  # kept rows that the chat template renders
    repeated: int = 0  # kept rows of a stored dataset whose tokens and pairs are those of an earlier row
    first_repeated: int = -1
    doubled: int = 0  # kept rows with a bos or eos token that follows itself
    doubled_example: str = ""
    notes: list[str] = field(default_factory=list)  # how the columns are read, in sentences
    merged: int = 0  # kept rows whose last prompt tokens change when a completion follows
    merged_example: str = ""
    max_token_id: int = -1  # in kept rows
    first_is_chat: bool | None = None  # whether the first usable row is a conversation
    _next_index: int = field(default=0, repr=False)

    def add_once(self, index: int, decision: Mapping[str, Any]) -> None:
        """Counts the row at `index` of a stream, unless an earlier pass over the stream has counted it."""
        if index >= self._next_index:
            self._next_index = index + 1
            self.add(decision)

    def add(self, decision: Mapping[str, Any]) -> None:
        """Counts one row, given as a row of the filter's output."""
        self.rows_in += 1
        if reason := decision["reason"]:
            self.dropped.setdefault(reason, Drop(detail=decision["detail"])).add(decision["row"])
            return
        self.kept += 1
        self.pairs += len(decision["rejected"])
        self.pairs_dropped += decision["pairs_given"] - len(decision["rejected"])
        self.truncated += decision["truncated"]
        self.promptless += decision["promptless"]
        self.completion_tokens += decision["completion_tokens"]
        self.scored_tokens += decision["scored_tokens"]
        self.max_token_id = max(self.max_token_id, decision["max_token_id"])
        self.chats += decision["is_chat"]
        self.texts += not decision["is_chat"]
        if decision["doubled"]:
            self.doubled += 1
            if self.doubled == 1:
                self.doubled_example = f"row {decision['row']}: {decision['doubled']}"
                logger.warning(
                    "%s data: a special token is there twice in succession (%s): the text or the chat template has one"
                    " and the tokenizer adds another, so the model sees what it never sees in inference. Remove one of"
                    " the two from the data or the template. Shown once.",
                    self.name,
                    self.doubled_example,
                )
        if decision["seam"]:
            self.merged += 1
            if self.merged == 1:
                self.merged_example = f"row {decision['row']}: {decision['seam']}"
                logger.warning(
                    "%s data: a prompt ends with different tokens when a completion follows it (%s). Training starts "
                    "the completion at these tokens, so the model never sees the prompt as inference tokenizes it. End "
                    "prompts at a token boundary, or use a chat template that renders them alike. Shown once.",
                    self.name,
                    self.merged_example,
                )

    @property
    def prompt_format(self) -> PromptFormat:
        """The format of the rows: "text", "chat", or "auto" if some are text and some are conversations.

        Of a stream that is not yet read, the format of its first row.
        """
        found = {True: self.chats, False: self.texts} if self.kept else {self.first_is_chat: 1}
        kinds = [is_chat for is_chat, count in found.items() if count]
        return "auto" if kinds not in ([True], [False]) else "chat" if kinds[0] else "text"

    def summary(self) -> list[str]:
        """Returns the report as lines of text, without the counts that are zero."""
        lines = [f"{self.name} data: {self.kept} of {self.rows_in} rows kept, {self.pairs} pairs"]
        lines += [f"dropped, {reason}: {drop}" for reason, drop in self.dropped.items()]
        if self.scored_tokens < self.completion_tokens:
            lines.append(f"{self.scored_tokens / self.completion_tokens:.1%} of the completions' tokens are scored")
        if self.texts and self.chats:
            lines.append(f"{self.texts} rows are text and {self.chats} are conversations, which have other tokens")
        counts = [
            (self.pairs_dropped, "pairs of kept rows dropped: equal sides, or a side without tokens"),
            (self.truncated, f"sequences truncated to max_length={self.max_length}"),
            (self.promptless, "sequences without a prompt: their first token has no log-prob"),
            (self.repeated, f"rows repeat an earlier row token by token (the first: row {self.first_repeated})"),
            (self.doubled, f"rows with a bos or eos token twice in succession ({self.doubled_example})"),
            (self.merged, f"prompts whose last tokens change when a completion follows ({self.merged_example})"),
        ]
        return [*lines, *(f"{count} {text}" for count, text in counts if count)]


@dataclass(frozen=True)
class Filter:
    """Batched `datasets.map` function: tokenized groups -> the pairs left by truncation, or a reason to drop.

    The fields key the cache of `datasets`, see `Tokenization`.
    """

    max_length: int | None
    truncation_mode: TruncationMode
    version: int = 4

    def __call__(self, batch: Mapping[str, list]) -> dict[str, list]:
        decisions = [self._decide(row) for row in _rows(batch, [*GROUP_FEATURES, *REMARK_FEATURES])]
        return {name: [decision[name] for decision in decisions] for name in _DECISION_FEATURES}

    def _decide(self, row: dict[str, Any]) -> dict[str, Any]:
        prompt_ids, completions, masks = row["prompt_ids"], row["completion_ids"], row["scored"]
        lengths = [len(prompt_ids) + len(ids) for ids in completions]
        flags = [weight > 0 for mask in masks for weight in mask] if masks else [True] * sum(map(len, completions))
        decision = {
            **{name: row[name] for name in (*_EDGES, *REMARK_FEATURES, "row")},
            "truncated": sum(self.max_length is not None and length > self.max_length for length in lengths),
            "promptless": sum(self._loses_prompt(prompt_ids, ids) for ids in completions),
            "max_token_id": max((max(ids) for ids in (prompt_ids, *completions) if ids), default=-1),
            "completion_tokens": sum(map(len, completions)),
            "scored_tokens": sum(flags),
        }
        if row["reason"] or (prompt_ids and not decision["truncated"] and not masks):
            return decision  # dropped already, or nothing to cut
        if self.max_length is not None and self.truncation_mode == "keep_start" and len(prompt_ids) >= self.max_length:
            return decision | {"reason": PROMPT_FILLS, "detail": f"{len(prompt_ids)} tokens"}
        how = (self.max_length, self.truncation_mode, bool(row["image_ids"]))
        cut = [truncate(prompt_ids, ids, *how) for ids in completions]
        seen = (
            [any(truncate(prompt_ids, mask, *how)[1]) for mask in masks] if masks else [len(ids) > 0 for _, ids in cut]
        )
        # A pair stays if all its completions keep some scored tokens and its two sides still differ.
        edges = list(zip(row["chosen"], row["targets"], *([row["rejected"]] if row["rejected"] else [])))
        scored = [e for e, edge in enumerate(edges) if all(seen[i] for i in edge)]
        different = [e for e in scored if len(edges[e]) < 3 or cut[edges[e][0]] != cut[edges[e][2]]]
        if not different:
            unscored = masks and any(all(len(cut[i][1]) > 0 for i in edge) for edge in edges)
            reason = IDENTICAL if scored else UNSCORED if unscored else IMAGE_CUT if row["image_ids"] else EMPTY
            detail = f"when cut to max_length={self.max_length}" if decision["truncated"] else "one token and no prompt"
            if unscored and not decision["truncated"]:
                detail = "its mask scores nothing"
            return decision | {"reason": reason, "detail": detail}
        return decision | {name: [row[name][e] for e in different] if row[name] else [] for name in _EDGES}

    def _loses_prompt(self, prompt_ids: list[int], completion_ids: list[int]) -> bool:
        cut_away = self.truncation_mode == "keep_end" and len(completion_ids) >= (self.max_length or math.inf)
        return bool(completion_ids) and (not prompt_ids or cut_away)


@dataclass(frozen=True)
class _StreamFilter:
    """The filter of a stream: drops rows as they are read, and counts them in the report."""

    filter: Filter
    report: PreparationReport
    columns: tuple[str, ...]

    def __call__(self, batch: Mapping[str, list], indices: Sequence[int]) -> dict[str, list]:
        decisions = self.filter(batch)
        for index, decision in zip(indices, _rows(decisions)):
            self.report.add_once(index, decision)
        kept = [i for i, reason in enumerate(decisions["reason"]) if not reason]
        # `map` keeps columns that the first row of the stream lacks, so they need as many values as the others.
        names = [name for name in batch if name in self.columns or name not in REMARK_FEATURES]
        columns = {name: batch[name] for name in names} | {name: decisions[name] for name in _EDGES}
        return {name: [values[i] for i in kept] for name, values in columns.items()}


class Examined(NamedTuple):
    """How the rows of a dataset are read."""

    dataset: Dataset | IterableDataset  # its visible rows
    columns: list[str]  # all of them
    form: Form
    roles: Roles
    keep: tuple[str, ...]  # the columns that stay as they are
    nulls: Mapping[str, NullPlaces]  # where Arrow may have inserted nulls
    first: FirstRow
    unused: list[str]  # the columns that nothing reads
    reader: ImageReader | None = None  # reads the images of the column `images`, if there is one


@dataclass(frozen=True)
class ReadingOptions:
    """Options by which the rows of a dataset are read.

    Attributes:
        max_length, truncation_mode: how the collator will truncate. They decide which rows are dropped.
        target_column: a third completion of each row: y_ref of SLiC's regularizer.
        gap_column: by how much chosen is better, in rows of one pair. Ranked rows use their `scores`, or ranks.
        ranked_pairs: which pairs a ranked row without `pairs` has, see `formats.ranked_pairs`.
        prompt_format: `auto` renders rows of messages, or with a system prompt or history, by the chat template, and
            continues text as it is. `chat` also makes turns of text. `text` drops rows that are conversations.
        weight_column: the weights of the pairs, numbers of at least 0: one for all pairs of a row, or a list of one for
            each of its `pairs`.
        assistant_only_loss: score the assistant's turns only, see :mod:`.masks`. Then the completion of a row of
            `messages` begins with the assistant's first turn.
        keep_columns: columns to keep as they are.
    """

    max_length: int | None = None
    truncation_mode: TruncationMode = "keep_start"
    target_column: str | None = None
    gap_column: str | None = None
    ranked_pairs: RankedPairs = "all"
    prompt_format: PromptFormat = "auto"
    weight_column: str | None = None
    assistant_only_loss: bool = False
    keep_columns: Sequence[str] = ()

    @property
    def single_columns(self) -> dict[str, str | None]:
        """The columns that options name, by option, without ``keep_columns``."""
        return {name: getattr(self, name) for name in ("target_column", "gap_column", "weight_column")}


def examine(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    reading: ReadingOptions,
    name: str = "train",
) -> Examined:
    """Checks options, columns and the first usable row of a dataset; arguments as of :func:`prepare`.

    Raises:
        UserError: the columns, an option or the tokenizer cannot be used.
    """
    _check_type(dataset, name)
    dataset = one_pair_rows(visible_rows(dataset), reading.weight_column)
    columns = read_columns(dataset)
    if not columns or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise UserError(f"the {name} data has no rows")
    check_truncation(reading.max_length, reading.truncation_mode)
    check_ranked_pairs(reading.ranked_pairs)
    processor: Any = tokenizer
    tokenizer = cast("PreTrainedTokenizerBase", getattr(processor, "tokenizer", processor))
    check_tokenizer(tokenizer)
    form, roles = find_roles(columns)
    reader = None
    if "images" in roles:
        reader = _make_reader(processor, form, roles, name)
        dataset, roles = undecoded(dataset, roles["images"]), {**roles, "images": IMAGES}
        columns = [IMAGES if column == "image" else column for column in columns]
    keep = _kept_columns(columns, form, reading)
    named = [*filter(None, reading.single_columns.values()), *keep, *((IMAGES,) if IMAGES in columns else ())]
    nulls = find_null_places(dataset.features, {*read_by(form, roles), *named} if form not in _TOKENIZED else ())
    first = read_first_row(dataset, form, roles, reading.prompt_format, processor if reader else tokenizer, nulls)
    if reading.assistant_only_loss and (first.is_chat is False or form in _TOKENIZED):
        raise UserError(
            f"assistant_only_loss=true finds the assistant's turns in messages, and the {name} data holds"
            f" {'tokens' if form in _TOKENIZED else 'text'}: give messages, set prompt_format=chat, or leave it out"
        )
    unused = unused_columns(columns, form, roles, named, first.is_whole)
    return Examined(dataset, columns, form, roles, keep, nulls, first, unused, reader)


def _make_reader(processor: Any, form: Form, roles: Roles, name: str) -> ImageReader:
    """Returns the reader of a dataset's images."""
    has = f"the {name} data is vision-related (column {in_backticks([roles['images']])})"
    if form is Form.TOKENS:
        raise UserError(f"{has}, and its prompts are tokens: give them as messages, or remove the column")
    if not is_processor(processor):
        raise UserError(
            f"{has}, and {type(processor).__name__} reads no images: give the processor of a vision-language model as"
            " processing_class (transformers.AutoProcessor), or remove the column"
        )
    reader = ImageReader(processor)
    assert reader.placeholder  # raises for a processor without one
    return reader


def prepare(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    num_proc: int | None = None,
    batch_size: int = 1000,
    name: str = "train",
    **options: Any,
) -> tuple[Dataset | IterableDataset, PreparationReport]:
    """Tokenizes a dataset of any accepted form, and drops rows that cannot be trained on. Truncation happens later.

    Args:
        dataset: rows of one of these forms:
            - `prompt, chosen, rejected`, text or messages; without `prompt`, the common start is the prompt;
            - `prompt, completions`, best first, or with `scores`, or with `pairs`, a list of [better, worse] positions;
            - `prompt, completion`; or `messages`;
            - `prompt, initial_steps, chosen_step, rejected_step`: two steps after the same beginning of an answer; with
              `chosen_rest` and `rejected_rest`, two whole answers;
            - `turns` or `paths`: several preferences of a conversation or a tree, see :mod:`.pair_rows`;
            - `prompt_ids, chosen_ids, rejected_ids`;
            - the output of this function.
            Rows of tokens may have `completion_mask`, a list for each completion of a 0 or a 1 per token: the tokens
            that are scored; or `token_weights`, of numbers of at least 0. Rows of messages may have `train_on`, numbers
            per turn, or a `weight` in messages.
            Rows of text or messages may have `tools` (a list or its JSON) and `chat_template_kwargs`. :mod:`.forms`
            lists the forms of other trainers that are read, too. Prompts of text or messages may have images, in a
            column `images` or `image`, as PIL images, paths, URLs or bytes.
        tokenizer: the model's tokenizer, or its processor, which images need. Its eos token becomes its pad token if it
            has none.
        num_proc: number of processes that tokenize a map-style dataset. A stream is tokenized where it is read.
        batch_size: number of rows that are tokenized together.
        name: name of the dataset in log lines, progress bars and the report.
        options: of :class:`ReadingOptions`.

    Returns:
        The dataset (a stream is filtered as it is read) with the columns of `tokenize.GROUP_FEATURES` and
        `keep_columns`, and `images` as they were given, if there are any; and the report. A ranked row may hold a
        completion whose pairs truncation has removed.

    Raises:
        UserError: the form, an option or the tokenizer cannot be used, or no row is left (the message counts reasons).
    """
    reading = ReadingOptions(**options)
    read = examine(dataset, tokenizer, reading, name)
    dataset, form, keep, first = read.dataset, read.form, read.keep, read.first

    # Tokenize and filter.
    stored = dataset.features if isinstance(dataset, Dataset) else {}
    exact = tuple(column for column in keep if isinstance(stored.get(column), ExactJson))
    tokenization = Tokenization(
        *(cast("Any", getattr(tokenizer, "tokenizer", tokenizer)), form, reading.target_column, reading.ranked_pairs),
        *(keep, reading.gap_column, read.nulls, exact),
        roles=dict(read.roles),
        prompt_format=first.prompt_format,
        reader=read.reader,
        weight_column=reading.weight_column,
        assistant_only_loss=reading.assistant_only_loss,
    )
    images = (IMAGES,) if IMAGES in read.columns and (read.reader or form is Form.GROUP) else ()
    if images:
        batch_size = min(batch_size, _IMAGE_ROWS)
        if isinstance(dataset, IterableDataset):
            tokenization = replace(tokenization, keep=(*keep, *images))
    tokenize = partial(_tokenize, dataset, tokenization, read.columns, batch_size)
    notes = first.notes(name, read.unused)
    report = PreparationReport(name, reading.max_length, notes=notes, first_is_chat=first.is_chat)
    filtration = Filter(reading.max_length, reading.truncation_mode)
    columns = (*GROUP_FEATURES, *keep)
    if isinstance(dataset, IterableDataset):
        columns = (*columns, *images)
        batches = {"with_indices": True, "batched": True, "batch_size": batch_size}
        stream_filter, given = _StreamFilter(filtration, report, columns), [*columns, *REMARK_FEATURES]
        return tokenize().map(stream_filter, remove_columns=given, **batches), report
    with _without_garbage_collection():
        tokenized = tokenize(num_proc=num_proc, desc=f"Tokenizing {name} data")
        # Images are not copied into the tokenized dataset.
        beside = dataset.select_columns(list(images)) if images else None
        return _filter_rows(tokenized, filtration, report, columns, batch_size, num_proc, beside), report


def _tokenize(dataset: Any, tokenization: Tokenization, given: list[str], batch_size: int, **options: Any) -> Any:
    # The features are given to map, because it cannot infer the types of lists from a batch with only dropped rows.
    # The rows of a stream are not stored, so they need no types.
    features = None
    if isinstance(dataset, Dataset):
        kept = {column: dataset.features[column] for column in tokenization.keep}
        features = Features(GROUP_FEATURES | REMARK_FEATURES | kept)
    return dataset.map(
        tokenization,
        with_indices=True,
        batched=True,
        batch_size=batch_size,
        remove_columns=given,
        features=features,
        **options,
    )


def _check_type(dataset: Any, name: str) -> None:
    if not isinstance(dataset, (Dataset, IterableDataset)):
        hint = f"; choose one of its splits: {', '.join(map(str, dataset))}" if isinstance(dataset, dict) else ""
        raise UserError(f"the {name} data is {type(dataset).__name__}; expected a Dataset or IterableDataset{hint}")


@contextlib.contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Switches the garbage collector off.

    It traverses the many lists of tokens again and again, a third of the time outside of the tokenizer, and rows leave
    no reference cycles to collect.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _filter_rows(
    tokenized: Dataset,
    filtration: Filter,
    report: PreparationReport,
    columns: tuple[str, ...],
    batch_size: int,
    num_proc: int | None,
    beside: Dataset | None,
) -> Dataset:
    """Counts and drops the rows of a map-style dataset. Decisions are cached in a small table beside the tokens.

    Args:
        beside: more columns of the result.
    """
    decisions = tokenized.map(
        filtration,
        batched=True,
        batch_size=batch_size,
        remove_columns=tokenized.column_names,
        features=_DECISION_FEATURES,
        num_proc=num_proc,
        desc=f"Filtering {report.name} data",
    )
    for batch in decisions.iter(batch_size):
        for decision in _rows(batch):
            report.add(decision)
    if not report.kept:
        raise UserError("\n  ".join(["no row can be trained on", *report.summary()]))
    kept = [index for index, reason in enumerate(decisions["reason"]) if not reason]
    digests = decisions.with_format("numpy", columns=["digest", "row"])[:]
    _, firsts = np.unique(digests["digest"][kept], return_index=True)
    if len(firsts) < len(kept):
        report.repeated = len(kept) - len(firsts)
        report.first_repeated = int(np.delete(digests["row"][kept], firsts)[0])
    tokens = tokenized.remove_columns([*_EDGES, *REMARK_FEATURES])
    parts = [tokens, decisions.select_columns(list(_EDGES)), *([beside] if beside is not None else [])]
    groups = concatenate_datasets(parts, axis=1)
    return groups.select_columns([*columns, *(beside.column_names if beside is not None else ())]).select(kept)


def _rows(batch: Mapping[str, list], names: Iterable[str] | None = None) -> list[dict[str, Any]]:
    """Returns the rows of a batch of columns."""
    columns = {name: batch[name] for name in names or batch}
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def _kept_columns(columns: Sequence[str], form: Form, reading: ReadingOptions) -> tuple[str, ...]:
    """Checks the columns that options name, and returns those to keep, including TRL's reference log-probs."""
    single, keep_columns = reading.single_columns, reading.keep_columns
    target_column, gap_column, weight_column = single.values()
    named = {option: [name] if name else [] for option, name in single.items()} | {"keep_columns": keep_columns}
    for option, names in named.items():
        if missing := [name for name in names if name not in columns]:
            raise UserError(f"{option} names {missing}, but the dataset has the columns {sorted(columns)}")
    if target_column and form in (Form.GROUP, Form.SUPERVISED, Form.MESSAGES):
        raise UserError(f"target_column={target_column!r} needs rows of pairs; the dataset's form is {form.value}")
    if gap_column and form not in (Form.PREFERENCE, Form.TOKENS):
        raise UserError(f"gap_column={gap_column!r} needs rows of one pair; the dataset's form is {form.value}")
    if weight_column and form is Form.GROUP:
        raise UserError(f"weight_column={weight_column!r}: prepared rows have their `weights` already; leave it out")
    if taken := set(keep_columns) & {*GROUP_FEATURES, *REMARK_FEATURES}:
        raise UserError(f"keep_columns names {sorted(taken)}, which the prepared dataset uses itself: rename them")
    references = REFERENCE_SUMS if form is Form.TOKENS else ()
    return tuple(dict.fromkeys([*keep_columns, *(name for name in references if name in columns)]))
