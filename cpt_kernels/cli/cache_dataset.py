"""A dataset and a reference as ``cpt-train`` would have them, for the commands of ``cpt cache``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
from accelerate.utils import send_to_device
from datasets import Dataset

from ..data.collate import PackedCollator
from ..data.preparation import prepare
from ..data.sources import load_data
from ..errors import UserError
from ..reference.cache import ReferenceCache
from ..reference.missing import Missing, find_missing, iter_sequences
from ..reference.scorer import Reference
from ..trainer import ContrastiveTrainer
from .parsing import parse
from .train import make_trainer

_SAMPLE_BATCH = 8  # completions scored together


class _Unfilled(ContrastiveTrainer):
    """A trainer whose reference has not been asked anything yet."""

    def _fill(self, reference: Reference) -> None:
        pass


class DatasetReference:
    """The prepared datasets of a run, and its reference."""

    def __init__(self, trainer: _Unfilled, raw: Dataset | None = None) -> None:
        self.trainer, self.raw = trainer, raw
        self.reference, self.collator = trainer.reference, trainer.collator
        self.cut = (trainer.collator.max_length, trainer.collator.truncation_mode)
        self.stored = {name: data for name, data in trainer.datasets.items() if isinstance(data, Dataset)}

    def fill(self) -> None:
        """Score what is missing, on all ranks."""
        ContrastiveTrainer._fill(self.trainer, self.reference)

    def missing(self) -> dict[str, Missing]:
        """What is missing of every dataset."""
        return {name: find_missing(data, self.reference.cache, *self.cut) for name, data in self.stored.items()}

    def rescore(self, sample: int, seed: int) -> list[float]:
        """Nats per token that the stored log-probs of a random sample differ from new ones; the largest of each."""
        stored = {}
        for dataset in self.stored.values():
            for sequences in iter_sequences(dataset, *self.cut):
                pairs = [sequence[2:] for sequence in sequences]
                for (prompt, completion), values in zip(pairs, self.reference.cache.get_many(pairs)):
                    if values is not None:
                        stored[tuple(prompt.tolist()), tuple(completion.tolist())] = values
        sums = self._imported()
        chosen = self._draw(list(stored), sample, seed)
        return [
            self._gap(new, stored[sequence], self.reference.cache.key(*sequence) in sums)
            for sequence, new in self._score(chosen)
        ]

    def import_sums(self, columns: Sequence[str], sample: int, seed: int, tolerance: float) -> tuple[int, list[float]]:
        """Store sums of log-probs, spread evenly over the tokens of their completions, marked as such.

        Losses take sums, so training is the same; single tokens mean nothing. A sample is scored first: the columns do
        not say which model, precision and truncation they are of.

        Returns:
            Completions added, and how far the sums of the sample are off, in nats per token.

        Raises:
            UserError: the data has no such columns, or its sums are not this reference's.
        """
        sums: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
        for row, position, prompt, completion in (
            item for part in iter_sequences(self.raw, *self.cut) for item in part
        ):
            sides = ((self.raw[row]["chosen"], columns[0]), (self.raw[row]["rejected"], columns[1]))
            for members, column in sides:
                if position in members:
                    sums[tuple(prompt.tolist()), tuple(completion.tolist())] = self.raw[row][column]
        gaps = [
            abs(float(new.sum(dtype=np.float64)) - sums[sequence]) / len(new)
            for sequence, new in self._score(self._draw(list(sums), sample, seed))
        ]
        if max(gaps) > tolerance:
            raise UserError(
                f"the sums in {' and '.join(columns)} are off by up to {max(gaps):.3g} nats per token from this"
                f" reference's, more than --tolerance {tolerance}: another model, precision or truncation gave them"
            )
        cache = self.reference.cache
        before = cache.num_rows
        with ReferenceCache(cache.directory, cache.fingerprint, description=cache.description, kind="sums") as imported:
            values = [np.full(len(c), total / len(c), np.float32) for (_, c), total in sums.items()]
            imported.add_many(list(sums), values)
        cache.refresh()
        return cache.num_rows - before, gaps

    def _score(self, sequences: Sequence[tuple]) -> Iterator[tuple[tuple, np.ndarray]]:
        collate = PackedCollator(share_prompts=False, share_limit=self.collator.share_limit)
        for start in range(0, len(sequences), _SAMPLE_BATCH):
            batch = sequences[start : start + _SAMPLE_BATCH]
            rows = [
                {"prompt_ids": prompt, "completion_ids": [completion], "chosen": [], "rejected": [], "targets": []}
                for prompt, completion in batch
            ]
            # The collator groups rows of one prompt, in the order in which the prompts first come.
            order = sorted(range(len(batch)), key=lambda i: [prompt for prompt, _ in batch].index(batch[i][0]))
            scored = self.reference._score(send_to_device(collate(rows), self.reference.accelerator.device))
            yield from ((batch[i], values) for i, values in zip(order, scored))

    def _imported(self) -> set[bytes]:
        return {key for shard in self.reference.cache.shards if shard.kind == "sums" for key in shard.keys().tolist()}

    @staticmethod
    def _gap(new: np.ndarray, stored: np.ndarray, is_sum: bool) -> float:
        if is_sum:
            return abs(float(new.sum(dtype=np.float64) - stored.sum(dtype=np.float64))) / len(new)
        return float(np.abs(new - stored).max())

    @staticmethod
    def _draw(sequences: list[tuple], sample: int, seed: int) -> list[tuple]:
        order = np.random.default_rng(seed).permutation(len(sequences))[:sample]
        return [sequences[i] for i in order.tolist()]


@contextmanager
def open_dataset(argv: Sequence[str], prog: str, keep_columns: Sequence[str] = ()) -> Iterator[DatasetReference]:
    """Load what the options of ``cpt-train`` name.

    Raises:
        UserError: it cannot be trained with, is a stream, or the loss has no reference.
    """
    with tempfile.TemporaryDirectory(prefix="cpt-cache-") as folder:  # a trainer makes its output folder
        options = parse([*argv, "--output_dir", folder], prog)
        if options.training.sync_ref_model:
            raise UserError("sync_ref_model moves the reference, so its log-probs are not cached: leave it out")
        trainer = make_trainer(options, _Unfilled)
        if trainer.reference is None:
            raise UserError(f"loss_type={trainer.loss.name} has no reference: there is nothing to score")
        data = DatasetReference(trainer, _with_columns(options, trainer, keep_columns) if keep_columns else None)
        if not data.stored:
            raise UserError("a stream cannot be scored ahead: leave out dataset_streaming")
        yield data


def _with_columns(options, trainer: _Unfilled, columns: Sequence[str]) -> Dataset:
    script, args = options.script, options.training
    data = load_data(script.dataset_name, config=script.dataset_config, split=script.dataset_train_split)
    if lacking := sorted(set(columns) - set(data.column_names)):
        raise UserError(f"{script.dataset_name} has no column {lacking[0]}: there is nothing to import")
    return prepare(
        data,
        trainer.processing_class,
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
        keep_columns=columns,
    )[0]
