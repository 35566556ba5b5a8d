"""Merges adapters into their base model and saves a whole model, which is proven to compute what they compute.

PEFT merges layer by layer. Where an embedding and a head share one weight, it adds both their adapters to that weight,
so each of the two gets the other's. Here the two are separated first, and shared again only if they end up equal.
"""

from __future__ import annotations

import re
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..data.stores import local_folder
from ..errors import UserError, user_error
from ..files import replacing_folder
from .adapters import marked_tokens
from .conditions import PinnedRouting
from .packed_model import base_model
from .pretrained import (
    BaseModel,
    SavedAdapters,
    active_adapters,
    find_adapters,
    find_base,
    load_pretrained,
    load_whole,
    stored_adapters,
)
from .proof import token_source

Dtype = Literal["auto", "bfloat16", "float16", "float32"]

_TOKENS = 32  # of the probe, beside those that an adapter is trained on
_ROUNDING = 128  # rounding moves a logit by up to so many epsilons of its size, beside the measured noise


@dataclass(frozen=True)
class Merged:
    """What a merge did."""

    base: BaseModel  # the base model
    adapters: Sequence[str]  # names of the merged adapters
    untied: bool  # whether the head got a weight of its own, because it differs from the embedding now
    # largest difference of a logit of the probe between the model with adapters and the merged one, both in fp32
    difference: float
    bound: float  # the largest difference that rounding explains
    dtype: torch.dtype  # of the saved weights
    rounding: float  # the same difference for the saved model, in its dtype


def merge_and_save(
    name: str,
    folder: Path,
    *,
    adapters: SavedAdapters,
    tokenizer: PreTrainedTokenizerBase | None,
    base: BaseModel | None = None,
    saved_dtype: Dtype = "auto",
    report: Callable[[str], object] = lambda line: None,
    **kwargs: Any,
) -> Merged:
    """Merges adapters into their base model in fp32, and saves the model; the folder appears only once it is proven.

    Args:
        name: folder or hub name of the adapters.
        folder: to write; it does not exist, or is empty.
        adapters: those to merge, from :func:`choose_adapters`.
        tokenizer: is saved with the model.
        base: the base model; default the one that the adapters name.
        saved_dtype: of the saved weights; auto is the dtype of the base model.
        report: is called with a line before each step that takes time.
        kwargs: of ``from_pretrained``, such as ``quantization_config`` and the dtype in which to quantize.

    Raises:
        UserError: the adapters cannot be loaded or merged, the merged model differs from them by more than rounding, or
            the folder cannot be written.
    """
    base = base or find_base(name, adapters)
    dtype = _saved_dtype(base, saved_dtype, kwargs)

    # Load and merge in fp32. The model with adapters is measured first, because merging changes its weights.
    report(f"loading {name} on {base.name}")
    kwargs.setdefault("dtype", torch.float32)
    loaded = load_pretrained(name, base=base, adapters=adapters, dequantize=True, **kwargs)
    model: Any = loaded.to("cpu", torch.float32)
    _check_space(model, dtype, folder)
    names = active_adapters(model)
    tokens = marked_tokens(model) + token_source(base_model(model))(_TOKENS)
    routing = PinnedRouting()
    with user_error(f"{name} cannot be merged"):  # such as adapters whose forward needs a task
        expected = _probe_logits(model, tokens, routing)
    noise = (_probe_logits(model, tokens, routing, rows=2) - expected).abs().max().item()
    bound = 2 * noise + _ROUNDING * torch.finfo(torch.float32).eps * (1 + expected.abs().max().item())
    report(f"merging {', '.join(names)}")
    merged, untied = merge_adapters(model, name)
    del model
    difference = (_probe_logits(merged, tokens, routing) - expected).abs().max().item()
    if not difference <= bound:
        raise UserError(
            f"{name} cannot be merged exactly: a logit of the merged model differs by {difference:.2g} from that of the"
            f" model with adapters, and rounding explains {bound:.2g}. Use the adapters without merging them"
        )

    # Save, and load what was saved: config and files must give the merged weights.
    _round(merged, dtype, name)
    with replacing_folder(folder) as temporary:
        report(f"writing {folder}")
        _write_model(merged, temporary, tokenizer)
        trust = {"trust_remote_code": kwargs.get("trust_remote_code", False)}
        saved: Any = load_whole(AutoModelForCausalLM, str(temporary), dtype=dtype, **trust)
        _check_saved(merged, saved, name)
        rounding = (_probe_logits(saved.eval(), tokens, routing) - expected).abs().max().item()
        if dtype == torch.float32 and not rounding <= bound:
            raise UserError(
                f"{name} cannot be saved as a whole model: a logit of the saved model differs by {rounding:.2g} from"
                f" that of the model with adapters, and rounding explains {bound:.2g}"
            )
    return Merged(base, names, untied, difference, bound, dtype, rounding)


def choose_adapters(name: str, names: Sequence[str] | None = None, **hub: Any) -> SavedAdapters:
    """Returns the adapters of a folder or hub repository that are to be merged: ``names``, else the active ones.

    Raises:
        UserError: there is no adapter, or none of a given name.
    """
    if names and Path(name).is_dir():
        found = stored_adapters(Path(name))
        if unknown := [adapter for adapter in names if adapter not in found]:
            raise UserError(f"{name} holds no adapter {unknown[0]}: choose from {', '.join(found) or 'none'}")
        return SavedAdapters({adapter: found[adapter] for adapter in names}, list(names))
    adapters = find_adapters(name, **hub)
    if adapters is None:
        raise UserError(f"{name} holds no adapter (adapter_config.json): name the folder of one")
    if names and list(names) != list(adapters.active):
        raise UserError(f"{name} holds the adapter {adapters.active[0]} alone: leave --adapters out")
    return adapters


