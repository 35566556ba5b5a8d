"""``cpt merge`` writes a whole model that computes what base model and adapters compute, or nothing."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from cpt_kernels.cli import main
from cpt_kernels.model import merging
from tests.helpers.architectures import tiny_model
from tests.helpers.toy import word_tokenizer
from tests.model.test_pretrained import ADAPTERS, LINEAR, base, change, edit, log_probs, save

ON_TIED = {
    **ADAPTERS,
    "lora on head": lambda: LoraConfig(r=2, target_modules=["lm_head"]),
    "lora on embedding": lambda: LoraConfig(r=2, target_modules=["embed_tokens"]),
    "dora on head": lambda: LoraConfig(r=2, target_modules=["lm_head", "q_proj"], use_dora=True),
    "tied adapters": lambda: LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True),
    "tokens of the head": lambda: LoraConfig(**LINEAR, trainable_token_indices={"embed_tokens": [5], "lm_head": [6]}),
    "whole embedding, lora on head": lambda: LoraConfig(
        r=2, target_modules=["lm_head"], modules_to_save=["embed_tokens"]
    ),
}
SEPARATE = {"whole head", "whole embedding and norm", "lora on head and embedding", "lora on head", "lora on embedding"}
SEPARATE |= {"dora on head", "tokens of the head", "whole embedding, lora on head"}


def merge(folder: str, *flags) -> int:
    return main(["merge", *map(str, (folder, *flags))])


def error_of(capsys) -> str:
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("cpt merge: ")]
    return line


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", ON_TIED)
def test_the_merged_model_is_the_model_with_adapters(tmp_path, kind, tied):
    model = change(get_peft_model(base(tmp_path, "llama-tied" if tied else "llama"), ON_TIED[kind]()))
    expected = log_probs(model)
    folder = save(model, tmp_path / "adapter")
    assert merge(folder, "--output", tmp_path / "merged") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(log_probs(merged), expected, rtol=0, atol=2e-5)
    is_tied = merged.get_output_embeddings().weight is merged.get_input_embeddings().weight
    assert merged.config.tie_word_embeddings is is_tied
    if kind != "tied adapters":
        assert is_tied == (tied and kind not in SEPARATE)
    assert not hasattr(merged, "peft_config")


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "qwen3_moe", "mixtral", "phi3"])
def test_architectures(tmp_path, name):
    linear = {"gpt2": ["c_attn"], "phi3": ["qkv_proj"]}.get(name, ["q_proj"])
    model = change(get_peft_model(base(tmp_path, name), LoraConfig(r=2, target_modules=linear)))
    expected = log_probs(model)
    assert merge(save(model, tmp_path / "adapter"), "--output", tmp_path / "merged") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(log_probs(merged), expected, rtol=0, atol=2e-5)


def test_added_tokens(tmp_path):
    model = change(get_peft_model(base(tmp_path, tokens=70), ADAPTERS["lora"]()))
    expected = log_probs(model)
    assert merge(save(model, tmp_path / "adapter"), "--output", tmp_path / "merged") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.vocab_size == 70
    torch.testing.assert_close(log_probs(merged), expected, rtol=0, atol=2e-5)


def test_several_adapters(tmp_path, capsys):
    """By default the active ones, together; --adapters chooses others."""
    model = get_peft_model(base(tmp_path), ADAPTERS["lora"](), adapter_name="first")
    model.add_adapter("second", LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    for name in ("first", "second"):
        model.set_adapter(name)
        change(model)
    expected = {}
    for active in (("first",), ("second",), ("first", "second")):
        model.base_model.set_adapter([*active])
        expected[active] = log_probs(model)
    folder = save(model, tmp_path / "adapters")
    for active, flags in {
        ("first", "second"): (),
        ("first",): ("--adapters", "first"),
        ("second",): ("--adapters", "second"),
    }.items():
        output = tmp_path / "-".join(active)
        assert merge(folder, "--output", output, *flags) == 0
        merged = AutoModelForCausalLM.from_pretrained(output)
        torch.testing.assert_close(log_probs(merged), expected[active], rtol=0, atol=2e-5)
    assert merge(folder, "--output", tmp_path / "third", "--adapters", "third") == 2
    assert "holds no adapter third: choose from first, second" in error_of(capsys)


@pytest.mark.parametrize(
    ("stored", "flag", "expected"),
    [
        ("bfloat16", "auto", torch.bfloat16),
        ("bfloat16", "float32", torch.float32),
        ("float32", "auto", torch.float32),
        ("float32", "float16", torch.float16),
    ],
)
def test_dtypes(tmp_path, stored, flag, expected):
    """Weights are merged in fp32 and rounded once, whatever the dtype of the base model."""
    tiny_model("llama").to(getattr(torch, stored)).save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    model = change(get_peft_model(model, ADAPTERS["lora on head and embedding"]()))
    folder = save(model, tmp_path / "adapter")
    assert merge(folder, "--output", tmp_path / "merged", "--dtype", flag) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto")
    assert {p.dtype for p in merged.parameters()} == {expected}
    for name, tensor in model.merge_and_unload().state_dict().items():
        assert torch.equal(merged.state_dict()[name], tensor.to(expected)), name


def test_what_lies_beside_the_weights(tmp_path):
    """Tokenizer, chat template and a generation config that transformers would refuse to save."""
    model = change(get_peft_model(base(tmp_path), ADAPTERS["lora"]()))
    settings = {"do_sample": False, "temperature": 0.6, "eos_token_id": [2, 7]}
    (tmp_path / "base/generation_config.json").write_text(json.dumps(settings))
    folder = save(model, tmp_path / "adapter")
    word_tokenizer().save_pretrained(tmp_path / "base")
    assert merge(folder, "--output", tmp_path / "one") == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "one").get_vocab() == word_tokenizer().get_vocab()
    saved = json.loads((tmp_path / "one/generation_config.json").read_text())
    assert {name: saved[name] for name in settings} == settings
    assert GenerationConfig.from_pretrained(tmp_path / "one").eos_token_id == [2, 7]
    # The adapter's tokenizer comes first, because training may have changed it.
    tokenizer = word_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    (tmp_path / "two").mkdir()  # an empty folder may exist
    assert merge(folder, "--output", tmp_path / "two") == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "two").chat_template == tokenizer.chat_template


def test_another_base_model(tmp_path, capsys):
    model = change(get_peft_model(base(tmp_path), ADAPTERS["lora"]()))
    folder = save(model, tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "moved")
    assert merge(folder, "--output", tmp_path / "merged") == 2
    assert "base" in error_of(capsys)
    assert merge(folder, "--output", tmp_path / "merged", "--base", tmp_path / "moved") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(log_probs(merged), log_probs(model), rtol=0, atol=2e-5)


def test_layers_that_the_adapter_repeats(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[(0, 2), (1, 2)])
    model = change(get_peft_model(base(tmp_path), config))
    expected = log_probs(model)
    assert merge(save(model, tmp_path / "adapter"), "--output", tmp_path / "merged") == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert merged.config.num_hidden_layers == 3
    torch.testing.assert_close(log_probs(merged), expected, rtol=0, atol=2e-5)


# --- Nothing is written ---


def assert_nothing_written(tmp_path: Path, *but: str) -> None:
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", *but}


def a_folder(tmp_path: Path, config: LoraConfig | None = None, name: str = "llama") -> str:
    return save(change(get_peft_model(base(tmp_path, name), config or ADAPTERS["lora"]())), tmp_path / "adapter")


def test_a_merge_that_is_not_exact(tmp_path, capsys, monkeypatch):
    """PEFT's own merge of a tied head, which is off by more than a logit."""
    folder = a_folder(tmp_path, ON_TIED["lora on head"](), "llama-tied")
    monkeypatch.setattr(merging, "_untie", lambda model: None)
    assert merge(folder, "--output", tmp_path / "merged") == 2
    assert "cannot be merged exactly: a logit of the merged model differs by" in error_of(capsys)
    assert_nothing_written(tmp_path)


