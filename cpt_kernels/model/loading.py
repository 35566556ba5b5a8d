"""Loads models and tokenizers, wraps models in adapters and prepares them for training."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import nn
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase, ProcessorMixin
from transformers.integrations import deepspeed

from ..config import ContrastiveConfig
from ..data.stores import local_folder
from ..errors import UserError, user_error
from .pretrained import load_pretrained
from .sharding import prepare_for_adapter, return_freed_memory, sliced_loading, uses_fsdp

logger = logging.getLogger(__name__)

_FSDP_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"
# Parts of PEFT's names of parameters that are initialized from the model's own values.
_FROM_MODEL = ("lora_magnitude_vector", ".modules_to_save.", "trainable_tokens_delta")
# Kinds of adapters that add a term to the loss of a model that is given labels: the weight of the term, and a notice.
_OWN_LOSSES = {
    "ADALORA": ("orth_reg_weight", "; the rank stays init_r unless a callback calls update_and_allocate"),
    "SHADOW": ("auxiliary_loss_weight", ""),
}


def tokenizer_of(
    model: str | nn.Module, args: ContrastiveConfig, images: bool = False
) -> PreTrainedTokenizerBase | ProcessorMixin:
    """Loads the tokenizer of a model; a model given by name has the revision of ``args.model_init_kwargs``.

    Args:
        images: load the processor of prompts with images in place of the tokenizer.

    Raises:
        UserError: the model was built in memory, so no name or folder leads to its tokenizer.
    """
    auto: Any = AutoProcessor if images else AutoTokenizer
    if not isinstance(model, str):
        if not (name := model.config._name_or_path):
            kind = "processor" if images else "tokenizer"
            raise UserError(f"the model has no name to load its {kind} from: pass the {kind} as processing_class")
        return auto.from_pretrained(local_folder(name), trust_remote_code=args.trust_remote_code)
    revision = _init_kwargs(args).get("revision") or "main"
    return auto.from_pretrained(local_folder(model), revision=revision, trust_remote_code=args.trust_remote_code)


def load_models(
    model: str | nn.Module, ref_model: str | nn.Module | None, args: ContrastiveConfig, quantization_config: Any = None
) -> tuple[nn.Module, nn.Module | None]:
    """Returns policy and reference; those given by name or folder are loaded. A policy's adapter may be trained.

    Raises:
        UserError: ``quantization_config`` for a policy that is loaded already, or given twice.
    """
    if not isinstance(model, str):
        if quantization_config is not None:
            raise UserError(
                "quantization_config is for a model given by name, and this one is loaded already: leave it out"
            )
        if args.model_init_kwargs and not isinstance(ref_model, str):
            logger.warning("model_init_kwargs has no effect: the model is loaded already")
    if isinstance(model, str):
        model = load_model(model, args, quantization_config, trainable=True, for_engine=True)
    if isinstance(ref_model, str):
        ref_model = load_model(ref_model, args, quantization_config, for_engine=True)
    return model, ref_model


def _init_kwargs(args: ContrastiveConfig) -> dict[str, Any]:
    return dict(args.model_init_kwargs or {})


def load_model(
    name: str,
    args: ContrastiveConfig,
    quantization_config: Any = None,
    *,
    trainable: bool = False,
    for_engine: bool = False,
) -> nn.Module:
    """Loads a model or an adapter by name or folder with ``args.model_init_kwargs``; the default dtype is fp32.

    Args:
        trainable: whether the parameters of an adapter require gradients.
        for_engine: load what the engine of the run needs of the weights, see :func:`engine_weights`; default all.

    Raises:
        UserError: ``quantization_config`` is also in ``model_init_kwargs``, or weights are missing or left over.
    """
    kwargs = _init_kwargs(args)
    kwargs.setdefault("dtype", torch.float32)
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    if quantization_config is not None:
        if "quantization_config" in kwargs:
            raise UserError(
                "quantization_config is given to the trainer and in model_init_kwargs: set only one of the two"
            )
        kwargs["quantization_config"] = quantization_config
    if args.world_size > 1 and kwargs.pop("device_map", None) is not None and args.process_index == 0:
        logger.warning("device_map has no effect on several processes: each holds the whole model or its shard")
    with engine_weights(args, is_whole=not for_engine or "quantization_config" in kwargs):
        return load_pretrained(name, trainable=trainable, **kwargs)


@contextlib.contextmanager
def engine_weights(args: ContrastiveConfig, *, is_whole: bool = False) -> Iterator[None]:
    """Makes ``from_pretrained`` load as the engine of a run needs it; all processes must load together.

    FSDP2: each process reads its slices, see :mod:`.sharding`. ZeRO-3: DeepSpeed partitions the weights while
    transformers loads them. Else, and with ``is_whole``, each process loads all weights.
    """
    return_freed_memory(args)
    if zero_stage(args) == 3 and not is_whole:
        yield
        return
    with whole_weights(), sliced_loading() if uses_fsdp(args) and not is_whole else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def whole_weights() -> Iterator[None]:
    """Makes ``from_pretrained`` load all weights on every process, also under ZeRO-3 and FSDP.

    By default transformers shards them while loading (ZeRO-3) or loads them on the first process only (FSDP).
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


