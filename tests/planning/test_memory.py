"""Tests of predicted memory: what a step on fake tensors allocates is what the step itself allocates."""

from __future__ import annotations

import random
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from cpt_kernels import ContrastiveConfig
from cpt_kernels.data.collate import PackedCollator
from cpt_kernels.losses import build_loss
from cpt_kernels.model.packed_model import PackedModel
from cpt_kernels.planning import budget
from cpt_kernels.planning.budget import fill_batch, free_memory, largest_budget
from cpt_kernels.planning.memory import LiveBytes, measure_step, set_checkpointing
from tests.helpers.architectures import STATES, tiny_model

VOCAB = 1500
CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=160, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=VOCAB,
)  # fmt: skip


def rows(count: int) -> list[dict]:
    words = random.Random(0)
    draw = lambda length: [words.randrange(1, VOCAB) for _ in range(length)]  # noqa: E731
    pairs = {"chosen": [0], "rejected": [1], "targets": [0]}
    return [
        {"prompt_ids": draw(20 + 5 * i), "completion_ids": [draw(30), draw(10 + 9 * i)], **pairs} for i in range(count)
    ]


@pytest.mark.parametrize(
    ("peft", "checkpointing", "options", "padded"),
    [
        (False, False, {}, False),
        (False, True, {"gradient_accumulation_steps": 2, "head_memory_mb": 0.5, "bf16": True}, False),
        (True, False, {"head_memory_mb": 0.5}, False),
        (True, True, {"bf16": True}, True),
        (False, True, {"head_mode": "general", "head_memory_mb": 0.5}, False),
    ],
)
def test_a_step_allocates_what_is_predicted(tmp_path, peft, checkpointing, options, padded):
    args = ContrastiveConfig(
        tmp_path, use_cpu=True, report_to=[], gradient_checkpointing_kwargs={"use_reentrant": False}, **options
    )
    model = AutoModelForCausalLM.from_config(CONFIG)
    if peft:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
        model.enable_input_require_grads()
    packed = PackedModel(model, args.head_memory_mb, packing="false" if padded else "true")
    loss, batch = build_loss("sigmoid", beta=0.1), PackedCollator(padded=padded)(rows(8))
    accumulates = args.gradient_accumulation_steps > 1
    found = measure_step(packed, batch, args, loss, checkpointing=checkpointing, accumulates=accumulates)
    assert all(p.grad is None for p in model.parameters())

    set_checkpointing(model, args, checkpointing)
    model.train()
    live = LiveBytes(torch.device("cpu"))
    live.exclude(model)
    for _ in range(1 + accumulates):
        with live:
            moved = {name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in batch.items()}
            with torch.autocast("cpu", torch.bfloat16, enabled=bool(args.bf16)):
                scores = packed(moved, loss, general=args.head_mode == "general", statistics=True)
            scores.loss.backward()
            del scores, moved
    assert found.peak == pytest.approx(live.peak, rel=0.02)
    assert 0 < found.activations < found.peak and 0 < found.head < found.peak


@pytest.mark.parametrize(("peft", "accumulates"), [(False, False), (True, True)])
def test_a_deep_model_is_measured_by_a_few_of_its_layers(tmp_path, peft, accumulates):
    args = ContrastiveConfig(tmp_path, use_cpu=True, report_to=[], bf16=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**CONFIG.to_dict() | {"num_hidden_layers": 18}))
        model = get_peft_model(model, LoraConfig(target_modules="all-linear")) if peft else model
    run = SimpleNamespace(
        packed=PackedModel(model, 0.5), collator=PackedCollator(), args=args, loss=build_loss("sigmoid")
    )
    run.train_dataset = Dataset.from_list(rows(8))
    how = {"checkpointing": True, "accumulates": accumulates}
    whole = measure_step(run.packed, run.collator(rows(8)), args, run.loss, **how)
    found = budget.measure_rows(run, range(8), **how)
    assert replace(found, peak=0) == replace(whole, peak=0)
    assert whole.peak <= found.peak <= 1.05 * whole.peak


def test_gradients_of_an_earlier_micro_batch_are_no_activations(tmp_path):
    args, loss = ContrastiveConfig(tmp_path, use_cpu=True, report_to=[]), build_loss("sigmoid", beta=0.1)
    packed = PackedModel(AutoModelForCausalLM.from_config(CONFIG))
    alone, second = (
        measure_step(packed, PackedCollator()(rows(4)), args, loss, checkpointing=True, accumulates=accumulates)
        for accumulates in (False, True)
    )
    gradients = sum(p.numel() * p.element_size() for p in packed.model.parameters())
    assert (second.activations, second.head) == (alone.activations, alone.head)
    assert alone.peak < second.peak <= alone.peak + gradients


@pytest.mark.parametrize("name", STATES)
def test_layers_with_a_state_are_measured_without_values(tmp_path, name):
    args = ContrastiveConfig(tmp_path, use_cpu=True, report_to=[])
    every = [{**row, "prompt_ids": [6, 7], "completion_ids": [[1, 2, 3], [4, 5]]} for row in rows(3)]
    packed, loss = PackedModel(tiny_model(name), 1.0), build_loss("sigmoid", beta=0.1)
    assert packed.state_layers
    found = measure_step(packed, PackedCollator()(every), args, loss, checkpointing=False, accumulates=False)
    assert found is not None and found.peak > 0


@pytest.mark.parametrize(("most", "expected"), [(budget.MOST, 225), (100, 100)])
def test_the_search_of_a_budget_ends_at_all_rows_or_at_the_most(tmp_path, monkeypatch, most, expected):
    monkeypatch.setattr(budget, "MOST", most)
    data = Dataset.from_list([{**row, "completion_ids": [[1, 2, 3], [4, 5]]} for row in rows(6)])
    args = ContrastiveConfig(tmp_path, use_cpu=True, report_to=[], gradient_checkpointing=False)
    packed, loss = PackedModel(AutoModelForCausalLM.from_config(CONFIG), 1.0), build_loss("sigmoid", beta=0.1)
    run = SimpleNamespace(packed=packed, collator=PackedCollator(), loss=loss, args=args, train_dataset=data)
    assert budget.find_budget(run, 2**30, has_weights=True) == expected


@pytest.mark.parametrize("curvature", [0, 1 / 500])
@pytest.mark.parametrize("limit", [799, 800, 50_000, 10**6])
def test_the_largest_budget_is_found_on_a_line_and_on_a_curve(curvature, limit):
    asked = []

    def peak_of(tokens: int) -> int:
        asked.append(tokens)
        return 100 + 7 * tokens + int(curvature * tokens**2)

    found = largest_budget(peak_of, limit, 100, 9_000)
    assert len(asked) <= 12
    best = max((tokens for tokens in range(100, 9_001) if peak_of(tokens) <= limit), default=None)
    assert found is None if best is None else best / 1.02 - 1 <= found <= best


def test_a_batch_is_filled_with_the_longest_rows_first():
    tokens = np.array([5, 30, 10, 20])
    assert fill_batch(tokens, None, 60) == [1, 3, 2]
    assert fill_batch(tokens, np.array([2, 2, 2, 2]), 125) == [1, 3]  # each padded to 30


def test_free_memory_is_what_the_machine_can_give():
    assert 2**20 < free_memory(torch.device("cpu")) < 2**50
