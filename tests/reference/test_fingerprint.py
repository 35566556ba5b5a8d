"""The fingerprint is equal for models with equal log-probs, and differs for all others."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import cpt_kernels.reference.fingerprint as module
from cpt_kernels.reference.fingerprint import describe_reference, fingerprint
from tests.helpers.architectures import CONFIGS, tiny_model


def digest(model: nn.Module, **changes) -> str:
    return fingerprint(model, **{"compute_dtype": torch.float32, "attention": "sdpa", **changes})


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture(scope="module")
def plain() -> str:
    """The fingerprint of the fixture `model`."""
    return digest(tiny_model("llama"))


def adapted(name: str = "llama", adapter_name: str = "default", **changes) -> nn.Module:
    model = tiny_model(name)
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False, **changes})
    torch.manual_seed(1)
    return get_peft_model(model, config, adapter_name)


def test_is_32_hex_digits_and_repeats(model, plain):
    assert len(plain) == 32 and int(plain, 16) >= 0
    assert digest(model) == digest(copy.deepcopy(model)) == plain


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "gemma3", "qwen3_moe", "phi3-longrope"])
def test_saved_and_loaded_from_another_path_is_the_same(name, tmp_path):
    model = tiny_model(name)
    fingerprints = {digest(model)}
    for folder in ("a", "b"):
        model.save_pretrained(tmp_path / folder, max_shard_size="10KB" if folder == "b" else "1GB")
        fingerprints.add(digest(AutoModelForCausalLM.from_pretrained(tmp_path / folder)))
    assert len(fingerprints) == 1


def test_every_tensor_and_every_bit_counts(model, plain):
    seen = {plain}
    for name, parameter in model.named_parameters():
        flat = parameter.detach().view(-1).view(torch.int32)
        flat[-1] ^= 1  # the lowest bit of the last element
        found = digest(model)
        assert found not in seen, name
        seen.add(found)
        flat[-1] ^= 1
    assert digest(model) == plain


def test_values_count_not_their_place(model, plain):
    first, second = (model.model.layers[i].mlp.up_proj for i in range(2))
    first.weight, second.weight = second.weight, first.weight
    assert digest(model) != plain


def test_memory_layout_does_not_count(model, plain, monkeypatch):
    weight = model.model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.t().contiguous().t()
    assert not weight.is_contiguous() and digest(model) == plain
    monkeypatch.setattr(module, "_CHUNK", 1000)  # several chunks per tensor, contiguous or not
    assert digest(model) == digest(tiny_model("llama"))


def test_systems_that_do_not_say_which_cores_a_process_has(model, plain, monkeypatch):
    monkeypatch.delattr(module.os, "sched_getaffinity")
    assert digest(model) == plain


def test_chunks_are_not_interchangeable(monkeypatch):
    monkeypatch.setattr(module, "_CHUNK", 4)
    values = torch.arange(10.0)
    digests = module._tensor_digests({"x": values, "y": values.roll(4), "z": values.view(2, 5), "empty": values[:0]})
    assert len({tuple(map(str, d)) for d in digests.values()}) == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8])
def test_dtypes(dtype):
    values = torch.arange(-4, 5)
    (name, shape, first), (_, _, second) = module._tensor_digests(
        {"a": values.to(dtype), "b": values.flip(0).to(dtype)}
    ).values()
    assert (name, shape) == (str(dtype)[6:], [9]) and first != second


def test_weight_dtype_compute_dtype_attention_and_operators_count(model, plain):
    others = [
        digest(model, compute_dtype=torch.bfloat16),
        digest(model, attention="eager"),
        digest(model, op_version=module.OP_VERSION + 1),
        digest(model.to(torch.bfloat16)),
    ]
    assert len({plain, *others}) == 5
    assert digest(tiny_model("llama"), compute_dtype="float32") == plain


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}},
        {"sliding_window": 7},
        {"rms_norm_eps": 1e-5},
        {"hidden_act": "gelu"},
        {"logits_scaling": 2.0},
        {"num_experts_per_tok": 1},
    ],
)
def test_config_that_changes_numbers_counts(model, plain, changes):
    for name, value in changes.items():
        setattr(model.config, name, value)
    assert digest(model) != plain


@pytest.mark.parametrize(
    "changes",
    [
        {"_name_or_path": "/elsewhere", "transformers_version": "0", "architectures": ["X"]},
        {"use_cache": False, "attention_dropout": 0.5, "router_aux_loss_coef": 0.1},
        {"pad_token_id": 5, "eos_token_id": 6, "a_field_of_another_version": None},
    ],
)
def test_config_that_does_not_change_numbers_does_not_count(model, plain, changes):
    for name, value in changes.items():
        setattr(model.config, name, value)
    model.set_attn_implementation("eager")  # irrelevant: the attention is an argument of fingerprint
    assert digest(model) == plain


def test_numbers_do_not_depend_on_whether_a_tie_survived():
    tied = tiny_model("llama-tied")
    expected = digest(tied)
    tied.lm_head.weight = nn.Parameter(tied.lm_head.weight.detach().clone())
    assert digest(tied) == expected
    tied.lm_head.weight.data[0, 0] += 1
    assert digest(tied) != expected


def test_tied_tensors_are_read_once(monkeypatch):
    reads = []
    monkeypatch.setattr(module, "_chunk_digests", lambda task: reads.append(task) or b"")
    model = tiny_model("llama-tied")
    digest(model)
    assert len(reads) == len(list(model.parameters())) == len(model.state_dict()) - 1


def test_persistent_buffers_count_and_others_do_not(model, plain):
    model.model.rotary_emb.inv_freq.mul_(2)  # not persistent: it follows from the config
    assert digest(model) == plain
    model.register_buffer("extra", torch.zeros(1))
    assert digest(model) != plain


def test_wrappers_do_not_count(model, plain):
    assert digest(torch.compile(model)) == plain
    assert digest(nn.DataParallel(model)) == plain
    model.model.layers[0] = torch.compile(model.model.layers[0])
    assert digest(model) == plain
    assert digest(torch.compile(adapted()), adapters=False) == plain


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("llama", {}),
        ("llama", {"use_dora": True}),
        ("llama", {"target_modules": ["q_proj", "embed_tokens"]}),
        ("llama", {"modules_to_save": ["lm_head"]}),
        ("llama", {"trainable_token_indices": [1, 2]}),
        ("llama-tied", {"trainable_token_indices": [1, 2]}),
        ("qwen3_moe", {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
    ],
)
def test_adapters_off_is_the_plain_base_model(name, changes):
    model = adapted(name, **changes)
    expected, on = digest(tiny_model(name)), digest(model)
    assert digest(model, adapters=False) == expected != on
    with model.disable_adapter():
        assert digest(model) == expected
    assert digest(model) == on
    for key, parameter in model.named_parameters():
        if "default" in key:  # every tensor of the adapter counts if the adapter is on
            parameter.data.view(-1)[0] += 1
            assert digest(model) != on, key
            assert digest(model, adapters=False) == expected, key
            parameter.data.view(-1)[0] -= 1
            on = digest(model)  # + 1 - 1 may not restore the same bits


def test_adapter_config_counts_and_its_name_does_not(tmp_path):
    expected = digest(adapted())
    assert digest(adapted(lora_alpha=16)) != expected
    assert digest(adapted(use_rslora=True)) != expected
    assert digest(adapted(lora_dropout=0.1)) == expected
    assert digest(adapted(adapter_name="reference")) == expected
    model = adapted()
    model.save_pretrained(tmp_path / "adapter")
    model.load_adapter(tmp_path / "adapter", "frozen")
    assert digest(model) == expected, "an inactive adapter does not count"
    model.set_adapter("frozen")
    assert digest(model) == expected, "TRL keeps the start values of a trained adapter like this"


def test_adapter_added_by_transformers_itself(model, plain):
    try:
        model.add_adapter(LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    except ValueError as error:  # transformers 5.24 wants a PEFT that is not released
        if "please use a version >=" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__} does not take this PEFT: {error}")
    assert digest(model, adapters=False) == plain != digest(model)


def test_merged_adapter():
    model = adapted()
    separate = digest(model)
    model.merge_adapter()
    assert digest(model) != separate  # rounds differently
    with pytest.raises(ValueError, match="merged"):
        digest(model, adapters=False)


def test_what_cannot_be_fingerprinted_is_named(model):
    with pytest.raises(ValueError, match="prompt-learning"):
        digest(get_peft_model(model, PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")))
    with pytest.raises(ValueError, match="no config"):
        digest(nn.Linear(2, 2))
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(CONFIGS["llama"]())
    with pytest.raises(ValueError, match=r"embed_tokens.weight is not on this process"):
        digest(empty)
    model.config.odd = object()
    with pytest.raises(ValueError, match="object"):
        digest(model)


@pytest.mark.gpu
def test_device_does_not_count(model, plain):
    assert digest(model.cuda()) == plain


def test_describe():
    about = describe_reference(adapted("llama-tied"), compute_dtype=torch.bfloat16, attention="sdpa", adapters=False)
    assert about == {
        "model": "",
        "model_type": "llama",
        "adapters": [],
        "parameters": sum(p.numel() for p in tiny_model("llama-tied").parameters()),
        "weights_dtype": ["float32"],
        "compute_dtype": "bfloat16",
        "attention": "sdpa",
        "op_version": module.OP_VERSION,
    }
