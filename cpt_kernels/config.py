"""The options of a training run: transformers' ``TrainingArguments`` and those of contrastive post-training.

Names and defaults are those of TRL's ``DPOConfig`` where it has the option. The options of the losses are in
``losses/options.py``.
"""

from __future__ import annotations

import logging
import math
import os
import socket
from collections.abc import Collection
from dataclasses import dataclass, fields
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, ClassVar, get_args

import torch
from accelerate import ParallelismConfig
from transformers import TrainingArguments, get_scheduler
from transformers.trainer_pt_utils import AcceleratorConfig

from .data.curriculum import Curriculum
from .data.formats import PromptFormat, RankedPairs
from .data.other_options import FOREIGN_OPTIONS, IGNORED_OPTIONS, REMOVED_OPTIONS
from .data.stores import local_name
from .data.truncation import TruncationMode
from .errors import UserError, user_error
from .losses import LOSSES, Loss, LossOptions, build_loss, loss_names
from .losses.build import with_hard_pairs
from .losses.functions import loss_options
from .losses.options import option
from .ops.attention.select import ATTENTION_BACKENDS

logger = logging.getLogger(__name__)

# Options that must be above 0, and options that must not be below 0. Options that depend on others are checked apart.
_POSITIVE = (
    *("max_length", "max_tokens_per_batch", "head_memory_mb", "ref_model_sync_steps", "dataset_num_proc"),
    *("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "adam_epsilon"),
    *("save_total_limit", "dataloader_prefetch_factor", "ddp_bucket_cap_mb", "ddp_timeout", "torch_empty_cache_steps"),
    "sp_size",
)
_NOT_NEGATIVE = (
    *("learning_rate", "weight_decay", "max_grad_norm", "seed", "data_seed", "dataloader_num_workers", "warmup_steps"),
    *("neftune_noise_alpha", "router_aux_loss_coef", "eval_delay"),
)
_NUMBERS = {*_POSITIVE, *_NOT_NEGATIVE, "adam_beta1", "adam_beta2", "max_steps", "num_train_epochs"}
_NUMBERS |= {"logging_steps", "eval_steps", "save_steps", "ref_model_mixup_alpha"}
_NUMBERS -= {"max_tokens_per_batch"}

# Keywords of torch.utils.checkpoint, and two of transformers.
_CHECKPOINT_KEYWORDS = {"use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop"}
_CHECKPOINT_KEYWORDS |= {"every_n_layers", "offload"}
_SHARING = {"auto": "auto", "true": "prompt", "false": "none"}  # share_prompts -> sharing
_LAYERS = ("auto", "eager", "compiled", "liger")
# Options of transformers that ask for layers -> which.
_LAYERS_BY_OPTION = {
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), "compiled"),
    **dict.fromkeys(("use_liger_kernel", "liger_kernel_config"), "liger"),
}
_DDP_BACKENDS = ("ccl", "hccl", "cncl", "mccl")  # of transformers' list; those of torch are added

# Keys of accelerator_config that configure accelerate's data loaders, which ours replace: the value that is ignored,
# and the reason.
_IGNORED_LOADER_KEYS = {
    "dispatch_batches": (True, "every process reads the data itself"),
    "use_seedable_sampler": (False, "data_seed, or else seed, decides the order of rows"),
}
# Old name (TRL's) -> new name of the options that transformers 5.24 renamed; empty for older versions.
_RENAMED = {
    f"gradient_{name}": f"activation_{name}"
    for name in ("checkpointing", "checkpointing_kwargs")
    if f"activation_{name}" in TrainingArguments.__dataclass_fields__
}
_CHECKPOINTING = ("gradient_checkpointing", "activation_checkpointing")
_REPLICAS = "for replicas of shards leave it out, and set dp_replicate_size and dp_shard_size in parallelism_config"
_FSDP1_STRATEGIES = {
    "no_shard": "leave out fsdp, which is DDP",
    "hybrid_shard": _REPLICAS,
    "hybrid_shard_zero2": _REPLICAS,
}
_OTHER_NAME = {**_RENAMED, **{new: old for old, new in _RENAMED.items()}}


