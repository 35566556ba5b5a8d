"""Means that are computed from sums over micro-batches."""

from __future__ import annotations

import itertools

import torch
from accelerate import Accelerator

from cpt_kernels.data.collate import PackedCollator
from cpt_kernels.losses import build_loss
from cpt_kernels.model.packed_model import PackedModel
from cpt_kernels.training.metrics import Metrics
from tests.helpers.architectures import tiny_model

ROW = {"prompt_ids": [5], "completion_ids": [[6, 7]], "chosen": [0], "targets": [0], "rejected": []}


def computed(*batches_of_rows, aux_losses=()):
    model, metrics = PackedModel(tiny_model("llama")), Metrics(Accelerator(cpu=True), beta=0.1)
    for rows, aux_loss in itertools.zip_longest(batches_of_rows, aux_losses):
        batch = PackedCollator()(rows)
        scores = model(batch, build_loss("sft"), statistics=True)
        metrics.add(batch, scores._replace(aux_loss=None if aux_loss is None else torch.tensor(aux_loss)))
    return metrics.compute()


def test_a_batch_without_rows_adds_nothing():
    """An empty batch does not say whether its data has rejected sides, so it must not create their metrics."""
    assert computed([ROW], []) == computed([ROW])
    assert computed([ROW]).keys().isdisjoint(["rewards/rejected", "rewards/margins", "logits/rejected", "aux_loss"])
    assert computed([]) == {}


def test_auxiliary_losses_are_averaged_over_pairs():
    """As in the loss. The pad of a batch without pairs has an auxiliary loss, too."""
    assert computed([ROW] * 3, [ROW], [], aux_losses=(2.0, 4.0, 9.0))["aux_loss"] == (3 * 2 + 4) / 4
