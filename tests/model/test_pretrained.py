"""A folder is loaded with exactly the weights that were saved into it, or an error names those that differ."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from cpt_kernels.cli.models import load_named_model
from cpt_kernels.model.pretrained import (
    load_pretrained,
    model_folders,
    reload_weights,
    sample_base,
    save_adapter_names,
    unsaved_parameters,
)
from tests.helpers.architectures import tiny_model

LINEAR = {"r": 2, "target_modules": ["q_proj", "down_proj"]}
ADAPTERS = {
    "lora": lambda: LoraConfig(**LINEAR),
    "dora": lambda: LoraConfig(**LINEAR, use_dora=True),  # transformers' from_pretrained loses its magnitudes
    "bias": lambda: LoraConfig(**LINEAR, bias="all"),
    "pissa": lambda: LoraConfig(**LINEAR, init_lora_weights="pissa"),
    "whole head": lambda: LoraConfig(**LINEAR, modules_to_save=["lm_head"]),
    "whole embedding and norm": lambda: LoraConfig(**LINEAR, modules_to_save=["embed_tokens", "norm"]),
    "tokens": lambda: LoraConfig(**LINEAR, trainable_token_indices=[5, 6, 7]),
    "tokens alone": lambda: TrainableTokensConfig(token_indices=[5, 6, 7], target_modules=["embed_tokens"]),
    "lora on head and embedding": lambda: LoraConfig(r=2, target_modules=["embed_tokens", "lm_head", "q_proj"]),
    "ia3": lambda: IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
}


@torch.no_grad()
def log_probs(model: nn.Module) -> Tensor:
    return model.eval()(torch.arange(5, 15)[None]).logits.double().log_softmax(-1)


@torch.no_grad()
def change(model: nn.Module) -> nn.Module:
    """Moves all trainable parameters, as training does."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def base(folder: Path, name: str = "llama", tokens: int | None = None) -> nn.Module:
    """Saves a tiny model, and loads it with transformers; ``tokens`` resizes its vocabulary afterwards."""
    if not (folder / "base").exists():
        tiny_model(name).save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base")
    if tokens is not None:
        torch.manual_seed(1)
        model.resize_token_embeddings(tokens)
    return model


def save(model: nn.Module, folder: Path) -> str:
    """Saves adapters as the trainer does."""
    model.save_pretrained(folder)
    save_adapter_names(model, folder, sample_base(model))
    return str(folder)


def edit(file: Path, **changes: Tensor | None) -> None:
    """Changes weights in a safetensors file; None removes one. "/" stands for "." in names."""
    weights = load_file(file)
    for name, value in changes.items():
        weights.pop(name.replace("/", "."), None)
        if value is not None:
            weights[name.replace("/", ".")] = value
    save_file(weights, file, metadata={"format": "pt"})


# --- Adapters ---


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ADAPTERS)
def test_an_adapter_is_loaded_as_it_was_saved(tmp_path, kind, tied):
    name = "llama-tied" if tied else "llama"
    model = change(get_peft_model(base(tmp_path, name), ADAPTERS[kind]()))
    expected = log_probs(model)
    assert (expected - log_probs(base(tmp_path, name))).abs().max() > 1e-2 and not unsaved_parameters(model)
    folder = save(model, tmp_path / "adapter")
    loaded = load_pretrained(folder)
    assert torch.equal(log_probs(loaded), expected)
    assert not any(p.requires_grad for p in loaded.parameters()) and not loaded.training
    trainable = load_pretrained(folder, trainable=True)
    trained = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (model, trainable)]
    assert trained[0] == trained[1] and trained[0]
    assert torch.equal(log_probs(PeftModel.from_pretrained(base(tmp_path, name), folder)), expected)
    again = get_peft_model(base(tmp_path, name), ADAPTERS[kind]())
    reload_weights(again, folder)
    assert torch.equal(log_probs(again), expected)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ["lora", "whole embedding and norm", "tokens"])
