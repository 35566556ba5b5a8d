"""Runs one rank of test_distributed.py: trains, then writes rank 0's logs and every rank's first gradients."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from cpt_kernels import ContrastiveTrainer
from tests.helpers.toy import losses, make_trainer, pairs_of, preference_data


class Recording(ContrastiveTrainer):
    """Records the pairs of every step, and the gradients of the first step before clipping."""

    gradients: dict[str, torch.Tensor] | None = None
    pairs: dict[int, list[str]]  # optimizer step -> pairs of this rank

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.pairs.setdefault(self.state.global_step, []).extend(pairs_of(inputs))
        return super().training_step(model, inputs, num_items_in_batch)

    def _clip_grad_norm(self, model):
        if self.gradients is None:
            unwrapped = self.accelerator.unwrap_model(model)
            self.gradients = {n: p.grad.clone() for n, p in unwrapped.named_parameters() if p.grad is not None}
        return super()._clip_grad_norm(model)


def main(folder: Path, name: str, rows: int, options: dict) -> None:
    data = preference_data(rows)
    if options.pop("stream", False):
        data = data.to_iterable_dataset()
    checkpoint = options.pop("resume", None)
    trainer = make_trainer(
        folder / name, Recording, train_dataset=data, eval_dataset=preference_data(5, seed=1), **options
    )
    trainer.pairs = {}
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = trainer.evaluate()
    rank = int(os.environ.get("RANK", 0))
    torch.save(trainer.gradients, folder / f"{name}-{rank}.pt")
    (folder / f"{name}-{rank}-pairs.json").write_text(json.dumps(trainer.pairs))
    if rank == 0:
        logged = {"losses": losses(trainer), "metrics": metrics, "history": trainer.state.log_history}
        (folder / f"{name}.json").write_text(json.dumps(logged))
    trainer.accelerator.wait_for_everyone()
