"""Tensors that the head keeps between forward and backward, and its peak of memory."""

from __future__ import annotations

import pytest
import torch

from cpt_kernels.ops.linear_preference import linear_preference_loss
from tests.helpers.heads import FROZEN, FUSED, GENERAL, Head, in_mode, peak_memory

FP32, BF16 = torch.float32, torch.bfloat16
MODES = (FROZEN, FUSED, GENERAL)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_memory(mode, dtype, monkeypatch):
    """A tile, (N, H) twice (G W and the gradient), dW in fp32; 5 % more.

    The tile that is left to the backward is there beside a dW of bf16; recomputed ones make room for it.
    """
    columns, width, rows = 16384, 128, 128
    # The blocks that a CPU works on are small beside a tile of real size; these values make them so here.
    monkeypatch.setattr("cpt_kernels.ops.vocab_score.reference._BLOCK_ELEMENTS", 1 << 14)
    monkeypatch.setattr("cpt_kernels.ops.head.passes._BLOCK_ROWS", 256)
    head = Head(blocks=[([80, 48], [(0, 0, 1)])] * 16, columns=columns, width=width).tile(rows, dtype.itemsize)
    head = in_mode(head, mode)
    leaves, pairs = head.leaves(dtype), head.pairs()
    with peak_memory() as peak:
        linear_preference_loss(
            leaves["hidden"],
            leaves["weight"],
            head.targets,
            pairs,
            head.loss,
            None,
            head.options,
            general=mode == GENERAL,
        ).loss.backward()
    tokens = sum(head.lengths)
    assert leaves["hidden"].grad is not None and (leaves["weight"].grad is None) == (mode == FROZEN)
    allowed = dtype.itemsize * (rows * columns + 2 * tokens * width) + (0 if mode == FROZEN else 4 * columns * width)
    if mode == FUSED and dtype == BF16:
        allowed += 2 * columns * width
    assert 0.8 * allowed < peak[0] <= 1.05 * allowed
    assert dtype.itemsize * tokens * columns > 3 * allowed  # all logits would not fit


@pytest.mark.parametrize("kept", [False, True])
def test_a_finished_gradient_is_there_once(kept):
    """Tiles are small beside dW, which is scaled in place unless the graph is kept."""
    head = Head(blocks=[([8, 8], [(0, 0, 1)])] * 4, columns=4096, width=256).tile(16, 4)
    leaves = head.leaves(FP32)
    with peak_memory() as peak:
        linear_preference_loss(
            leaves["hidden"], leaves["weight"], head.targets, head.pairs(), head.loss, None, head.options
        ).loss.backward(torch.tensor(0.5), retain_graph=kept)
    copies = peak[0] / (4 * head.columns * head.width)
    assert 1 + kept <= copies < 1.15 + kept


@pytest.mark.parametrize("mode", MODES)
def test_one_tile_keeps_the_score_and_not_the_weight(mode):
    """A weight that is gathered for the forward alone must not be saved: it is gone in the backward."""
    head = in_mode(Head(), mode)
    leaves, saved = head.leaves(FP32), []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        linear_preference_loss(
            leaves["hidden"], leaves["weight"], head.targets, head.pairs(), head.loss, general=mode == GENERAL
        ).loss.backward()
    tiles = [tensor for tensor in saved if tensor.shape == (len(head.targets), head.columns)]
    assert len(tiles) == (mode != FROZEN)
    assert all(tensor.data_ptr() != leaves["weight"].data_ptr() for tensor in saved)
