"""Heads with adapters, models that are refused, and the auxiliary loss of a mixture of experts."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from cpt_kernels.errors import UserError
from cpt_kernels.losses import build_loss
from cpt_kernels.model.packed_model import PackedModel, base_model
from tests.helpers.architectures import MIXTURES, VOCAB, tiny_model
from tests.helpers.exactness import (
    BATCHES,
    FLOOR,
    LOSSES,
    assert_as_exact,
    assert_equal,
    gradients,
    make_batch,
    make_rows,
    run_alone,
    run_packed,
)

_ADAPTERS = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "attention-and-head": {"target_modules": ["q_proj", "lm_head"]},
    "head": {"target_modules": ["lm_head"]},
    "whole-head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "dora": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
}
_TOKENS = {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4, 5, 6, 7, 8]}
_OF_TIED = {  # without ensure_weight_tying, PEFT adapts only one side of a tied weight
    "embedding": {"target_modules": ["embed_tokens"]},
    "embedding-and-head": {"target_modules": ["embed_tokens", "lm_head"]},
    "embedding-as-head": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "whole-embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "whole-embedding-as-head": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "tokens": _TOKENS,
}
_CASES = [*(("llama", adapter) for adapter in _ADAPTERS), *(("llama-tied", adapter) for adapter in _OF_TIED)]
_TRAINED = ("lora", "modules_to_save", "trainable_tokens")


def _adapted(adapter: str, dtype: torch.dtype, architecture: str = "llama", **changes) -> nn.Module:
    """Returns a PEFT model with a nonzero adapter. The base is frozen, the head as well unless it has an adapter."""
    config = LoraConfig(r=4, lora_alpha=6, task_type="CAUSAL_LM", **(_ADAPTERS | _OF_TIED)[adapter], **changes)
    model = get_peft_model(tiny_model(architecture, dtype, weights=torch.float32), config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(part in name for part in _TRAINED):
            parameter.data = (parameter + 0.1 * torch.randn(parameter.shape)).float().to(dtype)
    return model.eval()


@pytest.mark.parametrize("general", [False, True], ids=["fused", "general"])
@pytest.mark.parametrize(("architecture", "adapter"), _CASES)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_adapters(architecture, adapter, general):
    """Gradients of trainable adapters over a frozen base, with and without an adapter on the head."""
    loss = LOSSES["sigmoid"]
    results = {}
    for key, dtype, packed in (("exact", torch.float64, 0), ("eager", torch.float32, 0), ("packed", torch.float32, 1)):
        model, results[key] = _adapted(adapter, dtype, architecture), []
        scorer = PackedModel(model) if packed else None
        for seed in range(BATCHES):
            model.zero_grad()
            rows = make_rows("sigmoid", seed=seed)
            results[key].append(
                run_packed(scorer, rows, loss, general=general) if packed else run_alone(model, rows, loss)
            )
    trained = results["packed"][0].grads
    assert trained.keys() == results["exact"][0].grads.keys()
    assert all(any(part in name for part in _TRAINED) and grad.any() for name, grad in trained.items())
    assert_as_exact(results["packed"], results["eager"], results["exact"], torch.finfo(torch.float32).eps)


@pytest.mark.parametrize(
    ("architecture", "adapter"),
    [("llama", "attention-and-head"), ("llama", "whole-head"), *(("llama-tied", adapter) for adapter in _OF_TIED)],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_adapters_switched_off(architecture, adapter):
    """Like a reference, the model with its adapter off is the base model."""
    model, rows = _adapted(adapter, torch.float64, architecture), make_rows("sft")
    expected = run_alone(tiny_model(architecture, torch.float64), rows, LOSSES["sft"])
    packed = PackedModel(model)
    with torch.no_grad(), model.disable_adapter():
        found = packed(make_batch(rows)).completion_logps
    torch.testing.assert_close(found, torch.stack(list(expected.completion_logps.values())))


def test_a_merged_adapter_on_the_head():
    model, rows = _adapted("head", torch.float64), make_rows("slic")
    expected = run_alone(model, rows, LOSSES["slic"])
    model.zero_grad()
    model.merge_adapter()
    with torch.no_grad():
        found = PackedModel(model)(make_batch(rows)).completion_logps
    torch.testing.assert_close(found, torch.stack(list(expected.completion_logps.values())))


@pytest.mark.parametrize("changes", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=["dropout", "dora"])
def test_adapters_on_the_head_that_are_no_product(changes):
    """Log-probs come from the model's own logits, in padded rows."""
    model, rows = _adapted("head", torch.float64, **changes), make_rows("sigmoid")
    expected = run_alone(model, rows, LOSSES["sigmoid"])
    model.zero_grad()
    packed = PackedModel(model)
    assert packed.padded and packed.options is None
    scores = packed(make_batch(rows, padded=True), LOSSES["sigmoid"])
    scores.loss.backward()
    torch.testing.assert_close(scores.losses.sum(), sum(expected.losses.values()))
    assert_equal(type(expected)({}, {}, gradients(model)), type(expected)({}, {}, expected.grads), FLOOR)
    with pytest.raises(UserError, match="not be those of a linear head"):
        PackedModel(_adapted("head", torch.float64, **changes), packing="true")


