"""Frozen weights in autocast's dtype while a model trains change no number, and are afterwards as they were."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from torch._dynamo.utils import counters
from transformers import TrainerCallback
from transformers.models.llama.modeling_llama import LlamaMLP

from bench.traffic import Traffic
from cpt_kernels.errors import UserError
from cpt_kernels.model.adapters import spare_input_copies
from cpt_kernels.model.frozen import rounded_weights
from cpt_kernels.model.packed_model import PackedModel
from cpt_kernels.training.loop import PackedLoop
from tests.helpers.architectures import CONFIGS, STATES, recompute_activations, tiny_model
from tests.helpers.exactness import LOSSES, make_batch, make_rows
from tests.helpers.toy import losses, make_trainer, preference_data

ROUNDED = {
    **{"llama": 14, "gemma2": 14, "mixtral": 8, "phi": 12, "gpt2": 0},  # GPT-2's layers are no linear ones
    **{"lfm2": 12, "bamba": 12, "qwen3_next": 13},
}
IN_CI = ("llama", "mixtral", "qwen3_next")


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules="all-linear")  # PEFT writes the names of a model's layers into it


def with_lora(name: str, weights: torch.dtype | None = None) -> nn.Module:
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(name, weights=weights), lora())
    for key, parameter in model.named_parameters():
        if "lora_B" in key:  # zeros would hide the gradients of lora_A
            nn.init.normal_(parameter, std=0.1)
    spare_input_copies(model)
    return model


def loss_and_gradients(packed: PackedModel) -> list[torch.Tensor]:
    packed.model.train().zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        loss = packed(make_batch(make_rows("sigmoid"), packed), LOSSES["sigmoid"]).loss
    loss.backward()
    return [loss, *(p.grad for p in packed.model.parameters() if p.requires_grad)]


@pytest.mark.parametrize("weights", [torch.bfloat16, None], ids=["exact in bf16", "not exact"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    "name", [n if n in IN_CI else pytest.param(n, marks=pytest.mark.slow) for n in ROUNDED if n in {*CONFIGS, *STATES}]
)
def test_loss_and_gradients_are_bitwise_the_same(name, recompute, weights):
    model = with_lora(name, weights)
    if recompute:
        recompute_activations(model.get_base_model())
        model.enable_input_require_grads()
    packed = PackedModel(model)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = loss_and_gradients(packed)
    with rounded_weights(packed, torch.bfloat16):
        assert sum(p.dtype == torch.bfloat16 for p in model.parameters()) == ROUNDED[name]
        found = loss_and_gradients(packed)
    assert len(found) > 8 and all(map(torch.equal, found, expected))
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert {type(layer) for layer in model.modules() if isinstance(layer, nn.Linear)} == {nn.Linear}


def test_no_weight_is_cast_in_a_step():
    packed = PackedModel(with_lora("llama"))
    weights = sum(p.numel() for key, p in packed.model.named_parameters() if "base_layer" in key)
    moved = []
    with Traffic() as traffic:
        loss_and_gradients(packed)
    moved.append(traffic.by_operator["_to_copy"])
    with rounded_weights(packed, torch.bfloat16), Traffic() as traffic:
        loss_and_gradients(packed)
    moved.append(traffic.by_operator["_to_copy"])
    assert moved[0] - moved[1] == 6 * weights  # 4 bytes read and 2 written


def read_dtype(mlp: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x).to(mlp.up_proj.weight.dtype))


def without_autocast(mlp: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", enabled=False):
        up = mlp.up_proj(x.float())
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * up)


def in_eval_mode_only(mlp: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
    up = F.linear(x, mlp.up_proj.weight.float() + 0) if mlp.training else mlp.up_proj(x)
    return mlp.down_proj(F.silu(mlp.gate_proj(x)) * up)


def unused(mlp: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
    return mlp.down_proj(mlp.gate_proj(x))


@pytest.mark.parametrize("forward", [read_dtype, without_autocast, in_eval_mode_only, unused])
def test_a_weight_that_is_read_in_another_way_stays_as_it_is(forward, monkeypatch):
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    packed = PackedModel(get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules=["q_proj"])))
    expected = loss_and_gradients(packed)
    with rounded_weights(packed, torch.bfloat16):
        mlp = packed.model.get_base_model().model.layers[0].mlp
        assert mlp.up_proj.weight.dtype == torch.float32 and mlp.gate_proj.weight.dtype == torch.bfloat16
        assert all(map(torch.equal, loss_and_gradients(packed), expected))


class DuringTraining(TrainerCallback):
    """Records what a callback sees of the model."""

    def on_step_end(self, args, state, control, model, **kwargs):
        ids = torch.tensor([[3, 4, 5, 6]])
        self.dtypes = {key.split("layers.")[-1]: p.dtype for key, p in model.named_parameters()}
        base = model.get_base_model()  # accelerate makes the model around it run under autocast
        with torch.no_grad(), model.disable_adapter():
            self.logits = [each(ids).logits for each in (base, copy.deepcopy(base))]
        with pytest.raises(UserError, match="adapters cannot be merged while the model trains"):
            model.merge_adapter()


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32], ids=str)
def test_a_run_by_name_is_bitwise_the_same_and_its_model_whole_afterwards(weights, tmp_path, monkeypatch):
    tiny_model("llama", weights=weights).save_pretrained(tmp_path / "model")
    own = tiny_model("llama", weights=weights)
    ids = torch.tensor([[3, 4, 5, 6]])
    options = {"bf16": True, "max_steps": 2, "rows": 12, "gradient_accumulation_steps": 2}
    seen = DuringTraining()
    options |= {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": preference_data(4)}
    trainer = make_trainer(
        tmp_path / "a", model=str(tmp_path / "model"), peft_config=lora(), callbacks=[seen], **options
    )
    trainer.train()
    monkeypatch.setattr(PackedLoop, "_rounded_weights", lambda self: contextlib.nullcontext())
    other = make_trainer(tmp_path / "b", model=str(tmp_path / "model"), peft_config=lora(), **options)
    other.train()

    def logged(each):
        return [entry.get("eval_loss", entry.get("loss")) for entry in each.state.log_history[:-1]]

    assert logged(trainer) == logged(other) and len(losses(trainer)) == 2
    assert trainer.reference.cache.fingerprint == other.reference.cache.fingerprint
    for (key, found), expected in zip(trainer.model.state_dict().items(), other.model.state_dict().values()):
        assert torch.equal(found, expected) and found.dtype == expected.dtype, key
    assert seen.dtypes["0.self_attn.q_proj.base_layer.weight"] == torch.bfloat16
    assert seen.dtypes["0.input_layernorm.weight"] == seen.dtypes["0.self_attn.q_proj.lora_A.default.weight"]
    assert all(torch.equal(logits, own(ids).logits) for logits in seen.logits)
    merged, expected = (each.model.merge_and_unload()(ids).logits for each in (trainer, other))
    assert torch.equal(merged, expected)


def test_a_model_that_a_user_passes_keeps_its_weights(tmp_path):
    seen = DuringTraining()
    trainer = make_trainer(tmp_path, bf16=True, max_steps=1, peft_config=lora(), callbacks=[seen])
    with pytest.raises(pytest.fail.Exception):  # merging is not refused
        trainer.train()
    assert seen.dtypes["0.self_attn.q_proj.base_layer.weight"] == torch.float32


@pytest.mark.slow
def test_compiled_layers_take_few_graphs(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    torch._dynamo.reset()
    counters.clear()
    options = {"layers": "compiled", "torch_compile_backend": "aot_eager", "gradient_checkpointing": True}
    options |= {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": preference_data(4)}
    trainer = make_trainer(
        tmp_path, model=str(tmp_path / "model"), bf16=True, max_steps=2, peft_config=lora(), **options
    )
    trainer.train()
    # Two graphs or more each: the reference with exact weights, training and evaluation with rounded ones.
    assert 6 <= counters["stats"]["unique_graphs"] <= 12