def test_files_that_do_not_hold_the_merged_model(tmp_path, capsys, monkeypatch):
    folder, write = a_folder(tmp_path), merging._write_model

    def damage(model, path, tokenizer) -> None:
        write(model, path, tokenizer)
        edit(path / "model.safetensors", **{"model/norm/weight": torch.ones(32).nextafter(torch.zeros(32))})

    monkeypatch.setattr(merging, "_write_model", damage)
    assert merge(folder, "--output", tmp_path / "merged") == 2
    assert "model.norm.weight is another one when the model is loaded again" in error_of(capsys)
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(r=2, target_modules=["q_proj"], lora_bias=True), "cannot be merged: .* no bias"),
        (LoraConfig(r=2, target_modules=["q_proj"], alora_invocation_tokens=[7, 8]), "cannot be merged: aLoRA"),
    ],
)
def test_adapters_that_cannot_be_merged(tmp_path, capsys, config, message):
    assert merge(a_folder(tmp_path, config), "--output", tmp_path / "merged") == 2
    assert re.search(message, error_of(capsys))
    assert_nothing_written(tmp_path)


def test_a_weight_that_the_dtype_cannot_hold(tmp_path, capsys):
    model = base(tmp_path)
    model.lm_head.weight.data[3, 3] = 1e5
    model.save_pretrained(tmp_path / "base")
    assert merge(a_folder(tmp_path), "--output", tmp_path / "merged", "--dtype", "float16") == 2
    assert "values in lm_head.weight that torch.float16 cannot hold: choose --dtype float32" in error_of(capsys)
    assert_nothing_written(tmp_path)


