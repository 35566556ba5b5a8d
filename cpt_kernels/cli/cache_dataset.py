"""Prepares a dataset and its reference as ``cpt-train`` does, for the commands of ``cpt cache``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from datasets import Dataset

from ..data.images import IMAGES, ImageId, ids_of, images_of, split_key
from ..data.preparation import prepare
from ..data.sources import load_data
from ..errors import UserError
from ..reference.cache import ReferenceCache
from ..reference.missing import DatasetCompletion, Missing, find_missing, iter_sequences
from ..trainer import ContrastiveTrainer
from .parsing import parse
from .run import make_trainer

_SAMPLE_BATCH = 8  # completions that are scored together

_Ids = tuple[tuple[int, ...], tuple[int, ...]]  # prompt key, completion


class _UnfilledTrainer(ContrastiveTrainer):
    """Trainer whose constructor leaves the cache unfilled."""

    def _fill(self, *_: Any) -> None:
        pass


class DatasetReference:
    """The prepared datasets of a run, and its reference.

    Args:
        raw: the training data with its columns of sums, for `import_sums`.
    """

    def __init__(self, trainer: _UnfilledTrainer, raw: Dataset | None = None) -> None:
        self.trainer, self.raw = trainer, raw
        self.reference = trainer.reference
        self.collator = replace(trainer.collator, share_prompts=False)  # samples are scored without shared prompts
        self.truncation = (self.collator.max_length, self.collator.truncation_mode)
        self.stored = {name: data for name, data in trainer.datasets.items() if isinstance(data, Dataset)}

    def fill(self) -> None:
        """Scores the completions that the cache lacks, on all ranks."""
        ContrastiveTrainer._fill(self.trainer, self.reference)

    def missing(self) -> dict[str, Missing]:
        """Returns the completions of every dataset that the cache lacks."""
        return {name: find_missing(data, self.reference.cache, *self.truncation) for name, data in self.stored.items()}

    def rescore(self, sample: int, seed: int) -> list[float]:
        """Scores a random sample of the stored completions again.

        Returns:
            The largest difference between stored and new log-probs of each completion, in nats per token.
        """
        cache = self.reference.cache
        stored: dict[_Ids, np.ndarray] = {}
        for dataset in self.stored.values():
            for sequences in iter_sequences(dataset, *self.truncation):
                for sequence, values in zip(sequences, cache.get_many([sequence.ids for sequence in sequences])):
                    if values is not None:
                        stored[_as_tuples(sequence)] = values
        sums = cache.imported_keys
        return [
            _gap(new, stored[ids], is_sum=cache.key(*ids) in sums)
            for ids, new in self._score(_draw_sample(list(stored), sample, seed))
        ]

    def import_sums(self, columns: Sequence[str], sample: int, seed: int, tolerance: float) -> tuple[int, list[float]]:
        """Stores sums of log-probs, marked as sums and spread evenly over the tokens of their completions.

        Losses take sums, so training is the same; single tokens are meaningless. A sample is scored first, because the
        columns do not say which model, precision and truncation they are of.

        Returns:
            The number of completions added, and the differences of the sample in nats per token.

        Raises:
            UserError: the sums are not this reference's.
        """
        # Collect the sums by completion.
        sums: dict[_Ids, float] = {}
        for sequence in (sequence for chunk in iter_sequences(self.raw, *self.truncation) for sequence in chunk):
            row = self.raw[sequence.row]
            if sequence.weights is not None:
                raise UserError(
                    f"row {row['row']} has masks or weights of tokens, and a sum cannot be divided among them"
                )
            for side, column in zip(("chosen", "rejected"), columns):
                if sequence.position in row[side]:
                    sums[_as_tuples(sequence)] = row[column]
        # Compare a sample with this reference.
        gaps = [
            abs(float(new.sum(dtype=np.float64)) - sums[ids]) / len(new)
            for ids, new in self._score(_draw_sample(list(sums), sample, seed))
        ]
        if max(gaps) > tolerance:
            raise UserError(
                f"the sums in {' and '.join(columns)} differ by up to {max(gaps):.3g} nats per token from this"
                f" reference's, more than --tolerance {tolerance}: another model, precision or truncation computed them"
            )
        # Store them.
        cache = self.reference.cache
        before = cache.num_rows
        with ReferenceCache(cache.directory, cache.fingerprint, description=cache.description, kind="sums") as imported:
            values = [np.full(len(c), total / len(c), np.float32) for (_, c), total in sums.items()]
            imported.add_many(list(sums), values)
        cache.refresh()
        return cache.num_rows - before, gaps

    def _score(self, sequences: Sequence[_Ids]) -> Iterator[tuple[_Ids, np.ndarray]]:
        in_order = sorted(sequences)  # completions of one prompt are consecutive, as Reference.score expects
        places: dict[ImageId, tuple[Dataset, int]] = {}  # the row of a dataset that holds an image
        for data in self.stored.values():
            for row, words in enumerate(data["image_ids"] if IMAGES in data.column_names else ()):
                places |= dict.fromkeys(ids_of(words), (data, row))
        for start in range(0, len(in_order), _SAMPLE_BATCH):
            batch = in_order[start : start + _SAMPLE_BATCH]
            rows = [places[image] for prompt, _ in batch for image in ids_of(split_key(prompt)[0])]
            images = images_of(data[row] for data, row in rows)
            yield from zip(batch, self.reference.score(batch, self.collator, images))


def _as_tuples(sequence: DatasetCompletion) -> _Ids:
    prompt, completion = sequence.ids
    return tuple(map(int, prompt)), tuple(map(int, completion))


def _gap(new: np.ndarray, stored: np.ndarray, is_sum: bool) -> float:
    """Returns the difference in nats per token: of the sums if only the sum was imported, else the largest."""
    if is_sum:
        return abs(float(new.sum(dtype=np.float64) - stored.sum(dtype=np.float64))) / len(new)
    return float(np.abs(new - stored).max())


def _draw_sample(sequences: list[_Ids], sample: int, seed: int) -> list[_Ids]:
    order = np.random.default_rng(seed).permutation(len(sequences))[:sample]
    return [sequences[i] for i in order.tolist()]


@contextmanager
def open_dataset(argv: Sequence[str], prog: str, keep_columns: Sequence[str] = ()) -> Iterator[DatasetReference]:
    """Loads the model and the datasets that the options of ``cpt-train`` name.

    Raises:
        UserError: the options cannot be trained with, the data is a stream, or the loss has no reference.
    """
    with tempfile.TemporaryDirectory(prefix="cpt-cache-") as folder:  # a trainer creates its output folder
        options = parse([*argv, "--output_dir", folder], prog)
        if options.training.sync_ref_model:
            raise UserError("sync_ref_model moves the reference, so its log-probs are not cached: leave it out")
        trainer = make_trainer(options, _UnfilledTrainer)
        if trainer.reference is None:
            raise UserError(f"loss_type={trainer.loss.name} has no reference: there is nothing to score")
        data = DatasetReference(trainer, _with_columns(options, trainer, keep_columns) if keep_columns else None)
        if not data.stored:
            raise UserError("a stream cannot be scored ahead: leave out dataset_streaming")
        yield data


def _with_columns(options, trainer: _UnfilledTrainer, columns: Sequence[str]) -> Dataset:
    script, args = options.script, options.training
    data = load_data(script.dataset_name, config=script.dataset_config, split=script.dataset_train_split)
    if lacking := sorted(set(columns) - set(data.column_names)):
        raise UserError(f"{script.dataset_name} has no column {lacking[0]}: there is nothing to import")
    if args.assistant_only_loss:
        raise UserError("assistant_only_loss needs the log-prob of every token, and imports are sums: leave it out")
    names = ("max_length", "truncation_mode", "prompt_format")
    how = {name: getattr(args, name) for name in names}
    return prepare(data, trainer.processing_class, **how, keep_columns=columns)[0]