def test_a_head_whose_adapter_changes_after_the_proof():
    model = _adapted("head", torch.float64)
    packed = PackedModel(model)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["lm_head"], use_dora=True))
    model.set_adapter("other")
    with pytest.raises(UserError, match="changed after the trainer was made"):
        packed(make_batch(make_rows("sft")))


def test_an_adapter_that_leaves_the_head_out():
    model = _adapted("head", torch.float64)
    model.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    rows = make_rows("sft")
    expected = run_alone(model.double(), rows, LOSSES["sft"])
    model.zero_grad()
    assert_equal(run_packed(PackedModel(model), rows, LOSSES["sft"]), expected, FLOOR)


def test_base_model_finds_the_model_inside():
    model = _adapted("attention", torch.float32)
    assert base_model(model) is model.base_model.model and base_model(base_model(model)) is base_model(model)


# -- models that are refused ---


def _small(kind: str, **changes) -> tf.PreTrainedModel:
    config = getattr(tf, kind + "Config")(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, pad_token_id=0, **changes
    )
    return tf.AutoModelForCausalLM.from_config(config)


def _minimax() -> nn.Module:
    kinds = ["linear_attention", "full_attention"]
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    return _small("MiniMax", num_local_experts=2, layer_types=kinds, **heads)


def _llama4() -> nn.Module:
    config = tf.Llama4TextConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, intermediate_size_mlp=48, num_hidden_layers=2,
        head_dim=8, num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, attention_chunk_size=4,
        pad_token_id=0,
    )  # fmt: skip
    return tf.Llama4ForCausalLM(config)


def _t5() -> nn.Module:
    return tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    )


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (_minimax, "linear_attention"),
        (_llama4, "chunked_attention"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_architectures_that_cannot_be_packed(build, message):
    """They run in padded rows, and packing=true is refused with the reason."""
    with pytest.raises(UserError, match=f"{message}.*set packing=auto"):
        PackedModel(build(), packing="true")
    assert PackedModel(build()).padded and PackedModel(build(), packing="false").padded


def test_encoder_decoders_are_refused():
    with pytest.raises(UserError, match="encoder-decoder"):
        PackedModel(_t5())


def test_layers_on_several_devices():
    """Refused: attention would get hidden rows and layout on different devices."""
    model = tiny_model("llama")
    model.hf_device_map = {"": 0}
    PackedModel(model)
    model.hf_device_map = {"model.embed_tokens": 0, "model.layers": 1, "lm_head": "cpu"}
    with pytest.raises(ValueError, match=r"spread over devices \(0, 1, cpu\) by its device_map"):
        PackedModel(model)


@pytest.mark.parametrize(
    ("transform", "scale"), [(lambda z: 2 * z, 2.0), (lambda z: z.clamp(max=0.02), None)], ids=["doubled", "clamped"]
)
def test_an_unknown_transform_of_the_logits(transform, scale):
    """A scale is measured; for any other transform log-probs come from the model's own logits, in padded rows."""

    class Transforming(tf.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = transform(output.logits)
            return output

    plain = tiny_model("llama")
    model = Transforming(plain.config)
    model.load_state_dict(plain.state_dict())
    packed = PackedModel(model)
    assert packed.padded == (scale is None)
    assert packed.options is None if scale is None else packed.options.logit_scale == pytest.approx(scale)
    assert PackedModel(plain).options.logit_scale == 1.0


def _broken(name: str) -> tf.PreTrainedModel:
    model = tiny_model("llama")
    model.get_parameter(name).data[1, 2] = torch.nan
    return model


def _overflowing() -> tf.PreTrainedModel:
    model = tiny_model("llama").half()
    model.model.layers[1].mlp.down_proj.weight.data.fill_(6e4)
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: _broken("lm_head.weight"), "1 of its weights hold NaN or inf, such as lm_head.weight:"),
        (lambda: _broken("model.layers.0.mlp.up_proj.weight"), ".*such as model.layers.0.mlp.up_proj.weight"),
        (_overflowing, "its weights are finite, .* overflows in float16; load it with dtype bfloat16 or float32"),
    ],
    ids=["head", "layer", "overflow"],
)
def test_logits_that_are_not_finite(build, message):
    with pytest.raises(ValueError, match=f"^LlamaForCausalLM gives logits that are not finite: {message}"):
        PackedModel(build())