def test_folders(tmp_path, capsys, monkeypatch):
    folder = a_folder(tmp_path)
    for argv, message in (
        ((tmp_path / "base", "--output", tmp_path / "merged"), "base holds no adapter"),
        ((folder, "--output", tmp_path / "base"), "base exists already: choose another folder, or delete it"),
        ((folder, "--output", folder), "adapter exists already"),
        ((tmp_path / "nowhere", "--output", tmp_path / "merged"), "nowhere: there is no such folder"),
        ((folder, "--output", "/proc/merged"), "/proc/merged cannot be written to"),
        ((folder, "--output", tmp_path / "merged", "--load_in_8bit", "--load_in_4bit"), "exclude each other"),
        ((folder, "--output", tmp_path / "merged", "--use_bnb_nested_quant"), "has no effect without --load_in_4bit"),
        ((folder, "--output", tmp_path / "merged", "--adapters", "other"), "holds no adapter other"),
    ):
        assert merge(*argv) == 2, argv
        assert message in error_of(capsys), argv
    monkeypatch.setattr(merging.shutil, "disk_usage", lambda path: type("", (), {"free": 1000}))
    assert merge(folder, "--output", tmp_path / "merged") == 2
    assert "its disk has 0.0 GB free" in error_of(capsys)
    assert_nothing_written(tmp_path)


def test_a_disk_that_is_full_while_the_model_is_written(tmp_path, capsys, monkeypatch):
    folder = a_folder(tmp_path)

    def fail(self, path, **_):
        (Path(path) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    assert merge(folder, "--output", tmp_path / "merged") == 2
    assert "No space left on device" in error_of(capsys)
    assert_nothing_written(tmp_path)


def test_a_damaged_adapter(tmp_path, capsys):
    folder = a_folder(tmp_path)
    edit(
        tmp_path / "adapter/adapter_model.safetensors",
        **{"base_model/model/model/layers/0/self_attn/q_proj/lora_A/weight": None},
    )
    assert merge(folder, "--output", tmp_path / "merged") == 2
    assert "lacks weights of the adapter default" in error_of(capsys)
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(b"")
    assert merge(folder, "--output", tmp_path / "merged") == 2
    assert_nothing_written(tmp_path)


def test_the_base_model_is_unchanged(tmp_path):
    folder = a_folder(tmp_path)
    before = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
    assert merge(folder, "--output", tmp_path / "merged") == 0
    assert {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()} == before
    assert AutoConfig.from_pretrained(tmp_path / "merged").architectures == ["LlamaForCausalLM"]
