"""Trees = alone: sequences that share beginnings have the log-probs, losses and gradients of every one run alone."""

from __future__ import annotations

import pytest
import torch

from cpt_kernels.model.packed_model import PackedModel
from tests.helpers.architectures import CONFIGS, STATES, tiny_model
from tests.helpers.exactness import (
    FLOOR,
    FLOORS,
    LOSSES,
    assert_equal,
    freeze_head,
    make_batch,
    run_alone,
    run_packed,
)
from tests.helpers.trees import tree_rows

_FEW = ["llama", "gemma2"]  # with windows of 5 tokens, shorter than most paths
_HEADS = ["frozen", "trained", "general"]


def _compare(name: str, head: str, seed: int, loss: str = "sigmoid") -> None:
    rows = tree_rows(seed, loss)
    model = tiny_model(name, torch.float64)
    expected = run_alone(model, rows, LOSSES[loss])
    model.zero_grad()
    if head == "frozen":
        freeze_head(model)
    packed = PackedModel(model)
    batch = make_batch(rows, packed, minimum_shared=1)
    plain = make_batch(rows, packed)
    assert batch["token_index"] is not None and len(batch["targets"]) < sum(batch["completion_lengths"])
    assert batch["input_ids"].numel() < plain["input_ids"].numel()
    result = run_packed(packed, rows, LOSSES[loss], batch=batch, general=head == "general")
    assert_equal(result, expected, FLOORS.get(name, FLOOR))


@pytest.mark.parametrize("head", _HEADS)
@pytest.mark.parametrize("name", _FEW)
def test_random_tries(name, head):
    _compare(name, head, _FEW.index(name), "slic" if head == "trained" else "sigmoid")


@pytest.mark.slow
@pytest.mark.parametrize("head", _HEADS)
@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in STATES])
def test_more_random_tries(name, head):
    for seed, loss in enumerate(["sigmoid", "slic", "sft", "sigmoid"], 10):
        _compare(name, head, seed, loss)
