"""Compiled layers and offloaded activations take the same steps; Liger's kernels leave the head alone."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny_model
from torch._dynamo.utils import counters
from toy import config, losses, preference_data, word_tokenizer

from cpt_kernels import ContrastiveTrainer
from cpt_kernels.layers import offloaded_activations, prepare_layers


def train(folder, **options) -> ContrastiveTrainer:
    args = config(folder, max_steps=6, max_tokens_per_batch=120, **options)
    trainer = ContrastiveTrainer(
        tiny_model("llama"), args=args, train_dataset=preference_data(24), processing_class=word_tokenizer()
    )
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> ContrastiveTrainer:
    return train(tmp_path_factory.mktemp("plain"))


def test_compiled_layers_take_the_same_steps_with_few_graphs(plain, tmp_path):
    torch._dynamo.reset()
    counters.clear()
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager", "gradient_checkpointing": True}
    compiled = train(tmp_path, **options)
    assert losses(compiled) == pytest.approx(losses(plain), abs=1e-4)
    # Attention cuts a layer into a few parts. One set of them has gradients, one (the reference's) has none; more would
    # be graphs of single layers or lengths.
    assert 0 < counters["stats"]["unique_graphs"] <= 12


def test_offloaded_activations_take_the_same_steps(plain, tmp_path):
    offloaded = train(tmp_path, activation_offloading=True)
    assert losses(offloaded) == losses(plain)


def test_activations_leave_the_device_and_parameters_stay():
    layer = torch.nn.Linear(3, 3)
    x = torch.randn(2, 3, requires_grad=True)
    with offloaded_activations(True):
        hidden = layer(x).exp()
    saved = hidden.grad_fn._saved_result
    assert torch.equal(saved, hidden) and saved.data_ptr() != hidden.data_ptr()
    weight = hidden.grad_fn.next_functions[0][0]._saved_mat2
    assert weight.data_ptr() == layer.weight.data_ptr()


def test_liger_leaves_the_head_alone(tmp_path):
    args = config(tmp_path)
    args.use_liger_kernel, args.liger_kernel_config = True, {"swiglu": False}
    prepare_layers(tiny_model("llama"), args)
    assert args.liger_kernel_config == {"fused_linear_cross_entropy": False, "cross_entropy": False, "swiglu": False}
