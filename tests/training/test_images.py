"""Training on rows with images: references ahead and in streams, frozen and trained vision towers, evaluation."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from safetensors.torch import load_file

from cpt_kernels import ContrastiveTrainer
from cpt_kernels.errors import UserError
from cpt_kernels.model.conditions import is_sharded
from cpt_kernels.training import checks
from tests.helpers.forked import run_ranks
from tests.helpers.image_models import image_rows, picture, tiny_image_model, tiny_processor
from tests.helpers.toy import config, losses

ROWS = image_rows(8)


def make(
    folder: Path, rows: Any = ROWS, kind: str = "qwen2_5_vl", model: Any = None, **options: Any
) -> ContrastiveTrainer:
    own = {name: options.pop(name) for name in ("peft_config", "processing_class", "eval_dataset") if name in options}
    return ContrastiveTrainer(
        tiny_image_model(kind, torch.float32) if model is None else model,
        args=config(folder, **{"max_steps": 2, "max_length": None, **options}),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        **{"processing_class": tiny_processor(kind), **own},
    )


def test_references_are_scored_ahead_by_pixels(tmp_path, caplog) -> None:
    trainer = make(tmp_path)
    trainer.train()
    assert trainer.state.log_history[0]["rewards/chosen"] == pytest.approx(0, abs=1e-4)
    assert "0 of 16 reference log-probs were cached; 16 were scored" in caplog.text
    caplog.clear()
    make(tmp_path)
    assert "all 16 reference log-probs were cached" in caplog.text
    caplog.clear()
    changed = [{**ROWS[0], "images": [picture(40, 60, seed=99)]}, *ROWS[1:]]
    make(tmp_path, changed)
    assert "14 of 16 reference log-probs were cached; 2 were scored" in caplog.text
    caplog.clear()
    processor = tiny_processor("qwen2_5_vl")
    processor.image_processor.image_mean = [0.4, 0.4, 0.4]
    make(tmp_path, processing_class=processor)
    assert "4 of 16 reference log-probs were cached; 12 were scored" in caplog.text  # two rows have no images


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "chameleon", "emu3", "mllama"])
def test_streams_and_checkpointing_train_alike(kind: str, tmp_path) -> None:
    order = {"train_sampling_strategy": "sequential", "kind": kind}
    stored = make(tmp_path / "a", **order)
    stream = make(
        tmp_path / "b", IterableDataset.from_generator(lambda: iter(ROWS)), gradient_checkpointing=True, kind=kind
    )
    by_tokens = make(tmp_path / "c", max_tokens_per_batch=4000, gradient_accumulation_steps=1, **order)
    unshared = make(tmp_path / "d", share_prompts="false", **order)
    for trainer in (stored, stream, by_tokens, unshared):
        trainer.train()
    assert losses(stored)[0] == pytest.approx(math.log(2), abs=1e-5)  # Emu3's tower has batch norms
    assert losses(stream) == pytest.approx(losses(stored), abs=1e-5)
    assert losses(unshared) == pytest.approx(losses(stored), abs=1e-5)
    assert losses(by_tokens)[0] == pytest.approx(losses(stored)[0], abs=1e-5)


@pytest.mark.parametrize(
    ("target", "trained"),
    [
        (None, "model.visual"),
        pytest.param(None, "model.language_model", marks=pytest.mark.slow),
        (r".*visual.*qkv", "visual"),
        pytest.param(r".*q_proj", "language_model", marks=pytest.mark.slow),
    ],
)
def test_either_part_may_be_trained(target: str | None, trained: str, tmp_path) -> None:
    model = tiny_image_model("qwen2_5_vl", torch.float32)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    adapter = {} if target is None else {"peft_config": LoraConfig(r=2, target_modules=target)}
    trainer = make(tmp_path, model=model, eval_dataset=Dataset.from_list(ROWS[:4]), **adapter)
    start = {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    changed = {name for name, parameter in trainer.model.named_parameters() if not torch.equal(parameter, start[name])}
    assert changed and all(trained in name for name in changed)
    assert trainer.evaluate()["eval_loss"] < 0.7


@pytest.mark.parametrize("kind", ["llava", "mllama"])
def test_a_saved_run_is_loaded_by_name(kind: str, tmp_path) -> None:
    trainer = make(tmp_path, kind=kind, save_strategy="steps", save_steps=1)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    (name,) = {str(tmp_path / "saved")}
    again = ContrastiveTrainer(
        name, args=config(tmp_path / "again", max_steps=1), train_dataset=Dataset.from_list(ROWS)
    )
    assert type(again.model) is type(trainer.model)
    assert again.train_dataset["image_ids"] == trainer.train_dataset["image_ids"]
    resumed = make(tmp_path, kind=kind, max_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-1"))
    assert losses(resumed)[:2] == losses(trainer)[:2]


def train_rank(folder: Path, kind: str, name: str, options: dict[str, Any], rows: Any = ROWS) -> dict[str, Any]:
    """Trains as a rank or alone, and saves the model."""
    torch.manual_seed(0)
    common = {"max_steps": 3, "train_sampling_strategy": "sequential", "learning_rate": 1e-3}
    trainer = make(folder / name, rows, model=str(folder / kind), kind=kind, **common, **options)
    trainer.train()
    trainer.save_model(str(folder / name / "final"))
    sharded = sum(map(is_sharded, trainer.model.parameters()))
    found = trainer.packed.padded, trainer.reference.cache.fingerprint
    return {"losses": losses(trainer), "found": found, "sharded": sharded}


@pytest.mark.parametrize("engine", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "kind", ["qwen2_5_vl", *(pytest.param(k, marks=pytest.mark.slow) for k in ("gemma3", "mllama"))]
)
def test_two_ranks_take_the_steps_of_one(kind: str, engine: str, tmp_path) -> None:
    """Some batches have no images, unless the engine needs an image in each row."""
    tiny_image_model(kind, torch.float32).save_pretrained(tmp_path / kind)
    options = {"fsdp": True, "fsdp_config": {"version": 2}} if engine == "fsdp2" else {}
    rows = [row for row in image_rows(16) if len(row["images"]) == 1] if (kind, engine) == ("mllama", "fsdp2") else ROWS
    (one,) = run_ranks(tmp_path, 1, train_rank, tmp_path, kind, "one", {"per_device_train_batch_size": 4}, rows)
    two = {**options, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    if len({len(row["images"]) for row in rows}) == 1:
        with pytest.raises(AssertionError, match="under FSDP2 and ZeRO-3 all rows need equally many images"):
            run_ranks(tmp_path, 2, train_rank, tmp_path, kind, "two", two)
    ranks = run_ranks(tmp_path, 2, train_rank, tmp_path, kind, "two", two, rows)
    for rank in ranks:
        assert rank["losses"] == pytest.approx(one["losses"], abs=1e-4) and rank["found"] == one["found"]
        assert (rank["sharded"] > 0) == (engine == "fsdp2")
    weights = [load_file(tmp_path / name / "final/model.safetensors") for name in ("one", "two")]
    assert weights[1].keys() - weights[0].keys() <= {"lm_head.weight"}  # FSDP2 saves a tied head beside the embeddings
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_features_of_images_that_layers_share_are_not_checkpointed_re_entrantly(tmp_path) -> None:
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    with pytest.raises(UserError, match=r"\(the features of images\): set use_reentrant=false"):
        make(tmp_path, kind="mllama", **options)


@pytest.mark.parametrize(("kind", "is_refused"), [("mllama", False), ("emu3", True)])
def test_ranks_that_shard_a_model_run_the_same_modules(kind: str, is_refused: bool, monkeypatch) -> None:
    """Emu3 runs images of different sizes in forwards of their own, so the ranks would wait for each other forever."""
    monkeypatch.setattr(checks, "is_sharded", lambda _: True)
    packed: Any = SimpleNamespace(images=SimpleNamespace(by_rows=True), model=tiny_image_model(kind))
    found = pytest.raises(UserError, match="and of one shape") if is_refused else contextlib.nullcontext()
    with found:
        checks.check_image_counts(packed, Dataset.from_dict({"image_ids": [[-1, -2], [-3, -4]]}), "train")


def test_models_and_collators_that_read_no_images(tmp_path) -> None:
    from tests.helpers.architectures import tiny_model

    with pytest.raises(UserError, match="LlamaForCausalLM does not take image_grid_thw, pixel_values, which Qwen2_5"):
        make(tmp_path, model=tiny_model("llama"))
    with pytest.raises(
        UserError, match="reads no images: give the processor of a vision-language model as processing_class"
    ):
        make(tmp_path, processing_class=tiny_processor("llava").tokenizer)
