"""References of equal fingerprints and different log-probs have folders of their own, so no wrong number is served."""

from __future__ import annotations

import json
import math
import multiprocessing
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from cpt_kernels import cli
from cpt_kernels.model.packed_model import PackedModel
from cpt_kernels.reference.cache import ReferenceCache
from cpt_kernels.reference.fingerprint import fingerprint
from cpt_kernels.reference.probe import PROBE, ReferenceProbe, find_folder, measure, read_probe
from tests.helpers.architectures import CONFIGS, MIXTURES, tiny_model
from tests.helpers.toy import make_trainer, preference_data
from tests.reference.test_scorer import stored


def adapted() -> nn.Module:
    torch.manual_seed(0)
    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(tiny_model("llama"), adapter)


def scale(model: nn.Module) -> None:
    for module in model.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("default", 3.0)


def frequencies(model: nn.Module) -> None:
    """Of RoPE, the lowest of which change nothing within a few tokens."""
    model.get_base_model().model.rotary_emb.inv_freq[-1] *= 0.25


def attention_scaling(model: nn.Module) -> None:
    for layer in model.get_base_model().model.layers:
        layer.self_attn.scaling *= 1.5


def hook(model: nn.Module) -> None:
    model.get_base_model().model.norm.register_forward_hook(lambda _, args, out: 1.1 * out)


CHANGES = [scale, frequencies, attention_scaling, hook]


def margins(trainer) -> float:
    return trainer.evaluate()["eval_rewards/margins"]


def trainer_of(folder, change=None, reference="ref"):
    """A policy and, apart from it, a reference that is changed in memory."""
    ref_model = adapted()
    if change is not None:
        change(ref_model)
    return make_trainer(
        folder,
        model=tiny_model("llama"),
        ref_model=ref_model,
        train_dataset=None,
        eval_dataset=preference_data(6),
        ref_cache_dir=str(folder / reference),
    )


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_in_memory_is_another_reference(tmp_path, change, caplog):
    models = [adapted(), adapted()]
    change(models[1])
    digests = {fingerprint(model, compute_dtype=torch.float32, attention="sdpa") for model in models}
    assert len(digests) == 1  # what this test is about: the fingerprint does not show the change
    first = margins(trainer_of(tmp_path))
    alone = margins(trainer_of(tmp_path, change, reference="alone"))
    assert "a folder of its own" not in caplog.text
    changed = trainer_of(tmp_path, change)
    assert caplog.text.count("a folder of its own: log-probs of its own differ by") == 1
    assert margins(changed) == pytest.approx(alone, abs=1e-6) and abs(alone - first) > 1e-5
    # Both are found again, and nothing is scored twice.
    rows = stored(tmp_path)
    assert margins(trainer_of(tmp_path)) == first and margins(trainer_of(tmp_path, change)) == pytest.approx(alone)
    assert stored(tmp_path) == rows == 24


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*CONFIGS])
def test_rounding_is_no_change(name, dtype):
    """More threads and the eager attention round differently; the model itself is left as it was."""
    model = tiny_model(name, dtype)
    packed, state = PackedModel(model), torch.get_rng_state()
    first = measure(packed, dtype)
    assert first == measure(packed, dtype) and torch.equal(torch.get_rng_state(), state)
    if name not in MIXTURES:  # their routing may flip
        model.set_attn_implementation("eager")
        assert first.agrees(measure(packed, dtype)) and first.allowance < 0.5


def test_folders_in_turn(tmp_path):
    name = "0" * 32
    one, near, other = (ReferenceProbe([-1.0 - x, -2.0], 1e-4) for x in (0.0, 5e-5, 3e-4))
    assert find_folder(tmp_path, name, one) == (name, 0, 0.0) == find_folder(tmp_path, name, near)
    second = find_folder(tmp_path, name, other)
    assert second.fingerprint != name and second.rivals == 1 and second.difference == pytest.approx(3e-4)
    assert find_folder(tmp_path, name, other) == second and read_probe(tmp_path / second.fingerprint) == other
    assert find_folder(tmp_path, name, ReferenceProbe([-1.0], 1e-4)).rivals == 2
    assert not list(tmp_path.glob("*/.*"))


@pytest.mark.parametrize("content", [None, "", '{"logps": [0.0', "[]", '{"logps": "a", "allowance": 1}'])
def test_rows_without_a_readable_probe_are_not_served(tmp_path, content, caplog):
    folder = trainer_of(tmp_path).reference.cache.folder
    rows = stored(tmp_path)
    (folder / PROBE).unlink()
    if content is not None:
        (folder / PROBE).write_text(content)
    trainer = trainer_of(tmp_path)
    assert trainer.reference.cache.folder != folder and stored(tmp_path) == 2 * rows
    assert f"{folder} has no readable probe.json" in caplog.text
    assert ReferenceCache(folder.parent, folder.name).num_rows == rows  # without a model, as before


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    found = find_folder(tmp_path / "file", "0" * 32, ReferenceProbe([-1.0], 1e-4))
    assert found == ("0" * 32, 0, 0.0)


def claim(folder, start: float, results) -> None:
    results.put((start, find_folder(folder, "0" * 32, ReferenceProbe([start], 1e-4)).fingerprint))


def test_processes_that_claim_folders_at_once(tmp_path):
    """Four of two references each: both get one folder, whoever comes first."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    starts = [-1.0, -2.0] * 4
    processes = [context.Process(target=claim, args=(tmp_path, start, results)) for start in starts]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in starts]
    for process in processes:
        process.join(60)
    assert len(set(found)) == 2 and len({name for _, name in found}) == 2


def test_info_and_prune_know_the_probe(tmp_path, capsys):
    trainer_of(tmp_path)
    folder = trainer_of(tmp_path, scale).reference.cache.folder
    about = json.loads((folder / "reference.json").read_text())
    assert len(about["variant_of"]) == 32 and 0 < about["difference"] < math.inf
    shutil.copytree(folder, tmp_path / "ref" / ("0" * 32))
    (tmp_path / "ref" / ("0" * 32) / PROBE).unlink()
    cli.main(["cache", "info", "--ref_cache_dir", str(tmp_path / "ref")])
    text = capsys.readouterr().out
    assert text.count(f"beside {about['variant_of'][:8]}") == 2 and text.count("without a probe") == 1
    cli.main(["cache", "prune", "--older_than", "0", "--yes", "--ref_cache_dir", str(tmp_path / "ref")])
    assert not list((tmp_path / "ref").iterdir())


def test_start_weights_that_are_loaded_again_are_compared(tmp_path):
    """A hook of the policy is not in its files."""
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    model = type(model).from_pretrained(tmp_path / "model")
    model.model.norm.register_forward_hook(lambda _, args, out: 1.1 * out)
    trainer = make_trainer(tmp_path, model=model, max_steps=1)
    trainer.train()
    with pytest.raises(ValueError, match="gives other log-probs than training started from"):
        trainer.evaluate(preference_data(3, seed=5))
