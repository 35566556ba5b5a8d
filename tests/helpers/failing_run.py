"""Runs one rank of test_failures.py: rank 2 of four fails in the middle of a step, the first time that it comes there.

``kill`` ends the process, ``sleep`` never comes back, and ``stop`` makes the operating system stop it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from cpt_kernels import ContrastiveTrainer
from tests.helpers.toy import make_trainer, pairs_of, preference_data

RANK, STEP = 2, 7


class Failing(ContrastiveTrainer):
    """Fails, and appends the pairs of every step to a file of its rank and attempt."""

    failure: str

    def training_step(self, model, inputs, num_items_in_batch=None):
        rank, attempt = (int(os.environ.get(name, 0)) for name in ("RANK", "TORCHELASTIC_RESTART_COUNT"))
        if (rank, self.state.global_step, attempt) == (RANK, STEP, 0):
            if self.failure == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.failure == "sleep":
                time.sleep(1000)
            elif self.failure == "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
        with Path(self.args.output_dir, f"pairs-{attempt}-{rank}.jsonl").open("a") as file:
            file.write(json.dumps([self.state.global_step, pairs_of(inputs)]) + "\n")
        return super().training_step(model, inputs, num_items_in_batch)


def main(folder: Path, failure: str, options: dict) -> None:
    torch.set_num_threads(1)
    saving = {"save_strategy": "steps", "save_steps": 3, "max_steps": 10, "per_device_train_batch_size": 2}
    trainer = make_trainer(folder, Failing, train_dataset=preference_data(60), **{**saving, **options})
    trainer.failure = failure
    trainer.train()
    trainer.save_model()
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]))
    os._exit(0)  # at the normal exit, gloo's threads sometimes abort or block the process
