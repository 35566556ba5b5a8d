"""The worker of ``bench step``: trains ours or TRL's trainer with the same model, data and optimizer, step by step.

One process is the worker of one contestant. With several ranks, it is rank 0 and starts the others. TRL runs as
installed, with two changes: its data preparation is skipped, because the rows are tokenized already, and
``completion_rows_only`` enables on a CPU the selection of completion rows that TRL enables on CUDA only.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
)
from transformers.utils import is_flash_attn_2_available

from cpt_kernels.data.collate import PackedBatch, PackedCollator
from cpt_kernels.data.packing import scatter_rounds

from .lengths import FIRST_TOKEN, rows_of
from .shapes import PATCH, Shape
from .timing import MIB, Channel, peak_mib, reset_peak, resident_mib

_FOLDER = "BENCH_FOLDER"  # environment variable that names rank 0's folder to the other ranks


def tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Returns a tokenizer that only has special tokens, because the data consists of token ids."""
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    assert vocab >= len(words)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")),
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
    )


def processor(shape: Shape) -> Any:
    """Returns a processor for the rows of :func:`image_rows`, whose template adds no tokens."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = {"height": shape.image_size, "width": shape.image_size}
    images = CLIPImageProcessorPil(size={"shortest_edge": shape.image_size}, crop_size=size)
    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2, "<image>": FIRST_TOKEN}
    vocab |= {f"w{i}": i for i in range(FIRST_TOKEN + 1, shape.vocab)}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", extra_special_tokens=["<image>"])
    words = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    template = (
        "{% for m in messages %}{% for part in m['content'] %}{% if part['type'] == 'image' %}<image> {% else %}"
        "{{ part['text'] }} {% endif %}{% endfor %}{% endfor %}"
    )
    options = dict(patch_size=PATCH, vision_feature_select_strategy="default", num_additional_image_tokens=1)
    return LlavaProcessor(images, words, chat_template=template, **options)


def image_rows(rows: Sequence[dict[str, list[int]]], shape: Shape) -> list[dict[str, Any]]:
    """Returns rows of token ids as conversations in which an image takes the first tokens of the prompt.

    Raises:
        ValueError: a prompt is shorter than an image.
    """
    found, prompts = [], {}
    for row in rows:
        if len(row["prompt_ids"]) <= shape.image:
            raise ValueError(f"a prompt of {len(row['prompt_ids'])} tokens cannot hold an image of {shape.image}")
        number = prompts.setdefault(tuple(row["prompt_ids"]), len(prompts))
        size = (shape.image_size, shape.image_size, 3)
        picture = Image.fromarray(np.random.default_rng(number).integers(0, 256, size, dtype=np.uint8))
        rest, *sides = (
            " ".join(f"w{max(token, FIRST_TOKEN + 1)}" for token in ids)
            for ids in (row["prompt_ids"][shape.image :], row["chosen_ids"], row["rejected_ids"])
        )
        turns = [[{"role": role, "content": text}] for role, text in zip(("user", *["assistant"] * 2), (rest, *sides))]
        found.append({"images": [picture], **dict(zip(("prompt", "chosen", "rejected"), turns))})
    return found


def build_model(shape: Shape, seed: int = 0, attention: str | None = None, device: str = "cpu") -> PreTrainedModel:
    """Builds a model with random weights, the same in every process. On a GPU it takes seconds for billions of them."""
    torch.manual_seed(seed)
    auto = AutoModelForImageTextToText if shape.image else AutoModelForCausalLM
    with torch.device(device):
        return auto.from_config(shape.config(), attn_implementation=attention)


def best_attention(device: str) -> str:
    """Returns transformers' name of the attention for padded rows: flash attention on a GPU if installed, else SDPA."""
    return "flash_attention_2" if device == "cuda" and is_flash_attn_2_available() else "sdpa"


