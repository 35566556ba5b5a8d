"""The options that ``cpt-train`` has: three dataclasses, the groups they are shown in, and which go together.

How a YAML file and flags fill them is :mod:`cpt_kernels.cli.parsing`.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum
from functools import cache
from typing import Any, Literal, get_type_hints

import yaml

from ..config import IGNORED_OPTIONS, ContrastiveConfig
from ..errors import UserError
from ..losses import LOSSES, LossOptions, loss_names
from ..losses.options import default_of, option


@dataclass
class ScriptArguments:
    """Which data."""

    dataset_name: str | None = option(
        None, "Training data: a .json, .jsonl, .parquet or .csv file, a folder, or a hub name."
    )
    dataset_config: str | None = option(None, "Configuration of a hub dataset.")
    dataset_train_split: str = option("train", "Split to train on.")
    dataset_test_split: str = option("test", "Split to evaluate on.")
    dataset_streaming: bool = option(False, "Read rows as they are needed; needs max_steps.")
    datasets: list[dict] | None = option(
        None, "Several datasets in place of one, each a mapping: path, name, split, columns, fraction, ..."
    )
    test_split_size: float | None = option(None, "Share or number of rows of datasets to evaluate on.")
    eval_dataset_name: str | None = option(None, "Evaluation data of its own: a file, a folder, or a hub name.")
    columns: list[str] | None = option(None, "Columns to read: name, or 'name in the data=name here'.")
    ignore_bias_buffers: bool = option(False, "Keep true-or-false buffers of the model out of what DDP synchronises.")


@dataclass
class ModelArguments:
    """Which model, which reference, which adapter."""

    model_name_or_path: str | None = option(None, "Model to train: a folder, or a name on the hub.")
    model_revision: str = option("main", "Branch, tag or commit of a hub model.")
    tokenizer_name: str | None = option(None, "Folder or name of the tokenizer. Default: the model's.")
    from_scratch: bool = option(False, "Start from random weights; of the model only its config.json is read.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option("float32", "Type of the weights.")
    attn_implementation: str | None = option(None, "The model's attention where rows are not packed: sdpa, eager, ...")
    ref_model_name_or_path: str | None = option(None, "Reference model. Default: the model as training starts.")
    use_peft: bool = option(False, "Train a LoRA adapter instead of all weights.")
    lora_r: int = option(16, "Rank of the adapter.")
    lora_alpha: int = option(32, "The adapter is multiplied by lora_alpha / lora_r.")
    lora_dropout: float = option(0.05, "Dropout in the adapter, where disable_dropout is false.")
    lora_target_modules: list[str] | None = option(None, "Modules to adapt, or all-linear. Default: by architecture.")
    lora_target_parameters: list[str] | None = option(None, "Parameters to adapt that belong to no linear module.")
    lora_modules_to_save: list[str] | None = option(None, "Modules to train whole beside the adapter.")
    lora_task_type: Literal["CAUSAL_LM"] = option("CAUSAL_LM", "What the adapter is for.")
    use_rslora: bool = option(False, "Multiply by lora_alpha / sqrt(lora_r) instead.")
    use_dora: bool = option(False, "Weight-decomposed LoRA.")
    load_in_4bit: bool = option(False, "Load the base model in 4 bits (bitsandbytes); needs use_peft.")
    load_in_8bit: bool = option(False, "Load the base model in 8 bits (bitsandbytes); needs use_peft.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", "Kind of the 4 bits.")
    use_bnb_nested_quant: bool = option(False, "Quantise the scales of the 4 bits, too.")
    bnb_4bit_quant_storage: str | None = option(None, "Type in which the 4 bits are stored: bfloat16, ...")


CLASSES = (ScriptArguments, ModelArguments, ContrastiveConfig)
NAMES = {cls: tuple(f.name for f in fields(cls) if f.init) for cls in CLASSES}
_LAST_GROUP = "More of transformers' TrainingArguments"
# What --help shows, in this order. An option in no group goes to the last one.
_GROUPS: dict[str, tuple[str, ...]] = {
    "Script": NAMES[ScriptArguments],
    "Model": (
        *(name for name in NAMES[ModelArguments] if name != "ref_model_name_or_path"),
        *("trust_remote_code", "model_init_kwargs", "disable_dropout", "router_aux_loss_coef", "attention_backend"),
    ),
    "Loss": tuple(f.name for f in fields(LossOptions)),
    "Data": (
        *("max_length", "truncation_mode", "target_column", "gap_column", "ranked_pairs", "curriculum"),
        "dataset_num_proc",
    ),
    "Batches": (
        *("per_device_train_batch_size", "max_tokens_per_batch", "gradient_accumulation_steps", "share_prompts"),
        "per_device_eval_batch_size",
    ),
    "Head": ("head_memory_mb", "head_mode"),
    "Reference": (
        *("ref_model_name_or_path", "precompute_ref_log_probs", "ref_cache_dir", "sync_ref_model"),
        *("ref_model_mixup_alpha", "ref_model_sync_steps"),
    ),
    "Training": (
        *("output_dir", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps"),
        *("weight_decay", "max_grad_norm", "gradient_checkpointing", "activation_offloading"),
        *("bf16", "fp16", "use_cpu", "seed"),
        *("logging_steps", "eval_strategy", "eval_steps", "eval_on_start", "save_strategy", "save_steps"),
        *("save_total_limit", "resume_from_checkpoint", "report_to", "disable_tqdm"),
    ),
    "Accepted from TRL, without effect here": tuple(IGNORED_OPTIONS),
    _LAST_GROUP: (),
}
# In place of what transformers says of its own options at length.
HELP = {
    "per_device_train_batch_size": "Rows of a micro-batch.",
    "per_device_eval_batch_size": "Rows of a micro-batch in evaluation.",
    "gradient_accumulation_steps": "Micro-batches of an optimizer step.",
    "output_dir": "Folder for all that is written. Default: <model>-CPT.",
    "num_train_epochs": "Passes over the data.",
    "max_steps": "Optimizer steps, in place of num_train_epochs.",
    "lr_scheduler_type": "Course of the learning rate: linear, cosine, constant, ...",
    "warmup_steps": "Steps until the learning rate is reached; below 1, a share of all steps.",
    "weight_decay": "Weight decay of matrices.",
    "max_grad_norm": "Gradients are clipped to this norm; 0: not at all.",
    "fp16": "Mixed precision in fp16.",
    "use_cpu": "Leave a GPU alone.",
    "seed": "Seed of initialisation and order.",
    "eval_strategy": "When to evaluate: no, steps or epoch. With eval_dataset_name always at the end.",
    "eval_steps": "Steps between evaluations; below 1, a share of all steps. Default: logging_steps.",
    "eval_on_start": "Evaluate before the first step, too.",
    "save_strategy": "When to save checkpoints: no, steps, epoch or best.",
    "save_steps": "Steps between checkpoints; below 1, a share of all steps.",
    "save_total_limit": "Keep only so many checkpoints.",
    "resume_from_checkpoint": "Folder of a checkpoint, or last: the last one in output_dir.",
    "report_to": "Trackers to report to: wandb, tensorboard, ...",
    "disable_tqdm": "No progress bars.",
    **{name: f"{reason[0].upper()}{reason[1:]}." for name, reason in IGNORED_OPTIONS.items()},
}
# Of TrainingArguments, what no text can say.
NOT_OPTIONS = {"parallelism_config": "accelerate's sharding is a matter of the file of --accelerate_config"}
_NOT_SAVED = ("hub_token", "resume_from_checkpoint")  # a secret; a matter of one invocation


@dataclass(frozen=True)
class Options:
    """A run as asked for. ``values`` holds every option under its name, as given or else the default."""

    script: ScriptArguments
    model: ModelArguments
    training: ContrastiveConfig
    values: dict[str, Any]

    def to_yaml(self) -> str:
        """All options as a file that ``--config`` reads."""
        parts = []
        for title, names in groups().items():
            values = {name: self.values[name] for name in names if name not in _NOT_SAVED}
            parts.append(f"# {title}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}")
        return "\n".join(parts)


@cache
def defaults() -> dict[str, Any]:
    """Every option and its default."""
    values = {}
    for cls in CLASSES:
        for f in fields(cls):
            if f.init and f.name not in NOT_OPTIONS:
                default = default_of(f)
                values[f.name] = default.value if isinstance(default, Enum) else default
    return values


@cache
def type_hints() -> dict[str, Any]:
    """Option -> its type."""
    hints = {name: hint for cls in CLASSES for name, hint in get_type_hints(cls).items() if name in NAMES[cls]}
    return hints | {"fsdp": bool | str | None}  # transformers takes true as well as the words of old


def groups() -> dict[str, tuple[str, ...]]:
    """Group -> its options; every option is in one group."""
    placed = {name for names in _GROUPS.values() for name in names}
    rest = tuple(name for name in defaults() if name not in placed)
    return {title: (*names, *(rest if title == _LAST_GROUP else ())) for title, names in _GROUPS.items()}


def check_together(values: dict[str, Any]) -> None:
    """Raise ValueError for an option that would be ignored, or that another one excludes."""
    given = {name for name, value in values.items() if value != defaults()[name]}
    adapter = sorted(name for name in given if name.startswith("lora_") or name in ("use_rslora", "use_dora"))
    quantised = sorted(given & {"load_in_4bit", "load_in_8bit"})
    if adapter and not values["use_peft"]:
        raise UserError(f"{adapter[0]} has no effect without an adapter: set use_peft=true, or leave it out")
    if "load_in_4bit" not in given and (four := sorted(name for name in given if "bnb_" in name)):
        raise UserError(f"{four[0]} has no effect without load_in_4bit=true: set it, or leave this out")
    if len(quantised) == 2:
        raise UserError("load_in_4bit and load_in_8bit exclude each other")
    if quantised and not values["use_peft"]:
        raise UserError(f"{quantised[0]} needs use_peft=true: quantised weights cannot be trained themselves")
    if values["from_scratch"] and (loading := sorted(given & {"model_init_kwargs"}) + quantised):
        raise UserError(f"{loading[0]} is for weights that are loaded, and from_scratch=true loads none")
    if values["datasets"] and (one := sorted(given & {"dataset_name", "dataset_config", "columns"})):
        raise UserError(f"{one[0]} is for one dataset: leave it out, or say it in datasets")
    if values["test_split_size"] and (values["eval_dataset_name"] or not values["datasets"]):
        raise UserError("test_split_size splits datasets, where no eval_dataset_name is given: leave it out")
    if values["dataset_streaming"] and values["max_steps"] <= 0:
        raise UserError("dataset_streaming=true needs max_steps: a stream does not say how long it is")
    losses = loss_names(values["loss_type"])
    if set(losses) <= set(LOSSES):  # else ContrastiveConfig complains
        _check_loss(losses, given)


def _check_loss(losses: list[str], given: set[str]) -> None:
    named = f"loss_type={' '.join(losses)}"
    for column, reads in (("target_column", "uses_target"), ("gap_column", "needs_gap")):
        readers = [name for name, entry in LOSSES.items() if getattr(entry, reads)]
        if column in given and not set(losses) & set(readers):
            choices = " or ".join(readers)
            raise UserError(f"{column} has no effect with {named}: leave it out, or set loss_type={choices}")
    of_reference = {"ref_model_name_or_path", "precompute_ref_log_probs"} & given
    if of_reference and not any(LOSSES[loss].needs_reference for loss in losses):
        raise UserError(f"{min(of_reference)} has no effect with {named}, which has no reference: leave it out")
