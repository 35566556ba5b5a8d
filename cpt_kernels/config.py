"""Options of a training run: transformers' ``TrainingArguments`` and what contrastive post-training adds.

Names and defaults are those of TRL's ``DPOConfig`` where it has the option.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, field
from importlib.util import find_spec
from typing import Any, get_args

import torch
from transformers import TrainingArguments

from .data.curriculum import Curriculum
from .data.formats import RankedPairs
from .data.truncation import TruncationMode
from .errors import UserError, user_error
from .losses import F_DIVERGENCES, LOSSES, Loss, build_loss, loss_names, loss_options
from .ops.attention.select import BACKENDS

logger = logging.getLogger(__name__)

# Options of TRL and transformers that mean nothing here: accepted, so that configurations for TRL work, and the reason
# is logged.
_WITHOUT_MEANING = {
    "batches are always packed, without padding": ("padding_free",),
    "nothing is padded": ("pad_to_multiple_of",),
    "nothing is padded; a tokenizer that is to be saved with one needs tokenizer.pad_token": ("pad_token",),
    "the reference scores whole prompt groups, max_tokens_per_batch tokens at a time": ("precompute_ref_batch_size",),
    "a run trains, and evaluates where it has data for it": ("do_train", "do_eval", "do_predict"),
    "evaluation keeps sums and rewards, no logits": (
        *("prediction_loss_only", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
        *("include_for_metrics", "batch_eval_metrics"),
    ),
    "evaluation runs in the precision of training": ("bf16_full_eval", "fp16_full_eval"),
    "only the columns of the data's form are read": ("remove_unused_columns", "label_names", "length_column_name"),
    "a step always averages over its pairs": ("average_tokens_across_devices",),
    "preferences are smoothed by label_smoothing": ("label_smoothing_factor",),
    "training keeps no key-value cache": ("use_cache",),
    "the launcher says it by LOCAL_RANK": ("local_rank",),
}
WITHOUT_MEANING = {name: reason for reason, names in _WITHOUT_MEANING.items() for name in names}
_OF_LOADERS = {
    "dispatch_batches": (True, "every process reads the data itself"),
    "use_seedable_sampler": (False, "data_seed, or else seed, decides the order of rows"),
}
# Options that TRL had once: refused, and what to do is said.
REMOVED = {
    "rpo_alpha": "set loss_type=[sigmoid, sft] and loss_weights=[1, rpo_alpha]",
    "reference_free": "set loss_type=cpo and cpo_alpha=0, which is DPO without a reference; or simpo, orpo, slic",
    "max_prompt_length": "set max_length, the longest prompt and completion together",
    "max_completion_length": "set max_length, the longest prompt and completion together",
    "max_target_length": "only decoders are supported; set max_length",
    "is_encoder_decoder": "only decoders are supported",
    "label_pad_token_id": "nothing is padded",
    "padding_value": "nothing is padded",
    "generate_during_eval": "evaluation takes no samples; generate from a saved model",
    "use_logits_to_keep": "the head reads completion rows only, always",
    "use_num_logits_to_keep": "the head reads completion rows only, always",
    "use_liger_loss": "the head has kernels of its own",
    "base_model_attribute_name": "the head has kernels of its own",
    "model_adapter_name": "the active adapter is trained",
    "ref_adapter_name": "the reference of a model that comes with an adapter is that adapter as it comes",
    "force_use_ref_model": "a ref_model that is passed is used",
    "ref_model_init_kwargs": "load the reference as you like and pass it as ref_model",
    "tools": "give the data a column of tools",
    # transformers', as older configurations have them
    "warmup_ratio": "set warmup_steps, which below 1 is a share of all steps",
    "evaluation_strategy": "set eval_strategy",
    "torch_dtype": "set dtype",
    "no_cuda": "set use_cpu",
    "group_by_length": "set max_tokens_per_batch, which fills micro-batches whatever lengths rows have",
    "overwrite_output_dir": "an output_dir that is there is written to",
    "logging_dir": "trackers have settings of their own: TENSORBOARD_LOGGING_DIR, WANDB_DIR",
    "save_safetensors": "weights are always saved as safetensors",
    "push_to_hub_model_id": "set hub_model_id",
    "include_tokens_per_second": "num_tokens is always logged",
    "fsdp_transformer_layer_cls_to_wrap": "set transformer_layer_cls_to_wrap in fsdp_config",
    "gradient_checkpointing_use_reentrant": "set use_reentrant in gradient_checkpointing_kwargs",
    "use_liger": "set use_liger_kernel",
}


def _option(default: Any, help: str) -> Any:
    factory = {"default_factory": lambda: list(default)} if isinstance(default, list) else {"default": default}
    return field(**factory, metadata={"help": help})


@dataclass
class ContrastiveConfig(TrainingArguments):
    """Configuration of a :class:`ContrastiveTrainer`.

    Defaults that differ from ``TrainingArguments``: ``learning_rate`` 1e-6, ``logging_steps`` 10,
    ``gradient_checkpointing`` on, bf16 where an accelerator supports it.

    Raises:
        UserError: an unknown value of one of the options below.
    """

    learning_rate: float = _option(1e-6, "The initial learning rate.")
    logging_steps: float = _option(10, "Log every so many optimizer steps; below 1, a share of all steps.")
    gradient_checkpointing: bool = _option(True, "Recompute activations in the backward to save memory.")
    bf16: bool | None = _option(
        None, "Mixed precision in bf16. Default: on where an accelerator supports it and fp16 is off."
    )

    # Loss
    loss_type: list[str] = _option(["sigmoid"], f"Loss over pairs, or several to add up: {', '.join(LOSSES)}.")
    loss_weights: list[float] | None = _option(None, "Weights of several losses. Default: 1 each.")
    beta: float = _option(0.1, "Weight of the reference: beta of DPO, tau of IPO, lambda of ORPO.")
    label_smoothing: float = _option(0.0, "Probability that a label is flipped (conservative and robust DPO, EXO).")
    ld_alpha: float | None = _option(None, "Weight of tokens beyond the other side's length (LD-DPO). Default: 1.")
    f_divergence_type: str = _option("reverse_kl", f"Divergence from the reference: {', '.join(F_DIVERGENCES)}.")
    f_alpha_divergence_coef: float = _option(0.5, "Alpha of alpha_divergence.")
    use_weighting: bool = _option(False, "Weigh pairs by how likely the policy is to say them (WPO).")
    discopop_tau: float = _option(0.05, "Temperature of discopop.")
    slic_delta: float = _option(1.0, "Margin of SLiC, in nats.")
    slic_lambda: float = _option(1.0, "Weight of SLiC's regulariser, -log p(y_ref).")
    slic_length_normalize: bool = _option(False, "SLiC on log-probs per token instead of per completion.")
    simpo_gamma: float = _option(0.5, "Margin of SimPO.")
    cpo_alpha: float = _option(1.0, "Weight of CPO's likelihood term.")
    dpop_lambda: float = _option(50.0, "Weight of DPO-Positive's penalty where chosen becomes less likely.")
    odpo_alpha: float = _option(1.0, "Weight of ODPO's offset, log gap.")

    # Data
    max_length: int | None = _option(1024, "Longest prompt + completion in tokens; what is beyond is cut off.")
    truncation_mode: str = _option("keep_start", "What a cut keeps: keep_start or keep_end.")
    target_column: str | None = _option(None, "Column of y_ref for SLiC's regulariser. Default: the chosen completion.")
    gap_column: str | None = _option(None, "Column of by how much chosen is better, for ODPO. Default: ranked scores.")
    ranked_pairs: str = _option("all", "Pairs of a row with K ranked completions: all, adjacent or extremes.")
    dataset_num_proc: int | None = _option(None, "Processes that tokenise.")
    curriculum: dict | str | None = _option(
        None, "Order by difficulty: schedule, levels, ...; examples/curriculum.yaml explains them. Default: shuffled."
    )

    # Batches
    share_prompts: str = _option("auto", "Run a prompt once for all its completions: auto, true or false.")
    max_tokens_per_batch: int | None = _option(
        None, "Pack whole rows into micro-batches of at most so many tokens; replaces per_device_train_batch_size."
    )

    # Head
    head_memory_mb: float | None = _option(
        None, "Budget of a tile of logits, in MiB. Default: 1024 on a GPU, 512 rows on a CPU."
    )
    head_mode: str = _option(
        "auto", "auto, or general: token log-probs stay differentiable, one more product beyond a tile."
    )

    # Attention
    attention_backend: str = _option(
        "auto", "Attention of packed rows: auto, flash_attn or varlen (CUDA, one call for all), sdpa or eager."
    )

    # Reference
    precompute_ref_log_probs: bool | None = _option(
        None, "Score all data by the reference before training. Default: yes, except for streams."
    )
    ref_cache_dir: str | None = _option(None, "Where reference log-probs are kept. Default: the user's cache folder.")
    sync_ref_model: bool = _option(False, "Let the reference follow the policy (TR-DPO); its log-probs are not cached.")
    ref_model_mixup_alpha: float = _option(0.6, "Share of the policy in a synchronised reference.")
    ref_model_sync_steps: int = _option(512, "Steps from one synchronisation to the next.")

    # Model
    model_init_kwargs: dict | str | None = _option(
        None, "Keyword arguments of from_pretrained, for models given by name."
    )
    trust_remote_code: bool = _option(False, "Allow code from a model's repository.")
    activation_offloading: bool = _option(False, "Keep activations for the backward in the host's memory.")
    disable_dropout: bool = _option(True, "Switch dropout off in policy and reference.")
    router_aux_loss_coef: float | None = _option(
        None, "Weight of a mixture of experts' load-balancing loss. Default: the model's own."
    )

    # Accepted from TRL, see WITHOUT_MEANING
    padding_free: bool = _option(False, "TRL's, without meaning here.")
    pad_to_multiple_of: int | str | None = _option("auto", "TRL's, without meaning here.")
    pad_token: str | None = _option(None, "TRL's, without meaning here.")
    precompute_ref_batch_size: int | None = _option(None, "TRL's, without meaning here.")

    # transformers parses only JSON dictionaries of its own fields; this list makes it parse ours.
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "curriculum", "model_init_kwargs"]  # noqa: RUF012

    def __new__(cls, *_, **options):
        for name in REMOVED.keys() & options.keys():
            raise UserError(f"{name} is no option any more: {REMOVED[name]}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self.loss_type = loss_names(self.loss_type)
        self.share_prompts = str(self.share_prompts).lower()  # YAML reads true and false as booleans
        self._check_values()
        self._check_loss(self.build_loss())
        self._check_batches()
        self._check_parallelism()
        without_meaning = self._changed(WITHOUT_MEANING)  # transformers sets a few of them itself
        if self.bf16 is None:
            self.bf16 = not (self.fp16 or self.use_cpu) and _has_bf16()
        with user_error():  # transformers' own checks
            super().__post_init__()
        if self.fp16 and self.device.type == "cpu":
            raise UserError("fp16=true needs a GPU: a CPU would compute in fp32 instead; set bf16, or leave it out")
        if self.curriculum is not None:
            Curriculum.parse(self.curriculum)
            if self.train_sampling_strategy != "random":
                raise UserError("curriculum decides the order of rows: leave train_sampling_strategy at random")
        self._check_accelerator_config()
        for name in without_meaning:
            if self.process_index == 0 and getattr(self, name) is not None:
                logger.warning(f"{name}={getattr(self, name)} has no meaning here: {WITHOUT_MEANING[name]}")

    @property
    def device(self) -> torch.device:
        """As transformers has it, but a CPU without the rank's number, for which no checkpoint can be read."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    def build_loss(self) -> Loss:
        """The configured built-in loss, or sum of losses, with its options bound."""
        return build_loss(
            self.loss_type,
            self.loss_weights,
            ld_alpha=self.ld_alpha,
            f_divergence_type=self.f_divergence_type,
            f_alpha_divergence_coef=self.f_alpha_divergence_coef,
            use_weighting=self.use_weighting,
            **{name: getattr(self, name) for loss in self.loss_type for name in _options_of(loss)},
        )

    def _check_values(self) -> None:
        _one_of("truncation_mode", self.truncation_mode, get_args(TruncationMode))
        if self.train_sampling_strategy not in ("random", "sequential"):
            raise UserError(
                f"train_sampling_strategy='{self.train_sampling_strategy}': packed batches are random or sequential; to"
                " even out lengths set max_tokens_per_batch"
            )
        _one_of("ranked_pairs", self.ranked_pairs, get_args(RankedPairs))
        _one_of("share_prompts", self.share_prompts, ("auto", "true", "false"))
        _one_of("head_mode", self.head_mode, ("auto", "general"))
        _one_of("attention_backend", self.attention_backend, BACKENDS)
        for name in ("max_length", "max_tokens_per_batch", "head_memory_mb", "ref_model_sync_steps", "discopop_tau"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name}={value}: must be positive, or not set")
        for name in ("ld_alpha", "ref_model_mixup_alpha"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"{name}={value}: must lie in [0, 1]")

    def _check_loss(self, loss: Loss) -> None:
        """What does not go together among the options of the loss and of its reference, or would be ignored."""
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing={self.label_smoothing}: a flip probability must lie in [0, 0.5)")
        if "exo_pair" in self.loss_type and self.label_smoothing == 0:
            raise UserError("loss_type 'exo_pair' needs label_smoothing above 0: its paper has 1e-3")
        every_option = {name for other in LOSSES for name in loss_options(other)} - {"beta"}  # a factor of rewards
        taken = {name for one in self.loss_type for name in loss_options(one)}
        if given := self._changed(sorted(every_option - taken)):
            raise UserError(f"{given[0]} has no meaning for loss_type '{loss.name}': leave it out")
        if self.f_divergence_type != "alpha_divergence" and self._changed(["f_alpha_divergence_coef"]):
            raise UserError("f_alpha_divergence_coef has no meaning without f_divergence_type=alpha_divergence")
        if self.sync_ref_model and not loss.needs_reference:
            raise UserError(f"sync_ref_model has no meaning for loss_type '{loss.name}', which has no reference")
        if self.sync_ref_model and self.precompute_ref_log_probs:
            raise UserError(
                "sync_ref_model=true moves the reference, so its log-probs cannot be precomputed: leave out one of"
                " sync_ref_model and precompute_ref_log_probs"
            )
        if not self.sync_ref_model and (given := self._changed(["ref_model_mixup_alpha", "ref_model_sync_steps"])):
            raise UserError(f"{given[0]} has no meaning without sync_ref_model=true")

    def _check_batches(self) -> None:
        """What does not go together with a budget of tokens."""
        if self.auto_find_batch_size and self.max_tokens_per_batch is not None:
            raise UserError(
                "auto_find_batch_size halves per_device_train_batch_size, which max_tokens_per_batch replaces: leave"
                " out one of them"
            )
        if self.dataloader_drop_last and self.max_tokens_per_batch is not None:
            raise UserError(
                "dataloader_drop_last has no effect with max_tokens_per_batch, which spreads the last rows evenly:"
                " leave it out"
            )

    def _check_parallelism(self) -> None:
        sharded = {name: getattr(self.parallelism_config, f"{name}_size", 1) for name in ("tp", "cp", "sp")}
        if self.parallelism_config is not None and max(sharded.values()) > 1:
            raise UserError(
                "parallelism_config: tensor, context and sequence parallelism would cut packed rows, and are not"
                " supported; use FSDP or DeepSpeed"
            )
        if self.deepspeed and find_spec("deepspeed") is None:
            raise UserError("deepspeed needs the deepspeed package: pip install deepspeed")

    def _check_accelerator_config(self) -> None:
        """Complain of what is about accelerate's loaders, in whose place are ours."""
        if self.accelerator_config.split_batches:
            raise UserError(
                "accelerator_config: split_batches would cut packed batches; leave it out, and divide"
                " per_device_train_batch_size by the number of processes"
            )
        for name, (value, reason) in _OF_LOADERS.items():
            if getattr(self.accelerator_config, name) is value and self.process_index == 0:
                logger.warning(f"{name}={value} of accelerator_config has no meaning here: {reason}")

    def _changed(self, names: Iterable[str]) -> list[str]:
        """Those of the options ``names`` that are not at their default."""
        return [name for name in names if getattr(self, name) != default_of(self.__dataclass_fields__[name])]


def _has_bf16() -> bool:
    """Whether there is a GPU that computes in bf16; those before Ampere emulate it, which is slower than fp32."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


def default_of(option: Field) -> Any:
    """The default of a dataclass's field."""
    return option.default if option.default_factory is MISSING else option.default_factory()


def _options_of(loss: str) -> list[str]:
    return loss_options(loss) if loss in LOSSES else []  # an unknown one is build_loss's to complain of


def _one_of(name: str, value: str, allowed) -> None:
    if value not in allowed:
        raise UserError(f"{name}='{value}' is unknown: choose one of {', '.join(allowed)}")
