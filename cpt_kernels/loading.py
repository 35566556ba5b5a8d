"""Models and tokenizers as users give them -> models ready to be trained."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations import deepspeed

from .config import ContrastiveConfig
from .losses import Loss
from .model import base_model
from .weight_files import load

logger = logging.getLogger(__name__)

_FSDP_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def load_model(model: str | nn.Module, args: ContrastiveConfig, quantization_config: Any = None) -> nn.Module:
    """The model itself, or one loaded by name or folder; in fp32 unless ``model_init_kwargs`` says otherwise.

    Raises:
        ValueError: options for loading a model that is loaded already.
    """
    if not isinstance(model, str):
        if quantization_config is not None or args.model_init_kwargs:
            raise ValueError(
                "quantization_config and model_init_kwargs are for models given by name, not for loaded ones"
            )
        return model
    kwargs = dict(args.model_init_kwargs or {})
    kwargs.setdefault("dtype", torch.float32)
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    if quantization_config is not None:
        kwargs["quantization_config"] = quantization_config
    with whole_weights():
        return load(AutoModelForCausalLM, model, **kwargs)


@contextlib.contextmanager
def whole_weights() -> Iterator[None]:
    """Load all weights on every process, where transformers would shard them (ZeRO-3) or load them on the first alone
    (FSDP): the reference is identified and scores before the engine shards the model.
    """
    zero3, efficient = deepspeed._hf_deepspeed_config_weak_ref, os.environ.get(_FSDP_EFFICIENT)
    deepspeed.unset_hf_deepspeed_config()
    os.environ[_FSDP_EFFICIENT] = "false"
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = zero3
        if efficient is None:
            del os.environ[_FSDP_EFFICIENT]
        else:
            os.environ[_FSDP_EFFICIENT] = efficient


def wrap_in_adapter(model: nn.Module, peft_config: Any) -> nn.Module:
    """A PEFT model around ``model``.

    Raises:
        ValueError: peft is not installed, or the model has an adapter already.
    """
    try:
        from peft import get_peft_model
    except ImportError as error:
        raise ValueError("peft_config needs the peft package: pip install peft") from error
    if hasattr(model, "peft_config"):
        raise ValueError("the model has an adapter already: leave peft_config out, or merge the adapter first")
    return get_peft_model(model, peft_config)


def check_vocabularies(model: nn.Module, ref_model: nn.Module | None) -> None:
    """Raise ValueError where policy and reference have different vocabularies: their log-probs are of other things."""
    if ref_model is None:
        return
    policy, reference = (base_model(m).config.get_text_config().vocab_size for m in (model, ref_model))
    if policy != reference:
        raise ValueError(
            f"the reference has a vocabulary of {reference} tokens, the policy of {policy}: use a reference of the"
            " policy's family and tokenizer"
        )


def check_data(loss: Loss, dataset: Dataset, pairs: int, name: str) -> None:
    """Raise ValueError where a prepared dataset lacks what a loss needs of its pairs."""
    if loss.needs_rejected and not pairs:
        raise ValueError(
            f"loss '{loss.name}' needs pairs, and the {name} data has none: give rows with chosen and rejected, or set"
            " loss_type=sft"
        )
    if loss.needs_gap and not all(dataset["scores"]):
        row = next(row["row"] for row in dataset if not row["scores"])
        raise ValueError(
            f"loss '{loss.name}' needs by how much chosen is better, and row {row} of the {name} data does not say, or"
            " says that it is not: name a column by gap_column, or give ranked rows with scores"
        )


def dropout(model: nn.Module) -> float:
    """The largest dropout probability in a model."""
    modules = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    attention = [p for module in model.modules() if isinstance(p := getattr(module, "attention_dropout", 0.0), float)]
    return max([*modules, *attention], default=0.0)


def disable_dropout(model: nn.Module | None) -> None:
    """Set every dropout probability to 0: of modules, and of attentions that keep theirs as a number."""
    for module in model.modules() if model is not None else ():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0


def aux_loss_coef(model: PreTrainedModel, option: float | None) -> float:
    """Weight of a mixture of experts' load-balancing loss: the option, or else the model's own; 0 for a dense model.

    Raises:
        ValueError: the option is set, and the model has no such loss.
    """
    config = model.config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        if option:
            raise ValueError(f"router_aux_loss_coef={option}: {type(model).__name__} is no mixture of experts")
        return 0.0
    return getattr(config, "router_aux_loss_coef", 0.0) if option is None else option


_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")


def check_checkpoint(folder: str | Path, model: nn.Module) -> None:
    """Raise ValueError where a checkpoint to resume from is missing, or is of another model."""
    folder = Path(folder)
    adapter = hasattr(model, "peft_config")
    file = folder / ("adapter_config.json" if adapter else "config.json")
    if not file.is_file():
        raise ValueError(
            f"{folder} is not a checkpoint of this {'adapter' if adapter else 'model'}: it has no {file.name}"
        )
    if adapter:
        return
    saved = PretrainedConfig.from_dict(json.loads(file.read_text())).get_text_config()
    config = base_model(model).config.get_text_config()
    for name in _SHAPE:
        ours, theirs = getattr(config, name, None), getattr(saved, name, None)
        if ours != theirs:
            raise ValueError(f"{folder} is a checkpoint of another model: its {name} is {theirs}, this model's {ours}")
