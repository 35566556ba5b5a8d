"""Means that are computed from sums over micro-batches."""

from __future__ import annotations

from accelerate import Accelerator

from cpt_kernels.data.collate import PackedCollator
from cpt_kernels.losses import build_loss
from cpt_kernels.model.packed_model import PackedModel
from cpt_kernels.training.metrics import Metrics
from tests.helpers.architectures import tiny_model

ROW = {"prompt_ids": [5], "completion_ids": [[6, 7]], "chosen": [0], "targets": [0], "rejected": []}


def computed(*batches_of_rows):
    model, metrics = PackedModel(tiny_model("llama")), Metrics(Accelerator(cpu=True), beta=0.1)
    for rows in batches_of_rows:
        batch = PackedCollator()(rows)
        metrics.add(batch, model(batch, build_loss("sft"), statistics=True))
    return metrics.compute()


def test_a_batch_without_rows_adds_nothing():
    """An empty batch does not say whether its data has rejected sides, so it must not create their metrics."""
    assert computed([ROW], []) == computed([ROW])
    assert computed([ROW]).keys().isdisjoint(["rewards/rejected", "rewards/margins", "logits/rejected", "aux_loss"])
    assert computed([]) == {}
