"""FSDP2 and DeepSpeed ZeRO on two CPU processes have the losses of one process, and synchronize every gradient."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from tests.helpers.forked import run_ranks
from tests.helpers.sharded_run import ENGINES, MODELS, main, train

HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
SHARDED = [name for name in ENGINES if name != "alone"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    engines = [name for name in SHARDED if HAS_DEEPSPEED or "zero" not in name]
    run_ranks(folder, 2, main, folder, engines, environment={"DS_ACCELERATOR": "cpu"})
    return folder


@pytest.fixture(scope="module")
def alone() -> dict:
    return {name: train("alone", name) for name in MODELS}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("engine", SHARDED)
def test_two_sharded_ranks_take_the_steps_of_one(folder, alone, engine, model):
    if "zero" in engine and not HAS_DEEPSPEED:
        pytest.skip("deepspeed is not installed: pip install deepspeed")
    expected_losses, expected = alone[model]
    for rank in (0, 1):
        losses, gradients = torch.load(folder / f"{engine}-{model}-{rank}.pt")
        assert losses == pytest.approx(expected_losses, abs=1e-4)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            error = (gradient - expected[name]).abs().max() / expected[name].abs().max()
            assert error < 1e-5, name


@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_models_that_are_sharded_already_are_proven(folder, engine):
    if engine == "zero3" and not HAS_DEEPSPEED:
        pytest.skip("deepspeed is not installed: pip install deepspeed")
    for rank in (0, 1):
        found = torch.load(folder / f"{engine}-proof-{rank}.pt")
        assert found == {"llama": False, "faint": False, "attention": True, "convolution": True}


def test_ranks_without_weights_take_over_what_the_first_found(folder):
    results = [torch.load(folder / f"taken-over-{rank}.pt") for rank in (0, 1)]
    assert results == [(False, "shared_prompt_over_sdpa")] * 2
