"""Models and tokenizers as users give them -> models ready to be trained."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import deepspeed

from ..config import REMOVED, ContrastiveConfig
from ..errors import UserError
from ..losses import Loss
from .packed_model import base_model

logger = logging.getLogger(__name__)

_FSDP_EFFICIENT = "FSDP_CPU_RAM_EFFICIENT_LOADING"
# In PEFT's names of parameters that start from values of the model.
_WHOLE = ("lora_magnitude_vector", ".modules_to_save.", "trainable_tokens_delta")
# Methods that TRL's trainer calls, or called once, and this one does not, and what does their work.
NEVER_CALLED = {
    **dict.fromkeys(("_compute_loss", "get_batch_loss_metrics", "concatenated_forward"), "override compute_loss"),
    "dpo_loss": "pass a function of PairLogps as loss, or override compute_loss",
    "tokenize_row": "override _prepare_dataset",
    "_precompute_ref_logps": "override compute_ref_log_probs",
    "_get_train_sampler": "set train_sampling_strategy=sequential or a curriculum, or override get_train_dataloader",
    "_get_eval_sampler": "override get_eval_dataloader",
}


def check_moved(names: Iterable[str]) -> None:
    """Raise ValueError for arguments that TRL's constructor had once, TypeError for what was never one."""
    options = ContrastiveConfig.__dataclass_fields__
    for name in names:
        if name == "tokenizer":
            raise UserError("tokenizer is no argument any more: pass it as processing_class")
        if name in REMOVED:
            raise UserError(f"{name} is no argument any more: {REMOVED[name]}")
        if name not in options:
            raise TypeError(f"the trainer has no argument {name}")
        raise UserError(f"{name} is no argument any more: set it in args=DPOConfig({name}=...)")


def check_overrides(given: type, base: type) -> None:
    """Raise ValueError where ``given``, a trainer derived from ``base``, has a method that only TRL's calls."""
    for name, mend in NEVER_CALLED.items():
        if getattr(given, name, None) is not getattr(base, name, None):
            raise UserError(
                f"{given.__name__}.{name} would not be called by the trainer: {mend}; rename it if you call it yourself"
            )


def checked_config(
    model: str | nn.Module, args: ContrastiveConfig | None, evaluation_sets: Any = None
) -> ContrastiveConfig:
    """The configuration of a trainer, by default one with an ``output_dir`` after the model.

    Raises:
        UserError: it is another package's, or chooses the best checkpoint by what no evaluation set has.
    """
    if args is None:
        name = model if isinstance(model, str) else model.config._name_or_path
        return ContrastiveConfig(f"{Path(name).name or 'model'}-CPT")
    if not isinstance(args, ContrastiveConfig):
        raise UserError(f"args is a {type(args).__name__} of {type(args).__module__}: import it from cpt_kernels, too")
    _check_best_metric(args, evaluation_sets)
    return args


def _check_best_metric(args: ContrastiveConfig, evaluation_sets: Any) -> None:
    metric = args.metric_for_best_model
    if metric is None or args.eval_strategy == "no" or not isinstance(evaluation_sets, dict):
        return
    name = metric.removeprefix("eval_")
    if not name.startswith(tuple(f"{evaluation_set}_" for evaluation_set in evaluation_sets)):
        raise UserError(
            f"metric_for_best_model={metric} is of no evaluation set: with several, metrics carry their set's name;"
            f" set {next(iter(evaluation_sets))}_{name}"
        )


def check_engine(args: ContrastiveConfig, accelerator: Accelerator) -> None:
    """Raise ValueError where one process would train on several GPUs, or FSDP's first version would shard."""
    if accelerator.distributed_type == DistributedType.FSDP and accelerator.state.fsdp_plugin.fsdp_version == 1:
        raise UserError("FSDP1 is not supported: set fsdp_version to 2 in accelerate's file, or version in fsdp_config")
    if args.n_gpu > 1:
        raise UserError(
            f"{args.n_gpu} GPUs are visible to one process, and DataParallel is not supported: start with"
            " accelerate launch or torchrun, or set CUDA_VISIBLE_DEVICES to one of them"
        )


