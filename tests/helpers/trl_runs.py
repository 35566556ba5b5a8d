"""Runs the same training with TRL's DPOTrainer and with ours, and compares their logs."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, set_seed

from cpt_kernels import ContrastiveConfig, ContrastiveTrainer
from tests.helpers import toy
from tests.helpers.architectures import tiny_model
from tests.helpers.toy import preference_rows, word_tokenizer

PAIRS = 8  # per optimizer step

LOSS_TOLERANCE = 1e-4
METRIC_TOLERANCE = 1e-3
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
LOGPS = ("logps/chosen", "logps/rejected")
TOKEN_MEANS = ("logits/chosen", "logits/rejected", "entropy", "mean_token_accuracy")
TEMPLATE = toy.CHAT_TEMPLATE


def one_thread() -> Iterator[None]:
    """Uses one thread, as a second one gains nothing here, and keeps existing objects out of garbage collection."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(threads)


class Record(TrainerCallback):
    """Keeps the log of every step, and the gradients of the first step before they are clipped."""

    def __init__(self) -> None:
        self.logs: list[dict[str, float]] = []
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **_) -> None:
        self.gradients = self.gradients or {
            name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
        }

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if "loss" in logs:
            self.logs.append(dict(logs))


def run(
    trainer_class,
    config_class,
    folder,
    rows: Dataset,
    model=None,
    ref_model=None,
    peft_config=None,
    callbacks=(),
    processing_class=None,
    **options,
) -> Record:
    """Trains with options that both configurations accept; the default processing class is a word-level tokenizer."""
    record = Record()
    if processing_class is None:
        processing_class = word_tokenizer()
        processing_class.chat_template = TEMPLATE
    args = {
        "output_dir": str(folder),
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
    config = config_class(**{**args, **options})
    set_seed(config.seed)  # for the weights of a new adapter
    trainer = trainer_class(
        model or tiny_model("qwen2"),
        ref_model,
        args=config,
        train_dataset=rows,
        processing_class=processing_class,
        callbacks=[record, *callbacks],
        peft_config=peft_config,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return record


def run_ours(folder, rows: Dataset, model=None, **options) -> Record:
    return run(ContrastiveTrainer, ContrastiveConfig, folder, rows, model, ref_cache_dir=f"{folder}/cache", **options)


def run_trl(folder, rows: Dataset, **options) -> Record:
    trl = pytest.importorskip("trl", reason="parity needs TRL: pip install trl==1.16.0")

    class TokenizedDPOTrainer(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

    trainer = TokenizedDPOTrainer if "prompt_ids" in rows.column_names else trl.DPOTrainer
    return run(trainer, trl.DPOConfig, folder, rows, **options)


def assert_same_steps(ours: Record, theirs: Record, metrics: tuple[str, ...]) -> None:
    assert len(ours.logs) == len(theirs.logs) > 0
    for step, (a, b) in enumerate(zip(ours.logs, theirs.logs)):
        for name in ("loss", *metrics):
            tolerance = LOSS_TOLERANCE if name == "loss" else METRIC_TOLERANCE
            assert abs(a[name] - b[name]) <= tolerance, f"step {step}, {name}: ours {a[name]}, TRL's {b[name]}"


make_trainer = partial(toy.make_trainer, rows=8, max_steps=2)


def rows(count: int = 24) -> Dataset:
    return Dataset.from_list([{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in preference_rows(count)])


def both(folder, ours=ContrastiveTrainer, theirs=None, **options) -> None:
    """Trains with TRL's trainer and with ours, or with subclasses of them, and compares all steps."""
    trl = pytest.importorskip("trl", reason="parity needs TRL: pip install trl==1.16.0")
    options = {"max_steps": 6, "per_device_train_batch_size": 4, **options}
    cache = {"ref_cache_dir": f"{folder}/cache"}
    a = run(ours, ContrastiveConfig, folder / "ours", rows(), **options, **cache)
    b = run(theirs or trl.DPOTrainer, trl.DPOConfig, folder / "trl", rows(), **options)
    assert_same_steps(a, b, (*REWARDS, *LOGPS))
    assert a.logs[-1]["loss"] != pytest.approx(a.logs[0]["loss"], abs=1e-3)
