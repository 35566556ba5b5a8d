"""Renews the reference at the start of each stage of a curriculum (``refresh_reference``).

Stage k of S begins before optimizer step ceil(k steps / S) of the run. The policy is then the reference, and scores the
rows that the stage draws, and the evaluation sets, into the reference cache.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
from datasets import Dataset
from transformers import TrainerCallback

from ..data.batches import BatchSampler
from ..errors import UserError
from ..losses import Loss
from ..reference.missing import find_missing
from ..reference.moving import StagedReference
from .failures import passed

logger = logging.getLogger(__name__)


def check_refresh(loss: Loss, ahead: bool, overridden: bool) -> None:
    """Checks that a run can renew its reference.

    Args:
        ahead: all data is scored before training.
        overridden: the user overrides ``compute_ref_log_probs``.

    Raises:
        UserError: it cannot.
    """
    reasons = {
        f"loss '{loss.name}' has no reference: remove refresh_reference": not loss.needs_reference,
        "refresh_reference scores rows before their stage begins: store all data, evaluation sets too, and leave"
        " precompute_ref_log_probs out": not ahead,
        "the overridden compute_ref_log_probs would ignore refresh_reference: drop one": overridden,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"curriculum: {reason}")


def stage_starts(stages: int, steps: int) -> list[int]:
    """Returns the optimizer steps before which the stages begin, the first at 0.

    Raises:
        UserError: a stage has no step.
    """
    if steps < stages:
        raise UserError(f"curriculum: stages={stages} exceeds the {steps} optimizer steps of the run: lower it")
    return [math.ceil(stage * steps / stages) for stage in range(stages)]


def check_stage(recorded: Mapping[str, Any] | None, starts: list[int], step: int, checkpoint: str) -> None:
    """Raises a UserError unless a checkpoint after ``step`` steps records the stage in which this run has that step."""
    expected = max(start for start in starts if start < max(step, 1))
    found = None if recorded is None else recorded["step"]
    if found != expected:
        raise UserError(
            f"{checkpoint} records a stage that began at step {found}, but in this run its stage begins at step"
            f" {expected}: keep stages, refresh_reference, max_steps and num_train_epochs as they were"
        )


class Stages(TrainerCallback):
    """Makes the policy the reference at the start of every stage but the first.

    Args:
        trainer: a ``ContrastiveTrainer`` whose curriculum has stages.
    """

    def __init__(self, trainer: Any, reference: StagedReference) -> None:
        self.trainer, self.reference, self.starts = trainer, reference, [0]

    def on_train_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        """Finds the stages of the run, and checks that the log-probs of a resumed stage are there.

        Raises:
            UserError: they are not.
        """
        self.starts = stage_starts(self.trainer.curriculum.stages, state.max_steps)
        if state.global_step == 0:
            self.reference.reopen({"step": 0})
        if self.reference.since and state.global_step not in self.starts:
            rows = self._rows(args, state, train_dataloader)
            missing = len(find_missing(rows, self.reference.cache, args.max_length, args.truncation_mode))
            if missing:
                raise UserError(
                    f"{missing} log-probs of the stage that began at step {self.reference.since} are missing from"
                    f" {self.reference.cache.folder}: restore that folder or ref_cache_dir, or resume from a checkpoint"
                    " at or before that step"
                )

    def on_step_begin(self, args: Any, state: Any, control: Any, train_dataloader: Any = None, **_: Any) -> None:
        """Begins the stage that starts with this step, if there is one."""
        step = state.global_step
        if step == 0 or step not in self.starts or self.reference.since == step:
            return
        stage = self.starts.index(step) + 1
        if state.is_world_process_zero:
            logger.warning(
                f"stage {stage} of {len(self.starts)} begins at step {step}: the policy becomes the reference"
            )
        self.reference.begin_stage(step)
        data = {**self.trainer.datasets, "train": self._rows(args, state, train_dataloader)}
        for name, rows in data.items():
            collator, budget = self.trainer.collator, self.trainer.args.max_tokens_per_batch
            passed("the end of a stage", watched=False)
            self.reference.fill(rows, collator, budget, name, f"stage {stage} reference")
        self.reference.end_scoring()

    def _rows(self, args: Any, state: Any, loader: Any) -> Dataset:
        """Returns the rows that the current stage draws."""
        first = self.reference.since
        end = min((start for start in self.starts if start > first), default=state.max_steps)
        sampler = cast("BatchSampler", loader.batch_sampler)
        before, after = (sampler.count_draws(steps, args.gradient_accumulation_steps) for steps in (first, end))
        return self.trainer.train_dataset.select(np.flatnonzero(after > before))