def checked_tokenizer(processing_class: Any) -> PreTrainedTokenizerBase:
    """The tokenizer that a user passed, or that of a processor of a model which sees images, too."""
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UserError(f"processing_class is {type(processing_class).__name__}, expected a tokenizer")
    return tokenizer


def load_tokenizer(model: str | nn.Module, args: ContrastiveConfig) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model, of the revision that ``model_init_kwargs`` name.

    Raises:
        UserError: the model has no name, as it was made and not loaded.
    """
    if not isinstance(model, str):
        if not (name := model.config._name_or_path):
            raise UserError("the model was loaded from nowhere, so its tokenizer is not known: pass processing_class")
        return AutoTokenizer.from_pretrained(name, trust_remote_code=args.trust_remote_code)
    revision = _init_kwargs(args).get("revision") or "main"
    return AutoTokenizer.from_pretrained(model, revision=revision, trust_remote_code=args.trust_remote_code)


def load_models(
    model: str | nn.Module, ref_model: str | nn.Module | None, args: ContrastiveConfig, quantization_config: Any = None
) -> tuple[nn.Module, nn.Module | None]:
    """Policy and reference; what is given by name or folder is loaded.

    Raises:
        UserError: ``quantization_config`` without a model to load, or twice; weights that both models have; different
            vocabularies.
    """
    if not isinstance(model, str):
        if quantization_config is not None:
            raise UserError("quantization_config is for a model given by name, not for one that is loaded already")
        if args.model_init_kwargs and not isinstance(ref_model, str):
            logger.warning("model_init_kwargs has no effect: the model is loaded already")
    models = tuple(load_model(m, args, quantization_config) if isinstance(m, str) else m for m in (model, ref_model))
    check_vocabularies(*models)
    check_apart(*models)
    return models


def _init_kwargs(args: ContrastiveConfig) -> dict[str, Any]:
    return dict(args.model_init_kwargs or {})


def load_model(name: str, args: ContrastiveConfig, quantization_config: Any = None) -> nn.Module:
    """A model by name or folder, in fp32 unless ``model_init_kwargs`` says otherwise."""
    kwargs = _init_kwargs(args)
    kwargs.setdefault("dtype", torch.float32)
    kwargs.setdefault("trust_remote_code", args.trust_remote_code)
    if quantization_config is not None:
        if "quantization_config" in kwargs:
            raise UserError("quantization_config is given to the trainer and in model_init_kwargs: leave one out")
        kwargs["quantization_config"] = quantization_config
    if args.world_size > 1 and kwargs.pop("device_map", None) is not None and args.process_index == 0:
        logger.warning("device_map has no effect on several processes: each has the whole model, or its engine's shard")
    with whole_weights():
        return AutoModelForCausalLM.from_pretrained(name, **kwargs)


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


def wrap_in_adapter(model: nn.Module, peft_config: Any, args: ContrastiveConfig) -> nn.Module:
    """A PEFT model around ``model``.

    Raises:
        UserError: peft is not installed, it is no PEFT configuration, or the model has an adapter already.
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
    # ZeRO-3 gathers into buffers of one dtype: an adapter in fp32 beside weights in bf16 would fail.
    cast = zero_stage(args) != 3 or _is_quantised(model)
    return get_peft_model(model, peft_config, autocast_adapter_dtype=cast)


def check_trainable(model: nn.Module) -> None:
    """Raise ValueError where no weight of a model would be trained."""
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise UserError(
            "the model's adapter is frozen: load it by peft.AutoPeftModelForCausalLM.from_pretrained(..., is_trainable="
            "True) and pass that, or merge it into its model and train a new one"
        )
    raise UserError("no weight of the model is to be trained: all of them have requires_grad=False")


def prepare_adapter(model: nn.Module, args: ContrastiveConfig) -> None:
    """What training of an adapter needs; it is what TRL does."""
    if args.gradient_checkpointing:
        if zero_stage(args) == 3:  # it frees what a recomputation that is not reentrant looks at
            args.gradient_checkpointing_kwargs = (args.gradient_checkpointing_kwargs or {}) | {"use_reentrant": True}
        model.enable_input_require_grads()
    cast_adapter(model)


