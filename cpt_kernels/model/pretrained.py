"""Loads models and adapters from folders and hub repositories, with exactly the weights that were saved.

transformers initializes weights that a folder lacks at random, skips weights that it does not know, and reads adapters
by a path of its own, which loses some of their weights (the magnitudes of DoRA, for example). Here PEFT reads all
adapters, and a weight that is missing, left over or of another shape is an error.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedModel,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import find_adapter_config_file

from ..data.stores import is_remote, local_folder
from ..errors import UserError, user_error
from ..files import write_text
from .conditions import whole_tensor
from .sharding import make_whole, prepare_for_adapter

ADAPTER_CONFIG = "adapter_config.json"  # PEFT's name
_ADAPTERS = "adapters.json"  # beside saved adapters: their names, the active ones, and a sample of the base weights
_WEIGHTS = ("model*.safetensors", "pytorch_model*.bin")  # of a whole model
_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")
_HUB = ("revision", "subfolder", "token", "cache_dir")  # arguments that tell where files are
# PEFT's names between an embedding or head and its whole weight.
_WHOLE_WEIGHT = r"(base_layer\.|token_adapter\.base_layer\.|modules_to_save\.|original_module\.)?weight"
_NAMED = 5  # weights that a message lists
_SAMPLED = 8  # values of each base weight that are saved beside an adapter
# Largest relative difference between equal base weights: of one dtype, where PEFT may have changed them by a
# decomposition (PiSSA), and of two dtypes.
_SAME_DTYPE, _OTHER_DTYPE = 1e-5, 2**-6


class SavedAdapters(NamedTuple):
    """The adapters of a folder or hub repository."""

    places: Mapping[str, str]  # name -> folder or hub name
    active: Sequence[str]


class BaseModel(NamedTuple):
    """The base model of adapters."""

    name: str  # folder or hub name
    revision: str | None = None


# --- Loading ---


def load_pretrained(
    name: str,
    *,
    trainable: bool = False,
    base: BaseModel | None = None,
    adapters: SavedAdapters | None = None,
    dequantize: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Loads a causal language model, or its adapters around their base model.

    Args:
        name: folder, URL or hub name of a model or an adapter.
        trainable: whether the parameters of active adapters require gradients.
        base: the base model of adapters; default the one that their configuration names.
        adapters: the adapters of ``name``; default those that :func:`find_adapters` finds.
        dequantize: whether the quantized weights of a base model become fp32 weights of the same values.
        kwargs: of ``AutoModelForCausalLM.from_pretrained``; ``revision`` is that of ``name``.

    Raises:
        UserError: a weight is missing, left over or of another shape; the folder holds adapters of which none is
            active, or a whole model beside an adapter; an adapter names no base model, or PEFT is not installed;
            ``base`` is given for a whole model.
    """
    adapters = adapters or find_adapters(name, **_hub(kwargs))
    if adapters is not None:
        return _load_adapters(local_folder(name), adapters, trainable, base, dequantize, kwargs)
    if base is not None:
        raise UserError(f"{name} holds no adapter ({ADAPTER_CONFIG}): name the folder of one")
    return load_whole(_class_of(name, kwargs), name, **kwargs)


def auto_class(config: Any) -> Any:
    """Returns transformers' class that loads a model: with its parts for images, if it was saved with them."""
    named = getattr(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, "_model_mapping", {}).get(config.model_type)
    is_image_text = named is not None and named in (config.architectures or ())
    return AutoModelForImageTextToText if is_image_text else AutoModelForCausalLM


def _class_of(name: str, kwargs: Mapping[str, Any]) -> Any:
    with user_error(name):
        return auto_class(
            AutoConfig.from_pretrained(
                local_folder(name), **_hub(kwargs), trust_remote_code=kwargs.get("trust_remote_code")
            )
        )


