"""The options of ``cpt-train``: three dataclasses, the groups of ``--help``, and checks across options.

The module imports transformers. :mod:`cpt_kernels.cli.option_table` caches what ``--help`` needs of it, and
:mod:`cpt_kernels.cli.parsing` fills the dataclasses from a YAML file and flags.
"""

from __future__ import annotations

import functools
import re
import types
from dataclasses import dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from ..config import ContrastiveConfig
from ..data.other_options import ALIASES, FOREIGN_OPTIONS, IGNORED_OPTIONS, REMOVED_OPTIONS
from ..errors import UserError
from ..losses import LOSSES, LossOptions, loss_names
from ..losses.options import default_of, option
from .launch import launch_options
from .option_types import Option, OptionTable


@dataclass
class ScriptArguments:
    """The data."""

    dataset_name: str | None = option(
        None, "Training data: a .json, .jsonl, .parquet, .csv or .tsv file, a URL, a folder, or a hub name."
    )
    dataset_config: str | None = option(None, "Configuration of a hub dataset.")
    dataset_train_split: str = option("train", "Split to train on.")
    dataset_test_split: str = option("test", "Split to evaluate on.")
    dataset_streaming: bool = option(False, "Read rows during training, as a stream; needs max_steps.")
    datasets: list[dict] | None = option(
        None, "Several datasets, each a mapping of path, name, split, columns, fraction, ..."
    )
    test_split_size: float | None = option(None, "Share (below 1) or number of the rows to split off for evaluation.")
    eval_dataset_name: str | None = option(None, "Evaluation data: a file, a folder, or a hub name.")
    columns: list[str] | None = option(None, "Columns to read: name, or 'name in the data=name here'.")
    check: bool = option(
        False, "Train nothing: check model, data, first step, saving and loading, and exit with 1 if one of them fails."
    )
    overwrite_output_dir: bool = option(
        False, "Begin a new run in an output_dir that holds an earlier one, and replace its files."
    )
    ignore_bias_buffers: bool = option(False, "Exclude boolean buffers of the model from DDP's synchronization.")


