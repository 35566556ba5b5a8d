"""Held-out pairs under one or several models: implicit reward accuracy, margins and log-probs, whole and by group.

A model is scored as the reference is: its log-probs are kept on disk under a hash of its weights. Evaluation that was
killed goes on where it was, more pairs or another grouping score nothing again, and training's cache is found.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from accelerate import Accelerator
from datasets import Dataset
from numpy.typing import NDArray
from torch import nn
from xxhash import xxh3_64_intdigest

from ..config import ContrastiveConfig
from ..data.collate import PackedCollator
from ..data.preparation import PreparationReport, prepare
from ..data.tokenize import check_tokenizer
from ..errors import UserError
from ..model.loading import load_model
from ..model.packed_model import PackedModel, base_model
from ..pairs.build import factorize
from ..reference.cache import ReferenceCache, default_cache_dir
from ..reference.missing import iter_sequences
from ..reference.scorer import Reference
from .win_rate import CONFIDENCE, RESAMPLES, interval, win_rate

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Model = nn.Module | str | Callable[[], nn.Module]

# Chosen over rejected, in tokens; GPT-4's answers are about four times as long as InstructGPT's.
RATIO_EDGES = (0.5, 0.8, 1.25, 2.0, 4.0)
LENGTH_EDGES = (32, 64, 128, 256, 512)
ALL = "all pairs"
MODEL_PAIR, LENGTH_RATIO, CHOSEN_LENGTH = "model pair", "chosen / rejected tokens", "chosen tokens"
_MODELS = ("chosen_model", "rejected_model")
_GROUPED = ("completions", "models", "pairs")
_RESERVED = ("model", "row", "chosen", "rejected", "chosen_tokens", "rejected_tokens")  # columns of the table of pairs
_ORIGIN = ("pair_row", "pair_chosen", "pair_rejected")  # of a pair that was in a grouped row
_MOST_VALUES = 100  # that a table can have


@dataclass(frozen=True)
class Grouping:
    """Which of the values each of P pairs has."""

    name: str
    values: list[str]
    codes: NDArray[np.int64]  # (P,) index into values


@dataclass(frozen=True)
class PairEvaluation:
    """P pairs under one or several models.

    Attributes:
        rows: (P,) row of each pair in the data given.
        completions: (P, 2) which of the row's completions are chosen and rejected; 0 and 1 but for ranked rows.
        prompts: (P,) hash of each pair's prompt, over which intervals are drawn.
        lengths: (P, 2) tokens of chosen and rejected, as scored.
        groupings: by models, by length, and by the columns asked for.
        logps: model -> (P, 2) summed log-probs of chosen and rejected, nats.
        ref_logps: (P, 2) the reference's, or None.
        beta: of the rewards.
        report: what became of the data's rows.
    """

    rows: NDArray[np.int64]
    completions: NDArray[np.int64]
    prompts: NDArray[np.uint64]
    lengths: NDArray[np.int64]
    groupings: list[Grouping]
    logps: dict[str, NDArray[np.float64]]
    ref_logps: NDArray[np.float64] | None
    beta: float
    report: PreparationReport

    def metrics(self, model: str) -> dict[str, NDArray[np.float64]]:
        """Metric, under the trainer's name -> its value for each pair, (P,).

        An exact tie counts 1/2 in the accuracies. The log of training counts it 0; the two differ only where the policy
        still is its reference. Without a reference a reward is beta times the log-prob, as in training.
        """
        logps = self.logps[model]
        rewards = self.beta * (logps if self.ref_logps is None else logps - self.ref_logps)
        margins = rewards[:, 0] - rewards[:, 1]
        return {
            "rewards/accuracies": (np.sign(margins) + 1) / 2,
            "rewards/margins": margins,
            "rewards/chosen": rewards[:, 0],
            "rewards/rejected": rewards[:, 1],
            "logps/accuracies": (np.sign(logps[:, 0] - logps[:, 1]) + 1) / 2,
            "logps/chosen": logps[:, 0],
            "logps/rejected": logps[:, 1],
        }

    def summary(
        self, *, resamples: int = RESAMPLES, confidence: float = CONFIDENCE, seed: int = 0
    ) -> list[dict[str, Any]]:
        """A row for each model and value of each grouping that has pairs.

        Returns:
            ``model``, ``by``, ``value``, ``pairs``, ``prompts``, and every metric as ``{"mean", "low", "high"}``, the
            ends those of a bootstrap interval over prompts.
        """
        bootstrap = {"resamples": resamples, "confidence": confidence, "seed": seed}
        everything = Grouping(ALL, [ALL], np.zeros(len(self.rows), np.int64))
        metrics = {model: self.metrics(model) for model in self.logps}
        rows = []
        for grouping in (everything, *self.groupings):
            for code, value in enumerate(grouping.values):
                where = np.flatnonzero(grouping.codes == code)
                for model in metrics if len(where) else ():
                    prompts = self.prompts[where]
                    row = {"model": model, "by": grouping.name, "value": value}
                    row |= {"pairs": len(where), "prompts": len(np.unique(prompts))}
                    found = {name: values[where] for name, values in metrics[model].items()}
                    rows.append(row | _estimates(found, prompts, bootstrap))
        return rows

    def differences(
        self, *, resamples: int = RESAMPLES, confidence: float = CONFIDENCE, seed: int = 0
    ) -> list[dict[str, Any]]:
        """Every further model's metrics minus the first one's, over the same pairs, as in `summary`."""
        bootstrap = {"resamples": resamples, "confidence": confidence, "seed": seed}
        first, *others = self.logps
        base = self.metrics(first)
        rows = []
        for model in others:
            found = {name: values - base[name] for name, values in self.metrics(model).items()}
            rows.append({"model": model, "minus": first} | _estimates(found, self.prompts, bootstrap, shares=False))
        return rows

    def table(self) -> pa.Table:
        """A row for each model and pair: where it is in the data, its groups, lengths, log-probs and metrics."""
        shared = {
            "row": self.rows,
            "chosen": self.completions[:, 0],
            "rejected": self.completions[:, 1],
            **{grouping.name: np.array(grouping.values)[grouping.codes] for grouping in self.groupings},
            "chosen_tokens": self.lengths[:, 0],
            "rejected_tokens": self.lengths[:, 1],
        }
        if self.ref_logps is not None:
            shared |= {"ref_logps/chosen": self.ref_logps[:, 0], "ref_logps/rejected": self.ref_logps[:, 1]}
        parts = [{"model": [model] * len(self.rows)} | shared | self.metrics(model) for model in self.logps]
        return pa.concat_tables([pa.table(part) for part in parts])


def evaluate_pairs(
    models: Mapping[str, Model],
    data: Dataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reference: Model | None = None,
    args: ContrastiveConfig | None = None,
    by: Sequence[str] = (),
    ratio_edges: Sequence[float] = RATIO_EDGES,
    length_edges: Sequence[float] = LENGTH_EDGES,
) -> PairEvaluation:
    """Score pairs by every model and by the reference.

    Tokens, truncation, packing and precision are a :class:`ContrastiveTrainer`'s of the same ``args``. Works on any
    number of ranks, each with a whole model; every rank gets the result.

    Args:
        models: name -> model, name or folder of one, or a function that loads it; one is in memory at a time.
        data: pairs in any form that the trainer takes. Columns ``chosen_model`` and ``rejected_model``, or ``models``
            beside ``completions`` and ``pairs`` of grouped rows, say whose they are.
        tokenizer: the models' own.
        reference: default none: rewards are of log-probs alone.
        by: further columns to group by.
        ratio_edges, length_edges: where groups of length ratio (chosen / rejected) and of chosen length begin, in
            tokens.

    Raises:
        UserError: a stream, no pairs, an unknown column, or a model that does not fit the tokenizer.
    """
    args = ContrastiveConfig() if args is None else args
    _check(models, data, by)
    if _present(_GROUPED, data):
        data = _split_groups(data)
    with args.main_process_first(desc="tokenising the held-out data"):  # the others find it in datasets' cache
        dataset, report = prepare(
            data,
            tokenizer,
            max_length=args.max_length,
            truncation_mode=args.truncation_mode,
            ranked_pairs=args.ranked_pairs,
            keep_columns=list(dict.fromkeys([*_present(_MODELS, data), *by, *_present(_ORIGIN, data)])),
            num_proc=args.dataset_num_proc,
            name="held-out",
        )
    if not report.pairs:
        raise UserError("the held-out data has no pairs: give rows with chosen and rejected")
    scorer = _Scorer(dataset, tokenizer, args, report.max_token_id)
    lengths = scorer.lengths[scorer.members]
    groupings = [
        *_column_groupings(dataset, by, scorer.rows),
        _buckets(LENGTH_RATIO, lengths[:, 0] / lengths[:, 1], ratio_edges),
        _buckets(CHOSEN_LENGTH, lengths[:, 0], length_edges),
    ]
    places = _places(dataset, scorer)
    return PairEvaluation(
        rows=places[:, 0],
        completions=places[:, 1:],
        prompts=_prompt_hashes(data, dataset)[scorer.rows],
        lengths=lengths,
        groupings=groupings,
        ref_logps=None if reference is None else scorer.score("reference", reference)[scorer.members],
        logps={name: scorer.score(name, model)[scorer.members] for name, model in models.items()},
        beta=args.beta,
        report=report,
    )


def _check(models: Mapping[str, Model], data: Any, by: Sequence[str]) -> None:
    if not isinstance(data, Dataset):
        raise UserError(f"the held-out data is {type(data).__name__}, expected a datasets.Dataset that is no stream")
    if not models:
        raise UserError("there is no model to evaluate")
    if lacking := [name for name in by if name not in data.column_names]:
        raise UserError(f"by names the column {lacking[0]!r}, but the data has {sorted(data.column_names)}")
    if taken := [name for name in by if name in _RESERVED]:
        raise UserError(f"by names the column {taken[0]!r}, which the result has itself: rename it in the data")


def _present(names: tuple[str, ...], data: Dataset) -> tuple[str, ...]:
    """The columns, if the data has all of them, else none."""
    return names if {*names} <= {*data.column_names} else ()


class _Scorer:
    """Models score the C completions of a prepared dataset, which P pairs refer to.

    Attributes:
        lengths: (C,) tokens, in the order of `iter_sequences`.
        rows, sides: (P,) row of the prepared dataset, and (P, 2) which of the row's completions.
        members: (P, 2) which of the C completions.
        source: row of the prepared dataset -> row of the data given.
    """

    def __init__(
        self, dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: ContrastiveConfig, max_token_id: int
    ) -> None:
        self.dataset, self.tokenizer, self.args, self.max_token_id = dataset, tokenizer, args, max_token_id
        self.cut = (args.max_length, args.truncation_mode)
        self.accelerator = Accelerator(cpu=args.use_cpu, mixed_precision=args.mixed_precision)
        found = [(row, at, len(ids)) for part in iter_sequences(dataset, *self.cut) for row, at, _, ids in part]
        rows, positions, self.lengths = np.array(found, np.int64).T
        edges = dataset.with_format("arrow").select_columns(["chosen", "rejected", "row"])[:]
        self.source = edges["row"].to_numpy()
        chosen, rejected = (edges[name].combine_chunks() for name in ("chosen", "rejected"))
        self.rows = np.repeat(np.arange(len(dataset)), chosen.value_lengths().to_numpy())
        self.sides = np.stack([side.flatten().to_numpy() for side in (chosen, rejected)], axis=1).astype(np.int64)
        width = int(positions.max()) + 1
        self.members = np.searchsorted(rows * width + positions, self.rows[:, None] * width + self.sides)

    def score(self, name: str, model: Model) -> NDArray[np.float64]:
        """(C,) summed log-probs, nats; from the cache as far as it has them."""
        args = self.args
        if not isinstance(model, nn.Module):
            model = load_model(model, args) if isinstance(model, str) else model()
        check_tokenizer(self.tokenizer, base_model(model).get_input_embeddings().weight.shape[0], self.max_token_id)
        if not getattr(base_model(model), "is_quantized", False):  # those are where they were loaded to
            model.to(self.accelerator.device)
        packed = PackedModel(model, args.head_memory_mb, args.attention_backend)
        reference = Reference(
            packed,
            None,
            new_adapter=False,
            keep=False,
            accelerator=self.accelerator,
            cache_dir=args.ref_cache_dir or default_cache_dir(),
        )
        collator = PackedCollator(*self.cut, args.share_prompts != "false", packed.share_limit)
        reference.fill(self.dataset, collator, args.max_tokens_per_batch, "held-out", name)
        return np.concatenate(list(self._sums(reference.cache)))

    def _sums(self, cache: ReferenceCache) -> Iterator[NDArray[np.float64]]:
        for sequences in iter_sequences(self.dataset, *self.cut):
            found = cache.get_many([sequence[2:] for sequence in sequences])
            if any(values is None for values in found):
                raise UserError(f"log-probs written to {cache.folder} just now are not there any more: run it again")
            yield np.array([values.sum(dtype=np.float64) for values in found])


def _split_groups(data: Dataset) -> Dataset:
    """Rows of ``completions``, ``models`` and ``pairs`` as a row for each pair; each response is scored once still."""
    kept = [name for name in data.column_names if name not in (*_GROUPED, "scores")]

    def split(batch: Mapping[str, list], rows: list[int]) -> dict[str, list]:
        split: dict[str, list] = {name: [] for name in (*kept, "chosen", "rejected", *_MODELS, *_ORIGIN)}
        for i, row in enumerate(rows):
            completions, models, pairs = (batch[name][i] for name in _GROUPED)
            if lacking := [name for name in _GROUPED if batch[name][i] is None]:
                raise UserError(f"row {row} has no {lacking[0]}, as grouped rows do: give it some, or leave it out")
            for pair in pairs:
                are_there = len(pair) == 2 and 0 <= min(pair) <= max(pair) < len(models) == len(completions)
                if not are_there:
                    raise UserError(f"row {row}: models and pairs do not belong to its {len(completions)} completions")
                sides = [values[side] for values in (completions, models) for side in pair]
                for name, value in zip(("chosen", "rejected", *_MODELS, *_ORIGIN), (*sides, row, *pair)):
                    split[name].append(value)
                for name in kept:
                    split[name].append(batch[name][i])
        return split

    return data.map(split, batched=True, with_indices=True, remove_columns=data.column_names, desc="Splitting groups")


def _places(dataset: Dataset, scorer: _Scorer) -> NDArray[np.int64]:
    """(P, 3) row of each pair in the data given, and which of the row's completions are chosen and rejected."""
    if not _present(_ORIGIN, dataset):
        return np.concatenate([scorer.source[scorer.rows, None], scorer.sides], axis=1)
    table = dataset.with_format("arrow").select_columns(list(_ORIGIN))[:]
    return np.stack([table[name].to_numpy() for name in _ORIGIN], axis=1)[scorer.rows]


