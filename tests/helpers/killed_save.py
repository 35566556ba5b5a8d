"""Runs of test_checkpoints.py. ``run_all`` runs each case in a process that kills itself while it saves step 4."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import torch

from cpt_kernels import ContrastiveTrainer
from cpt_kernels.training import checkpoints
from tests.helpers import toy

SAVED, KILLED, STEPS = 2, 4, 6
CASES = ("weights", "optimizer", "random state", "record", "rename")


def make_trainer(folder: Path, cls: type[ContrastiveTrainer] = ContrastiveTrainer, **options) -> ContrastiveTrainer:
    torch.set_num_threads(1)
    saving = {"save_strategy": "steps", "save_steps": SAVED, "max_steps": STEPS, "save_total_limit": 1}
    return toy.make_trainer(folder, cls, rows=24, **saving | options)


def dying(case: str) -> type[ContrastiveTrainer]:
    """Returns a trainer that kills its process at a point of the save of step KILLED."""

    def die(trainer: ContrastiveTrainer, at: str) -> None:
        if at == case and trainer.state.global_step == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)

    class Dying(ContrastiveTrainer):
        def _save(self, output_dir=None, state_dict=None):
            super()._save(output_dir, state_dict)
            die(self, "weights")

        def _save_optimizer_and_scheduler(self, output_dir):
            super()._save_optimizer_and_scheduler(output_dir)
            die(self, "optimizer")

        def _save_rng_state(self, output_dir):
            super()._save_rng_state(output_dir)
            die(self, "random state")

        def _finish_checkpoint(self, *args):
            for name in ("write_record", "replace_folder"):
                wait = {"write_record": "record", "replace_folder": "rename"}[name]
                setattr(checkpoints, name, before(getattr(checkpoints, name), lambda wait=wait: die(self, wait)))
            super()._finish_checkpoint(*args)

    return Dying


def before(function, action):
    def run(*args, **kwargs):
        action()
        return function(*args, **kwargs)

    return run


def run_all(folder: Path) -> None:
    for case in CASES:
        child = os.fork()
        if child == 0:
            make_trainer(folder / case, dying(case)).train()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, case
