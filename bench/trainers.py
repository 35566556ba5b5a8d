"""The trainers that ``bench.step`` compares: same model, data, order and optimizer, driven step by step.

Runs as the worker process of one contestant; for several ranks it starts the others itself. TRL is taken as it is
installed, but for two switches: its data preparation is skipped (rows are tokenised already), and
``completion_rows_only`` turns on the compaction of the head's rows that it has for CUDA and leaves off on a CPU.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
import torch
import torch.distributed
from datasets import Dataset
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Trainer, TrainerCallback
from transformers.utils import is_flash_attn_2_available

from cpt_kernels.data.collate import PackedBatch, PackedCollator
from cpt_kernels.data.packing import scatter_rounds

from .lengths import rows_of
from .timing import MIB, Channel, peak_mib, reset_peak, resident_mib
from .work import Shape

_FOLDER = "BENCH_FOLDER"  # tells a rank where rank 0 writes


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


def build_model(shape: Shape, seed: int = 0, attention: str | None = None) -> Qwen2ForCausalLM:
    """Random weights, the same in every process."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(Qwen2Config(**shape.config(), attn_implementation=attention))


def best_attention(device: str) -> str:
    """Of transformers', for padded rows: flash attention on a GPU where it is installed."""
    return "flash_attention_2" if device == "cuda" and is_flash_attn_2_available() else "sdpa"


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
        "use_liger_kernel": spec.get("liger_layers", False),
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        "seed": 0,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def adapter(spec: dict[str, Any]):
    """LoRA on all linear layers, or ``None`` where all weights are trained."""
    if not spec.get("lora_rank"):
        return None
    from peft import LoraConfig

    return LoraConfig(r=spec["lora_rank"], target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")


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
        peft_config=adapter(spec),
    )


def our_trainer(spec: dict[str, Any], model, rows: Dataset, callbacks: list, folder: str) -> Trainer:
    from cpt_kernels import ContrastiveConfig, ContrastiveTrainer

    args = ContrastiveConfig(**arguments(spec, folder), ref_cache_dir=f"{folder}/cache", **spec.get("options", {}))
    trainer = ContrastiveTrainer(
        model,
        args=args,
        train_dataset=rows,
        processing_class=tokenizer(spec["shape"]["vocab"]),
        callbacks=callbacks,
        peft_config=adapter(spec),
    )
    if spec.get("padded"):
        trainer.collator = trainer.data_collator = PaddedCollator(max_length=None)
    return trainer


@dataclasses.dataclass(frozen=True)
class PaddedCollator(PackedCollator):
    """Every completion behind its own prompt, right-padded to the longest: what a batch is without packing.

    Pads run in the layers and in attention. No other token sees them, and the head reads completion rows only.
    """

    share_prompts: bool = False

    def __call__(self, rows) -> PackedBatch:
        batch = super().__call__(rows)
        lengths = np.diff(batch["cu_seqlens_q"].numpy())
        count, longest = len(lengths), int(lengths.max())
        places = np.concatenate([i * longest + np.arange(length) for i, length in enumerate(lengths)])
        tokens = np.full(count * longest, self.pad_token_id)
        tokens[places] = batch["input_ids"][0].numpy()
        predictors = places[batch["predictor_index"].numpy()]
        every = torch.arange(len(tokens))
        bounds = torch.arange(0, len(tokens) + 1, longest, dtype=torch.int32)
        rounds = [tuple(map(torch.from_numpy, turn)) for turn in scatter_rounds(predictors, len(tokens))]
        return batch | PackedBatch(
            input_ids=torch.from_numpy(tokens)[None],
            position_ids=(every % longest)[None],
            cu_seqlens_q=bounds,
            cu_seqlens_k=bounds,
            kv_index=every,
            kv_rounds=[(every, every)],
            segment_lengths=[(longest, longest)] * count,
            predictor_index=torch.from_numpy(predictors),
            predictor_rounds=rounds,
        )


class StepOnCommand(TrainerCallback):
    """Holds the training loop after every logged step until the parent wants the next one.

    A step's time runs from the command to the step's log: fetching and collating its batch, forward, backward,
    optimizer, metrics. On CUDA the log's values have come from the device by then. Rank 0 alone has a channel; the
    others wait for it.
    """

    def __init__(self, channel: Channel | None, baseline_mib: float, cuda: bool) -> None:
        self.channel, self.baseline_mib, self.cuda = channel, baseline_mib, cuda
        self.started = 0.0

    def on_train_begin(self, args, state, control, **_) -> None:
        self.wait()

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if "loss" not in (logs or {}):  # the summary after the last step
            return
        if self.channel is not None:
            seconds = time.perf_counter() - self.started
            metrics = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
            self.channel.reply(seconds=seconds, peak_mib=self.peak_mib(), metrics=metrics)
        self.wait()  # after the last step, too: the end of one process would take time from the others' steps

    def wait(self) -> None:
        """Serve the parent until it asks for a step."""
        while self.channel is not None and (message := self.channel.receive()) != "step":
            if message != "reset":
                sys.exit(0)
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
            known = reset_peak() or self.cuda
            self.channel.reply(peak_is_of_timed_steps=known, baseline_mib=self.baseline_mib)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        self.started = time.perf_counter()

    def peak_mib(self) -> float:
        return torch.cuda.max_memory_allocated() / MIB if self.cuda else peak_mib()


def other_ranks(ranks: int, folder: str) -> list[subprocess.Popen]:
    """Make this process rank 0 of so many, and start the others; all write to ``folder``."""
    if ranks == 1:
        return []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", _FOLDER: folder}
    command = [sys.executable, "-m", "bench.trainers", *sys.argv[1:]]
    return [
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=sys.stderr, env=os.environ | {"RANK": rank, "LOCAL_RANK": rank}
        )
        for rank in map(str, range(1, ranks))
    ]


def main(spec: dict[str, Any]) -> None:
    if folder := os.environ.get(_FOLDER):
        run(spec, None, folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        # From disk: TRL's ranks find the reference log-probs by the cache file that belongs to it.
        Dataset.from_list(rows_of(spec)).save_to_disk(f"{folder}/rows")
        others = other_ranks(spec.get("ranks", 1), folder)
        try:
            run(spec, Channel(), folder)
        finally:
            for process in others:
                process.kill()
                process.wait()


def run(spec: dict[str, Any], channel: Channel | None, folder: str) -> None:
    """Train; on rank 0 at the parent's pace."""
    cuda = spec["device"] == "cuda"
    if threads := spec.get("threads"):
        torch.set_num_threads(threads)
    build = {"trl": trl_trainer, "ours": our_trainer}[spec["side"]]
    __import__("trl" if spec["side"] == "trl" else "cpt_kernels.trainer")  # so that no import is counted as the step's
    shape = Shape(**spec["shape"])
    rows = Dataset.load_from_disk(f"{folder}/rows")
    model = build_model(shape, attention=best_attention(spec["device"]))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    # Weights are there, AdamW's two moments will be: the peak beyond that is what a step takes.
    weights = 0.0 if not cuda else 4 * parameters / MIB
    moments = 0.0 if spec.get("lora_rank") else 2 * 4 * parameters / MIB
    baseline = (weights if cuda else resident_mib()) + moments
    checksum = sum(parameter.double().sum().item() for parameter in model.parameters())
    trainer = build(spec, model, rows, [StepOnCommand(channel, baseline, cuda)], folder)
    if channel is not None:
        channel.reply(parameters=parameters, checksum=checksum, threads=torch.get_num_threads())
    trainer.train()


if __name__ == "__main__":
    main(json.loads(sys.argv[sys.argv.index("--worker") + 1]))
