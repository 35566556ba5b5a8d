"""The trainers that ``bench.step`` compares: same model, data, order and optimizer, driven step by step.

Runs as the worker process of one contestant. TRL is taken as it is installed, but for two switches: its data
preparation is skipped (rows are tokenised already), and ``completion_rows_only`` turns on the compaction of the head's
rows that it has for CUDA and leaves off on a CPU.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Trainer, TrainerCallback

from .lengths import preference_rows
from .timing import MIB, Channel, peak_mib, reset_peak, resident_mib
from .work import Shape


def tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """One that the trainers can ask for its special tokens; the data brings its ids."""
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    assert vocab >= len(words)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def build_model(shape: Shape, seed: int = 0) -> Qwen2ForCausalLM:
    """Random weights, the same in every process."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**shape.config()))


def arguments(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    """What both configurations are given."""
    cuda = spec["device"] == "cuda"
    return {
        "output_dir": folder,
        "max_steps": spec["steps"],
        "per_device_train_batch_size": spec["pairs"],
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": spec["gradient_checkpointing"],
        "train_sampling_strategy": "sequential",
        "learning_rate": spec["learning_rate"],
        "loss_type": spec["loss"],
        "beta": 0.1,
        "max_length": None,
        "precompute_ref_log_probs": True,
        "logging_steps": 1,
        "bf16": cuda,
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        "seed": 0,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def trl_trainer(spec: dict[str, Any], model, rows: Dataset, callbacks: list, folder: str) -> Trainer:
    import trl.trainer.utils
    from trl import DPOConfig, DPOTrainer

    if spec.get("completion_rows_only"):
        trl.trainer.utils._use_triton = lambda device: True  # read by the fused head alone, for this one switch

    class TokenisedDPOTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

    return TokenisedDPOTrainer(
        model,
        args=DPOConfig(**arguments(spec, folder)),
        train_dataset=rows,
        processing_class=tokenizer(spec["shape"]["vocab"]),
        callbacks=callbacks,
    )


def our_trainer(spec: dict[str, Any], model, rows: Dataset, callbacks: list, folder: str) -> Trainer:
    from cpt_kernels import ContrastiveConfig, ContrastiveTrainer

    args = ContrastiveConfig(**arguments(spec, folder), ref_cache_dir=f"{folder}/cache", **spec.get("options", {}))
    return ContrastiveTrainer(
        model,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer(spec["shape"]["vocab"]),
        callbacks=callbacks,
    )


class StepOnCommand(TrainerCallback):
    """Holds the training loop after every logged step until the parent wants the next one.

    A step's time runs from the command to the step's log: fetching and collating its batch, forward, backward,
    optimizer, metrics. On CUDA the log's values have come from the device by then.
    """

    def __init__(self, channel: Channel, baseline_mib: float, cuda: bool) -> None:
        self.channel, self.baseline_mib, self.cuda = channel, baseline_mib, cuda
        self.started = 0.0

    def on_train_begin(self, args, state, control, **_) -> None:
        self.wait()

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if "loss" not in (logs or {}):  # the summary after the last step
            return
        seconds = time.perf_counter() - self.started
        metrics = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
        self.channel.reply(seconds=seconds, peak_mib=self.peak_mib(), metrics=metrics)
        if state.global_step < state.max_steps:
            self.wait()

    def wait(self) -> None:
        """Serve the parent until it asks for a step."""
        while (message := self.channel.receive()) == "reset":
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
            known = reset_peak() or self.cuda
            self.channel.reply(peak_is_of_timed_steps=known, baseline_mib=self.baseline_mib)
        if message != "step":
            sys.exit(0)
        self.started = time.perf_counter()

    def peak_mib(self) -> float:
        return torch.cuda.max_memory_allocated() / MIB if self.cuda else peak_mib()


def main(spec: dict[str, Any]) -> None:
    channel = Channel()
    cuda = spec["device"] == "cuda"
    build = {"trl": trl_trainer, "ours": our_trainer}[spec["side"]]
    __import__("trl" if spec["side"] == "trl" else "cpt_kernels.trainer")  # so that no import is counted as the step's
    shape = Shape(**spec["shape"])
    rows = Dataset.from_list(preference_rows(spec["lengths"], spec["steps"] * spec["pairs"], shape.vocab))
    model = build_model(shape)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    # Weights are there, AdamW's two moments will be: the peak beyond that is what a step takes.
    weights = 0.0 if not cuda else 4 * parameters / MIB
    baseline = (weights if cuda else resident_mib()) + 2 * 4 * parameters / MIB
    checksum = sum(parameter.double().sum().item() for parameter in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(spec, model, rows, [StepOnCommand(channel, baseline, cuda)], folder)
        channel.reply(parameters=parameters, checksum=checksum, threads=torch.get_num_threads())
        trainer.train()


if __name__ == "__main__":
    main(json.loads(sys.argv[sys.argv.index("--worker") + 1]))
