"""Noise in training mode under any name, re-entrant checkpointing, and auxiliary losses, measured on the model."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers as tf
from peft import LoKrConfig, LoraConfig, get_peft_model
from torch import nn

from cpt_kernels.model.loading import prepare_adapter
from cpt_kernels.model.trials import (
    auxiliary_loss,
    can_run,
    checkpointing_error,
    disable_config_dropout,
    disable_dropout,
    dropout,
    is_random,
)
from cpt_kernels.training.checks import check_checkpointing
from tests.helpers.architectures import tiny_model
from tests.helpers.tiny_configs import tiny_config
from tests.helpers.toy import config, losses, make_trainer


def tiny(kind: str, **changes):
    """Returns a model of a class's own defaults, dropout among them, with few vocabulary entries."""
    torch.manual_seed(0)
    return tf.AutoModelForCausalLM.from_config(tiny_config(kind, **changes)).eval()


class Private(tf.LlamaForCausalLM):
    """Drops hidden states with a probability that has no name."""

    def forward(self, *args, **kwargs):
        hook = self.model.norm.register_forward_hook(lambda _, __, out: nn.functional.dropout(out, 0.5, self.training))
        try:
            return super().forward(*args, **kwargs)
        finally:
            hook.remove()


def private(cls: type = Private):
    torch.manual_seed(0)
    return cls(tiny_model("llama").config)


# --- Noise ---


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt2", {}),
        ("opt", {"layerdrop": 0.5}),
        ("seed_oss", {}),
        ("starcoder2", {"residual_dropout": 0.1, "embedding_dropout": 0.1}),
        ("falcon", {"hidden_dropout": 0.1, "attention_dropout": 0.1}),
        ("gpt_neo", {"attention_dropout": 0.1}),
        ("persimmon", {"attention_dropout": 0.1}),
        ("bart", {}),
        ("biogpt", {"layerdrop": 0.5}),
        ("xglm", {}),
        ("mixtral", {"router_jitter_noise": 0.2}),
    ],
)
def test_dropout_under_any_name_is_disabled(kind, changes):
    model = tiny(kind, **changes)
    ids = torch.arange(5, 15)[None]
    before = model(input_ids=ids).logits
    assert is_random(model)
    disable_dropout(model)
    if kind in ("falcon", "persimmon"):
        assert is_random(model)
        disable_config_dropout(model)
    assert not is_random(model) and dropout(model) == 0
    assert torch.equal(model(input_ids=ids).logits, before)


def test_a_number_that_counts_in_eval_mode_is_kept():
    """PhiMoE's router compares experts by the width of its noise; another class, in the same name, by a dropout."""
    model = tiny("phimoe")
    widths = {module.router_jitter_noise for module in model.modules() if hasattr(module, "router_jitter_noise")}
    disable_dropout(model)
    assert widths == {m.router_jitter_noise for m in model.modules() if hasattr(m, "router_jitter_noise")} == {0.01}
    assert is_random(model)  # it draws experts at random

    class Scaled(tf.LlamaForCausalLM):
        drop_scale = 0.5

        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits * (1 - self.drop_scale)
            return out

    model = private(Scaled)
    model.drop_scale = 0.5
    disable_dropout(model)
    assert model.drop_scale == 0.5


def test_a_trial_leaves_no_trace():
    model = private()
    model.model.layers[0].train()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    modes = [module.training for module in model.modules()]
    weights = [p.clone() for p in model.parameters()]
    assert is_random(model)
    assert checkpointing_error(model, {"use_reentrant": True}) < 1e-5
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]  # noqa: NPY002
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None and p.requires_grad and torch.equal(p, w) for p, w in zip(model.parameters(), weights))
    assert not model.is_gradient_checkpointing