@dataclass
class ModelArguments:
    """The model, the reference and the adapter."""

    model_name_or_path: str | None = option(None, "Model to train: a folder, or a name on the hub.")
    model_revision: str = option("main", "Branch, tag or commit of a hub model.")
    tokenizer_name: str | None = option(None, "Folder or name of the tokenizer. Default: the model's.")
    from_scratch: bool = option(False, "Start from random weights; only the model's config.json is read.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = option("float32", "Type of the weights.")
    attn_implementation: str | None = option(None, "The model's attention for unpacked rows: sdpa, eager, ...")
    ref_model_name_or_path: str | None = option(None, "Reference model. Default: the model at the start of training.")
    adapter_name_or_path: str | None = option(
        None, "Adapter to train further, on model_name_or_path or else its own base model: a folder, or a hub name."
    )
    use_peft: bool = option(False, "Train a new LoRA adapter instead of all weights.")
    lora_r: int = option(16, "Rank of the adapter.")
    lora_alpha: int = option(32, "The adapter's output is multiplied by lora_alpha / lora_r.")
    lora_dropout: float = option(0.05, "Dropout in the adapter, if disable_dropout is false.")
    lora_target_modules: list[str] | None = option(None, "Modules to adapt, or all-linear. Default: by architecture.")
    lora_target_parameters: list[str] | None = option(None, "Parameters to adapt that are not in a linear module.")
    lora_modules_to_save: list[str] | None = option(None, "Modules to train in full beside the adapter.")
    lora_task_type: Literal["CAUSAL_LM"] = option("CAUSAL_LM", "Task of the adapter.")
    use_rslora: bool = option(False, "Multiply by lora_alpha / sqrt(lora_r) (rank-stabilized LoRA).")
    use_dora: bool = option(False, "Weight-decomposed LoRA (DoRA).")
    load_in_4bit: bool = option(False, "Load the base model in 4 bits (bitsandbytes); needs an adapter.")
    load_in_8bit: bool = option(False, "Load the base model in 8 bits (bitsandbytes); needs an adapter.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", "4-bit data type.")
    use_bnb_nested_quant: bool = option(False, "Also quantize the scales of 4-bit weights.")
    bnb_4bit_quant_storage: str | None = option(None, "Data type that stores 4-bit weights: bfloat16, ...")


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
        *("max_length", "truncation_mode", "target_column", "gap_column", "weight_column", "ranked_pairs"),
        *("assistant_only_loss", "curriculum"),
        *("prompt_format", "dataset_num_proc"),
    ),
    "Batches": (
        *("per_device_train_batch_size", "max_tokens_per_batch", "gradient_accumulation_steps", "sharing"),
        *("share_prompts", "group_by_prefix", "packing", "sp_size", "per_device_eval_batch_size"),
    ),
    "Head": ("head_memory_mb", "head_mode"),
    "Reference": (
        *("ref_model_name_or_path", "precompute_ref_log_probs", "ref_cache_dir", "sync_ref_model"),
        *("ref_model_mixup_alpha", "ref_model_sync_steps"),
    ),
    "Training": (
        *("output_dir", "num_train_epochs", "max_steps", "learning_rate", "lr_scheduler_type", "warmup_steps"),
        *("weight_decay", "max_grad_norm", "layers", "gradient_checkpointing", "activation_offloading"),
        *("bf16", "fp16", "use_cpu", "seed"),
        *("logging_steps", "eval_strategy", "eval_steps", "eval_on_start", "save_strategy", "save_steps"),
        *("save_total_limit", "resume_from_checkpoint", "report_to", "disable_tqdm"),
    ),
    "Accepted from TRL, without effect here": tuple(IGNORED_OPTIONS),
    _LAST_GROUP: (),
}
# Help of transformers' options that replaces its own, which runs to six sentences.
_HELP = {
    "per_device_train_batch_size": "Rows of a micro-batch on each device.",
    "per_device_eval_batch_size": "Rows of a micro-batch on each device in evaluation.",
    "gradient_accumulation_steps": "Micro-batches of an optimizer step.",
    "output_dir": "Folder for everything that the run writes. Default: <model>-CPT.",
    "num_train_epochs": "Passes over the data.",
    "max_steps": "Optimizer steps, in place of num_train_epochs.",
    "lr_scheduler_type": "Schedule of the learning rate: linear, cosine, constant, ...",
    "warmup_steps": "Steps until the learning rate reaches its maximum; below 1, a share of all steps.",
    "weight_decay": "Weight decay of weight matrices.",
    "max_grad_norm": "Norm to which gradients are clipped; 0 disables clipping.",
    "fp16": "Mixed precision in fp16.",
    "use_cpu": "Train on the CPU even if there is a GPU.",
    "seed": "Seed of initialization and of the order of rows.",
    "eval_strategy": "When to evaluate: no, steps or epoch. With eval_dataset_name also at the end.",
    "eval_steps": "Steps between evaluations; below 1, a share of all steps. Default: logging_steps.",
    "eval_on_start": "Also evaluate before the first step.",
    "save_strategy": "When to save checkpoints: no, steps, epoch or best.",
    "save_steps": "Steps between checkpoints; below 1, a share of all steps.",
    "save_total_limit": "Most checkpoints to keep.",
    "resume_from_checkpoint": "Folder of a checkpoint; or last, for the last one in output_dir.",
    "report_to": "Trackers to report to: wandb, tensorboard, ...",
    "disable_tqdm": "Show no progress bars.",
    **{name: f"{reason[0].upper()}{reason[1:]}." for name, reason in IGNORED_OPTIONS.items()},
}
# Options of TrainingArguments that a flag or a file cannot express -> what to do in their place.
_REFUSED = {
    "parallelism_config": "set sp_size for sequence parallelism, and configure sharding in the file of"
    " --accelerate_config"
}
# Options that name a local file or folder, or something on the hub.
PATH_OPTIONS = (
    *("model_name_or_path", "ref_model_name_or_path", "tokenizer_name", "dataset_name", "eval_dataset_name"),
    *("output_dir", "ref_cache_dir"),
)
_NOT_SAVED = ("hub_token", "resume_from_checkpoint", "overwrite_output_dir", "check")  # a secret; of one invocation


# --- The table of options ---


