"""Compiled layers give eager's losses and gradients on rows of any lengths, with few graphs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters

from cpt_kernels.model.layers import _compile_layers
from cpt_kernels.model.packed_model import PackedModel
from tests.helpers.architectures import CONFIGS, LENGTH_DEPENDENT, recompute_activations, tiny_model
from tests.helpers.exactness import BATCHES, LOSSES, alone, assert_as_exact, make_batch, make_rows, run_packed

ARCHITECTURES = [name for name in CONFIGS if name not in ("llama-tied", *LENGTH_DEPENDENT)]
IN_CI = [("llama", "aot_eager", False), ("gemma2", "aot_eager", True), ("mixtral", "aot_eager", True)]
ALL = [(name, "inductor", recompute) for name in ARCHITECTURES for recompute in (False, True)]
CASES = [*IN_CI, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL)]


@pytest.mark.parametrize(("name", "backend", "recompute"), CASES)
def test_compiled_layers_are_as_exact_as_eager_ones(name, backend, recompute):
    reference, _ = alone(name, torch.float32, torch.float64, "sigmoid")
    eager, _ = alone(name, torch.float32, torch.float32, "sigmoid")
    model = tiny_model(name).train()
    if recompute:
        recompute_activations(model)
    packed, results = PackedModel(model), []
    torch._dynamo.reset()
    counters.clear()
    _compile_layers(model, SimpleNamespace(torch_compile_backend=backend, torch_compile_mode=None))
    for seed in range(BATCHES):
        rows = make_rows("sigmoid", seed=seed)
        model.eval()
        with torch.no_grad():  # as an evaluation between two steps
            packed(make_batch(rows, packed), LOSSES["sigmoid"])
        model.train()
        model.zero_grad()
        results.append(run_packed(packed, rows, LOSSES["sigmoid"]))
    assert_as_exact(results, eager, reference, torch.finfo(torch.float32).eps)
    # Two sets of at least two graphs: with gradients, also below checkpointing, and without.
    assert 4 <= counters["stats"]["unique_graphs"] <= 12
