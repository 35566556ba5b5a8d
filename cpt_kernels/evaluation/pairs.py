"""Evaluates models on held-out pairs: implicit reward accuracy, margins and log-probs, over all pairs and by group.

The models' log-probs go through the reference cache, whose key contains a fingerprint of the weights. An evaluation
that was killed therefore continues where it stopped, another grouping or additional pairs score no completion again,
and the log-probs that training cached are reused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from accelerate import Accelerator
from datasets import Dataset, Features, Value
from numpy.typing import NDArray
from torch import nn
from xxhash import xxh3_64_intdigest

from ..config import ContrastiveConfig
from ..data.collate import PackedCollator
from ..data.image_files import as_files
from ..data.images import IMAGES
from ..data.pair_rows import one_pair_rows
from ..data.preparation import PreparationReport, prepare
from ..data.rows import ExactJson, visible_rows
from ..data.tokenize import check_tokenizer
from ..errors import UserError
from ..model.images import image_reader
from ..model.loading import load_model
from ..model.packed_model import PackedModel, base_model, embedding_rows
from ..model.sharing import sharing_options
from ..pairs.build import factorize
from ..reference.cache import ReferenceCache, default_cache_dir
from ..reference.missing import iter_sequences
from ..reference.scorer import Reference
from .drift import TEXT, Model, dataset_sequences, measure_drift, text_sequences
from .pair_metrics import CHOSEN_LENGTH, LENGTH_EDGES, LENGTH_RATIO, MODEL_PAIR, RATIO_EDGES, Grouping, PairEvaluation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

_MODELS = ("chosen_model", "rejected_model")
_GROUPED = ("completions", "models", "pairs")
# Columns of `PairEvaluation.table`.
_RESERVED = ("model", "row", "chosen", "rejected", "chosen_tokens", "rejected_tokens")
_ORIGIN = ("pair_row", "pair_chosen", "pair_rejected")  # place of a pair that comes from a grouped row
_MOST_VALUES = 100  # values of a grouping; more do not make a readable table


def evaluate_pairs(
    models: Mapping[str, Model],
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
    *,
    reference: Model | None = None,
    ref_logps: NDArray[np.float64] | None = None,
    args: ContrastiveConfig | None = None,
    per_token: bool | None = None,
    by: Sequence[str] = (),
    ratio_edges: Sequence[float] = RATIO_EDGES,
    length_edges: Sequence[float] = LENGTH_EDGES,
    drift: bool = False,
    text: str | None = None,
) -> PairEvaluation:
    """Scores pairs by every model and by the reference.

    Tokenization, truncation, packing, precision and rewards are those of a :class:`ContrastiveTrainer` with the same
    ``args``.
    Works on any number of ranks with a whole model on each; every rank gets the result.

    Args:
        models: name -> a model, its name or folder, or a function that loads it. One model is in memory at a time.
        data: pairs in any form that the trainer accepts. The models that wrote the responses are named by the columns
            ``chosen_model`` and ``rejected_model``, or in grouped rows by ``models`` beside ``completions`` and
            ``pairs``.
        tokenizer: the tokenizer of all models, or the processor if prompts have images.
        reference: without a reference, the rewards are computed from the log-probs alone.
        ref_logps: (P, 2) its summed log-probs of chosen and rejected if they are known, as an earlier evaluation of the
            same data found them; the reference then scores nothing.
        args: default ``ContrastiveConfig()``.
        per_token: compute rewards of log-probs per token. Default: as the loss of ``args`` does.
        by: further columns to group by.
        ratio_edges: lower edges of the groups by length ratio, tokens of chosen / tokens of rejected.
        length_edges: lower edges of the groups by tokens of chosen.
        drift: also compare each model with the reference on every token of the responses, see
            :mod:`cpt_kernels.evaluation.drift`; both are then in memory at a time.
        text: plain text on which each model is also compared with the reference.

    Raises:
        UserError: the data is a stream, has no pairs or lacks a column, a model does not fit the tokenizer, or there is
            no reference to compare with.
    """
    args = ContrastiveConfig() if args is None else args
    if (drift or text is not None) and reference is None:
        raise UserError("what training changed is measured against the reference, and there is none: give one")
    if not isinstance(data, Dataset):
        raise UserError(f"the held-out data is {type(data).__name__}, expected a datasets.Dataset (not a stream)")
    with args.main_process_first(desc="reading the held-out data"):
        data = as_files(one_pair_rows(visible_rows(data)))
        _check_arguments(models, data, by)
        if _present(_GROUPED, data):
            data = _split_groups(data)
    dataset, report = _tokenize_pairs(data, tokenizer, args, by)

    # Group the pairs.
    scorer = _Scorer(dataset, tokenizer, args, report.max_token_id)
    lengths = scorer.lengths[scorer.members]
    groupings = [
        *_column_groupings(dataset, by, scorer.rows),
        _buckets(LENGTH_RATIO, lengths[:, 0] / lengths[:, 1], ratio_edges),
        _buckets(CHOSEN_LENGTH, lengths[:, 0], length_edges),
    ]

    # Compare whole distributions. What cannot be compared is an error before completions are scored.
    cut = {"responses": dataset_sequences(dataset, args)} if drift else {}
    if text is not None:
        cut[TEXT] = text_sequences(text, scorer.tokenizer, args.max_length)
    drifts = measure_drift(models, reference, cut, args) if cut else {}

    # Score every completion once per model, and gather the two sides of each pair.
    if ref_logps is None and reference is not None:
        ref_logps = scorer.score("reference", reference)[scorer.members]
    places = _places(dataset, scorer)
    return PairEvaluation(
        rows=places[:, 0],
        completions=places[:, 1:],
        prompts=_prompt_hashes(dataset)[scorer.rows],
        lengths=lengths,
        groupings=groupings,
        ref_logps=ref_logps,
        logps={name: scorer.score(name, model)[scorer.members] for name, model in models.items()},
        beta=args.beta,
        per_token=args.build_loss().per_token if per_token is None else per_token,
        report=report,
        drifts=drifts,
    )


def _check_arguments(models: Mapping[str, Model], data: Dataset, by: Sequence[str]) -> None:
    if not models:
        raise UserError("there is no model to evaluate: give at least one in models")
    if lacking := [name for name in by if name not in data.column_names]:
        raise UserError(f"by names the column {lacking[0]!r}, but the data has {sorted(data.column_names)}")
    if taken := [name for name in by if name in _RESERVED]:
        raise UserError(f"by names the column {taken[0]!r}, which is a column of the result: rename it in the data")


def _present(names: tuple[str, ...], data: Dataset) -> tuple[str, ...]:
    """Returns the names if the data has all of these columns, else no name."""
    return names if {*names} <= {*data.column_names} else ()


def _tokenize_pairs(
    data: Dataset, tokenizer: PreTrainedTokenizerBase | ProcessorMixin, args: ContrastiveConfig, by: Sequence[str]
) -> tuple[Dataset, PreparationReport]:
    """Tokenizes the pairs as the trainer does, and keeps the columns by which pairs are grouped.

    The main process goes first, and the other ranks then find the result in the cache of datasets.
    """
    with args.main_process_first(desc="tokenizing the held-out data"):
        dataset, report = prepare(
            data,
            tokenizer,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            ranked_pairs=args.ranked_pairs or "all",
            prompt_format=args.prompt_format,
            assistant_only_loss=args.assistant_only_loss,
            keep_columns=list(dict.fromkeys([*_present(_MODELS, data), *by, *_present(_ORIGIN, data)])),
            num_proc=args.dataset_num_proc,
            name="held-out",
        )
    if args.weight_column is not None:
        report.notes.append("every pair counts once, whatever its weight: results of other weights stay comparable")
    if not report.pairs:
        raise UserError("the held-out data has no pairs: give rows with chosen and rejected")
    return dataset, report


class _Scorer:
    """Scores the C completions of a prepared dataset, to which P pairs refer.

    Attributes:
        lengths: (C,) sums of the weights of each completion's tokens, in the order of `iter_sequences`; without weights
            the numbers of scored tokens.
        rows: (P,) row of each pair in the prepared dataset.
        sides: (P, 2) positions of chosen and rejected among the completions of that row.
        members: (P, 2) positions of chosen and rejected among the C completions.
        source: row of the prepared dataset -> row of the given data.
    """

    def __init__(
        self,
        dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase | ProcessorMixin,
        args: ContrastiveConfig,
        max_token_id: int,
    ) -> None:
        self.dataset, self.processor, self.args, self.max_token_id = dataset, tokenizer, args, max_token_id
        self.tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        self.cut = (args.max_length, args.truncation_mode)
        self.accelerator = Accelerator(cpu=args.use_cpu, mixed_precision=args.mixed_precision)
        completions = (each for part in iter_sequences(dataset, *self.cut) for each in part)
        found = [
            (
                each.row,
                each.position,
                len(each.completion_ids) if each.weights is None else each.weights.sum(dtype=float),
            )
            for each in completions
        ]
        rows, positions, lengths = zip(*found)
        rows, positions, sums = np.array(rows), np.array(positions), np.array(lengths, np.float64)
        self.lengths = sums if (sums % 1).any() else sums.astype(np.int64)
        edges = dataset.with_format("arrow").select_columns(["chosen", "rejected", "row"])[:]
        self.source = edges["row"].to_numpy()
        chosen, rejected = (edges[name].combine_chunks() for name in ("chosen", "rejected"))
        self.rows = np.repeat(np.arange(len(dataset)), chosen.value_lengths().to_numpy())
        self.sides = np.stack([side.flatten().to_numpy() for side in (chosen, rejected)], axis=1).astype(np.int64)
        # The C completions are sorted by (row, position), so a pair's side is found by binary search.
        width = int(positions.max()) + 1
        self.members = np.searchsorted(rows * width + positions, self.rows[:, None] * width + self.sides)

    def score(self, name: str, model: Model) -> NDArray[np.float64]:
        """Returns (C,) summed log-probs in nats; only completions that the cache lacks are computed."""
        args = self.args
        if not isinstance(model, nn.Module):
            model = load_model(model, args) if isinstance(model, str) else model()
        check_tokenizer(self.tokenizer, embedding_rows(model), self.max_token_id)
        if not getattr(base_model(model), "is_quantized", False):  # a quantized model cannot be moved
            model.to(self.accelerator.device)
        images = image_reader(base_model(model), self.processor) if IMAGES in self.dataset.column_names else None
        packed = PackedModel(model, args.head_memory_mb, args.attention_backend, args.packing, images)
        # The evaluated model takes the place of the reference: its log-probs are cached under its own fingerprint.
        reference = Reference(
            packed,
            None,
            new_adapter=False,
            keep=False,
            accelerator=self.accelerator,
            cache_dir=args.ref_cache_dir or default_cache_dir(),
            progress=not args.disable_tqdm,
        )
        sharing = sharing_options(packed, args, training=False)
        how = {"share_limit": packed.share_limit, "padded": packed.padded, "images": packed.images} | sharing
        collator = PackedCollator(*self.cut, **how)
        reference.fill(self.dataset, collator, args.max_tokens_per_batch, "held-out", name)
        return np.concatenate(list(self._sums(reference.cache)))

    def _sums(self, cache: ReferenceCache) -> Iterator[NDArray[np.float64]]:
        for sequences in iter_sequences(self.dataset, *self.cut):
            found = cache.get_many([each.ids for each in sequences])
            if any(values is None for values in found):
                raise UserError(f"log-probs have disappeared from {cache.folder} during the run: start it again")
            if any(each.weights is not None for each in sequences) and cache.imported_keys:
                raise UserError(
                    f"{cache.folder} holds imported sums, and tokens have masks or weights: choose another one"
                )
            weighed = (
                v if each.weights is None else v * each.weights.astype(float) for v, each in zip(found, sequences)
            )
            yield np.array([values.sum(dtype=np.float64) for values in weighed])


def _split_groups(data: Dataset) -> Dataset:
    """Splits rows of ``completions``, ``models`` and ``pairs`` into one row per pair.

    A response that is in several pairs is still scored once, because the cache is keyed by prompt and completion.
    """
    kept = [name for name in data.column_names if name not in (*_GROUPED, "scores")]
    side = getattr(data.features["completions"], "feature", data.features["completions"])  # of the items, or JSON
    features = {name: data.features[name] for name in kept} | dict.fromkeys(("chosen", "rejected"), side)
    features |= dict.fromkeys(_MODELS, Value("string")) | dict.fromkeys(_ORIGIN, Value("int64"))

    def split(batch: Mapping[str, list], rows: list[int]) -> dict[str, list]:
        split: dict[str, list] = {name: [] for name in (*kept, "chosen", "rejected", *_MODELS, *_ORIGIN)}
        for i, row in enumerate(rows):
            completions, models, pairs = (batch[name][i] for name in _GROUPED)
            if lacking := [name for name in _GROUPED if batch[name][i] is None]:
                raise UserError(f"row {row} has no {lacking[0]}, which grouped rows need: add it, or remove the row")
            for pair in pairs:
                is_valid = len(pair) == 2 and 0 <= min(pair) <= max(pair) < len(models) == len(completions)
                if not is_valid:
                    raise UserError(f"row {row}: models and pairs do not belong to its {len(completions)} completions")
                names = [None if model is None else str(model) for model in models]
                sides = [values[side] for values in (completions, names) for side in pair]
                for name, value in zip(("chosen", "rejected", *_MODELS, *_ORIGIN), (*sides, row, *pair)):
                    split[name].append(value)
                for name in kept:
                    split[name].append(batch[name][i])
        exact = [name for name, feature in features.items() if isinstance(feature, ExactJson)]
        return split | {name: list(map(ExactJson().encode_example, split[name])) for name in exact}

    return data.map(
        split,
        batched=True,
        with_indices=True,
        remove_columns=data.column_names,
        features=Features(features),
        desc="Splitting groups",
    )


def _places(dataset: Dataset, scorer: _Scorer) -> NDArray[np.int64]:
    """Returns (P, 3) for each pair: its row in the given data, and the positions of chosen and rejected in that row."""
    if not _present(_ORIGIN, dataset):
        return np.concatenate([scorer.source[scorer.rows, None], scorer.sides], axis=1)
    table = dataset.with_format("arrow").select_columns(list(_ORIGIN))[:]
    return np.stack([table[name].to_numpy() for name in _ORIGIN], axis=1)[scorer.rows]


def _prompt_hashes(dataset: Dataset) -> NDArray[np.uint64]:
    """Returns a hash of the prompt of every row of the prepared dataset, (rows,).

    Turns of one conversation count as one prompt, and so do steps of one answer, because what is found of them is not
    independent. Prompts with different images are different.
    """
    trees = dataset.with_format("arrow").select_columns(["tree"])[:]["tree"].to_numpy().astype(np.uint64)
    if IMAGES in dataset.column_names:
        images = dataset.select_columns(["image_ids"])["image_ids"]
        with_images = [xxh3_64_intdigest(f"{tree} {ids}".encode()) if ids else tree for tree, ids in zip(trees, images)]
        trees = np.array(with_images, np.uint64)
    return trees


def _column_groupings(dataset: Dataset, by: Sequence[str], row_of_pair: NDArray) -> Iterator[Grouping]:
    """Groups the pairs by the two models of a pair, if the data names them, and by each requested column."""
    of_models = _present(_MODELS, dataset)
    if of_models:
        sides = zip(*(dataset[name][:] for name in of_models))
        yield _grouping(MODEL_PAIR, [f"{chosen} > {rejected}" for chosen, rejected in sides], row_of_pair)
    for name in by:
        yield _grouping(name, list(map(str, dataset[name][:])), row_of_pair)


def _grouping(name: str, of_rows: list[str], row_of_pair: NDArray) -> Grouping:
    """Groups the pairs by a value of their rows."""
    values = list(dict.fromkeys(of_rows))
    if len(values) > _MOST_VALUES:
        raise UserError(f"{name} has {len(values)} different values; at most {_MOST_VALUES} can be grouped by")
    return Grouping(name, values, factorize(of_rows)[row_of_pair])


def _buckets(name: str, values: NDArray, edges: Sequence[float]) -> Grouping:
    """Groups the pairs by the interval between two edges that contains their value."""
    if list(edges) != sorted(set(edges)) or not len(edges):
        raise UserError(f"edges of {name} must increase, but are {list(edges)}")
    labels = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    return Grouping(name, [f"below {edges[0]:g}", *labels, f"from {edges[-1]:g}"], np.digitize(values, edges))