def test_a_shift_of_the_logits_is_no_transform():
    class Shifted(tf.LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits + 3
            return output

    PackedModel(Shifted(tiny_model("llama").config))


def test_a_quantized_head_is_one_clear_error():
    class Int8Head(nn.Module):
        def __init__(self, weight: torch.Tensor):
            super().__init__()
            self.weight = nn.Parameter((weight * 100).to(torch.int8), requires_grad=False)
            self.bias = None

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden @ self.weight.t().to(hidden.dtype) / 100

    model = tiny_model("llama")
    model.set_output_embeddings(Int8Head(model.lm_head.weight.detach()))
    with pytest.raises(ValueError, match="quantized"):
        PackedModel(model)


def test_the_probe_of_the_head_leaves_modes_as_they_were():
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    PackedModel(model)
    assert model.training and model.model.layers[1].training and not model.model.layers[0].training


# -- the auxiliary loss ---


def _router_logits(model: nn.Module, rows: list[dict], unique: bool) -> tuple[torch.Tensor, ...]:
    """Router logits of every layer for all completions run alone; prompts once per group (unique) or completion."""
    parts = []
    for row in rows:
        for i, completion in enumerate(row["completion_ids"]):
            ids = torch.tensor([row["prompt_ids"] + completion])
            logits = model(input_ids=ids, output_router_logits=True).router_logits
            start = len(row["prompt_ids"]) if unique and i else 0
            parts.append([layer.reshape(-1, layer.shape[-1])[start:] for layer in logits])
    return tuple(torch.cat(layer) for layer in zip(*parts))


@pytest.mark.parametrize("share", [True, False], ids=["unique-tokens", "with-prompt-copies"])
@pytest.mark.parametrize("name", MIXTURES)
def test_the_auxiliary_loss_is_that_of_the_rows_tokens(name, share):
    """It covers every token of the packed row once. Without shared prompts this is TRL's value without padding."""
    rows, model = make_rows("sft"), tiny_model(name, torch.float64)
    loss = LOSSES["sft"]
    gate = _router_logits(model, rows, unique=share)
    assert len(gate[0]) == make_batch(rows, share_prompts=share)["input_ids"].numel()
    auxiliary = load_balancing_loss_func(gate, 4, 2)
    expected = run_alone(model, rows, loss)
    auxiliary.backward()
    expected.grads = {name_: parameter.grad for name_, parameter in model.named_parameters()}

    model = tiny_model(name, torch.float64)
    batch = make_batch(rows, share_prompts=share)
    tokens_per_pair = batch["num_chosen_tokens"] / batch["num_pairs"]
    scores = PackedModel(model)(batch, loss, aux_loss=True, tokens_per_pair=tokens_per_pair)
    assert abs(scores.aux_loss.double() - auxiliary) <= FLOOR * auxiliary
    (scores.loss + scores.aux_loss).backward()
    grads = {name_: parameter.grad for name_, parameter in model.named_parameters()}
    assert_equal(type(expected)({}, {}, grads), expected, FLOOR)


def test_the_two_auxiliary_losses_differ():
    rows, packed = make_rows("sft"), PackedModel(tiny_model("mixtral"))
    with torch.no_grad():
        shared, copies = (
            packed(make_batch(rows, share_prompts=share), build_loss("sft"), aux_loss=True).aux_loss
            for share in (True, False)
        )
    assert abs(shared - copies) > 1e-3 * copies
    assert packed(make_batch(rows), build_loss("sft")).aux_loss is None