def build_table() -> OptionTable:
    """Builds the table of all options from the dataclasses; `cli.option_table` caches it."""
    hints = {name: hint for cls in CLASSES for name, hint in get_type_hints(cls).items() if name in NAMES[cls]}
    hints["gradient_checkpointing"] = bool | Literal["auto"] | None
    hints["fsdp"] = bool | str | None  # transformers takes true as well as its older words
    helps = {f.name: f.metadata.get("help", "") for cls in CLASSES for f in fields(cls)}
    defaults = _defaults()
    options = {
        name: Option(group, kinds_of(hints[name]), defaults[name], _help(name, helps[name], defaults[name]))
        for group, names in groups().items()
        for name in names
    }
    removed = {name: mend for name, mend in REMOVED_OPTIONS.items() if name not in options}
    return OptionTable(options, removed, FOREIGN_OPTIONS, ALIASES, _REFUSED, launch_options(defaults))


def groups() -> dict[str, tuple[str, ...]]:
    """Returns the options by group; every option is in one group."""
    placed = {name for names in _GROUPS.values() for name in names}
    rest = tuple(name for name in _defaults() if name not in placed)
    return {title: (*names, *(rest if title == _LAST_GROUP else ())) for title, names in _GROUPS.items()}


def kinds_of(hint: Any) -> dict[str, Any]:
    """Translates a type hint to the kinds of values that an option allows, see :class:`Option`."""
    kinds: dict[str, Any] = {}
    for part in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        origin = get_origin(part) or part
        if origin is list:
            kinds["list"] = kinds_of(get_args(part)[0])
        elif origin is Literal:
            kinds["str"] = [choice for choice in get_args(part) if isinstance(choice, str)]
        elif origin is str:
            kinds.setdefault("str", [])  # SchedulerType | str allows the values of SchedulerType alone
        elif origin is type(None):
            kinds["none"] = None
        elif issubclass(origin, Enum):
            kinds["str"] = [choice.value for choice in origin]
        else:
            kinds[origin.__name__] = None
    return kinds


@functools.cache
def _defaults() -> dict[str, Any]:
    values = {}
    for cls in CLASSES:
        for f in fields(cls):
            if f.init and f.name not in _REFUSED:
                default = default_of(f)
                values[f.name] = default.value if isinstance(default, Enum) else default
    return values | {"gradient_checkpointing": None}  # its default depends on the device


def _help(name: str, text: str, default: Any) -> str:
    """Returns one sentence with the default."""
    text = _HELP.get(name, text.replace("%%", "%"))  # transformers escapes % for argparse
    if "Default: " in text:
        return text
    if name not in _HELP:
        text = re.split(r"(?<=[.])\s(?=[A-Z])", text)[0]
    if default in (None, False, "", []):
        return text
    shown = " ".join(default) if isinstance(default, list) else str(default).lower() if default is True else default
    return f"{text} [{shown}]"


# --- The options of a run ---


@dataclass(frozen=True)
class Options:
    """The options of one run. ``values`` holds every option under its name, with defaults filled in."""

    script: ScriptArguments
    model: ModelArguments
    training: ContrastiveConfig
    values: dict[str, Any]

    def to_yaml(self) -> str:
        """Returns all options as the content of a file for ``--config``, from whatever folder it is read."""
        parts = []
        for title, names in groups().items():
            values = {name: _absolute(name, self.values[name]) for name in names if name not in _NOT_SAVED}
            parts.append(f"# {title}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}")
        return "\n".join(parts)


def _absolute(name: str, value: Any) -> Any:
    """Returns the absolute path for a local file or folder that an option names, and any other value as it is."""
    if name == "datasets" and value:
        return [{**part, "path": _absolute("dataset_name", part.get("path"))} for part in value]
    if name not in PATH_OPTIONS or not isinstance(value, str):
        return value
    path = Path(value).expanduser()
    return str(path.absolute()) if path.exists() else value


def complete(given: dict[str, Any]) -> Options:
    """Adds the defaults to the options that flags and file give, and checks all options together.

    Raises:
        UserError: an option without effect, or options that exclude each other.
    """
    values = _defaults() | given
    _check_together(values)
    parts = [cls(**{name: given[name] for name in NAMES[cls] if name in given}) for cls in CLASSES]
    return Options(*parts, values)