def arguments(spec: dict[str, Any], folder: str) -> dict[str, Any]:
    """Returns the options that both trainers' configurations get. Without ``gradient_checkpointing``: their default."""
    cuda = spec["device"] == "cuda"
    checkpointing = spec.get("gradient_checkpointing")
    return ({} if checkpointing is None else {"gradient_checkpointing": checkpointing}) | {
        "output_dir": folder,
        "max_steps": spec["steps"],
        "per_device_train_batch_size": spec["pairs"],
        "gradient_accumulation_steps": 1,
        "train_sampling_strategy": "sequential",
        "learning_rate": spec["learning_rate"],
        "loss_type": spec["loss"],
        "beta": 0.1,
        "max_length": None,
        "precompute_ref_log_probs": not (spec.get("side") == "trl" and spec["shape"].get("image")),
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


def processing_class(spec: dict[str, Any]) -> Any:
    shape = Shape(**spec["shape"])
    return processor(shape) if shape.image else tokenizer(shape.vocab)


def adapter(spec: dict[str, Any]):
    """Returns a LoRA configuration for all linear layers, or ``None`` if all weights are trained."""
    if not spec.get("lora_rank"):
        return None
    from peft import LoraConfig

    return LoraConfig(r=spec["lora_rank"], target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")


def trl_trainer(spec: dict[str, Any], model, rows: Dataset, callbacks: list, folder: str) -> Trainer:
    """Builds TRL's ``DPOTrainer``."""
    import trl.trainer.dpo_trainer
    import trl.trainer.utils
    from trl import DPOConfig, DPOTrainer

    if spec.get("completion_rows_only"):
        trl.trainer.utils._use_triton = lambda device: True  # only the fused head reads this switch

    if "weights_id" in spec:  # hashing 8 billion weights, on one core, takes longer than all steps
        trl.trainer.dpo_trainer.hash_module = lambda model: spec["weights_id"]

    class TokenizedDPOTrainer(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset

    live = spec["shape"].get("image") and not spec.get("lora_rank")  # TRL precomputes no references of images
    return TokenizedDPOTrainer(
        model,
        ref_model=copy.deepcopy(model) if live else None,
        args=DPOConfig(**arguments(spec, folder)),
        train_dataset=rows,
        processing_class=processing_class(spec),
        callbacks=callbacks,
        peft_config=adapter(spec),
    )


def our_trainer(spec: dict[str, Any], model, rows: Dataset, callbacks: list, folder: str) -> Trainer:
    """Builds our ``ContrastiveTrainer``."""
    from cpt_kernels import ContrastiveConfig, ContrastiveTrainer

    options = arguments(spec, folder) | {"ref_cache_dir": f"{folder}/cache"} | spec.get("options", {})
    args = ContrastiveConfig(**options)
    trainer = ContrastiveTrainer(
        model,
        args=args,
        train_dataset=rows,
        processing_class=processing_class(spec),
        callbacks=callbacks,
        peft_config=adapter(spec),
    )
    if spec.get("padded"):
        trainer.collator = trainer.data_collator = PaddedCollator(max_length=None)
    return trainer


@dataclasses.dataclass(frozen=True)
class PaddedCollator(PackedCollator):
    """Collates each completion after its own prompt, right-padded to the longest sequence, as without packing.

    Layers and attention compute pad tokens. No other token attends to them. The head reads completion rows only.
    """

    share_prompts: bool = False

    def __call__(self, rows) -> PackedBatch:
        # Move each sequence of the packed batch to its own padded row.
        batch = super().__call__(rows)
        lengths = np.diff(batch["cu_seqlens_q"].numpy())
        count, longest = len(lengths), int(lengths.max())
        places = np.concatenate([i * longest + np.arange(length) for i, length in enumerate(lengths)])
        tokens = np.full(count * longest, self.pad_token_id)
        tokens[places] = batch["input_ids"][0].numpy()
        predictors = places[batch["predictor_index"].numpy()]
        # Every padded row is one segment that sees its own keys.
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
    """Pauses training after every logged step until the parent asks for the next one.

    A step's time runs from the parent's request to the step's log. It includes fetching and collating the batch,
    forward, backward, optimizer and metrics. On CUDA, logging waits for the device. Only rank 0 has a channel; the
    other ranks wait for rank 0.
    """

    def __init__(self, channel: Channel | None, baseline_mib: float, cuda: bool, cpu_time: bool = False) -> None:
        self.channel, self.baseline_mib, self.cuda = channel, baseline_mib, cuda
        self.clock = time.process_time if cpu_time else time.perf_counter
        self.started, self.images = 0.0, 0

    def on_train_begin(self, args, state, control, **_) -> None:
        self.wait()

    def on_log(self, args, state, control, logs=None, **_) -> None:
        if "loss" not in (logs or {}):  # the summary that the trainer logs after the last step
            return
        if self.channel is not None:
            seconds = self.clock() - self.started
            metrics = {name: value for name, value in logs.items() if isinstance(value, (int, float))}
            metrics["images"], self.images = self.images, 0
            self.channel.reply(seconds=seconds, peak_mib=self.peak_mib(), metrics=metrics)
        self.wait()  # also after the last step, because a process that exits would disturb the others' steps

    def wait(self) -> None:
        """Answers the parent's requests until it asks for a step."""
        while self.channel is not None and (message := self.channel.receive()) != "step":
            if message != "reset":
                sys.exit(0)
            if self.cuda:
                torch.cuda.reset_peak_memory_stats()
            known = reset_peak() or self.cuda
            self.channel.reply(peak_is_of_timed_steps=known, baseline_mib=self.baseline_mib)
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        self.started = self.clock()

    def count(self, tower: Any, arguments: tuple, keywords: dict[str, Any]) -> None:
        """Counts the images that a vision tower gets; a forward hook."""
        self.images += len(keywords["pixel_values"] if "pixel_values" in keywords else arguments[0])

    def peak_mib(self) -> float:
        """Returns the peak since the last reset in MiB, on CUDA that of the device's allocator."""
        return torch.cuda.max_memory_allocated() / MIB if self.cuda else peak_mib()


def other_ranks(ranks: int, folder: str) -> list[subprocess.Popen]:
    """Makes this process rank 0 of ``ranks`` and starts the others. All ranks share ``folder``."""
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
    """Runs one rank; rank 0 also writes the data and starts the others."""
    if folder := os.environ.get(_FOLDER):
        run(spec, None, folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        # The data is on disk because TRL's ranks share reference log-probs through the dataset's cache file.
        rows, shape = rows_of(spec), Shape(**spec["shape"])
        rows = image_rows(rows, shape) if shape.image else rows
        Dataset.from_list(rows).save_to_disk(f"{folder}/rows")
        others = other_ranks(spec.get("ranks", 1), folder)
        try:
            run(spec, Channel(), folder)
        finally:
            for process in others:
                process.kill()
                process.wait()


def run(spec: dict[str, Any], channel: Channel | None, folder: str) -> None:
    """Trains one rank. Rank 0 takes a step whenever the parent asks for one."""
    cuda = spec["device"] == "cuda"
    if threads := spec.get("threads"):
        torch.set_num_threads(threads)
    build = {"trl": trl_trainer, "ours": our_trainer}[spec["side"]]
    __import__("trl" if spec["side"] == "trl" else "cpt_kernels.trainer")  # imports must not count as part of a step
    shape = Shape(**spec["shape"])
    rows = Dataset.load_from_disk(f"{folder}/rows")
    model = build_model(shape, attention=best_attention(spec["device"]))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    # The baseline of memory is the weights and AdamW's two moments; the peak beyond it belongs to the step.
    weights = 0.0 if not cuda else 4 * parameters / MIB
    moments = 0.0 if spec.get("lora_rank") else 2 * 4 * parameters / MIB
    baseline = (weights if cuda else resident_mib()) + moments
    checksum = sum(parameter.double().sum().item() for parameter in model.parameters())
    steps = StepOnCommand(channel, baseline, cuda, spec.get("cpu_time", False))
    trainer = build(spec, model, rows, [steps], folder)
    if shape.image:
        model.model.vision_tower.register_forward_pre_hook(steps.count, with_kwargs=True)
    if channel is not None:
        channel.reply(parameters=parameters, checksum=checksum, threads=torch.get_num_threads())
    trainer.train()


if __name__ == "__main__":
    main(json.loads(sys.argv[sys.argv.index("--worker") + 1]))
