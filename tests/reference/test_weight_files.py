"""Digests of weights by the identity of their files: found for what came from these files alone, never stale."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import huggingface_hub
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import cpt_kernels.reference.fingerprint as fingerprint_module
import cpt_kernels.reference.weight_files as module
from cpt_kernels import ContrastiveTrainer
from cpt_kernels.cli import cache as cache_tool
from cpt_kernels.model.packed_model import PackedModel
from cpt_kernels.reference.scorer import Reference
from tests.helpers.architectures import tiny_model
from tests.helpers.toy import config, preference_data, word_tokenizer


@pytest.fixture
def settled(monkeypatch):
    """As if a file's time of change were always fine enough to tell two changes apart."""
    monkeypatch.setattr(module, "_SETTLED", -1e9)


@pytest.fixture
def saved(tmp_path, settled) -> Path:
    tiny_model("llama").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def reads(monkeypatch) -> list:
    """Grows with every chunk of a tensor that is digested."""
    chunks, digest = [], fingerprint_module._chunk_digests
    monkeypatch.setattr(fingerprint_module, "_chunk_digests", lambda task: chunks.append(task) or digest(task))
    return chunks


def load(folder: Path, **options) -> torch.nn.Module:
    return module.load(AutoModelForCausalLM, str(folder), **options)


def reference(model: torch.nn.Module, folder: Path, **options) -> str:
    """The fingerprint that a run takes of it."""
    how = {"new_adapter": False, "keep": False, "accelerator": Accelerator(cpu=True), **options}
    return Reference(PackedModel(model), None, cache_dir=str(folder), **how).cache.fingerprint


def test_weights_are_digested_once(saved, tmp_path, reads):
    first = reference(load(saved), tmp_path / "cache")
    assert reads
    reads.clear()
    assert reference(load(saved), tmp_path / "cache") == first and not reads
    assert reference(tiny_model("llama"), tmp_path / "cache") == first and reads, "handed over, so digested"
    (entry,) = (tmp_path / "cache/weights").iterdir()
    assert "model.safetensors" in json.loads(entry.read_text())["files"]


def test_trainer_and_its_reference_model_by_name(saved, tmp_path, reads):
    word_tokenizer().save_pretrained(saved)

    def fingerprint(**options) -> str:
        arguments = {"args": config(tmp_path), "train_dataset": preference_data(4), **options}
        return ContrastiveTrainer(str(saved), **arguments).reference.cache.fingerprint

    first = fingerprint()
    assert reads
    reads.clear()
    assert fingerprint() == fingerprint(ref_model=str(saved)) == first and not reads
    adapter = LoraConfig(r=4, target_modules="all-linear")
    assert fingerprint(peft_config=adapter) == first and not reads
    assert fingerprint(args=config(tmp_path, precompute_ref_log_probs=False)) == first and not reads
    assert fingerprint(ref_model=tiny_model("llama-tied")) != first and reads


def test_commands_digest_a_model_once(saved, tmp_path, reads):
    word_tokenizer().save_pretrained(saved)
    preference_data(4).remove_columns("sampled").to_json(tmp_path / "data.jsonl")
    options = ["--model_name_or_path", str(saved), "--dataset_name", str(tmp_path / "data.jsonl"), "--use_cpu"]
    for expected in (True, False):
        reads.clear()
        cache_tool.main(["build", *options, "--ref_cache_dir", str(tmp_path / "cache")])
        assert bool(reads) == expected


def rewrite(folder: Path, in_place: bool = True) -> None:
    """Other weights in a file of the same size."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][0, 0] += 1
    size = file.stat().st_size
    save_file(tensors, folder / "new", {"format": "pt"})
    if in_place:
        file.write_bytes((folder / "new").read_bytes())
        (folder / "new").unlink()
    else:
        (folder / "new").replace(file)
    assert file.stat().st_size == size


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("backdated", [True, False])
def test_rewritten_files_are_digested_again(saved, tmp_path, reads, in_place, backdated):
    first = reference(load(saved), tmp_path / "cache")
    before = os.stat(saved / "model.safetensors")
    rewrite(saved, in_place)
    if backdated:
        os.utime(saved / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
        assert os.stat(saved / "model.safetensors").st_mtime_ns == before.st_mtime_ns
    changed = load(saved)
    reads.clear()
    assert reference(changed, tmp_path / "cache") == reference(changed, tmp_path / "other") != first and reads


def test_files_that_changed_a_moment_ago_are_not_trusted(tmp_path, reads):
    """They might change once more within one tick of the file system's clock."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    assert module.claim(load(tmp_path / "model")) is None


