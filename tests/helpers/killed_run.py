"""Runs of test_resume.py. ``run_all`` runs each case in a process that kills itself in the middle of a step."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch
from datasets import Dataset, IterableDataset

from cpt_kernels import ContrastiveTrainer
from tests.helpers import toy

STEPS, SAVED, KILLED = 20, 10, 14
CASES = {
    "rows": {},
    "accumulated": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 1},
    "token budget": {"max_tokens_per_batch": 60, "gradient_accumulation_steps": 2},
    "curriculum": {
        **{"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
        "curriculum": {"levels": ["a>b", "a>c"]},
    },
    "stages": {
        **{"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "num_train_epochs": 4},
        "curriculum": {"column": "gap", "keep": 0.6, "schedule": "sqrt", "stages": 4, "refresh_reference": True},
    },
    "stream": {},
    "stream of shuffled rows": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
}


class Dying(ContrastiveTrainer):
    """Kills its process in the last micro-batch of step KILLED, before the optimizer step."""

    seen = 0

    def training_step(self, *args, **kwargs):
        self.seen += 1
        if self.seen == KILLED * self.args.gradient_accumulation_steps:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(*args, **kwargs)


def data(case: str) -> Dataset | IterableDataset:
    rows = toy.preference_data(30)
    if "stream" not in case:
        return rows
    stream = rows.to_iterable_dataset()
    return stream.shuffle(seed=3, buffer_size=8) if "shuffled" in case else stream


def make_trainer(folder: Path, case: str, cls: type[ContrastiveTrainer] = ContrastiveTrainer) -> ContrastiveTrainer:
    torch.set_num_threads(1)
    saving = {"save_strategy": "steps", "save_steps": SAVED, "max_steps": STEPS}
    return toy.make_trainer(folder / case, cls, train_dataset=data(case), **saving, **CASES[case])


def run_all(folder: Path) -> None:
    for case in CASES:
        child = os.fork()
        if child == 0:
            make_trainer(folder, case, Dying).train()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, case
