"""Compiled layers, offloaded activations and Liger's kernels take the same steps, with our head."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.utils import counters

from cpt_kernels import ContrastiveTrainer
from cpt_kernels.model import layers
from cpt_kernels.model.layers import offloaded_activations, prepare_layers
from tests.helpers import ROOT
from tests.helpers.architectures import tiny_model
from tests.helpers.toy import config, losses, preference_data, word_tokenizer


def train(folder, **options) -> ContrastiveTrainer:
    args = config(folder, **{"max_steps": 6, "max_tokens_per_batch": 120, **options})
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
    # Attention splits a layer into a few graphs. There is one set with gradients and one without (for the reference).
    # More graphs would mean that single layers or lengths were compiled.
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


def liger_takes_the_same_steps(folder: str) -> None:
    """Trains on packed rows, whose positions restart for every completion, with Liger's RoPE.

    Liger patches transformers' modules permanently, so the test runs in a process of its own. Only RoPE is covered:
    Triton's interpreter cannot run Liger's kernels for norms and MLPs.
    """
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    options = {"max_steps": 2, "max_tokens_per_batch": 60}
    plain = train(f"{folder}/plain", **options)
    liger = {"use_liger_kernel": True, "liger_kernel_config": {"rms_norm": False, "swiglu": False}}
    trainer = train(f"{folder}/liger", **options, **liger)
    assert trainer.collator.share_prompts and "forward" not in vars(trainer.model)
    assert sys.modules[type(trainer.model).__module__].apply_rotary_pos_emb is liger_rotary_pos_emb
    assert losses(trainer) == pytest.approx(losses(plain), abs=1e-5)
    for (name, found), expected in zip(trainer.model.named_parameters(), plain.model.parameters()):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, msg=name)


def test_ligers_rope_takes_the_same_steps(tmp_path):
    pytest.importorskip("liger_kernel", reason="needs Liger: pip install liger-kernel==0.8.5")
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            f"from tests.model import test_layers; test_layers.liger_takes_the_same_steps({str(tmp_path)!r})",
        ],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]


def test_liger_leaves_the_head_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    args = config(tmp_path)
    args.use_liger_kernel, args.liger_kernel_config = True, {"swiglu": False}
    prepare_layers(tiny_model("llama"), args)
    assert args.liger_kernel_config == {"fused_linear_cross_entropy": False, "cross_entropy": False, "swiglu": False}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"TRITON_INTERPRET": "0"}, "use_liger_kernel needs a GPU"),
        ({"liger_kernel_config": {"fused_linear_cross_entropy": True}}, "leave fused_linear_cross_entropy out"),
        ({"package": None}, "pip install liger-kernel"),
    ],
    ids=lambda change: next(iter(change)) if isinstance(change, dict) else "",
)
def test_liger_where_it_cannot_run(tmp_path, monkeypatch, change, message):
    monkeypatch.setenv("TRITON_INTERPRET", change.pop("TRITON_INTERPRET", "1"))
    if "package" in change:
        monkeypatch.setattr(layers, "find_spec", lambda _: change["package"])
    args = config(tmp_path)
    args.use_liger_kernel, args.liger_kernel_config = True, change.get("liger_kernel_config")
    with pytest.raises(ValueError, match=message):
        prepare_layers(tiny_model("llama"), args)