def _prompt_hashes(data: Dataset, dataset: Dataset) -> NDArray[np.uint64]:
    """A hash of every prepared row's prompt: of what the data has, as its last tokens may depend on what follows."""
    hashes: list[int | None] = [None] * len(dataset)
    if "prompt" in data.column_names and "prompt_ids" not in data.column_names:
        parts = data.with_format(None).select_columns(["prompt"]).iter(1000)
        prompts = (prompt for part in parts for prompt in part["prompt"])
        given = [None if prompt is None else xxh3_64_intdigest(json.dumps(prompt).encode()) for prompt in prompts]
        hashes = [given[row] for row in dataset.with_format("arrow").select_columns(["row"])[:]["row"].to_pylist()]
    if None in hashes:  # prompts that are the common start of their completions
        parts = dataset.with_format("numpy", columns=["prompt_ids"]).iter(1000)
        of_tokens = (xxh3_64_intdigest(ids.tobytes()) for part in parts for ids in part["prompt_ids"])
        hashes = [tokens if known is None else known for tokens, known in zip(of_tokens, hashes)]
    return np.array(hashes, np.uint64)


def _column_groupings(dataset: Dataset, by: Sequence[str], row_of_pair: NDArray) -> Iterator[Grouping]:
    of_models = _present(_MODELS, dataset)
    columns = list(dict.fromkeys([*of_models, *by]))
    table = dataset.with_format("arrow").select_columns(columns)[:] if columns else None
    if of_models:
        sides = zip(*(table[name].to_pylist() for name in of_models))
        yield _grouping(MODEL_PAIR, [f"{chosen} > {rejected}" for chosen, rejected in sides], row_of_pair)
    for name in by:
        yield _grouping(name, list(map(str, table[name].to_pylist())), row_of_pair)


