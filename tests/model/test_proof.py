"""The proof at construction: it catches models that do not run packed rows exactly, and leaves the model as it was."""

from __future__ import annotations

import contextlib

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.masking_utils import create_chunked_causal_mask, create_sliding_window_causal_mask

from cpt_kernels.data.collate import PackedCollator
from cpt_kernels.errors import UserError
from cpt_kernels.model import packed_model
from cpt_kernels.model.conditions import PinnedRouting, magnified
from cpt_kernels.model.packed_model import PackedModel
from cpt_kernels.model.proof import Probe, Truth, find_truth
from tests.helpers.architectures import MIXTURES, VOCAB, tiny_model
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


# --- Gradients ---


class DetachedHead(nn.Linear):
    """Has the values of a linear head, but its weight has no gradient."""

    def forward(self, hidden):
        return nn.functional.linear(hidden, self.weight.detach())


class DetachedKeys(tf.LlamaForCausalLM):
    """Cuts the gradient of its keys where a packed layout arrives, and only there."""

    def __init__(self, config) -> None:
        super().__init__(config)
        attention = self.model.layers[0].self_attn
        attention.register_forward_pre_hook(self.note_layout, with_kwargs=True)
        attention.k_proj.register_forward_hook(lambda _, args, out: out.detach() if self.is_packed else out)

    def note_layout(self, module, args, kwargs) -> None:
        self.is_packed = kwargs.get("layout") is not None


def gradients(model: nn.Module, logps: torch.Tensor) -> list[torch.Tensor]:
    weights = torch.linspace(-1, 1, len(logps))
    found = torch.autograd.grad(logps @ weights, [*model.parameters()], allow_unused=True)
    return [torch.zeros(1) if g is None else g for g in found]


def test_a_head_without_gradient_keeps_its_own_logits():
    model = tiny_model("llama")
    model.lm_head.__class__ = DetachedHead
    packed = PackedModel(model)
    assert packed.padded and packed.options is None
    batch = PackedCollator(padded=True).pack(SEQUENCES, [], [], [])
    for one, other in zip(gradients(model, packed(batch).tokens.logps), gradients(model, alone(model))):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_gradient_that_packed_rows_lose_is_found(caplog):
    assert PackedModel(build(DetachedKeys)).padded and "gradients differ" in caplog.text
    model = build(DetachedKeys)
    model.requires_grad_(False)  # as a reference, of which log-probs are all that counts
    assert not PackedModel(model).padded


@pytest.mark.parametrize("is_perturbed", [True, False])
def test_an_adapter_is_proven_as_if_trained(monkeypatch, is_perturbed):
    """A planted fault: a LoRA head that forgets its bias, which is zero at the start."""
    adapter = LoraConfig(r=4, target_modules=["lm_head"], lora_bias=True)
    model = get_peft_model(tiny_model("phi"), adapter)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    operands = packed_model.head_operands

    def forgetful(head, rows):
        rows, weight, bias = operands(head, rows)
        base = head.get_base_layer().bias
        # The gradient stays, so that only the value of a bias that is not zero shows the fault.
        return rows, weight, base + (bias - bias.detach())

    monkeypatch.setattr(packed_model, "head_operands", forgetful)
    if not is_perturbed:
        monkeypatch.setattr(packed_model, "perturbed", lambda model: contextlib.nullcontext())
    assert PackedModel(model).padded == is_perturbed
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


# --- Mixtures of experts ---


def close_routers(name: str) -> tf.PreTrainedModel:
    """A mixture in bf16 whose experts have nearly equal scores, so that rounding chooses among them."""
    model = tiny_model(name, torch.bfloat16)
    for module in model.modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.weight.data = module.weight[:1].repeat(len(module.weight), 1)
            module.weight.data *= 1 + 1e-2 * torch.randn_like(module.weight)
    return model


@pytest.mark.parametrize("name", MIXTURES)
def test_the_routing_of_a_mixture_is_pinned(name, monkeypatch):
    assert not PackedModel(close_routers(name), packing="true").padded


def test_pinned_routing_repeats_choices():
    """Free scores choose other experts; values follow the pinned choice; columns of a length are no experts."""
    routing, random = PinnedRouting(), torch.Generator().manual_seed(0)
    scores = lambda rows, columns=8: torch.rand(rows, columns, generator=random)  # noqa: E731
    with routing.follow([(5, 6, 7)]):
        first, keys = torch.topk(scores(3), 2), scores(3, 3).topk(2)
    again = scores(5)
    with routing.follow([(5, 6, 7), (5, 6, 8, 9)], shared=[0, 2]):
        values, chosen = again.topk(2)
        free = scores(5, 5).topk(2)
    assert torch.equal(chosen[:3], first.indices) and torch.equal(values, again.gather(-1, chosen))
    assert torch.equal(chosen[3:], again[3:].topk(2).indices) and keys.indices.max() < 3 and free.indices.max() > 2


# --- Errors ---


def state_of(model: nn.Module) -> list:
    return [
        model.config._attn_implementation,
        torch.get_rng_state().tolist(),
        [module.training for module in model.modules()],
        [(len(m._forward_hooks), len(m._forward_pre_hooks), "forward" in vars(m)) for m in model.modules()],
        [(p.dtype, p.requires_grad, p.grad is None, str(p.tolist())) for p in model.parameters()],
        [(name, b.tolist()) for name, b in model.named_buffers()],
    ]