def cast_adapter(model: nn.Module) -> None:
    """Adapters of quantised weights to bf16 (QLoRA, arXiv 2305.14314, §3); PEFT makes and loads them in fp32.

    What starts from values of the model stays as it is: bf16 would round these, and lose small steps.
    """
    if _is_quantised(model):
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not any(part in name for part in _WHOLE):
                parameter.data = parameter.data.to(torch.bfloat16)


def zero_stage(state: ContrastiveConfig | AcceleratorState) -> int | None:
    """DeepSpeed's stage of sharding, None without DeepSpeed."""
    return None if state.deepspeed_plugin is None else state.deepspeed_plugin.zero_stage


def _is_quantised(model: nn.Module) -> bool:
    return getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)


def check_vocabularies(model: nn.Module, ref_model: nn.Module | None) -> None:
    """Raise ValueError where policy and reference have different vocabularies: their log-probs are of other things."""
    if ref_model is None:
        return
    policy, reference = (base_model(m).config.get_text_config().vocab_size for m in (model, ref_model))
    if policy != reference:
        raise UserError(
            f"the reference has a vocabulary of {reference} tokens, the policy of {policy}: use a reference of the"
            " policy's family and tokenizer"
        )


def check_apart(model: nn.Module, ref_model: nn.Module | None) -> None:
    """Raise ValueError where policy and reference have weights in common, as an adapter has with the model in it."""
    ours = {id(parameter) for parameter in model.parameters()}
    if ref_model is not None and any(id(parameter) in ours for parameter in ref_model.parameters()):
        raise UserError("model and ref_model are the same weights: leave ref_model out to take those of the start")


def check_data(loss: Loss, dataset: Dataset, pairs: int, name: str) -> None:
    """Raise ValueError where a prepared dataset lacks what a loss needs of its pairs."""
    if loss.needs_rejected and not pairs:
        raise UserError(
            f"loss '{loss.name}' needs pairs, and the {name} data has none: give rows with chosen and rejected, or set"
            " loss_type=sft"
        )
    if loss.needs_gap and not all(dataset["scores"]):
        row = next(row["row"] for row in dataset if not row["scores"])
        raise UserError(
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


def may_share_prompts(model: nn.Module, ref_model: nn.Module | None, args: ContrastiveConfig) -> bool:
    """Whether completions may share their prompt, once dropout is as ``args`` want it.

    Raises:
        UserError: they shall, and there is dropout or noise.
    """
    if args.disable_dropout:
        disable_dropout(model)
        disable_dropout(ref_model)
    random = args.neftune_noise_alpha is not None or dropout(model) > 0
    if args.share_prompts == "true" and random:
        raise UserError(
            "share_prompts=true with dropout or NEFTune's noise would give all completions of a prompt the same: set"
            " disable_dropout=true and leave out neftune_noise_alpha, or set share_prompts=false"
        )
    return args.share_prompts == "true" or (args.share_prompts == "auto" and not random)


def aux_loss_coef(model: PreTrainedModel, option: float | None) -> float:
    """Weight of a mixture of experts' load-balancing loss: the option, or else the model's own; 0 for a dense model.

    Raises:
        UserError: the option is set, and the model has no such loss.
    """
    config = model.config.get_text_config()
    if not hasattr(config, "output_router_logits"):
        if option:
            raise UserError(f"router_aux_loss_coef={option}: {type(model).__name__} is no mixture of experts")
        return 0.0
    return getattr(config, "router_aux_loss_coef", 0.0) if option is None else option


_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")


def check_checkpoint(folder: str | Path, model: nn.Module) -> None:
    """Raise ValueError where a checkpoint to resume from is missing, or is of another model."""
    folder = Path(folder)
    adapter = hasattr(model, "peft_config")
    file = folder / ("adapter_config.json" if adapter else "config.json")
    if not file.is_file():
        raise UserError(
            f"{folder} is not a checkpoint of this {'adapter' if adapter else 'model'}: it has no {file.name}"
        )
    if adapter:
        return
    saved = PretrainedConfig.from_dict(json.loads(file.read_text())).get_text_config()
    config = base_model(model).config.get_text_config()
    for name in _SHAPE:
        ours, theirs = getattr(config, name, None), getattr(saved, name, None)
        if ours != theirs:
            raise UserError(f"{folder} is a checkpoint of another model: its {name} is {theirs}, this model's {ours}")