# --- Merging ---


@torch.no_grad()
def merge_adapters(model: Any, name: str) -> tuple[PreTrainedModel, bool]:
    """Merges the active adapters of a PEFT model into its base model, in place.

    Args:
        name: of the adapters, for messages.

    Returns:
        The base model, and whether its head has a weight of its own now.

    Raises:
        UserError: PEFT cannot merge adapters of this kind.
    """
    if not hasattr(model.base_model, "merge_and_unload"):
        kind = str(model.peft_config[active_adapters(model)[0]].peft_type).rsplit(".", 1)[-1]
        raise UserError(f"{name} cannot be merged: adapters of the kind {kind} do not change weights")
    configs = (base_model(model).config, base_model(model).config.get_text_config())
    tied = any(getattr(config, "tie_word_embeddings", False) for config in configs)
    _untie(model)
    # PEFT refuses kinds of adapters and layers by exceptions of many types.
    with user_error(f"{name} cannot be merged", (Exception,)), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about tied weights, which are separate here
        merged = model.merge_and_unload(progressbar=True, safe_merge=True)
    return merged, tied and not _retie(merged)


def _untie(model: Any) -> None:
    """Gives every parameter below an adapter that other modules share a copy of its own."""
    places: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for path, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, key, path))
    # PEFT repeats layers by sharing their weights, which a saved model cannot.
    repeats = any(getattr(config, "layer_replication", None) for config in model.peft_config.values())
    for shared in places.values():
        if len(shared) > 1 and (repeats or any(path.endswith("base_layer") for *_, path in shared)):
            for module, key, _ in shared[1:]:
                parameter = module._parameters[key]
                module._parameters[key] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


def _retie(model: PreTrainedModel) -> bool:
    """Ties embedding and head again if they are equal, and writes into the configs whether they are. Returns that."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and torch.equal(head.weight, embedding.weight)
    if tied:
        head.weight = embedding.weight
    for config in (model.config, model.config.get_text_config()):
        config.tie_word_embeddings = tied
    return tied


# --- Measuring ---


@torch.no_grad()
def _probe_logits(model: nn.Module, tokens: Sequence[int], routing: PinnedRouting, rows: int = 1) -> Tensor:
    """Returns the logits (tokens, V) of the probe in fp32, of its first row if it is run in a batch."""
    with routing.follow([tokens] * rows, rows=rows):
        logits = model(input_ids=torch.tensor([tokens] * rows), use_cache=False).logits[0].float()
    if not logits.isfinite().all():
        raise UserError(f"logits of {type(base_model(model)).__name__} are not finite: the model cannot be merged")
    return logits


# --- Saving ---


def _check_space(model: nn.Module, dtype: torch.dtype, folder: Path) -> None:
    """Raises UserError if the disk of a folder cannot hold the merged model, which is about the size of ``model``."""
    size = sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize
    free = shutil.disk_usage(next(parent for parent in folder.absolute().parents if parent.exists())).free
    if free < size:
        raise UserError(f"{folder} needs {size / 1e9:.1f} GB, and its disk has {free / 1e9:.1f} GB free")


def _saved_dtype(base: BaseModel, dtype: Dtype, kwargs: dict[str, Any]) -> torch.dtype:
    if dtype != "auto":
        return getattr(torch, dtype)
    trust = kwargs.get("trust_remote_code", False)
    with user_error(base.name):
        folder, revision = local_folder(base.name), base.revision or "main"
        config = AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=trust)
    return config.dtype or torch.float32


@torch.no_grad()
def _round(model: PreTrainedModel, dtype: torch.dtype, name: str) -> None:
    """Converts parameters and saved buffers to a dtype, except those that transformers keeps in fp32.

    Raises:
        UserError: a weight is too large for the dtype.
    """
    half = [] if dtype == torch.float32 else [*(model._keep_in_fp32_modules_strict or ())]
    half += [*(model._keep_in_fp32_modules or ())] if dtype == torch.float16 else []
    keep = re.compile("|".join(pattern.replace("*", ".*") for pattern in half) or "(?!)")
    for key, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not keep.search(key):
            tensor.data = tensor.data.to(dtype)
            if not tensor.isfinite().all():
                raise UserError(f"{name} has values in {key} that {dtype} cannot hold: choose --dtype float32")
    for config in (model.config, model.config.get_text_config()):
        config.dtype = dtype


def _write_model(model: PreTrainedModel, folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Writes model, generation config and tokenizer."""
    generation = model.generation_config
    if generation is not None:
        # transformers refuses to save some generation configs of published models, such as a temperature of a model
        # that does not sample. The base model's own settings are kept as they are.
        model.generation_config = GenerationConfig()
    with user_error(str(folder), (SafetensorError,)):  # such as a full disk
        model.save_pretrained(folder)
    if generation is not None:
        generation.to_json_file(folder / "generation_config.json")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def _check_saved(merged: PreTrainedModel, saved: PreTrainedModel, name: str) -> None:
    """Raises UserError unless a model that was saved and loaded again has the same weights, bit by bit."""
    ours, theirs = merged.state_dict(), saved.state_dict()
    for key in sorted(ours.keys() | theirs.keys()):
        if key not in ours or key not in theirs or not torch.equal(ours[key], theirs[key].to(ours[key].dtype)):
            raise UserError(
                f"{name} cannot be saved as a whole {type(merged).__name__}: {key} is another one when the model is"
                " loaded again. Use the adapters without merging them"
            )
