"""Options of a training run: transformers' ``TrainingArguments`` and what contrastive post-training adds.

Names and defaults are those of TRL's ``DPOConfig`` where it has the option.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TrainingArguments

from .data.curriculum import Curriculum
from .losses import LOSSES, Loss, build_loss, loss_options
from .ops.attention_backends import BACKENDS


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class ContrastiveConfig(TrainingArguments):
    """Configuration of a :class:`ContrastiveTrainer`.

    Defaults that differ from ``TrainingArguments``: ``learning_rate`` 1e-6, ``logging_steps`` 10,
    ``gradient_checkpointing`` on, bf16 where an accelerator supports it.

    Raises:
        ValueError: an unknown value of one of the options below.
    """

    learning_rate: float = _option(1e-6, "The initial learning rate.")
    logging_steps: float = _option(10, "Log every so many optimizer steps; below 1, a share of all steps.")
    gradient_checkpointing: bool = _option(True, "Recompute activations in the backward to save memory.")
    bf16: bool | None = _option(
        None, "Mixed precision in bf16. Default: on where an accelerator supports it and fp16 is off."
    )

    # Loss
    loss_type: str = _option("sigmoid", f"Loss over pairs: {', '.join(LOSSES)}.")
    beta: float = _option(0.1, "Weight of the reference: beta of DPO and RSO, tau of IPO.")
    label_smoothing: float = _option(0.0, "Probability that a label is flipped (conservative DPO).")
    slic_delta: float = _option(1.0, "Margin of SLiC, in nats.")
    slic_lambda: float = _option(1.0, "Weight of SLiC's regulariser, -log p(y_ref).")
    slic_length_normalize: bool = _option(False, "SLiC on log-probs per token instead of per completion.")

    # Data
    max_length: int | None = _option(1024, "Longest prompt + completion in tokens; what is beyond is cut off.")
    truncation_mode: str = _option("keep_start", "What a cut keeps: keep_start or keep_end.")
    target_column: str | None = _option(None, "Column of y_ref for SLiC's regulariser. Default: the chosen completion.")
    ranked_pairs: str = _option("all", "Pairs of a row with K ranked completions: all, adjacent or extremes.")
    dataset_num_proc: int | None = _option(None, "Processes that tokenise.")
    curriculum: dict | str | None = _option(
        None, "Order by difficulty: schedule, levels, ...; recipes/curriculum.yaml explains them. Default: shuffled."
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
    head_mode: str = _option("auto", "auto, or general: token log-probs stay differentiable (one more matrix product).")

    # Attention
    attention_backend: str = _option(
        "auto", "Attention of packed rows: auto, flash_attn or varlen (CUDA, one call for all), sdpa or eager."
    )

    # Reference
    precompute_ref_log_probs: bool | None = _option(
        None, "Score all data by the reference before training. Default: yes, except for streams."
    )
    ref_cache_dir: str | None = _option(None, "Where reference log-probs are kept. Default: the user's cache folder.")

    # Model
    model_init_kwargs: dict | str | None = _option(
        None, "Keyword arguments of from_pretrained, for models given by name."
    )
    trust_remote_code: bool = _option(False, "Allow code from a model's repository.")
    disable_dropout: bool = _option(True, "Switch dropout off in policy and reference.")
    router_aux_loss_coef: float | None = _option(
        None, "Weight of a mixture of experts' load-balancing loss. Default: the model's own."
    )

    # transformers parses only JSON dictionaries of its own fields; this list makes it parse ours.
    _VALID_DICT_FIELDS = [*TrainingArguments._VALID_DICT_FIELDS, "curriculum", "model_init_kwargs"]  # noqa: RUF012

    def __post_init__(self) -> None:
        _one_of("loss_type", self.loss_type, LOSSES)
        _one_of("truncation_mode", self.truncation_mode, ("keep_start", "keep_end"))
        _one_of("ranked_pairs", self.ranked_pairs, ("all", "adjacent", "extremes"))
        self.share_prompts = str(self.share_prompts).lower()  # YAML reads true and false as booleans
        _one_of("share_prompts", self.share_prompts, ("auto", "true", "false"))
        _one_of("head_mode", self.head_mode, ("auto", "general"))
        _one_of("attention_backend", self.attention_backend, BACKENDS)
        for name in ("max_length", "max_tokens_per_batch", "head_memory_mb"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value}: must be positive, or not set")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing={self.label_smoothing}: a flip probability must lie in [0, 0.5)")
        if self.label_smoothing and "label_smoothing" not in loss_options(self.loss_type):
            raise ValueError(f"label_smoothing has no meaning for loss_type '{self.loss_type}': leave it at 0")
        if self.bf16 is None:
            self.bf16 = not (self.fp16 or self.use_cpu) and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        super().__post_init__()
        if self.curriculum is not None:
            Curriculum.parse(self.curriculum)
            if self.train_sampling_strategy != "random":
                raise ValueError("curriculum decides the order of rows: leave train_sampling_strategy at random")

    def build_loss(self) -> Loss:
        """The configured built-in loss with its options bound."""
        return build_loss(self.loss_type, **{name: getattr(self, name) for name in loss_options(self.loss_type)})


def _one_of(name: str, value: str, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{name}='{value}' is unknown: choose one of {', '.join(allowed)}")