def wrap_in_adapter(model: nn.Module, peft_config: Any, args: ContrastiveConfig) -> nn.Module:
    """Returns a PEFT model around ``model``.

    Raises:
        UserError: peft is not installed, ``peft_config`` is not a PEFT configuration or trains prompt tokens, or the
            model has an adapter already.
    """
    try:
        from peft import PeftConfig, get_peft_model
    except ImportError as error:
        raise UserError("peft_config needs the peft package: pip install peft") from error
    if not isinstance(peft_config, PeftConfig):
        raise UserError(f"peft_config is {type(peft_config).__name__}: expected one of peft, such as peft.LoraConfig")
    if hasattr(model, "peft_config"):
        raise UserError("the model has an adapter already: leave peft_config out, or merge the adapter first")
    if peft_config.is_prompt_learning:
        kind = type(peft_config).__name__
        raise UserError(f"{kind} adds tokens to prompts, which packed rows do not support: use LoRA")
    init = str(getattr(peft_config, "init_lora_weights", ""))
    if init.startswith("pissa_niter"):
        raise UserError(
            f"init_lora_weights={init} changes the base weights at random, so the saved adapter would not fit a base"
            " model that is loaded again: set init_lora_weights=pissa"
        )
    # ZeRO-3 gathers parameters into buffers of one dtype, so an fp32 adapter beside bf16 weights would fail.
    cast = zero_stage(args) != 3 or is_quantised(model)
    prepare_for_adapter(model, peft_config)
    # Such as target modules that the model does not have. PEFT refuses some kinds of layers by TypeError and others.
    with user_error("peft_config", (Exception,)), warnings.catch_warnings():
        # PEFT 0.21 reads a name that transformers 5.24 deprecates, which is nothing that the user could change.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, peft_config, autocast_adapter_dtype=cast)


def prepare_model(model: nn.Module, args: ContrastiveConfig, peft_config: Any = None) -> nn.Module:
    """Returns the policy ready to train, in a new adapter if there is a ``peft_config``."""
    if peft_config is not None:
        model = wrap_in_adapter(model, peft_config, args)
    if hasattr(model, "peft_config"):
        prepare_adapter(model, args)
    return model


def prepare_adapter(model: nn.Module, args: ContrastiveConfig) -> None:
    """Prepares a PEFT model for training as TRL does: checkpointing reaches the adapter, QLoRA trains in bf16.

    Raises:
        UserError: gradient checkpointing for aLoRA or X-LoRA.
    """
    configs = getattr(model, "peft_config", {}).values()
    for kind, (name, notice) in _OWN_LOSSES.items():
        if any(config.peft_type == kind and getattr(config, name) for config in configs):
            logger.warning("%s of the %s adapter has no effect on preference losses%s", name, kind, notice)
    # Both give layers values by hooks. These are gone when a layer is recomputed, or stay if no backward follows.
    has_hooks = any(c.peft_type == "XLORA" or getattr(c, "alora_invocation_tokens", None) for c in configs)
    if has_hooks and args.chooses_checkpointing:
        args.gradient_checkpointing = False
    if args.gradient_checkpointing:
        if has_hooks:
            raise UserError(
                "aLoRA and X-LoRA do not work with gradient checkpointing: set gradient_checkpointing=false"
            )
        if zero_stage(args) == 3:  # non-reentrant recomputation would read parameters that ZeRO-3 has freed
            args.gradient_checkpointing_kwargs = (args.gradient_checkpointing_kwargs or {}) | {"use_reentrant": True}
        model.enable_input_require_grads()
    cast_adapter(model)


def cast_adapter(model: nn.Module) -> None:
    """Casts the adapter of a quantised model to bf16 (QLoRA, arXiv 2305.14314, §3); PEFT makes and loads it in fp32.

    Parameters that start from the model's own values keep their dtype: bf16 would round those values, and later the
    small updates to them.
    """
    if is_quantised(model):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not any(part in name for part in _FROM_MODEL):
                parameter.data = parameter.data.to(torch.bfloat16)


def zero_stage(state: ContrastiveConfig | AcceleratorState) -> int | None:
    """Returns the ZeRO stage, ``None`` without DeepSpeed."""
    return None if state.deepspeed_plugin is None else state.deepspeed_plugin.zero_stage


def is_quantised(model: nn.Module) -> bool:
    """Whether bitsandbytes has quantized a model's weights."""
    return getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)