def _grouping(name: str, of_rows: list[str], row_of_pair: NDArray) -> Grouping:
    values = list(dict.fromkeys(of_rows))
    if len(values) > _MOST_VALUES:
        raise UserError(f"{name} has {len(values)} different values; at most {_MOST_VALUES} make a table")
    return Grouping(name, values, factorize(of_rows)[row_of_pair])


def _buckets(name: str, values: NDArray, edges: Sequence[float]) -> Grouping:
    if list(edges) != sorted(set(edges)) or not len(edges):
        raise UserError(f"edges of {name} must increase, not {list(edges)}")
    labels = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
    return Grouping(name, [f"below {edges[0]:g}", *labels, f"from {edges[-1]:g}"], np.digitize(values, edges))


def _estimates(
    values: dict[str, NDArray], prompts: NDArray, bootstrap: dict[str, Any], shares: bool = True
) -> dict[str, dict[str, float]]:
    ends = interval(np.stack(list(values.values()), axis=1), prompts=prompts, **bootstrap).T.tolist()
    estimates = {}
    for (name, found), (low, high) in zip(values.items(), ends):
        if shares and name.endswith("/accuracies") and low == high:  # all pairs agree: see win_rate
            _, low, high, _ = win_rate(found, prompts=prompts, **bootstrap)
        estimates[name] = {"mean": float(found.mean()), "low": low, "high": high}
    return estimates