def _check_together(values: dict[str, Any]) -> None:
    given = {name for name, value in values.items() if value != _defaults()[name]}
    adapter = sorted(name for name in given if name.startswith("lora_") or name in ("use_rslora", "use_dora"))
    quantized = sorted(given & {"load_in_4bit", "load_in_8bit"})

    # Adapter and quantization
    if adapter and not values["use_peft"]:
        raise UserError(f"{adapter[0]} has no effect without an adapter: set use_peft=true, or leave it out")
    if "load_in_4bit" not in given and (four := sorted(name for name in given if "bnb_" in name)):
        raise UserError(f"{four[0]} has no effect without load_in_4bit=true: set it, or leave {four[0]} out")
    if len(quantized) == 2:
        raise UserError("load_in_4bit and load_in_8bit exclude each other: leave one of them out")
    if values["adapter_name_or_path"] and (other := sorted(given & {"use_peft", "from_scratch"})):
        raise UserError(
            f"adapter_name_or_path trains an existing adapter further, and {other[0]} makes new weights: leave one of"
            " them out"
        )
    has_adapter = values["use_peft"] or values["adapter_name_or_path"]
    if quantized and not has_adapter and not _is_adapter(values["model_name_or_path"]):
        raise UserError(
            f"{quantized[0]} needs use_peft=true or adapter_name_or_path: quantized weights are not trained"
        )
    if values["from_scratch"] and (loading := sorted(given & {"model_init_kwargs"}) + quantized):
        raise UserError(f"{loading[0]} has no effect with from_scratch=true, which loads no weights: leave it out")
    if values["from_scratch"] and values["use_peft"]:
        raise UserError(
            "use_peft saves the adapter alone, and from_scratch=true makes a base model that is not saved: leave one of"
            " them out"
        )

    # Data
    if values["datasets"] and (one := sorted(given & {"dataset_name", "dataset_config", "columns"})):
        raise UserError(f"{one[0]} is for one dataset: leave it out, or give it in an entry of datasets")
    _check_split(values)
    if values["dataset_streaming"] and values["max_steps"] <= 0:
        raise UserError("dataset_streaming=true needs max_steps: the length of a stream is not known")

    # Numbers that ContrastiveConfig does not have
    for name in ("lora_r", "lora_alpha"):
        if values[name] <= 0:
            raise UserError(f"{name}={values[name]}: must be positive")
    if not 0 <= values["lora_dropout"] < 1:
        raise UserError(f"lora_dropout={values['lora_dropout']}: must lie in [0, 1)")

    # Loss; an unknown one is left to ContrastiveConfig
    losses = loss_names(values["loss_type"])
    if set(losses) <= set(LOSSES):
        _check_for_losses(losses, given)


def _check_split(values: dict[str, Any]) -> None:
    size = values["test_split_size"]
    if size is None:
        return
    if size <= 0 or (size >= 1 and size != int(size)):
        raise UserError(f"test_split_size={size}: give a share of the rows below 1, or a whole number of rows")
    if values["eval_dataset_name"]:
        raise UserError("test_split_size and eval_dataset_name both choose the evaluation data: leave one of them out")
    if values["dataset_streaming"]:
        raise UserError("test_split_size needs the number of rows, and a stream has none: split the data beforehand")


def _is_adapter(name: str | None) -> bool:
    from ..model.pretrained import local_adapters

    return name is not None and local_adapters(name) is not None


def _check_for_losses(losses: list[str], given: set[str]) -> None:
    """Raises UserError for a column or a reference that none of the losses reads."""
    named = f"loss_type={' '.join(losses)}"
    for column, reads in (("target_column", "uses_target"), ("gap_column", "needs_gap")):
        readers = [name for name, entry in LOSSES.items() if getattr(entry, reads)]
        if column in given and not set(losses) & set(readers):
            choices = " or ".join(readers)
            raise UserError(f"{column} has no effect with {named}: leave it out, or set loss_type={choices}")
    of_reference = {"ref_model_name_or_path", "precompute_ref_log_probs"} & given
    if of_reference and not any(LOSSES[loss].needs_reference for loss in losses):
        raise UserError(f"{min(of_reference)} has no effect with {named}, which has no reference: leave it out")
