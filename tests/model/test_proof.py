"""The proof at construction: it catches models that do not run packed rows exactly, and leaves the model as it was."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from torch import nn

from cpt_kernels.data.collate import PackedCollator
from cpt_kernels.errors import UserError
from cpt_kernels.model.packed_model import PackedModel
from cpt_kernels.model.proof import Probe, find_truth, magnified
from tests.helpers.architectures import VOCAB, tiny_model
from tests.helpers.tiny_configs import tiny_causal_lm
from tests.helpers.toy import losses, make_trainer

SEQUENCES = [((5, 6, 7, 8), (9, 10, 11)), ((5, 6, 7, 8), (12, 13)), ((14, 15), (16, 17, 18, 19))]


class OwnAttention(tf.LlamaForCausalLM):
    """Its layers attend by themselves: the layout of a packed row does not reach them."""

    def __init__(self, config) -> None:
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.forward = self.attend(layer.self_attn)

    @staticmethod
    def attend(attention: nn.Module):
        def forward(hidden_states, **_):
            q, k, v = (
                projection(hidden_states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            out = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            return attention.o_proj(out.transpose(1, 2).flatten(-2)), None

        return forward


class HiddenConvolution(tf.LlamaForCausalLM):
    """Mixes each hidden row with the one before it in the row, whatever sequence that belongs to."""

    def __init__(self, config) -> None:
        super().__init__(config)
        self.model.norm.register_forward_hook(lambda _, args, out: out + nn.functional.pad(out, (0, 0, 1, 0))[:, :-1])


class SquaredLogits(tf.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits + output.logits.square()
        return output


def build(cls: type) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    return cls(tiny_model("llama").config).eval()


def faint(model: tf.PreTrainedModel) -> tf.PreTrainedModel:
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            parameter.data.mul_(0.1)
    return model.bfloat16()


def alone(model: nn.Module) -> torch.Tensor:
    logps = []
    for prompt, completion in SEQUENCES:
        logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        logps.append(logits.log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(logps)


@pytest.mark.parametrize("cls", [OwnAttention, HiddenConvolution, SquaredLogits], ids=lambda cls: cls.__name__)
def test_a_model_that_packed_rows_would_break_runs_in_padded_rows(cls, caplog):
    model = build(cls)
    packed = PackedModel(model)
    assert packed.padded and "runs each completion in a padded row" in caplog.text
    batch = PackedCollator(padded=True).pack(SEQUENCES, [], [], [])
    torch.testing.assert_close(packed(batch).tokens.logps, alone(model), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="in a packed row"):
        PackedModel(build(cls), packing="true")


@pytest.mark.parametrize("cls", [OwnAttention, HiddenConvolution, SquaredLogits], ids=lambda cls: cls.__name__)
def test_such_a_model_trains(cls, tmp_path):
    """In padded rows the first loss of DPO is log 2, and it falls."""
    trainer = make_trainer(tmp_path, model=build(cls), rows=8, max_steps=4, learning_rate=5e-3)
    trainer.train()
    found = losses(trainer)
    assert found[0] == pytest.approx(0.6931, abs=1e-3) and found[-1] < found[0]


def test_an_encoder_is_not_causal():
    config = tf.BertConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    with pytest.raises(UserError, match=r"not causal.*is_decoder=True"):
        PackedModel(tf.BertLMHeadModel(config))
    config.is_decoder = True
    PackedModel(tf.BertLMHeadModel(config))


def test_the_model_is_as_before():
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    state = torch.get_rng_state()
    PackedModel(model)
    assert torch.equal(torch.get_rng_state(), state) and [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_magnified_weights_return_bit_by_bit(dtype):
    model = tiny_model("llama").to(dtype)
    before = [p.detach().clone() for p in model.parameters()]
    with magnified(model):
        assert next(model.parameters()).dtype == torch.float32
        assert not torch.equal(next(model.parameters()), before[0].float())
    assert all(p.dtype == dtype and torch.equal(p, b) for p, b in zip(model.parameters(), before))


def test_nearly_uniform_models_are_magnified_until_a_wrong_layout_would_show():
    """With weights this small, one token's log-prob hardly depends on the others."""
    model = faint(tiny_model("llama"))
    own = lambda ids: model(input_ids=ids, use_cache=False).logits  # noqa: E731
    assert not find_truth(own, Probe.of(model)).is_clear()
    assert not PackedModel(model).padded
    with pytest.raises(UserError, match="in a packed row"):
        PackedModel(faint(build(OwnAttention)), packing="true")


def test_a_sharded_model_is_refused_by_its_kinds_of_layers(monkeypatch):
    """Its weights are not whole, so that nothing can be run: a state would leak between packed completions."""
    monkeypatch.setattr("cpt_kernels.model.packed_model._is_sharded", lambda model: True)
    with pytest.raises(UserError, match=r"stateful layers.*set packing=false"):
        PackedModel(tiny_causal_lm("mamba"))
    assert PackedModel(tiny_causal_lm("mamba"), packing="false").padded
    assert not PackedModel(tiny_model("llama")).padded
