"""``cpt-train --check``: takes the first step of a run without changing a weight, and saves and loads the model.

The first step is that of the run itself: the same loader, engine, loss and optimizer, with a learning rate of 0.
"""

from __future__ import annotations

import itertools
import math
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from rich.table import Table
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from ..data.collate import PackedBatch, PackedCollator, Tokens
from ..data.images import images_of, is_processor
from ..data.stores import local_root, url_of
from ..errors import UserError
from ..losses import PairLogps
from ..model.comparison import compare_rows
from ..model.packed_model import Scores
from ..reference.fingerprint import fingerprint
from ..reference.scorer import Reference, start_bound
from ..trainer import ContrastiveTrainer
from ..training.checks import checked_tokenizer
from .console import print_results
from .decoded import decoded_pair
from .models import load_policy_tokenizer, load_weights
from .options import Options
from .run import check_options, make_trainer, quieten

_COMPARED_TOKENS = 4096  # most tokens of rows that are run packed and alone, beyond the first row


class Check(NamedTuple):
    """The result of one check."""

    name: str
    passed: bool
    detail: str


def check_run(options: Options) -> None:
    """Runs all checks on all ranks, and prints their results with a decoded row of the data.

    Nothing is written to ``output_dir``; reference log-probs of the first step's rows are kept in their cache.
    """
    args = options.training
    if args.resume_from_checkpoint:
        raise UserError("check=true takes the first step of a run: leave out resume_from_checkpoint")
    check_options(options)
    quieten(args)
    with _folder_beside(Path(args.output_dir), args.process_index) as folder:
        args.output_dir, args.report_to, args.push_to_hub = str(folder), [], False
        trainer = make_trainer(options, CheckedTrainer)
        rows = trainer.first_rows()
        checks = [
            _check_rows(trainer, rows),
            *_check_first_step(trainer, options.model.ref_model_name_or_path is not None),
        ]
        checks.append(_check_saving(trainer, folder, options))
        _report(trainer, rows, checks)


class CheckedTrainer(ContrastiveTrainer):
    """A trainer that scores the rows of the first step only, and records the numbers of that step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.recorded: list[tuple[torch.Tensor, PairLogps]] = []  # losses and log-probs of every micro-batch
        self.digest = fingerprint(self.packed.model, compute_dtype="", attention="")  # while the weights are whole

    def _fill(self, reference: Reference) -> None:
        rows = sorted({row for indices in gather_object([self._first_indices()]) for row in indices})
        reference.fill(self.train_dataset.select(rows), self.collator, self.args.max_tokens_per_batch, "first step")

    def _first_indices(self) -> list[int]:
        """Returns the rows of this rank's first step, as indices into the prepared dataset."""
        sampler = self._loader(self.train_dataset, training=True).batch_sampler
        batches = itertools.islice(sampler, self.args.gradient_accumulation_steps)
        return [row for batch in batches for row in batch]

    def first_rows(self) -> list[dict]:
        """Returns the prepared rows of this rank's first step; of a stream those of the first micro-batch."""
        if isinstance(self.train_dataset, Dataset):
            return self.train_dataset.select(self._first_indices()).to_list()
        return next(iter(self._loader(self.train_dataset, training=True).dataset), [])

    def score(self, model: torch.nn.Module, inputs: PackedBatch, *args: Any) -> Scores:
        scores = super().score(model, inputs, *args)
        if inputs["num_pairs"]:
            self.recorded.append((scores.losses, scores.pair_logps))
        return scores


