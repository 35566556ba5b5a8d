"""Tests of the calls that push to the hub, by strategy. The hub is a stand-in that records them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers.trainer
from datasets import Dataset
from huggingface_hub import ModelCard
from peft import LoraConfig

from cpt_kernels import ContrastiveTrainer
from cpt_kernels.cli import run as run_module
from tests.helpers.architectures import tiny_model
from tests.helpers.command import bpe_tokenizer, run, word_pairs, write_model, write_rows
from tests.helpers.toy import config, preference_data, word_tokenizer


class Hub:
    """Records the calls of an HfApi, and for an upload the files in its folder at that time."""

    def __init__(self) -> None:
        self.created: list[tuple[str, dict]] = []
        self.uploads: list[dict] = []

    def create_repo(self, name, **options):
        self.created.append((name, options))
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, *, folder_path, **options):
        files = {str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()}
        card = Path(folder_path) / "README.md"
        self.uploads.append({**options, "files": files, "card": card.read_text() if card.exists() else ""})
        return SimpleNamespace(done=lambda: True)


@pytest.fixture
def hub(monkeypatch) -> Hub:
    hub = Hub()
    monkeypatch.setattr(transformers.trainer, "hf_api", lambda: hub)
    return hub


def make_trainer(folder, peft_config=None, **options) -> ContrastiveTrainer:
    saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "push_to_hub": True}
    args = config(folder, **saving, hub_model_id="tiny-dpo", hub_token="secret", hub_private_repo=True, **options)
    return ContrastiveTrainer(
        tiny_model("llama"),
        args=args,
        train_dataset=preference_data(16),
        eval_dataset=preference_data(4, seed=1),
        processing_class=word_tokenizer(),
        peft_config=peft_config,
    )


@pytest.mark.parametrize(
    ("strategy", "paths"),
    [
        ("end", []),
        ("every_save", [None, None]),
        ("checkpoint", [None, "last-checkpoint"] * 2),
        ("all_checkpoints", [None, "checkpoint-2", None, "checkpoint-4"]),
    ],
)
def test_checkpoints_go_where_the_strategy_says(tmp_path, hub, strategy, paths):
    trainer = make_trainer(tmp_path, hub_strategy=strategy, hub_always_push=True)
    trainer.train()
    assert hub.created == [("tiny-dpo", {"token": "secret", "private": True, "exist_ok": True})]
    assert [upload.get("path_in_repo") for upload in hub.uploads] == paths
    for upload in hub.uploads:
        assert upload["repo_id"] == "me/tiny-dpo" and upload["token"] == "secret"
        assert {"model.safetensors", "config.json"} <= upload["files"]
        if upload.get("path_in_repo") is None:
            assert "tiny-dpo" in upload["card"] and "checkpoint-*" in upload["ignore_patterns"]
            assert "tokenizer.json" in upload["files"]
        else:
            assert {"optimizer.pt", "scheduler.pt", "trainer_state.json", "run.json"} <= upload["files"]


def test_push_at_the_end(tmp_path, hub):
    """TRL's scripts call push_to_hub after save_model."""
    trainer = make_trainer(tmp_path, hub_strategy="end", loss_type="ipo")
    trainer.train()
    trainer.evaluate()
    trainer.save_model(trainer.args.output_dir)
    trainer.push_to_hub(dataset_name="org/pairs", tags=["mine"])
    assert [upload["commit_message"] for upload in hub.uploads] == ["Model save", "End of training"]
    card = ModelCard(hub.uploads[-1]["card"])
    assert card.data.datasets == ["org/pairs"] and card.data.model_name == "tiny-dpo"
    assert card.data.tags == ["cpt-kernels", "ipo", "mine"] and "eval_rewards/margins" in card.text
    assert "secret" not in "".join(path.read_text() for path in (tmp_path / "out").glob("*.*") if path.suffix == ".md")


def test_an_adapter_is_pushed_as_one(tmp_path, hub):
    trainer = make_trainer(tmp_path, LoraConfig(r=4, target_modules="all-linear"), hub_strategy="every_save")
    trainer.train()
    trainer.save_model()
    for upload in hub.uploads:
        assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= upload["files"]
        assert "model.safetensors" not in upload["files"]


def test_cpt_train_pushes_once_with_its_records(tmp_path, hub, monkeypatch):
    monkeypatch.setenv("CPT_CACHE", str(tmp_path / "cache"))
    pairs = word_pairs(8)
    write_model(tmp_path / "start", bpe_tokenizer(text for row in pairs for text in row.values()))
    data = write_rows(tmp_path / "pairs.jsonl", pairs)
    flags = ["--model_name_or_path", tmp_path / "start", "--from_scratch", "--dataset_name", data, "--max_steps", 2]
    flags += ["--output_dir", tmp_path / "out", "--save_strategy", "no", "--use_cpu", "--disable_tqdm", "--push_to_hub"]
    assert run(*flags) == 0
    (upload,) = hub.uploads
    assert {"training_config.yaml", "metrics.jsonl", "curves.png", "README.md", "model.safetensors"} <= upload["files"]
    card = ModelCard(upload["card"])
    assert card.data.tags == ["cpt-kernels", "sigmoid"] and card.data.datasets is None  # the data is a local file


def test_cpt_train_names_the_data_of_the_hub(tmp_path, hub, monkeypatch):
    monkeypatch.setenv("CPT_CACHE", str(tmp_path / "cache"))
    pairs = word_pairs(8)
    write_model(tmp_path / "start", bpe_tokenizer(text for row in pairs for text in row.values()))
    monkeypatch.setattr(run_module, "load_data", lambda *_, **__: Dataset.from_list(pairs))
    flags = ["--model_name_or_path", tmp_path / "start", "--from_scratch", "--dataset_name", "org/pairs"]
    flags += ["--max_steps", 1, "--output_dir", tmp_path / "out", "--use_cpu", "--disable_tqdm", "--push_to_hub"]
    assert run(*flags, "--hub_strategy", "end") == 0
    assert ModelCard(hub.uploads[-1]["card"]).data.datasets == ["org/pairs"]
