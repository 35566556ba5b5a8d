"""The same training as TRL's DPOTrainer, step by step; and a step that does not depend on how it was batched."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from architectures import VOCAB, tiny_model
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback

from cpt_kernels import ContrastiveConfig, ContrastiveTrainer

STEPS = 20
EPOCHS = 4
PAIRS = 8  # of an optimizer step

LOSS_TOLERANCE = 1e-4
METRIC_TOLERANCE = 1e-3
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
LOGPS = ("logps/chosen", "logps/rejected")
TOKEN_MEANS = ("logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy")


def tokenised_pairs(rows: int) -> Dataset:
    """Rows as TRL tokenises them; a few share their prompt with the row before."""
    random = np.random.default_rng(0)

    def ids(low: int, high: int) -> list[int]:
        return random.integers(3, VOCAB, random.integers(low, high)).tolist()

    pairs = []
    for row in range(rows):
        prompt = pairs[-1]["prompt_ids"] if row % 5 == 4 else ids(1, 14)
        pairs.append({"prompt_ids": prompt, "chosen_ids": ids(1, 16), "rejected_ids": ids(1, 16)})
    return Dataset.from_list(pairs)


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny models gain nothing from a second thread, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Record(TrainerCallback):
    """Keeps every step's log, and the gradients of the first step before they are clipped or used."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **_) -> None:
        self.gradients = self.gradients or {name: p.grad.clone() for name, p in model.named_parameters()}

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if "loss" in logs:
            self.logs.append(dict(logs))


def run(trainer_class, config_class, folder, rows: Dataset, model=None, **options) -> Record:
    """Train with settings that both configurations know."""
    record = Record()
    args = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": PAIRS,
        "learning_rate": 1e-3,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "precompute_ref_log_probs": True,
        "logging_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    trainer = trainer_class(
        model or tiny_model("qwen2"),
        args=config_class(**{**args, **options}),
        train_dataset=rows,
        processing_class=tokenizer(),
        callbacks=[record],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return record


def run_ours(folder, rows: Dataset, model=None, **options) -> Record:
    return run(ContrastiveTrainer, ContrastiveConfig, folder, rows, model, ref_cache_dir=f"{folder}/cache", **options)


def run_trl(folder, rows: Dataset, **options) -> Record:
    trl = pytest.importorskip("trl", reason="parity needs TRL: pip install trl==1.16.0")

    class TokenisedDPOTrainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

    return run(TokenisedDPOTrainer, trl.DPOConfig, folder, rows, **options)


def assert_same_steps(ours: Record, theirs: Record, metrics: tuple[str, ...]) -> None:
    assert len(ours.logs) == len(theirs.logs) == STEPS
    for step, (a, b) in enumerate(zip(ours.logs, theirs.logs)):
        for name in ("loss", *metrics):
            tolerance = LOSS_TOLERANCE if name == "loss" else METRIC_TOLERANCE
            assert abs(a[name] - b[name]) <= tolerance, f"step {step}, {name}: ours {a[name]}, TRL's {b[name]}"


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge", "sft"])
def test_every_step_is_trls(loss: str, tmp_path) -> None:
    rows = tokenised_pairs(STEPS // EPOCHS * PAIRS)
    theirs = run_trl(tmp_path / "trl", rows, loss_type=loss)
    ours = run_ours(tmp_path / "ours", rows, loss_type=loss)
    rewards = () if loss == "sft" else REWARDS  # ours runs no reference for a loss that has none
    assert_same_steps(ours, theirs, (*rewards, *LOGPS, *TOKEN_MEANS))
    assert set(theirs.logs[0]) <= set(ours.logs[0])
    assert ours.logs[-1]["num_tokens"] == theirs.logs[-1]["num_tokens"]
    assert ours.logs[-1]["loss"] < 0.95 * ours.logs[0]["loss"]  # it did train


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_every_accumulated_step_is_trls(loss: str, tmp_path) -> None:
    """TRL averages its token means over micro-batches, ours over tokens: pair means are compared."""
    rows = tokenised_pairs(STEPS // EPOCHS * PAIRS)
    options = {"loss_type": loss, "per_device_train_batch_size": PAIRS // 2, "gradient_accumulation_steps": 2}
    theirs = run_trl(tmp_path / "trl", rows, **options)
    ours = run_ours(tmp_path / "ours", rows, **options)
    assert_same_steps(ours, theirs, (*REWARDS, *LOGPS))


@pytest.mark.parametrize("loss", ["sigmoid", "slic", "sft"])
def test_a_step_averages_over_its_pairs_however_they_fell_into_micro_batches(loss: str, tmp_path) -> None:
    rows = tokenised_pairs(PAIRS)
    batchings = {
        "8 x 1": {"per_device_train_batch_size": 8},
        "4 x 2": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
        "2 x 4": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        "3 + 3 + 2": {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3},
        "by tokens": {"max_tokens_per_batch": 64, "gradient_accumulation_steps": 10},
    }
    found = {
        name: run_ours(
            tmp_path,
            rows,
            tiny_model("gpt2", torch.float64),
            loss_type=loss,
            max_steps=1,
            max_grad_norm=0.0,
            **batching,
        )
        for name, batching in batchings.items()
    }
    expected = found.pop("8 x 1")
    for name, record in found.items():
        assert record.logs[0]["num_tokens"] == expected.logs[0]["num_tokens"], name
        # transformers adds the losses of micro-batches up in fp32
        assert record.logs[0]["loss"] == pytest.approx(expected.logs[0]["loss"], rel=1e-6, abs=1e-6), name
        for parameter, gradient in expected.gradients.items():
            difference = (record.gradients[parameter] - gradient).abs().max()
            assert difference <= 1e-12 * gradient.abs().max() + 1e-15, f"{name}: {parameter} differs by {difference}"