class _StopAfterOneStep(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_log = control.should_training_stop = True


@contextmanager
def _folder_beside(output: Path, rank: int) -> Iterator[Path]:
    """A temporary folder in ``output``, so that the same disk is written to; all ranks get the same one.

    For an output folder on a store, nothing is written to the store.
    """
    output = output if url_of(output) is None else local_root() / ".checks"
    output.mkdir(parents=True, exist_ok=True)
    is_new = not any(output.iterdir())
    folder = tempfile.mkdtemp(prefix="check-", dir=output) if rank == 0 else None
    (folder,) = broadcast_object_list([folder])
    assert folder is not None
    try:
        yield Path(folder)
    finally:
        if rank == 0:
            shutil.rmtree(folder)
            if is_new:
                output.rmdir()


# --- The checks ---


def _check_rows(trainer: CheckedTrainer, rows: Sequence[dict]) -> Check:
    """Compares rows of the first step, run as in training, with each completion run alone."""
    sequences = _some_sequences(rows, trainer.collator)
    difference = bound = 0.0
    if sequences:
        with trainer.accelerator.autocast():
            difference, bound = compare_rows(trainer.packed, sequences, trainer.collator, images_of(rows))
    layout = "padded" if trainer.packed.padded else "packed"
    return Check(
        f"{layout} rows equal each completion run alone",
        difference <= bound,
        f"log-probs of {len(sequences)} completions differ by at most {difference:.2g} nats; rounding explains"
        f" {bound:.2g}",
    )


def _some_sequences(rows: Sequence[dict], collator: PackedCollator) -> list[Tokens]:
    """Returns different truncated sequences of the longest row and of further ones, grouped by their prompts."""
    groups: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
    total = 0
    for row in sorted(rows, key=lambda row: -len(row["prompt_ids"]) - max(map(len, row["completion_ids"]))):
        cut = collator.truncated(row)
        size = sum(len(p) + len(c) for p, c in cut)
        if total and total + size > _COMPARED_TOKENS:
            continue
        total += size
        for prompt, completion in cut:
            if completion:
                groups.setdefault(tuple(prompt), {})[tuple(completion)] = None
    return [(prompt, completion) for prompt, completions in groups.items() for completion in completions]


def _check_first_step(trainer: CheckedTrainer, has_ref_model: bool) -> list[Check]:
    """Trains one step with a learning rate of 0, and checks its loss, gradient and rewards."""
    args = trainer.args
    args.learning_rate, args.logging_steps, args.logging_strategy = 0.0, 1, "steps"
    args.save_strategy = args.eval_strategy = "no"
    args.eval_on_start = args.load_best_model_at_end = False
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(_StopAfterOneStep())
    trainer.train()
    log = next(record for record in trainer.state.log_history if "loss" in record)
    loss, norm = log["loss"], log.get("grad_norm", 0.0)
    finite = math.isfinite(loss) and math.isfinite(norm)
    checks = [Check("the first step is finite", finite, f"loss {loss:.6g}, norm of the gradient {norm:.4g}")]
    is_noisy = trainer.packed.noisy or args.neftune_noise_alpha is not None
    if trainer.loss.needs_reference and not has_ref_model and not is_noisy:
        checks += _check_start(trainer)
    return checks


def _check_start(trainer: CheckedTrainer) -> list[Check]:
    """Compares the first step of a policy that starts from its reference with one whose log-ratios are exactly 0."""
    bound = start_bound(trainer.packed.model, trainer.accelerator)
    beta = trainer.args.beta
    sums = torch.zeros(5, dtype=torch.float64)  # loss, loss at 0, what rounding explains of it, gap, absolute reward
    for losses, logps in trainer.recorded:
        zero = trainer.loss(_at_reference(logps))
        explained = (trainer.loss(_at_reference(logps, bound)) - zero).abs()
        ratios = [getattr(logps, side) - getattr(logps, f"ref_{side}") for side in ("chosen", "rejected")]
        gap = (ratios[0] / logps.chosen_length).abs() + (ratios[1] / logps.rejected_length).abs()
        reward = beta * (ratios[0].abs() + ratios[1].abs())
        sums += torch.stack([part.double().sum().cpu() for part in (losses, zero, explained, gap / 2, reward / 2)])
    pairs = sum(len(losses) for losses, _ in trainer.recorded)
    *totals, pairs = trainer.accelerator.reduce(
        torch.tensor([*sums, pairs], device=trainer.args.device), "sum"
    ).tolist()
    loss, zero, explained, gap, reward = (total / max(pairs, 1) for total in totals)
    return [
        Check(
            "the first loss is that of log-ratios of 0",
            abs(loss - zero) <= explained + 1e-6 * (1 + abs(zero)),
            f"{loss:.6g} over {pairs / trainer.args.sp_size:.0f} pairs, at 0 it is {zero:.6g}",
        ),
        Check(
            "rewards start at 0",
            gap <= bound,
            f"mean absolute reward {reward:.2g}; log-probs differ by {gap:.2g} nats per token, rounding explains"
            f" {bound:g}",
        ),
    ]


def _at_reference(logps: PairLogps, shift: float = 0.0) -> PairLogps:
    """Returns log-probs of a policy that equals the reference, or favours chosen by ``shift`` nats per token."""
    return replace(
        logps,
        chosen=logps.ref_chosen + shift * logps.chosen_length,
        rejected=logps.ref_rejected - shift * logps.rejected_length,
        chosen_tail=logps.ref_chosen_tail,
        rejected_tail=logps.ref_rejected_tail,
    )


def _check_saving(trainer: CheckedTrainer, folder: Path, options: Options) -> Check:
    """Saves model and tokenizer as at the end of training, and compares what is loaded again by digests."""
    name = "the saved model and tokenizer load again"
    trainer.save_model(str(folder))
    if trainer.args.process_index:
        return Check(name, True, "")
    saved = replace(options.model, tokenizer_name=None, model_name_or_path=str(folder), model_revision="main")
    processor = trainer.processing_class
    loaded = load_policy_tokenizer(saved, options.training, images=is_processor(processor))
    model = load_weights(str(folder), "output_dir", saved, options.training, trainable=True)
    same = fingerprint(model, compute_dtype="", attention="") == trainer.digest
    same_tokens = checked_tokenizer(loaded).get_vocab() == checked_tokenizer(processor).get_vocab()
    megabytes = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6
    found = "equal" if same and same_tokens else "differs in " + ("its vocabulary" if same else "weights or config")
    return Check(name, same and same_tokens, f"{megabytes:,.1f} MB, {found}")


# --- The report ---


def _report(trainer: CheckedTrainer, rows: Sequence[dict], checks: Sequence[Check]) -> None:
    """Prints the checks of all ranks on the main process."""
    of_ranks = list(zip(*gather_object([list(checks)])))
    # A check passes if it does on all ranks; else the first rank that fails explains it.
    checks = [next((check for check in each if not check.passed), each[0]) for each in of_ranks]
    if trainer.is_world_process_zero():
        table = Table("check", "result", "found", title="cpt-train --check", title_justify="left")
        for check in checks:
            table.add_row(check.name, "[green]passed[/]" if check.passed else "[red]FAILED[/]", check.detail)
        print_results([*decoded_pair(rows[0], trainer.processing_class, trainer.collator), table], [])
    if not all(check.passed for check in checks):
        raise SystemExit(1)