def load_whole(cls: Any, name: str, **kwargs: Any) -> PreTrainedModel:
    """Loads a model without adapters by ``cls.from_pretrained``, with all its weights and no others.

    Raises:
        UserError: weights are missing, left over or of another shape, other than those that transformers ties or
            declares as optional.
    """
    # Transformers would raise the mismatched shapes without naming them.
    kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    with user_error(name, (SafetensorError,)):  # a damaged file
        model, found = cls.from_pretrained(local_folder(name), **kwargs)
    if is_remote(name):  # what names it elsewhere, unlike the local copy
        model.name_or_path = model.config._name_or_path = name
    shapes = [f"{key} {list(saved)} instead of {list(ours)}" for key, saved, ours in sorted(found["mismatched_keys"])]
    faults = [
        ("lacks weights that would be random", sorted(found["missing_keys"])),
        ("holds weights that the model does not have", sorted(found["unexpected_keys"])),
        ("holds weights of another shape", shapes),
    ]
    if faults := [f"{fault}: {_listed(keys)}" for fault, keys in faults if keys]:
        raise UserError(
            f"{name} does not hold the weights of a {type(model).__name__}: it {'; it '.join(faults)}. Name the folder"
            " of a complete causal language model"
        )
    return model


def find_adapters(name: str, **hub: Any) -> SavedAdapters | None:
    """Returns the adapters in a folder or hub repository, or None if it holds a whole model.

    Args:
        hub: ``revision``, ``subfolder`` and others of ``from_pretrained``.

    Raises:
        UserError: a folder holds several adapters and does not say which are active, or an adapter and a whole model.
    """
    name = local_folder(name)
    folder = Path(name, hub.get("subfolder") or "")
    if not Path(name).is_dir():
        file = find_adapter_config_file(name, **hub)
        return None if file is None else SavedAdapters({"default": name}, ["default"])
    found = stored_adapters(folder)
    if any(file for pattern in _WEIGHTS for file in folder.glob(pattern)):
        if "default" in found:
            raise UserError(
                f"{folder} holds a whole model and an adapter ({ADAPTER_CONFIG}), so it is unclear which of them to"
                " load: move one of them to another folder"
            )
        return None
    record = folder / _ADAPTERS
    if record.is_file():
        saved = json.loads(record.read_text(encoding="utf-8"))
        if lost := [adapter for adapter in saved["adapters"] if adapter not in found]:
            raise UserError(f"{folder} lacks its adapter {lost[0]}, which {_ADAPTERS} names: restore the folder")
        return SavedAdapters({adapter: found[adapter] for adapter in saved["adapters"]}, saved["active"])
    if "default" in found:  # what PEFT and transformers load
        return SavedAdapters({"default": found["default"]}, ["default"])
    if (folder / "config.json").is_file() or not found:
        return None
    if len(found) > 1:
        raise UserError(f"{folder} holds several adapters: name the folder of one, such as {min(found.values())}")
    return SavedAdapters(found, [*found])


def local_adapters(name: str) -> SavedAdapters | None:
    """Returns the adapters of a folder or URL; None for a whole model, or a name of the hub."""
    folder = Path(local_folder(name)).expanduser()
    return find_adapters(str(folder)) if folder.is_dir() else None


def model_folders(name: str) -> list[Path]:
    """Returns the local folders that hold a model, or adapters and then their base model; none for a hub model."""
    name = local_folder(name)
    if not Path(name).is_dir():
        return []
    if (adapters := find_adapters(name)) is None:
        return [Path(name)]
    folders = [Path(place) for place in adapters.places.values()]
    configs = (json.loads((folder / ADAPTER_CONFIG).read_text()) for folder in folders)
    bases = (local_folder(config["base_model_name_or_path"] or "") for config in configs)
    return [*folders, *(Path(base) for base in sorted({*bases}) if base and Path(base).is_dir())]


def stored_adapters(folder: Path, model: Any = None) -> dict[str, str]:
    """Returns name -> folder of the adapters that PEFT saved: the one named default itself, others in subfolders.

    Args:
        model: whose adapters they are. Transformers' own adapters are saved in the folder itself, without their name.
    """
    name = "default" if model is None or hasattr(model, "get_base_model") else active_adapters(model)[0]
    own = {name: str(folder)} if (folder / ADAPTER_CONFIG).is_file() else {}
    others = {file.parent.name: str(file.parent) for file in sorted(folder.glob(f"*/{ADAPTER_CONFIG}"))}
    return own | {name: place for name, place in others.items() if not _CHECKPOINT.fullmatch(name)}