def test_an_adapter_with_added_tokens(tmp_path, kind, tied):
    model = change(get_peft_model(base(tmp_path, "llama-tied" if tied else "llama", tokens=70), ADAPTERS[kind]()))
    expected = log_probs(model)
    folder = save(model, tmp_path / "adapter")
    loaded = load_pretrained(folder)
    assert loaded.config.vocab_size == 70 and torch.equal(log_probs(loaded), expected)


def test_added_tokens_whose_head_is_not_saved(tmp_path):
    """PEFT saves the embedding, which the adapter targets, but not the untied head."""
    model = get_peft_model(base(tmp_path, tokens=70), LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    folder = save(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"vocabulary of 70 tokens, its base model has 61, .* not hold the head"):
        load_pretrained(folder)


def test_adapters_with_names(tmp_path):
    """One adapter, several of which one is active, and several active ones."""
    model = change(get_peft_model(base(tmp_path), ADAPTERS["lora"](), adapter_name="policy"))
    folder = save(model, tmp_path / "one")
    assert torch.equal(log_probs(load_pretrained(folder)), log_probs(model))
    (tmp_path / "one/adapters.json").unlink()  # as PEFT saves it
    assert torch.equal(log_probs(load_pretrained(folder)), log_probs(model))
    alone = load_pretrained(str(tmp_path / "one/policy"))
    assert torch.equal(log_probs(alone), log_probs(model)) and list(alone.peft_config) == ["default"]

    model.add_adapter("other", ADAPTERS["dora"]())
    model.set_adapter("other")
    change(model)
    results = {}
    for active in (["policy"], ["other"], ["policy", "other"]):
        model.base_model.set_adapter(active)
        results[len(results)] = log_probs(model)
        loaded = load_pretrained(save(model, tmp_path / "two"), trainable=True)
        assert torch.equal(log_probs(loaded), log_probs(model)) and loaded.active_adapters == active
        assert {n for n, p in loaded.named_parameters() if p.requires_grad} == {
            n for n, p in model.named_parameters() if p.requires_grad
        }
    assert not torch.equal(results[0], results[1]) and not torch.equal(results[1], results[2])
    (tmp_path / "two/adapters.json").unlink()
    with pytest.raises(ValueError, match=r"holds several adapters: name the folder of one, such as .*other"):
        load_pretrained(str(tmp_path / "two"))


def test_checkpoints_and_older_adapters_in_a_folder_are_not_loaded(tmp_path):
    save(get_peft_model(base(tmp_path), ADAPTERS["lora"](), adapter_name="older"), tmp_path / "out")
    model = change(get_peft_model(base(tmp_path), ADAPTERS["lora"]()))
    save(model, tmp_path / "out/checkpoint-3")
    loaded = load_pretrained(save(model, tmp_path / "out"))
    assert list(loaded.peft_config) == ["default"] and torch.equal(log_probs(loaded), log_probs(model))


A = "base_model/model/model/layers/0/self_attn/q_proj/lora_A/weight"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({A: None}, r"lacks weights of the adapter default: .*layers\.0\.self_attn\.q_proj\.lora_A"),
        ({"base_model/model/lm_head/weight": None}, r"lacks the weight .*lm_head"),
        ({A.replace("/0/", "/7/"): torch.zeros(2, 32)}, r"holds weights that the adapter default does not .*layers\.7"),
        ({A: torch.zeros(3, 32)}, r"saved from another base model or adapter configuration: size mismatch .*lora_A"),
        ({A: torch.zeros(2, 16)}, "saved from another base model"),
    ],
)
def test_an_adapter_whose_weights_differ_from_the_model(tmp_path, changes, message):
    make = lambda: get_peft_model(base(tmp_path), ADAPTERS["whole head"]())  # noqa: E731
    folder = save(make(), tmp_path / "adapter")
    edit(tmp_path / "adapter/adapter_model.safetensors", **changes)
    with pytest.raises(ValueError, match=message):
        load_pretrained(folder)
    with pytest.raises(ValueError, match=message):
        reload_weights(make(), folder)