@pytest.mark.parametrize("known", [False, True])
def test_files_that_change_after_they_were_loaded_are_not_trusted(saved, tmp_path, reads, known):
    """On a CPU tensors may be mapped from a file: overwritten, it changes them."""
    if known:
        reference(load(saved), tmp_path / "cache")
    loaded = load(saved)
    rewrite(saved)
    reads.clear()
    assert reference(loaded, tmp_path / "cache") == reference(loaded, tmp_path / "other") and reads
    assert len(list(tmp_path.glob("cache/weights/*"))) == known


def test_another_type_is_another_entry(saved, tmp_path):
    full, half, cast = (load(saved, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float32))
    fingerprints = [reference(model, tmp_path / "cache") for model in (full, half, cast.to(torch.bfloat16))]
    assert fingerprints[0] != fingerprints[1] == fingerprints[2]
    assert len(list((tmp_path / "cache/weights").iterdir())) == 2


def test_resized_embeddings_are_digested(saved, tmp_path, reads):
    first = reference(load(saved), tmp_path / "cache")
    reads.clear()
    resized = load(saved)
    resized.resize_token_embeddings(resized.config.vocab_size + 1)
    assert reference(resized, tmp_path / "cache") != first and reads


def test_whoever_had_the_model_may_have_changed_it(saved, tmp_path, reads):
    """Trained by SFT, which has no reference, then by DPO: the reference is the trained model."""
    word_tokenizer().save_pretrained(saved)
    start = reference(load(saved), tmp_path / "ref")
    common = {"train_dataset": preference_data(4), "processing_class": word_tokenizer()}
    sft = ContrastiveTrainer(str(saved), args=config(tmp_path, loss_type="sft"), **common)
    sft.model.lm_head.weight.data[0, 0] += 1
    dpo = ContrastiveTrainer(sft.model, args=config(tmp_path), **common)
    reads.clear()
    found = [dpo.reference.cache.fingerprint, *(reference(model, tmp_path / "ref") for model in (sft.model, dpo.model))]
    assert len(set(found)) == 1 and start not in found and reads


def test_weights_that_the_files_lack_have_no_entry(saved):
    tensors = load_file(saved / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, saved / "model.safetensors", {"format": "pt"})
    assert module.claim(load(saved)) is None


@pytest.mark.parametrize("options", [{"tie_word_embeddings": True}, {"device_map": "cpu"}])
def test_options_that_may_change_weights_have_no_entry(saved, options):
    assert module.claim(load(saved)) is not None
    assert module.claim(load(saved, **options)) is None


def test_an_adapters_folder_has_no_entry(saved):
    """Its base model lies elsewhere."""
    get_peft_model(tiny_model("llama"), LoraConfig(r=4)).save_pretrained(saved.parent / "adapter")
    about = json.loads((saved.parent / "adapter/adapter_config.json").read_text())
    about["base_model_name_or_path"] = str(saved)
    (saved.parent / "adapter/adapter_config.json").write_text(json.dumps(about))
    assert module.claim(load(saved.parent / "adapter")) is None


@pytest.mark.parametrize("damage", ["", "{}", "[]", "wrong digest"])
def test_a_damaged_entry_is_ignored_with_a_word(saved, tmp_path, caplog, damage):
    first = reference(load(saved), tmp_path / "cache")
    (entry,) = (tmp_path / "cache/weights").iterdir()
    content = json.loads(entry.read_text())
    content["tensors"]["lm_head.weight"][2] = "0" * 64
    entry.write_text(json.dumps(content) if damage == "wrong digest" else damage)
    with caplog.at_level(logging.WARNING):
        assert reference(load(saved), tmp_path / "cache") == first
    assert f"{entry} is damaged" in caplog.text


def test_a_cache_that_cannot_be_written_is_no_error(saved, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file")
    files = module.claim(load(saved))
    files.write(tmp_path / "cache", {})
    assert "cannot be kept" in caplog.text


def test_a_downloaded_model_is_its_blobs(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    model = tmp_path / "models--me--model"
    snapshot = model / "snapshots" / ("a" * 40)
    for folder in (snapshot, model / "blobs", model / "refs"):
        folder.mkdir(parents=True)
    (model / "refs/main").write_text("a" * 40)
    for name in ("config.json", "model.safetensors"):
        (model / "blobs" / name).write_text("1")
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert module._folder("me/model", None) == module._folder("me/model", "main") == snapshot
    before = module._stats(snapshot)
    (model / "blobs/model.safetensors").write_text("2")
    assert {name for name, about in module._stats(snapshot).items() if about != before[name]} == {"model.safetensors"}
    (model / "blobs/model.safetensors").unlink()
    assert module._stats(snapshot) == {}, "nothing certain can be said"


def test_a_name_that_was_never_downloaded_has_no_files():
    assert module._folder("nobody/no-such-model", None) is None