@pytest.mark.parametrize(
    "adapter",
    [
        LoraConfig(lora_dropout=0.3, target_modules=["q_proj"]),
        LoKrConfig(rank_dropout=0.3, target_modules=["q_proj"]),
        LoKrConfig(module_dropout=0.3, target_modules=["q_proj"]),
    ],
    ids=["lora", "rank", "module"],
)
def test_dropout_of_an_adapter_that_is_still_zero(adapter):
    model = get_peft_model(tiny_model("llama"), adapter)
    zeros = [name for name, p in model.named_parameters() if p.requires_grad and not p.any()]
    assert zeros and dropout(model) == pytest.approx(0.3)
    assert zeros == [name for name, p in model.named_parameters() if p.requires_grad and not p.any()]
    disable_dropout(model)
    assert not is_random(model) and dropout(model) == 0


@pytest.mark.parametrize("kind", ["gpt2", "opt", "seed_oss", "falcon"])
def test_the_first_loss_is_log_2(tmp_path, kind):
    changes = {"hidden_dropout": 0.1} if kind == "falcon" else {}
    off = make_trainer(tmp_path, model=tiny(kind, **changes), max_steps=1)
    off.train()
    assert losses(off)[0] == pytest.approx(math.log(2), abs=1e-4) and not off.packed.noisy
    assert off.collator.share_prompts == (not off.packed.padded)
    on = make_trainer(tmp_path, model=tiny(kind, **changes), max_steps=1, disable_dropout=False)
    on.train()
    assert not on.collator.share_prompts and on.packed.noisy
    assert losses(on)[0] != pytest.approx(math.log(2), abs=1e-4)


def test_noise_that_has_no_name_is_measured(tmp_path, caplog):
    trainer = make_trainer(tmp_path, model=private(), max_steps=1)
    assert not trainer.collator.share_prompts
    message = (
        "every completion runs its own copy of the prompt: Private adds noise in training mode, which disable_drop"
    )
    assert caplog.text.count(message) == 1
    assert trainer.reference._likely_cause().startswith("the noise that the model adds in training mode")
    with pytest.raises(ValueError, match="share_prompts=true with dropout, NEFTune noise, or a router"):
        make_trainer(tmp_path, model=private(), share_prompts="true")


class LeavesLayersOut(tf.LlamaForCausalLM):
    """Draws one number in each forward, and leaves out a layer if it is below ``share``."""

    share = 0.0

    def forward(self, *args, **kwargs):
        layers = self.model.layers
        if self.training and torch.rand(()) < self.share:
            self.model.layers = layers[:1]
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.model.layers = layers


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_a_number_that_is_drawn_and_not_used_is_no_noise(share):
    model = private(LeavesLayersOut)
    model.share = share
    assert is_random(model) == (share > 0)


# --- Re-entrant checkpointing ---

SHARED = {"num_kv_shared_layers": 2}


@pytest.mark.parametrize(("kind", "changes"), [("gemma3n_text", SHARED), ("gemma4_text", SHARED)])
def test_re_entrant_checkpointing_loses_gradients_of_shared_keys(tmp_path, kind, changes):
    model = tiny(kind, **changes)
    assert checkpointing_error(model, {"use_reentrant": True}) > 0.01
    assert checkpointing_error(model, {"use_reentrant": False}) < 1e-5
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    message = "re-entrant activation checkpointing gives .* wrong gradients.*set use_reentrant=false in gradient_check"
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, model=model, **options)
    make_trainer(tmp_path, model=model, gradient_checkpointing=True)


@pytest.mark.parametrize("kwargs", [{"use_reentrant": True}, {"preserve_rng_state": False}], ids=["said", "torch"])
def test_re_entrant_checkpointing_is_as_exact_as_any_elsewhere(tmp_path, kwargs):
    """Without use_reentrant, torch takes the re-entrant kind."""
    found = []
    for options in ({}, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}):
        trainer = make_trainer(tmp_path, model=tiny("gemma4_text", num_kv_shared_layers=0), max_steps=3, **options)
        trainer.train()
        found.append(losses(trainer))
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    with pytest.raises(ValueError, match="wrong gradients"):
        make_trainer(tmp_path, model=tiny("gemma4_text", **SHARED), **options)