def not_causal(model: nn.Module, monkeypatch) -> None:
    model.model.norm.register_forward_hook(lambda _, args, out: out + out.mean(1, keepdim=True))


def not_finite(model: nn.Module, monkeypatch) -> None:
    model.model.norm.weight.data[0] = float("nan")


def not_exact(model: nn.Module, monkeypatch) -> None:
    monkeypatch.setattr(Truth, "difference", lambda *_: 1e9)


def out_of_memory(model: nn.Module, monkeypatch) -> None:
    def fail(module, args, kwargs):
        if kwargs.get("layout") is not None:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.model.layers[1].register_forward_pre_hook(fail, with_kwargs=True)


def interrupted(model: nn.Module, monkeypatch) -> None:
    def fail(module, args, kwargs):
        if kwargs.get("layout") is not None:
            raise KeyboardInterrupt

    model.model.layers[1].register_forward_pre_hook(fail, with_kwargs=True)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (not_causal, "not causal"),
        (not_finite, "NaN or inf"),
        (not_exact, "does not run completions exactly"),
        (out_of_memory, "out of memory"),
        (interrupted, None),
    ],
)
def test_an_error_leaves_the_model_as_it_was(fault, error, monkeypatch):
    """A flash model on a CPU is proven with other attention, which must not stay."""
    model = faint(tiny_model("llama")).train()
    model.model.embed_tokens.requires_grad_(False)
    model.config._attn_implementation_internal = "flash_attention_2"
    fault(model, monkeypatch)
    before = state_of(model)
    with pytest.raises(BaseException, match=error) as raised:
        PackedModel(model)
    assert isinstance(raised.value, (UserError, torch.OutOfMemoryError, KeyboardInterrupt))
    assert state_of(model) == before


def test_attention_that_was_asked_for_and_cannot_run_is_no_reason_for_padded_rows():
    with pytest.raises(UserError, match="unknown attention backend"):
        PackedModel(tiny_model("llama"), attention_backend="flash")
    with pytest.raises(UserError, match="'sdpa' lacks soft-cap"):
        PackedModel(tiny_model("gemma2"), attention_backend="sdpa")


def test_frequencies_of_the_longest_row_are_forgotten():
    """Dynamic NTK remembers the longest row that it has seen, which would be the proof's."""
    model = tiny_model("llama-dynamic")
    expected = tiny_model("llama-dynamic")(input_ids=torch.arange(5, 29)[None]).logits
    PackedModel(model)
    model.set_attn_implementation("sdpa")
    assert torch.equal(model(input_ids=torch.arange(5, 29)[None]).logits, expected)


# --- Windows that a short row does not show ---


def small(kind: str, **changes) -> tf.PreTrainedModel:
    torch.manual_seed(0)
    return tiny_causal_lm(kind, **changes).eval()


class WindowInItsMask(tf.LlamaForCausalLM):
    """Builds a mask with a window, of which its attention is not told."""

    def forward(self, *args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            window = lambda config, **given: create_sliding_window_causal_mask(config=config, **given)  # noqa: E731
            patch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", window)
            return super().forward(*args, **kwargs)


class ChunksInItsMask(tf.LlamaForCausalLM):
    """Attends in chunks, which only its mask says."""

    def forward(self, *args, **kwargs):
        with pytest.MonkeyPatch.context() as patch:
            chunks = lambda config, **given: create_chunked_causal_mask(config=config, **given)  # noqa: E731
            patch.setattr("transformers.models.llama.modeling_llama.create_causal_mask", chunks)
            return super().forward(*args, **kwargs)


@pytest.mark.parametrize("window", [5, 64])
def test_a_window_in_the_mask_only(window):
    assert PackedModel(small("phimoe", sliding_window=window)).padded
    assert not PackedModel(small("phimoe", sliding_window=None)).padded
    config = tiny_model("llama").config
    config.sliding_window = window
    assert PackedModel(WindowInItsMask(config).eval()).padded
    config = tiny_model("mistral").config
    config.sliding_window = window
    assert not PackedModel(tf.MistralForCausalLM(config).eval()).padded


def test_one_layer_of_several_kinds_without_its_window():
    model = tiny_model("gemma3")
    for module in model.modules():
        if getattr(module, "sliding_window", None):
            module.sliding_window = None
    assert PackedModel(model).padded


@pytest.mark.parametrize("chunk", [5, 64])
def test_chunks_in_the_mask_only(chunk):
    config = tiny_model("llama").config
    config.attention_chunk_size = chunk
    torch.manual_seed(0)
    assert PackedModel(ChunksInItsMask(config).eval()).padded
    assert PackedModel(small("llama4_text", attention_chunk_size=64)).padded


# --- Sharded weights ---


def test_weights_that_no_process_holds():
    with torch.device("meta"):
        packed = PackedModel(tf.LlamaForCausalLM(tiny_model("llama").config))
    with pytest.raises(UserError, match="no process holds the weights"):
        packed.agree()
