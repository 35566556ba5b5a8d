"""Runs of a curriculum that renews its reference, killed in each stage; see test_stages.py."""

from __future__ import annotations

import os
import pickle
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from cpt_kernels import ContrastiveTrainer
from cpt_kernels.reference import scorer
from cpt_kernels.reference.cache import ReferenceCache
from cpt_kernels.training.run_folder import checkpoints_in
from tests.helpers import toy

# Fields of logs that are times, memory, or a mean over the steps of one process.
UNREPEATABLE = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}
UNREPEATABLE |= {"peak_memory_gib", "tokens_per_second"}
# (event, optimizer steps before it, how often it happens before the process dies)
Point = tuple[str, int, int]


def run_killed(folder: Path, points: Mapping[str, Point | None], options: dict[str, Any]) -> None:
    """Runs each case until it dies at its point, resumes it, and writes results and scored completions to its folder.

    A case without a point is not interrupted.
    """
    for case, point in points.items():
        (folder / case).mkdir()
        for dies in (point, None) if point else (None,):
            if (child := os.fork()) == 0:
                _train(folder / case, dies, options)
                os._exit(0)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert code == (-signal.SIGKILL if dies else 0), case


def _train(folder: Path, dies: Point | None, options: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    seen: list[tuple[str, int]] = []

    def happens(event: str, step: int) -> None:
        seen.append((event, step))
        if dies is not None and (event, step) == dies[:2] and seen.count(dies[:2]) == dies[2]:
            os.kill(os.getpid(), signal.SIGKILL)

    class Dying(ContrastiveTrainer):
        def training_step(self, *args, **kwargs):
            happens("trains", self.state.global_step)
            return super().training_step(*args, **kwargs)

        def _save_checkpoint(self, *args, **kwargs):
            super()._save_checkpoint(*args, **kwargs)
            happens("saved", self.state.global_step)

    fill, score, add_many = scorer.Reference.fill, scorer.Reference.score, ReferenceCache.add_many

    def filling(self, *args):
        happens("fills", self.since)
        fill(self, *args)

    def scoring(self, sequences, *args):
        happens("scores", self.since)
        logps = score(self, sequences, *args)
        with (folder / "scored").open("a") as file:
            file.writelines(f"{self.cache.fingerprint} {self.cache.key(*each).hex()}\n" for each in sequences)
        return logps

    def adding(self, *args):  # otherwise up to `flush_seconds` of scoring are lost
        add_many(self, *args)
        self.flush()

    scorer.Reference.fill, scorer.Reference.score, ReferenceCache.add_many = filling, scoring, adding
    scorer._TOKENS_PER_BATCH = {"cpu": 100}  # several micro-batches
    trainer = toy.make_trainer(folder, Dying, eval_dataset=toy.preference_data(3, seed=1), **options)
    trainer.train(resume_from_checkpoint=bool(checkpoints_in(folder / "out")) or None)
    logs = [{k: v for k, v in each.items() if k not in UNREPEATABLE} for each in trainer.state.log_history]
    (folder / "result").write_bytes(pickle.dumps((logs, trainer.model.state_dict())))
