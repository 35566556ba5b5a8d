"""The trainer's evaluation: means over the pairs and tokens of all ranks, however they were packed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate.utils import gather_object
from torch.utils.data import DataLoader
from transformers.trainer_utils import EvalLoopOutput, EvalPrediction

if TYPE_CHECKING:
    from .loop import PackedLoop


def run_evaluation(trainer: PackedLoop, dataloader: DataLoader, prefix: str, keep_rewards: bool) -> EvalLoopOutput:
    """Score all batches; the metrics are TRL's, each name after ``prefix_``.

    With ``keep_rewards`` the predictions are (pairs, 2), the rewards of chosen and rejected on all ranks, and what
    ``compute_metrics`` makes of them is among the metrics.
    """
    model = trainer._wrap_model(trainer.model, training=False)
    if len(trainer.accelerator._models) == 0 and model is trainer.model:
        model = trainer.accelerator.prepare_model(model, evaluation_mode=True)
    model.eval()
    trainer.callback_handler.eval_dataloader = dataloader  # callbacks get it
    metrics = trainer.metrics["eval"]
    metrics.reset()
    predictions, pairs = [], 0
    losses = torch.zeros((), device=trainer.args.device)
    for inputs in dataloader:
        loss, rewards, _ = trainer.prediction_step(model, inputs, prediction_loss_only=not keep_rewards)
        if inputs["num_pairs"]:
            losses += loss.detach() * inputs["num_pairs"]
        pairs += inputs["num_pairs"]
        if keep_rewards:
            predictions.append(np.concatenate(gather_object([rewards.cpu().numpy()])))  # ranks differ in pairs
        trainer.control = trainer.callback_handler.on_prediction_step(trainer.args, trainer.state, trainer.control)
    total = trainer.accelerator.reduce(torch.stack([losses, losses.new_tensor(pairs)]), "sum").tolist()
    means = metrics.compute() | {"loss": total[0] / max(total[1], 1.0)}
    predictions = np.concatenate(predictions) if predictions else None
    if trainer.compute_metrics is not None and predictions is not None:
        last = {"compute_result": True} if trainer.args.batch_eval_metrics else {}  # one call, of all batches
        means |= trainer.compute_metrics(
            EvalPrediction(predictions, np.zeros(len(predictions), dtype=np.int64)), **last
        )
    means["num_tokens"] = trainer.count_tokens()
    means = {f"{prefix}_{name.removeprefix(prefix + '_')}": value for name, value in means.items()}
    return EvalLoopOutput(predictions, None, means, num_samples=pairs)
