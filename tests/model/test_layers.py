"""Compiled layers, offloaded activations and Liger's kernels take the same steps, with our head."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._dynamo.utils import counters

from bench.traffic import Traffic
from cpt_kernels import ContrastiveTrainer
from cpt_kernels.model import layers
from cpt_kernels.model.adapters import spare_input_copies
from cpt_kernels.model.layers import offloaded_activations, prepared_layers
from tests.helpers import ROOT
from tests.helpers.architectures import recompute_activations, tiny_model
from tests.helpers.toy import config, losses, preference_data, word_tokenizer


def train(folder, checkpoint: str | None = None, lora: bool = False, **options) -> ContrastiveTrainer:
    args = config(folder, **{"max_steps": 6, "max_tokens_per_batch": 120, **options})
    trainer = ContrastiveTrainer(
        tiny_model("llama"),
        args=args,
        train_dataset=preference_data(24),
        eval_dataset=preference_data(24) if lora else None,
        processing_class=word_tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear") if lora else None,
    )
    trainer.train(checkpoint)
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
    # Attention splits a layer into two graphs or more. There is a set with gradients, below checkpointing, and one
    # without, for the reference. More graphs would mean that single layers or lengths were compiled.
    assert 4 <= counters["stats"]["unique_graphs"] <= 12
    assert compiled.args.torch_compile and compiled.args.torch_compile_backend == "aot_eager"


def test_compiled_lora_with_an_evaluation_takes_few_graphs(tmp_path):
    options = {"lora": True, "bf16": True, "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    eager = train(tmp_path / "eager", **options)
    torch._dynamo.reset()
    counters.clear()
    options |= {"layers": "compiled", "torch_compile_backend": "aot_eager", "gradient_checkpointing": True}
    compiled = train(tmp_path / "compiled", **options)
    assert losses(compiled) == pytest.approx(losses(eager), abs=1e-3)
    # Two graphs or more each: training, evaluation, and the reference, which is the model with its adapter off.
    assert 6 <= counters["stats"]["unique_graphs"] <= 12


def test_a_resumed_run_of_compiled_layers_ends_as_one_without_a_break(tmp_path):
    options = {"layers": "compiled", "torch_compile_backend": "aot_eager", "save_strategy": "steps", "save_steps": 3}
    whole = train(tmp_path, **options)
    resumed = train(tmp_path, checkpoint=f"{whole.args.output_dir}/checkpoint-3", **options)
    assert losses(resumed) == losses(whole)
    for found, expected in zip(resumed.model.state_dict().values(), whole.model.state_dict().values()):
        assert torch.equal(found, expected)


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
    with prepared_layers(tiny_model("llama"), args) as line:
        assert line == "layers: liger"
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
    with pytest.raises(ValueError, match=message), prepared_layers(tiny_model("llama"), args):
        pass


class OnCuda(SimpleNamespace):
    """The options that decide about layers, on a GPU that has Triton and a C compiler."""

    def __init__(self, **options) -> None:
        common: dict = {"layers": "auto", "device": torch.device("cuda"), "deepspeed_plugin": None, "fsdp": []}
        common |= {"torch_compile_backend": None, "torch_compile_mode": None, "activation_offloading": False}
        common |= {"torch_compile": False, "use_liger_kernel": False, "liger_kernel_config": None}
        super().__init__(**common | options)


@pytest.mark.parametrize(
    ("options", "missing", "expected"),
    [
        ({}, (), "layers: compiled"),
        ({"layers": "eager"}, (), "layers: eager"),
        ({"use_liger_kernel": True}, (), "layers: liger"),
        ({"torch_compile": True, "use_liger_kernel": True}, (), "layers: compiled, liger"),
        ({"activation_offloading": True}, (), "layers: liger (not compiled, because their activations are offloaded)"),
        ({}, ("triton",), "layers: liger (not compiled, because torch.compile needs Triton and a C compiler)"),
        ({}, ("triton", "liger_kernel"), "layers: eager (not compiled, because torch.compile needs Triton"),
        ({"device": torch.device("cpu")}, (), "layers: eager"),
        ({"device": torch.device("cpu"), "layers": "compiled"}, (), "layers: compiled"),
    ],
    ids=str,
)
def test_auto_takes_what_moves_the_fewest_bytes_and_can_run(monkeypatch, options, missing, expected):
    monkeypatch.setattr(layers, "find_spec", lambda name: None if name in missing else name)
    model = tiny_model("llama")
    args = OnCuda(**options)
    with prepared_layers(model, args) as line:
        assert line.startswith(expected)
        assert not args.torch_compile
    assert args.torch_compile == options.get("torch_compile", False)
    is_compiled = "layers: compiled" in expected
    assert all((layer._compiled_call_impl is not None) == is_compiled for layer in model.model.layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": "eager", "torch_compile": True}, "layers=eager contradicts torch_compile=True"),
        ({"layers": "compiled", "use_liger_kernel": True}, "layers=compiled contradicts use_liger_kernel=True"),
        ({"layers": "liger", "torch_compile_mode": "default"}, "layers=liger contradicts torch_compile_mode=default"),
        ({"layers": "fused"}, "layers='fused' is unknown: choose one of auto, eager, compiled, liger"),
    ],
    ids=str,
)
def test_layers_that_contradict_other_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_a_copy_of_a_compiled_model_runs_its_own_weights():
    model = tiny_model("llama")
    with prepared_layers(model, OnCuda(torch_compile_backend="eager")):
        pass
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
        ids = torch.tensor([[3, 4, 5]])
        assert not torch.allclose(other(ids).logits, model(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_lora_without_copies_of_its_inputs_has_bitwise_the_same_gradients(dtype, recompute):
    ids = torch.arange(3, 40)[None]
    found, copies = [], []
    for spare in (False, True):
        torch.manual_seed(0)
        model = get_peft_model(tiny_model("llama", dtype), LoraConfig(r=4, target_modules="all-linear")).train()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zeros would hide the gradients of lora_A
                torch.nn.init.normal_(parameter, std=0.1)
        if recompute:
            recompute_activations(model)
            model.enable_input_require_grads()
        if spare:
            spare_input_copies(model)
        with Traffic() as traffic:
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(ids).logits.float().logsumexp(-1).sum()
            loss.backward()
        copies.append(traffic.by_operator["_to_copy"])
        found.append([loss, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(found[0]) > 20 and all(map(torch.equal, *found))
    assert copies[1] < copies[0] * (0.5 if dtype == torch.bfloat16 else 0.9)


def test_lora_without_autocast_still_casts_its_inputs():
    model = get_peft_model(tiny_model("llama", torch.bfloat16), LoraConfig(r=4, target_modules=["q_proj"]))
    spare_input_copies(model)
    assert model(torch.tensor([[3, 4]])).logits.dtype == torch.bfloat16


def test_dropout_and_dora_keep_their_copies():
    for options in ({"lora_dropout": 0.1}, {"use_dora": True}):
        model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj"], **options))
        spare_input_copies(model)
        assert not any("_cast_input_dtype" in vars(module) for module in model.modules())