def find_base(name: str, adapters: SavedAdapters, **hub: Any) -> BaseModel:
    """Returns the base model that the configurations of adapters name.

    Raises:
        UserError: they name none, several, or a folder that does not exist; or PEFT is not installed.
    """
    bases = {BaseModel(c.base_model_name_or_path, c.revision) for c in _read_configs(name, adapters, hub).values()}
    if len({base.name for base in bases}) > 1 or not all(base.name for base in bases):
        named = " and ".join(sorted({str(base.name) for base in bases}))
        raise UserError(
            f"{name} names {named} as base model: write the one base model as base_model_name_or_path into its"
            f" {ADAPTER_CONFIG}"
        )
    base = bases.pop()
    if base.name.startswith((os.sep, ".")) and not Path(base.name).is_dir():
        raise UserError(
            f"{name} names {base.name} as base model, and there is no such folder: write where it is as"
            f" base_model_name_or_path into its {ADAPTER_CONFIG}"
        )
    return base


def _read_configs(name: str, adapters: SavedAdapters, hub: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the PEFT configurations of adapters by name."""
    try:
        from peft import PeftConfig
    except ImportError as error:
        raise UserError(f"{name} holds an adapter, which needs the peft package: pip install peft") from error
    hub = {} if Path(name).is_dir() else hub
    with user_error(name):
        return {adapter: PeftConfig.from_pretrained(place, **hub) for adapter, place in adapters.places.items()}


def _load_adapters(
    name: str,
    adapters: SavedAdapters,
    trainable: bool,
    given: BaseModel | None,
    dequantize: bool,
    kwargs: Mapping[str, Any],
) -> nn.Module:
    """Loads the base model of adapters, and adds the adapters by PEFT."""
    # The base model.
    hub = {} if Path(name).is_dir() else _hub(kwargs)
    configs = _read_configs(name, adapters, hub)
    base_name, revision = given or find_base(name, adapters, **hub)
    of_base = {**kwargs, "revision": revision or "main", "subfolder": ""}
    with user_error(f"the base model of {name}, {base_name}"):
        if find_adapters(base_name, **_hub(of_base)) is not None:
            raise UserError(
                f"the base model of {name}, {base_name}, is an adapter itself: merge it first, by cpt merge {base_name}"
                " --output FOLDER"
            )
        base = load_whole(_class_of(base_name, of_base), base_name, **of_base)
        if dequantize and getattr(base, "hf_quantizer", None) is not None:
            # Kinds of quantization that transformers cannot undo raise NotImplementedError.
            with user_error("its quantized weights cannot be dequantized", (NotImplementedError, ValueError)):
                base = base.dequantize(dtype=torch.float32).float()
    weights = {adapter: _read_weights(base, place, hub) for adapter, place in adapters.places.items()}
    _resize_vocabulary(base, weights.values(), name)

    # The adapters, whose configuration names the base model when they are saved again.
    from peft import get_peft_model

    model: Any = None
    for adapter, config in configs.items():
        config.base_model_name_or_path, config.revision = base_name, revision
        config.inference_mode = not (trainable and adapter in adapters.active)
        prepare_for_adapter(base, config)
        with user_error(name):
            if model is None:
                model = get_peft_model(base, config, adapter_name=adapter)
            else:
                model.add_adapter(adapter, config)
        set_adapter_weights(model, adapter, weights[adapter], adapters.places[adapter])
    active = [*adapters.active]
    model.base_model.set_adapter(active if len(active) > 1 else active[0])
    if Path(name).is_dir():
        _check_base(model, Path(name))
    if not trainable:
        model.requires_grad_(False)
    return model.eval()


def _hub(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: kwargs[name] for name in _HUB if kwargs.get(name)}


def _read_weights(base: nn.Module, place: str, hub: Mapping[str, Any]) -> dict[str, Tensor]:
    from peft.utils.save_and_load import load_peft_weights

    mapping = getattr(base, "_checkpoint_conversion_mapping", None) or {}
    with user_error(place, (OSError, ValueError, SafetensorError)):
        return load_peft_weights(place, device="cpu", key_mapping=mapping, **hub)


def _resize_vocabulary(base: PreTrainedModel, adapters: Collection[Mapping[str, Tensor]], name: str) -> None:
    """Gives a base model the vocabulary of its adapters, which hold whole embeddings if tokens were added.

    Raises:
        UserError: the adapters lack the embedding or the head of the added tokens.
    """
    layers = {"embedding": base.get_input_embeddings(), "head": base.get_output_embeddings()}
    names = {module: path for path, module in base.named_modules()}
    sizes = {}
    for part, layer in layers.items():
        path = re.compile(rf"(base_model\.model\.)?{re.escape(names[layer])}\.{_WHOLE_WEIGHT}")
        sizes[part] = {len(w) for weights in adapters for key, w in weights.items() if path.fullmatch(key)}
    rows = base.get_input_embeddings().weight.shape[0]
    resized = set().union(*sizes.values()) - {rows}
    if not resized:
        return
    tied = layers["embedding"].weight is layers["head"].weight
    if lacking := [part for part, found in sizes.items() if found != resized and not tied]:
        raise UserError(
            f"{name} was trained with a vocabulary of {max(resized)} tokens, its base model has {rows}, and the adapter"
            f" does not hold the {lacking[0]} of the added tokens: save the resized base model, and set it as"
            f" base_model_name_or_path in {ADAPTER_CONFIG}"
        )
    make_whole(base, "its vocabulary grows by that of the adapter")
    base.resize_token_embeddings(max(resized), mean_resizing=False)


# --- Weights of a model in memory ---


def set_adapter_weights(model: Any, adapter: str, weights: Mapping[str, Tensor], place: str | Path) -> None:
    """Gives an adapter of a PEFT model the weights that PEFT read from a folder, all of them and no others.

    Raises:
        UserError: a weight is missing, left over or of another shape.
    """
    from peft.utils.save_and_load import set_peft_model_state_dict

    try:
        result = set_peft_model_state_dict(model, dict(weights), adapter_name=adapter)
    except KeyError as error:  # a module that the adapter trains whole
        raise UserError(f"{place} lacks the weight {error.args[0]} of the adapter {adapter}: restore it") from error
    except RuntimeError as error:  # torch lists the shapes that differ
        lines = [line.strip() for line in str(error).splitlines() if "size mismatch" in line]
        if not lines:
            raise
        raise UserError(
            f"{place} does not fit the model, because it was saved from another base model or adapter configuration:"
            f" {_listed(lines)}"
        ) from error
    if missing := _missing(model, adapter, result.missing_keys):
        raise UserError(f"{place} lacks weights of the adapter {adapter}: {_listed(missing)}; restore the folder")
    known = {key.replace(f".{adapter}", "") for key in model.state_dict()}
    if unexpected := sorted(key for key in result.unexpected_keys if key.replace(f".{adapter}", "") not in known):
        raise UserError(
            f"{place} holds weights that the adapter {adapter} does not have: {_listed(unexpected)}; it was saved from"
            " another base model or adapter configuration"
        )


def _missing(model: Any, adapter: str, absent: Collection[str]) -> list[str]:
    """Returns the names in ``absent`` whose tensors PEFT saves with the adapter and that no other name refers to."""
    from peft import get_peft_model_state_dict

    state = {key: tensor for key, tensor in model.state_dict().items() if isinstance(tensor, Tensor)}
    saved = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    given = {_storage(tensor) for key, tensor in state.items() if key not in {*absent}}
    needed = {_storage(tensor) for tensor in saved.values() if isinstance(tensor, Tensor)} - given
    return sorted(key for key in absent if key in state and _storage(state[key]) in needed)


@torch.no_grad()
def reload_weights(model: nn.Module, folder: str | Path) -> None:
    """Gives a model in memory the weights of a checkpoint of it: of all adapters of a PEFT model, else of the model.

    Raises:
        UserError: a weight or an adapter is missing, left over or of another shape.
    """
    folder = Path(folder)
    if hasattr(model, "peft_config"):
        places = stored_adapters(folder, model)
        for adapter in model.peft_config:
            if adapter not in places:
                raise UserError(f"{folder} holds no adapter {adapter}, only {_listed(sorted(places)) or 'none'}")
            base = model.get_base_model() if hasattr(model, "get_base_model") else model
            set_adapter_weights(model, adapter, _read_weights(base, places[adapter], {}), places[adapter])
        _check_base(model, folder)
        return
    # Files may hold the weights under other names than the model, such as one per expert. Only from_pretrained
    # converts them.
    saved = load_whole(type(model), str(folder), dtype="auto").state_dict()
    own = model.state_dict()
    for name, tensor in own.items():
        if name not in saved or saved[name].shape != tensor.shape:
            raise UserError(f"{folder} is a checkpoint of another model: its {name} differs in shape or is missing")
        tensor.copy_(saved[name])


def sample_base(model: Any) -> dict[str, list[float]]:
    """Returns a few values of every weight of a PEFT model that PEFT does not save, by name.

    They tell the base model of an adapter from another one of the same shapes. Call it before FSDP2 wraps the model.
    """
    from peft import get_peft_model_state_dict

    saved = {
        _storage(tensor)
        for adapter in model.peft_config
        for tensor in get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False).values()
    }
    samples = {}
    for name, weight in model.named_parameters():
        size = getattr(weight, "ds_numel", weight.numel())  # ZeRO-3 leaves an empty weight
        if weight.is_floating_point() and size and not weight.is_meta and _storage(weight) not in saved:
            flat = whole_tensor(weight).reshape(-1)
            values = flat[:: max(1, len(flat) // _SAMPLED)][:_SAMPLED].double().tolist()
            samples[f"{name} {str(weight.dtype).removeprefix('torch.')}"] = values
    return samples


def _check_base(model: Any, folder: Path) -> None:
    """Raises UserError if the base model of adapters is not the one that was trained with them, where that is known."""
    file = folder / _ADAPTERS
    saved = json.loads(file.read_text(encoding="utf-8")).get("base", {}) if file.is_file() else {}
    ours = {name.split()[0]: (name.split()[1], values) for name, values in sample_base(model).items()}
    for key, values in saved.items():
        name, dtype = key.split()
        if name not in ours or not values:
            continue
        bound = (_SAME_DTYPE if ours[name][0] == dtype else _OTHER_DTYPE) * max(map(abs, values))
        if any(not abs(a - b) <= bound for a, b in zip(values, ours[name][1])):
            raise UserError(
                f"the adapter in {folder} was trained on another base model: {name} has other values now. Restore the"
                " base model, or train the adapter again"
            )


def save_adapter_names(model: nn.Module, folder: str | Path, base: Mapping[str, Sequence[float]]) -> None:
    """Writes what PEFT does not into the folder of saved adapters: their names, and which of them are active.

    Args:
        base: from :func:`sample_base`, written as well.
    """
    if hasattr(model, "get_base_model"):
        record = {"adapters": [*model.peft_config], "active": active_adapters(model), "base": base}
        write_text(Path(folder) / _ADAPTERS, json.dumps(record) + "\n")


def active_adapters(model: Any) -> list[str]:
    """Returns the names of a model's active adapters: PEFT's are a property, those of transformers a method."""
    active = model.active_adapters
    return [*(active() if callable(active) else active)]


def unsaved_parameters(model: Any) -> list[str]:
    """Returns the names of the parameters of a PEFT model that require gradients and that PEFT does not save."""
    from peft import get_peft_model_state_dict

    saved = {
        _storage(tensor)
        for adapter in model.peft_config
        for tensor in get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False).values()
    }
    return [name for name, p in model.named_parameters() if p.requires_grad and _storage(p) not in saved]


def _storage(tensor: Tensor) -> int:
    return getattr(tensor, "_local_tensor", tensor).untyped_storage().data_ptr()


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
