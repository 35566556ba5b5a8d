"""Runs a rank of test_checkpoints.py: in each case one rank cannot write a part of the checkpoint of step KILLED."""

from __future__ import annotations

import resource
from pathlib import Path

from cpt_kernels import ContrastiveTrainer
from cpt_kernels.training import saving
from tests.helpers.killed_save import KILLED, SAVED, make_trainer
from tests.helpers.toy import preference_data

# Case -> the rank that fails, and the method or function of the save in which it does.
CASES = {
    "card": (0, "create_model_card"),
    "weights": (0, "_save"),
    "optimizer": (0, "_save_optimizer_and_scheduler"),
    "random state": (1, "_save_rng_state"),
    "record": (0, "complete_checkpoint"),
    "no disk error": (1, "_save_rng_state"),
}


def failing(case: str) -> type[ContrastiveTrainer]:
    """Returns a trainer that cannot write more than 100 bytes to a file in one part of the save on one rank."""
    rank, name = CASES[case]

    class Failing(ContrastiveTrainer):
        pass

    def run(trainer, function, *args, **kwargs):
        if trainer.state.global_step != KILLED or trainer.args.process_index != rank:
            return function(*args, **kwargs)
        if case == "no disk error":
            raise RuntimeError("out of memory")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        try:
            return function(*args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    if hasattr(ContrastiveTrainer, name):
        inner = getattr(ContrastiveTrainer, name)
        setattr(Failing, name, lambda self, *a, **k: run(self, lambda *a, **k: inner(self, *a, **k), *a, **k))
        return Failing

    def finish(self, *args):
        function = getattr(saving, name)
        setattr(saving, name, lambda *a: run(self, function, *a))
        try:
            ContrastiveTrainer._finish_checkpoint(self, *args)
        finally:
            setattr(saving, name, function)

    Failing._finish_checkpoint = finish
    return Failing


def run_all(folder: Path) -> dict[str, list[str]]:
    """Returns the error of every case: the name of its class, and its text."""
    found = {}
    for case in CASES:
        # With a best checkpoint, transformers has a barrier between weights and optimizer.
        best = {"metric_for_best_model": "loss", "eval_strategy": "steps", "eval_steps": SAVED}
        evaluation = {"eval_dataset": preference_data(4), **best} if case == "weights" else {}
        trainer = make_trainer(folder / case, failing(case), per_device_train_batch_size=2, **evaluation)
        try:
            trainer.train()
        except Exception as error:
            found[case] = [type(error).__name__, str(error)]
    return found