@dataclass
class ContrastiveConfig(LossOptions, TrainingArguments):
    """Configuration of a :class:`ContrastiveTrainer`.

    Defaults that differ from ``TrainingArguments``: ``learning_rate`` 1e-6, ``logging_steps`` 10,
    ``gradient_checkpointing`` auto on a GPU and on otherwise, bf16 on where an accelerator supports it.

    Raises:
        UserError: an unknown value of an option, an option without effect, or options that exclude each other.
    """

    learning_rate: float = option(1e-6, "The initial learning rate.")
    logging_steps: float = option(10, "Log every so many optimizer steps; below 1, a share of all steps.")
    # The default of the field is True, so that HfArgumentParser makes --no_gradient_checkpointing, as for TRL.
    gradient_checkpointing: bool | str = option(
        True,
        "Recompute activations in the backward to save memory: true, false, or auto, which does so only if a step"
        " would not fit into memory without. Default: auto on a GPU, true on a CPU.",
    )
    bf16: bool | None = option(
        None, "Mixed precision in bf16. Default: on where an accelerator supports it and fp16 is off."
    )

    # Data
    max_length: int | None = option(1024, "Longest prompt + completion in tokens; longer sequences are cut.")
    truncation_mode: str = option("keep_start", "Which end of a cut sequence is kept: keep_start or keep_end.")
    target_column: str | None = option(None, "Column of y_ref for SLiC's regularizer. Default: the chosen completion.")
    gap_column: str | None = option(
        None, "Column of numbers by how much chosen is better, for ODPO. Default: the difference of ranked scores."
    )
    weight_column: str | None = option(
        None,
        "Column of weights of the pairs' losses: numbers of at least 0, one for a row or for each of its pairs.",
    )
    assistant_only_loss: bool = option(
        False, "Score the assistant's turns only: no turns of users and tools within a completion."
    )
    ranked_pairs: str | None = option(
        None, "Pairs of a row with K ranked completions: all, adjacent or extremes. Default: the row's own, else all."
    )
    prompt_format: str = option(
        "auto", "auto: messages use the chat template, text does not; chat: text becomes turns; text: only text."
    )
    dataset_num_proc: int | None = option(None, "Processes that tokenize.")
    curriculum: dict | str | None = option(
        None, "Order by difficulty: schedule, levels, ...; examples/curriculum.yaml explains them. Default: shuffled."
    )

    # Batches
    sharing: str = option(
        "auto",
        "Run once what several sequences begin with: tree (any beginning), prompt, none, or auto (prompts, and longer"
        " beginnings where that saves 64 tokens).",
    )
    share_prompts: str | None = option(None, "Older name of sharing: auto, true (prompt) or false (none).")
    group_by_prefix: bool = option(
        False, "Keep rows together whose prompts begin alike, such as the turns of one conversation, to run it once."
    )
    packing: str = option(
        "auto",
        "Run all completions of a micro-batch in one packed row (true), each in a padded row of its own (false), or"
        " packed if a proof on a few tokens shows that the model runs packed rows exactly (auto).",
    )
    max_tokens_per_batch: int | str | None = option(
        None,
        "Pack whole rows into micro-batches of at most so many tokens; replaces per_device_train_batch_size. auto: the"
        " rows of a step stay, and fill as few micro-batches as fit into memory.",
    )
    sp_size: int = option(
        1,
        "Processes that run each micro-batch together, each a part of its tokens (sequence parallelism): for rows that"
        " need more memory than one GPU has. The number of processes must be a multiple of it.",
    )

    # Head
    head_memory_mb: float | None = option(
        None,
        "Memory of a tile of logits, in MiB. Default: 1024 on a GPU, 512 rows on a CPU. One tile of all rows may exceed"
        " it where it takes less memory in all than several.",
    )
    head_mode: str = option(
        "auto", "auto, or general: token log-probs stay differentiable, for one more matrix product per tile."
    )

    # Attention
    attention_backend: str = option(
        "auto",
        "Attention of packed rows: auto, flash_attn, varlen or cudnn (one CUDA call per layer), sdpa or eager; or one"
        " generation of flash_attn: flash_attn_2, flash_attn_3 or flash_attn_4.",
    )

    # Reference
    precompute_ref_log_probs: bool | None = option(
        None, "Score all data by the reference before training. Default: yes, except for streams."
    )
    ref_cache_dir: str | None = option(None, "Folder or URL of the reference cache. Default: the user's cache folder.")
    sync_ref_model: bool = option(False, "Let the reference follow the policy (TR-DPO); its log-probs are not cached.")
    ref_model_mixup_alpha: float = option(0.6, "Share of the policy in a synchronized reference.")
    ref_model_sync_steps: int = option(512, "Steps from one synchronization to the next.")

    # Model
    model_init_kwargs: dict | str | None = option(
        None, "Keyword arguments of from_pretrained, for models given by name."
    )
    trust_remote_code: bool = option(False, "Allow code from a model's repository.")
    layers: str = option(
        "auto",
        "Layers below the head: eager; compiled, by torch.compile; liger, by Liger's kernels; auto is compiled on a"
        " GPU, liger where that cannot be, and eager on a CPU.",
    )
    activation_offloading: bool = option(False, "Keep activations for the backward in the host's memory.")
    disable_dropout: bool = option(True, "Disable dropout, and the noise of routers, in policy and reference.")
    router_aux_loss_coef: float | None = option(
        None, "Weight of a mixture of experts' load-balancing loss. Default: the model's own."
    )

    # Options of TRL without effect, see IGNORED_OPTIONS
    padding_free: bool = option(False, "TRL's, without effect here.")
    pad_to_multiple_of: int | str | None = option("auto", "TRL's, without effect here.")
    pad_token: str | None = option(None, "TRL's, without effect here.")
    precompute_ref_batch_size: int | None = option(None, "TRL's, without effect here.")

    # transformers parses JSON text only for the dictionaries that this list names.
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "curriculum", "model_init_kwargs"]  # noqa: RUF012

    finds_budget = False  # whether max_tokens_per_batch was auto; it is None then
    planned: ClassVar[Any] = None  # the Processes of a plan, which runs on one process itself
    chooses_checkpointing = False  # whether gradient_checkpointing is auto; it is True until training begins
    names = MappingProxyType({})  # of the model and the data, which a trainer knows

    def __new__(cls, *_, **options):
        # Here, because the generated __init__ would refuse a removed option by a TypeError without advice.
        for name in REMOVED_OPTIONS.keys() & options.keys():
            raise UserError(f"{name} was removed: {REMOVED_OPTIONS[name]}")
        for name in FOREIGN_OPTIONS.keys() & options.keys():
            raise UserError(f"{name} has another name here: {FOREIGN_OPTIONS[name]}")
        made = super().__new__(cls)
        # An option that was not given cannot be told from a given one later.
        made.chooses_checkpointing = all(options.get(name) is None for name in _CHECKPOINTING)
        return made

    _renamed_agree = False  # whether both names of each renamed option have one value

    def __setattr__(self, name: str, value: object) -> None:
        """Sets an attribute; after construction, an option that transformers renamed is set under both names.

        Setting ``gradient_checkpointing`` ends the choice by ``auto``.
        """
        super().__setattr__(name, value)
        if self._renamed_agree and name in _CHECKPOINTING:
            self.chooses_checkpointing = False
        if self._renamed_agree and name == "share_prompts" and value is not None:
            super().__setattr__("sharing", _SHARING[str(value).lower()])
        if self._renamed_agree and name in _OTHER_NAME:
            super().__setattr__(_OTHER_NAME[name], value)

    def __post_init__(self) -> None:
        self.output_dir = self.output_dir and local_name(self.output_dir)  # its files are uploaded by training.saving
        # Values as a YAML file may have them.
        self.loss_type = loss_names(self.loss_type)
        self.packing = str(self.packing).lower()  # YAML reads true and false as booleans
        self._read_sharing()

        if isinstance(self.max_tokens_per_batch, str):  # a flag or YAML may have a number as text
            self._read_budget(self.max_tokens_per_batch)
        is_auto = self._read_checkpointing()

        # Checks of what was given, before transformers changes values.
        self._check_values()
        loss = self.check_loss()
        self._check_reference(loss)
        if self.weight_column is not None:
            loss.check_weights()
        self._check_batches()
        self._check_parallelism()
        self._check_keywords()
        ignored = self._changed(IGNORED_OPTIONS)

        # transformers' own checks and changes.
        if self.bf16 is None:
            self.bf16 = not (self.fp16 or self.use_cpu) and _has_bf16()
        for old, new in _RENAMED.items():
            # Setting the new name here avoids transformers' FutureWarning about the old one, which has our default.
            if getattr(self, new) is None:
                setattr(self, new, getattr(self, old))
        _use_fresh_store()
        asked = self.fsdp.split() if isinstance(self.fsdp, str) else self.fsdp if isinstance(self.fsdp, list) else []
        if found := [word for word in asked if word in _FSDP1_STRATEGIES]:
            raise UserError(f"fsdp={found[0]} is of FSDP1, which is not supported: {_FSDP1_STRATEGIES[found[0]]}")
        with user_error():
            super().__post_init__()
        self.chooses_checkpointing = is_auto or (self.chooses_checkpointing and self.device.type == "cuda")
        self._renamed_agree = True
        if self._asks_fsdp_for_checkpointing():
            self.gradient_checkpointing = True

        # Checks that need the device or transformers' objects.
        if self.sp_size > 1 and self.world_size % self.sp_size:
            raise UserError(
                f"sp_size={self.sp_size} needs a multiple of {self.sp_size} processes, and there are {self.world_size}:"
                " start as many with torchrun, accelerate launch or --num_processes"
            )
        if self.fp16 and self.device.type == "cpu":
            raise UserError("fp16=true needs a GPU: a CPU would compute in fp32 instead; set bf16, or leave it out")
        if self.curriculum is not None:
            self._check_curriculum()
            if self.train_sampling_strategy != "random":
                raise UserError("curriculum decides the order of rows: leave train_sampling_strategy at random")
        self._check_accelerator_config()
        self._check_scheduler()
        for name in ignored:
            if self.process_index == 0 and getattr(self, name) is not None:
                logger.warning(f"{name}={getattr(self, name)} has no effect here: {IGNORED_OPTIONS[name]}")

    def _check_curriculum(self) -> None:
        curriculum = Curriculum.parse(self.curriculum)
        self.training_loss()  # checks the loss of hard pairs
        if curriculum.refresh_reference and self.sync_ref_model:
            raise UserError("sync_ref_model and the curriculum's refresh_reference both move the reference: choose one")
        if curriculum.refresh_reference and self.load_best_model_at_end:
            raise UserError(
                "curriculum: with refresh_reference the metrics of each stage are against another reference, so"
                " load_best_model_at_end cannot compare them: leave one out"
            )

    def training_loss(self, loss: Loss | None = None) -> Loss:
        """Returns the configured loss, or a user's, with the curriculum's loss or weight of the hard pairs.

        Raises:
            UserError: the loss of the hard pairs is unknown, or one of the two depends on other pairs of the batch.
        """
        loss = self.build_loss() if loss is None else loss
        curriculum = None if self.curriculum is None else Curriculum.parse(self.curriculum)
        if curriculum is None or not curriculum.trains_hard_rows:
            return loss
        name = curriculum.hard_loss
        if name is not None and name not in LOSSES:
            raise UserError(f"curriculum: hard_loss='{name}' is unknown: choose one of {', '.join(LOSSES)}")
        options = {} if name is None else {option: getattr(self, option) for option in loss_options(name)}
        hard = None if name is None else build_loss(name, **options)
        return with_hard_pairs(loss, hard, curriculum.hard_weight or 1.0)

    @property
    def data_ranks(self) -> int:
        """The number of sequence groups: each runs micro-batches of its own."""
        return (self.world_size if self.planned is None else self.planned.count) // self.sp_size

    @property
    def data_rank(self) -> int:
        """The number of this process's sequence group."""
        return self.process_index // self.sp_size

    @property
    def device(self) -> torch.device:
        """The device as transformers has it, without the rank's number on a CPU: no checkpoint loads onto `cpu:1`."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    def _check_values(self) -> None:
        _check_choice("truncation_mode", self.truncation_mode, get_args(TruncationMode))
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise UserError(
                f"train_sampling_strategy='{self.train_sampling_strategy}': packed batches are random or sequential; to"
                " even out lengths set max_tokens_per_batch"
            )
        if self.ranked_pairs is not None:
            _check_choice("ranked_pairs", self.ranked_pairs, get_args(RankedPairs))
        _check_choice("prompt_format", self.prompt_format, get_args(PromptFormat))
        _check_choice("sharing", self.sharing, ("auto", "tree", "prompt", "none"))
        _check_choice("packing", self.packing, ("auto", "true", "false"))
        _check_choice("head_mode", self.head_mode, ("auto", "general"))
        _check_choice("attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        _check_choice("layers", self.layers, _LAYERS)
        for name, layers in _LAYERS_BY_OPTION.items():
            if self.layers not in ("auto", layers) and getattr(self, name):
                raise UserError(f"layers={self.layers} contradicts {name}={getattr(self, name)}: leave one of them out")
        self._check_numbers()
        for mapping in self.optim_args.replace(" ", "").split(",") if self.optim_args else ():
            if mapping.count("=") != 1:
                raise UserError(f"optim_args={self.optim_args}: expected name=value, name=value, ...; got '{mapping}'")
        # "gloo", or by device "cpu:gloo,cuda:nccl".
        for backend in (part.split(":")[-1] for part in self.ddp_backend.split(",")) if self.ddp_backend else ():
            _check_choice("ddp_backend", backend, (*_DDP_BACKENDS, *torch.distributed.Backend.backend_list[1:]))

    def _check_numbers(self) -> None:
        for name, value in vars(self).items():
            if name in _NUMBERS and isinstance(value, str):
                raise UserError(f"{name}={value!r}: must be a number, not text")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"{name}={value}: must be finite")
        self._require_positive(*_POSITIVE)
        self._require_not_negative(*_NOT_NEGATIVE)
        self._require_share("ref_model_mixup_alpha")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: must lie in [0, 1)")
        if self.warmup_steps > 1 and self.warmup_steps != int(self.warmup_steps):
            raise UserError(f"warmup_steps={self.warmup_steps}: must be a whole number of steps, or below 1 a share")
        if self.max_steps == 0 or self.max_steps < -1:
            raise UserError(f"max_steps={self.max_steps}: must be positive, or -1 to train for num_train_epochs")
        if self.max_steps == -1:
            self._require_positive("num_train_epochs")
        for when in ("logging", "eval", "save"):
            if getattr(self, f"{when}_strategy") == "steps":
                self._require_positive(f"{when}_steps")
        if self.dataloader_prefetch_factor is not None and not self.dataloader_num_workers:
            raise UserError("dataloader_prefetch_factor has no effect without dataloader_num_workers: set both or none")

    def _check_reference(self, loss: Loss) -> None:
        if self.sync_ref_model and not loss.needs_reference:
            raise UserError(f"sync_ref_model has no effect on loss_type '{loss.name}', which has no reference")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise UserError(
                "sync_ref_model=true moves the reference, so its log-probs cannot be precomputed: leave out one of"
                " sync_ref_model and precompute_ref_log_probs"
            )
        if not self.sync_ref_model and (given := self._changed(["ref_model_mixup_alpha", "ref_model_sync_steps"])):
            raise UserError(f"{given[0]} has no effect without sync_ref_model=true")

    def _read_budget(self, text: str) -> None:
        """Sets ``finds_budget`` for "auto", so that ``max_tokens_per_batch`` is a number or None from here on."""
        if text != "auto" and not text.lstrip("-").isdigit():
            raise UserError(f"max_tokens_per_batch={text}: must be a number of tokens, or auto")
        self.finds_budget = text == "auto"
        self.max_tokens_per_batch = None if self.finds_budget else int(text)

    def _read_checkpointing(self) -> bool:
        """Returns whether ``gradient_checkpointing`` is "auto", and sets it to True for "auto" and None."""
        values = [getattr(self, name, None) for name in _CHECKPOINTING]
        for name, value in zip(_CHECKPOINTING, values):
            if isinstance(value, str) and value != "auto":
                raise UserError(f"{name}={value}: must be true, false or auto")
            if value == "auto":
                setattr(self, name, True)
        if self.gradient_checkpointing is None:
            self.gradient_checkpointing = True
        return "auto" in values

    def _asks_fsdp_for_checkpointing(self) -> bool:
        """Whether ``fsdp_config``, or the environment that accelerate's launcher sets, asks for it."""
        given = self.fsdp_config if self.fsdp and isinstance(self.fsdp_config, dict) else {}
        variables = ("ACCELERATE_USE_FSDP", "FSDP_ACTIVATION_CHECKPOINTING")
        by_launcher = all(os.environ.get(name, "").lower() == "true" for name in variables)
        return by_launcher or str(given.get("activation_checkpointing")).lower() == "true"

    def _read_sharing(self) -> None:
        """Sets ``sharing`` to what ``share_prompts`` says, if that is given."""
        self.sharing = str(self.sharing).lower()
        if self.share_prompts is None:
            return
        self.share_prompts = str(self.share_prompts).lower()
        _check_choice("share_prompts", self.share_prompts, tuple(_SHARING))
        if self.sharing not in ("auto", _SHARING[self.share_prompts]):
            raise UserError(
                f"share_prompts={self.share_prompts} contradicts sharing={self.sharing}: leave share_prompts out"
            )
        self.sharing = _SHARING[self.share_prompts]

    def _check_batches(self) -> None:
        """Raises UserError for options of batches of rows where batches are filled by tokens."""
        if self.max_tokens_per_batch is None and not self.finds_budget:
            return
        if self.auto_find_batch_size:
            raise UserError(
                "auto_find_batch_size halves per_device_train_batch_size, which max_tokens_per_batch replaces: leave"
                " out one of them"
            )
        if self.dataloader_drop_last:
            raise UserError(
                "dataloader_drop_last has no effect with max_tokens_per_batch, which spreads the last rows evenly:"
                " leave it out"
            )

    def to_dict(self) -> dict[str, Any]:
        """Returns the options, and the names of model and data: this is what trackers record."""
        return {**super().to_dict(), **self.names}

    def _check_parallelism(self) -> None:
        given = self.parallelism_config
        from_launcher = given is None and os.environ.get("ACCELERATE_USE_PARALLELISM_CONFIG", "").lower() == "true"
        if from_launcher:
            given = ParallelismConfig()  # reads what accelerate launch has set
        elif isinstance(given, dict):
            with user_error("parallelism_config", (TypeError, ValueError)):
                self.parallelism_config = given = ParallelismConfig(**given)
        for name in ("tp", "cp") if given is not None else ():
            if (size := getattr(given, f"{name}_size")) > 1:
                raise UserError(
                    f"parallelism_config: {name}_size={size} is not supported, because it would cut packed rows in"
                    " another way: set sp_size for long rows, and use FSDP or DeepSpeed for large models"
                )
        if given is not None and given.sp_size > 1:
            self._take_sp_size(given, from_launcher)
        self.check_sp_size()
        if self.deepspeed and find_spec("deepspeed") is None:
            raise UserError("deepspeed needs the deepspeed package: pip install deepspeed")

    def check_sp_size(self) -> None:
        """Raises :class:`UserError` for options that exclude ``sp_size``."""
        if self.sp_size > 1 and self.packing == "false":
            raise UserError(f"sp_size={self.sp_size} cuts packed rows: leave out packing=false")
        if self.sp_size > 1 and self.finds_budget:
            raise UserError(
                f"max_tokens_per_batch=auto does not know the memory of rows that sp_size={self.sp_size} cuts: set a"
                " number of tokens"
            )

    def _take_sp_size(self, given: ParallelismConfig, from_launcher: bool) -> None:
        """Takes ``sp_size`` out of accelerate's configuration, whose own back end for it would need another loader.

        The engine then averages gradients, and shards weights, over the ranks of sequence groups as well.
        """
        if self.sp_size not in (1, given.sp_size):
            raise UserError(f"sp_size={self.sp_size} contradicts sp_size={given.sp_size} of parallelism_config")
        self.sp_size = given.sp_size
        sizes = {"dp_replicate_size": given.dp_replicate_size, "dp_shard_size": given.dp_shard_size * given.sp_size}
        has_sizes = from_launcher or given.dp_shard_size > 1
        self.parallelism_config = ParallelismConfig(**sizes, sp_size=1, tp_size=1, cp_size=1) if has_sizes else None

    def _check_keywords(self) -> None:
        """Raises UserError for keywords that accelerate's or torch's functions would refuse long after the start."""
        known = {
            "accelerator_config": {f.name for f in fields(AcceleratorConfig)},
            "gradient_checkpointing_kwargs": _CHECKPOINT_KEYWORDS,
        }
        for name, keywords in known.items():
            given = getattr(self, name)
            if isinstance(given, dict) and (unknown := sorted(map(str, given.keys() - keywords))):
                raise UserError(f"{name} has no keyword {unknown[0]!r}: its keywords are {', '.join(sorted(keywords))}")

    def _check_scheduler(self) -> None:
        """Raises UserError for keywords that the scheduler does not take, or lacks, by making one for a trial."""
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        kwargs, kind = self.lr_scheduler_kwargs, getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
        given = f"lr_scheduler_kwargs={kwargs}" if kwargs else f"lr_scheduler_type={kind}"
        with user_error(given, (TypeError, ValueError)):
            get_scheduler(self.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=kwargs)

    def _check_accelerator_config(self) -> None:
        if self.accelerator_config.split_batches:
            raise UserError(
                "accelerator_config: split_batches would cut packed batches; leave it out, and divide"
                " per_device_train_batch_size by the number of processes"
            )
        for name, (value, reason) in _IGNORED_LOADER_KEYS.items():
            if getattr(self.accelerator_config, name) is value and self.process_index == 0:
                logger.warning(f"{name}={value} of accelerator_config has no effect here: {reason}")


def _has_bf16() -> bool:
    """Returns whether a GPU computes in bf16. Those before Ampere emulate it, which is slower than fp32."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def _check_choice(name: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise UserError(f"{name}='{value}' is unknown: choose one of {', '.join(choices)}")


def _use_fresh_store() -> None:
    """Gives the process group of a run that torchrun has restarted a store of its own, before the group is made.

    torchrun keeps one store for all its restarts. In it, torch 2.13 finds the addresses of the processes that failed.
    """
    attempt, address = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("MASTER_ADDR")
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if attempt == "0" or address is None or not shared or torch.distributed.is_initialized():
        return
    agreed = torch.distributed.TCPStore(address, int(os.environ["MASTER_PORT"]), is_master=False)
    key = f"cpt_kernels/port/{attempt}"
    if os.environ["RANK"] == "0":
        with socket.socket() as probe:
            probe.bind(("", 0))
            agreed.set(key, str(probe.getsockname()[1]))
    os.environ["MASTER_PORT"] = agreed.get(key).decode()
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"  # rank 0 makes the store