def test_re_entrant_checkpointing_that_the_model_came_with(tmp_path):
    model = tiny("gemma4_text", **SHARED)
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ValueError, match="wrong gradients"):
        make_trainer(tmp_path, model=model)


def test_re_entrant_checkpointing_that_zero_3_forces(tmp_path):
    model = get_peft_model(tiny("gemma4_text", **SHARED), LoraConfig(target_modules="all-linear"))
    args = config(tmp_path, gradient_checkpointing=True)
    args.deepspeed_plugin = SimpleNamespace(zero_stage=3)
    prepare_adapter(model, args)
    with pytest.raises(ValueError, match="ZeRO-3 needs it for adapters, so set gradient_checkpointing=false"):
        check_checkpointing(model, args)


def test_sharded_weights_are_not_run():
    """The config says then whether layers share keys and values."""
    config = tiny_config("gemma4_text", **SHARED)
    with torch.device("meta"):
        model = tf.AutoModelForCausalLM.from_config(config)
    assert not can_run(model) and not is_random(model)
    options = SimpleNamespace(
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
        deepspeed_plugin=None,
        chooses_checkpointing=False,
    )
    with pytest.raises(ValueError, match="its layers share keys and values"):
        check_checkpointing(model, options)


def test_a_model_without_checkpointing_is_refused_early(tmp_path):
    with pytest.raises(ValueError, match=r"JetMoe.* does not support activation checkpointing: set gradient_ch"):
        make_trainer(tmp_path, model=tiny("jetmoe"), gradient_checkpointing=True)


# --- Auxiliary losses ---


def returning(value):
    """Returns a Mixtral whose auxiliary loss is ``value``."""
    model = tiny("mixtral")

    def forward(*args, **kwargs):
        out = type(model).forward(model, *args, **kwargs)
        out.aux_loss = value
        return out

    model.forward = forward
    return model


@pytest.mark.parametrize("value", [0, 0.5, torch.tensor([2.0], dtype=torch.bfloat16)], ids=["int", "float", "tensor"])
def test_an_auxiliary_loss_of_any_kind(tmp_path, caplog, value):
    trainer = make_trainer(tmp_path, model=returning(value), router_aux_loss_coef=0.1, max_steps=1)
    trainer.train()
    assert losses(trainer)[0] == pytest.approx(math.log(2) + 0.1 * float(value), abs=1e-4)
    assert trainer.state.log_history[0]["aux_loss"] == float(value)
    message = f"computes no load-balancing loss (aux_loss={value}), so router_aux_loss_coef=0.1 changes no gradient"
    assert (message in caplog.text) == (not isinstance(value, torch.Tensor))


def test_an_index_error_of_the_forward_is_not_taken_for_a_missing_auxiliary_loss(monkeypatch):
    model = tiny_model("qwen3_next")
    monkeypatch.setattr(model.lm_head, "forward", lambda hidden: hidden[len(hidden)])
    with pytest.raises(IndexError, match="out of bounds"):
        auxiliary_loss(model)


@pytest.mark.parametrize("model", ["deepseek_v3", "none", "dense"])
def test_a_mixture_of_experts_without_an_auxiliary_loss(tmp_path, caplog, model):
    models = {"none": lambda: returning(None), "dense": lambda: tiny_model("qwen3_next")}
    model = models.get(model, lambda: tiny(model))()
    assert auxiliary_loss(model) is None
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0\.1: .* computes no load-balancing loss"):
        make_trainer(tmp_path, model=model, router_aux_loss_coef=0.1)
    trainer = make_trainer(tmp_path, model=model, max_steps=1)
    trainer.train()
    assert "aux_loss" not in trainer.state.log_history[0] and not trainer.aux_loss_enabled