def test_an_adapter_of_another_base_model(tmp_path):
    model = get_peft_model(base(tmp_path), ADAPTERS["lora"]())
    folder = save(model, tmp_path / "adapter")
    half = load_pretrained(folder, dtype=torch.bfloat16)  # rounded weights are those of the same model
    assert half.get_base_model().dtype == torch.bfloat16
    other = base(tmp_path)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight += 1e-4  # trained further, for a few steps
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"trained on another base model: .*layers\.1\.mlp\.up_proj.* has other"):
        load_pretrained(folder)
    with pytest.raises(ValueError, match="trained on another base model"):
        reload_weights(get_peft_model(base(tmp_path), ADAPTERS["lora"]()), folder)
    tiny_model("qwen2").save_pretrained(tmp_path / "base")
    with pytest.raises(ValueError, match=r"trained on another base model|saved from another base model"):
        load_pretrained(folder)


def test_an_adapter_without_a_usable_base_model(tmp_path):
    model = get_peft_model(base(tmp_path), ADAPTERS["lora"]())
    folder = Path(save(model, tmp_path / "adapter"))
    config = json.loads((folder / "adapter_config.json").read_text())
    for name, message in (
        (None, "names None as base model: write the one base model as base_model_name_or_path"),
        (str(folder), "is an adapter itself: merge it"),
        (str(tmp_path / "nowhere"), "adapter names .*nowhere as base model, and there is no such folder"),
    ):
        (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": name}))
        with pytest.raises(ValueError, match=message):
            load_pretrained(str(folder))


def test_a_folder_of_a_whole_model_and_an_adapter(tmp_path):
    folder = save(get_peft_model(base(tmp_path), ADAPTERS["lora"]()), tmp_path / "both")
    base(tmp_path).save_pretrained(folder)
    with pytest.raises(ValueError, match="holds a whole model and an adapter"):
        load_pretrained(folder)


def test_folders_of_a_model(tmp_path):
    folder = save(get_peft_model(base(tmp_path), ADAPTERS["lora"](), adapter_name="policy"), tmp_path / "adapter")
    assert model_folders(folder) == [tmp_path / "adapter/policy", tmp_path / "base"]
    assert model_folders(str(tmp_path / "base")) == [tmp_path / "base"] and model_folders("org/model") == []


# --- Whole models ---


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "mixtral", "qwen3_moe", "gpt_oss", "gemma3"])
def test_a_whole_model_is_loaded_as_it_was_saved(tmp_path, name):
    model = change(tiny_model(name))
    model.save_pretrained(tmp_path)
    loaded = load_pretrained(str(tmp_path))
    assert type(loaded) is type(model)
    again = tiny_model(name)
    reload_weights(again, tmp_path)
    for other in (loaded, again):
        for key, tensor in model.state_dict().items():
            assert torch.equal(other.state_dict()[key], tensor), key


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lm_head/weight": None}, r"lacks weights that would be random: lm_head\.weight\."),
        ({"model/layers/1/mlp/up_proj/weight": None, "model/norm/weight": None}, r"layers\.1\.mlp\.up_proj.*norm"),
        ({"score/weight": torch.zeros(1, 32)}, r"holds weights that the model does not have: score\.weight"),
        ({"model/norm/weight": torch.zeros(16)}, r"of another shape: model\.norm\.weight \[16\] instead of \[32\]"),
    ],
)
def test_a_whole_model_with_other_weights(tmp_path, changes, message):
    tiny_model("llama").save_pretrained(tmp_path)
    edit(tmp_path / "model.safetensors", **changes)
    with pytest.raises(ValueError, match=message):
        load_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match=message):
        reload_weights(tiny_model("llama"), tmp_path)
    with pytest.raises(ValueError, match=f"reference={tmp_path} cannot be loaded: .*{message}"):
        load_named_model(str(tmp_path), "reference")


def test_an_adapter_on_a_damaged_base_model(tmp_path):
    folder = save(get_peft_model(base(tmp_path), ADAPTERS["lora"]()), tmp_path / "adapter")
    edit(tmp_path / "base/model.safetensors", **{"lm_head/weight": None})
    with pytest.raises(
        ValueError, match=r"base does not hold the weights .* lacks weights that would be random: lm_head"
    ):
        load_pretrained(folder)
