"""Loads the models and tokenizers that the options of a command name.

Every error of ``from_pretrained`` becomes a :class:`UserError` that names the option. transformers takes seconds to
import, so the functions import it when they run.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.stores import is_remote, local_folder
from ..errors import UserError, user_error

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase

    from ..config import ContrastiveConfig
    from .options import ModelArguments


# A folder with none of these holds neither a model nor a tokenizer.
_MODEL_FILES = ("config.json", "adapter_config.json", "tokenizer_config.json")


def from_pretrained(load: Callable[..., Any], name: str, option: str, hint: str = "", **kwargs: Any) -> Any:
    """Calls ``load``, such as ``AutoConfig.from_pretrained``, with the folder or hub name of ``option``.

    Args:
        hint: how to mend a folder whose content cannot be loaded.

    Raises:
        UserError: the folder does not exist, or its content cannot be loaded. The message names the option.
    """
    from safetensors import SafetensorError

    path = Path(local_folder(name)).expanduser()
    if path.is_file():
        raise UserError(f"{option}={name} is a file: give the folder of a model, or a hub name")
    if not path.exists() and is_path(name):
        raise UserError(f"{option}={name}: there is no such folder")
    try:
        return load(str(path) if path.exists() else name, **kwargs)
    except (OSError, ValueError, ImportError, SafetensorError) as error:  # transformers raises any of them
        if "Unrecognized configuration class" in str(error):
            found = re.search(r"\w+Config\b", str(error))
            kind = found[0] if found else "of unknown class"
            raise UserError(
                f"{option}={name} is not a causal language model ({kind}): only decoders such as Llama or GPT-2 are"
                " supported"
            ) from error
        if path.is_dir() and not any((path / file).is_file() for file in _MODEL_FILES) and not kwargs.get("subfolder"):
            raise UserError(
                f"{option}={name}: the folder {path.absolute()} has no {' or '.join(_MODEL_FILES)}; give a folder that"
                " save_pretrained wrote"
            ) from error
        message = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".:")
        if not path.exists():
            message += f"; nor is there a folder {path.absolute()}"
        elif hint:
            message += f"; {hint}"
        raise UserError(f"{option}={name} cannot be loaded: {message}") from error


def is_path(name: str) -> bool:
    """Whether a name cannot be one of the hub."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


# --- Tokenizers ---


def load_named_tokenizer(
    name: str, option: str, *, revision: str | None = None, trust_remote_code: bool = False, images: bool = False
) -> Any:
    """Loads the tokenizer ``name``, a folder or a hub name that ``option`` has as its value.

    Args:
        images: load the processor of a model for prompts with images in place of the tokenizer.
    """
    from transformers import AutoProcessor, AutoTokenizer

    kwargs = {} if revision is None else {"revision": revision}
    hint = f"name the {'processor' if images else 'tokenizer'} by tokenizer_name"
    load = (AutoProcessor if images else AutoTokenizer).from_pretrained
    loaded = from_pretrained(load, name, option, hint, trust_remote_code=trust_remote_code, **kwargs)
    if images and not hasattr(loaded, "image_processor"):
        raise UserError(f"{option}={name} has no processor for the images of the prompts: name an image-text model")
    return loaded


def find_tokenizer(*names: str, images: bool = False) -> str | None:
    """Returns the first of some folders or hub names that holds a tokenizer, or the processor of images."""
    from transformers.utils import cached_file

    quiet = {f"_raise_exceptions_for_{kind}": False for kind in ("gated_repo", "missing_entries", "connection_errors")}
    files = ("tokenizer_config.json", "tokenizer.json")
    files = ("processor_config.json", "preprocessor_config.json") if images else files
    folders = {name: local_folder(name) for name in names}
    present = [name for name, folder in folders.items() if Path(folder).is_dir() or not is_path(name)]
    return next((name for name in present if any(cached_file(folders[name], file, **quiet) for file in files)), None)


def load_policy_tokenizer(model: ModelArguments, args: ContrastiveConfig, images: bool = False) -> Any:
    """Loads the tokenizer that ``tokenizer_name`` names, else that of the adapter, the model or its base model.

    Args:
        images: load the processor of a model for prompts with images in place of the tokenizer.
    """
    from ..model.pretrained import local_adapters

    load = partial(load_named_tokenizer, trust_remote_code=args.trust_remote_code, images=images)
    if model.tokenizer_name is not None:
        return load(model.tokenizer_name, "tokenizer_name")
    name = model.model_name_or_path
    adapter = model.adapter_name_or_path or name
    if adapter != name or local_adapters(adapter) is not None:
        base = _base_name(adapter) if adapter == name else name
        found = find_tokenizer(*dict.fromkeys([adapter, base]), images=images)
        if found is not None and found != name:
            return load(found, "the adapter's tokenizer")
    return load(name, "model_name_or_path", revision=model.model_revision)


def load_ref_tokenizer(
    model: ModelArguments, args: ContrastiveConfig, option: str = "ref_model_name_or_path"
) -> PreTrainedTokenizerBase | None:
    """Loads the reference's tokenizer, to compare it with the policy's; ``None`` for a folder without a tokenizer."""
    name = model.ref_model_name_or_path
    if name is None:
        return None
    folder = Path(local_folder(name))
    if folder.is_dir() and not (folder / "tokenizer_config.json").exists():
        return None
    return load_named_tokenizer(name, option, trust_remote_code=args.trust_remote_code)


# --- Weights ---


def load_policy(model: ModelArguments, args: ContrastiveConfig) -> nn.Module:
    """Loads the model or adapter to train, or initializes a model from its config where ``from_scratch`` is set."""
    from transformers import set_seed

    name, revision = model.model_name_or_path, model.model_revision
    options: dict[str, Any] = {"for_engine": True, "trainable": True}
    if model.adapter_name_or_path is not None:
        from ..model.pretrained import BaseModel

        folder = Path(name).expanduser()
        options["base"] = BaseModel(str(folder) if folder.exists() else name, revision)
        return load_weights(model.adapter_name_or_path, "adapter_name_or_path", model, args, **options)
    if not model.from_scratch:
        return load_weights(name, "model_name_or_path", model, args, revision=revision, **options)
    set_seed(args.seed)
    attention = {"attn_implementation": model.attn_implementation}
    return random_model(name, "model_name_or_path", revision, model.dtype, args.trust_remote_code, **attention)


def random_model(
    name: str, option: str, revision: str, dtype: str, trust_remote_code: bool, **kwargs: Any
) -> nn.Module:
    """Makes the language model whose config the value ``name`` of ``option`` has, with random weights.

    Args:
        dtype: name of the weights' type; ``auto`` is that of the config.
        kwargs: further arguments of ``from_config``.
    """
    import torch
    from transformers import AutoConfig

    from ..model.pretrained import auto_class

    kwargs["trust_remote_code"] = trust_remote_code
    config = from_pretrained(
        AutoConfig.from_pretrained, name, option, revision=revision, trust_remote_code=trust_remote_code
    )
    kwargs["dtype"] = config.dtype or torch.float32 if dtype == "auto" else getattr(torch, dtype)
    return from_pretrained(lambda _, **kwargs: auto_class(config).from_config(config, **kwargs), name, option, **kwargs)


def describe_adapter(model: ModelArguments) -> str | None:
    """Returns a line that says what becomes of an adapter that the options name.

    Raises:
        UserError: a new adapter is asked for on top of an adapter that is not merged.
    """
    from ..model.pretrained import local_adapters

    adapter = model.adapter_name_or_path or model.model_name_or_path
    if model.adapter_name_or_path is None and local_adapters(adapter) is None:
        return None
    if model.use_peft:
        raise UserError(
            f"model_name_or_path={adapter} holds an adapter, and use_peft makes a new one. To train the adapter further"
            f" leave use_peft out; for a new adapter on the merged model, run cpt merge {adapter} --output"
            f" {adapter.rstrip('/')}-merged, and name that folder"
        )
    base = model.model_name_or_path if model.adapter_name_or_path else _base_name(adapter)
    reference = model.ref_model_name_or_path or "the adapter's values at the start"
    return (
        f"{adapter} holds an adapter on {base}: it is trained further, and no new one is made. A loss with a reference"
        f" compares with {reference}"
    )


def _base_name(adapter: str) -> str:
    from ..model.pretrained import find_base, local_adapters

    adapters = local_adapters(adapter)
    assert adapters is not None
    return find_base(adapter, adapters).name


def load_reference(model: ModelArguments, args: ContrastiveConfig) -> nn.Module | None:
    """Loads the model that ``ref_model_name_or_path`` names, if any."""
    if model.ref_model_name_or_path is None:
        return None
    return load_weights(model.ref_model_name_or_path, "ref_model_name_or_path", model, args, for_engine=True)


def load_weights(
    name: str, option: str, model: ModelArguments, args: ContrastiveConfig, *, for_engine: bool = False, **kwargs: Any
) -> nn.Module:
    """Loads the model or adapter ``name``, the value of ``option``, with the dtype and quantization of the run.

    ``kwargs`` are those of :func:`.model.pretrained.load_pretrained`, ``for_engine`` is that of
    :func:`.model.loading.load_model`.
    """
    from ..model.loading import engine_weights

    kwargs |= {"dtype": model.dtype, "trust_remote_code": args.trust_remote_code}
    if model.attn_implementation is not None:
        kwargs["attn_implementation"] = model.attn_implementation
    if model.load_in_4bit or model.load_in_8bit:
        kwargs["quantization_config"] = quantization_config(model, args)
    unknown = user_error(f"model_init_kwargs={args.model_init_kwargs}", (TypeError,) if args.model_init_kwargs else ())
    with engine_weights(args, is_whole=not for_engine or "quantization_config" in kwargs), unknown:
        return load_named_model(name, option, **kwargs | (args.model_init_kwargs or {}))


def load_named_model(name: str, option: str, **kwargs: Any) -> nn.Module:
    """Loads the model or adapter ``name`` by :func:`.model.pretrained.load_pretrained`."""
    from ..model.pretrained import load_pretrained

    def load(place: str, **kwargs: Any) -> nn.Module:
        return load_pretrained(name if is_remote(name) else place, **kwargs)  # a model has its URL as its name

    hint = "to start from random weights set from_scratch=true" if (Path(name) / "config.json").exists() else ""
    return from_pretrained(load, name, option, hint, **kwargs)


def quantization_config(model: ModelArguments, args: ContrastiveConfig | None = None) -> BitsAndBytesConfig:
    """Translates ``load_in_4bit``, ``load_in_8bit`` and ``bnb_*`` for transformers; ``args`` have mixed precision."""
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise UserError("load_in_4bit and load_in_8bit need the bitsandbytes package: pip install bitsandbytes")
    return BitsAndBytesConfig(
        load_in_4bit=model.load_in_4bit,
        load_in_8bit=model.load_in_8bit,
        bnb_4bit_quant_type=model.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=model.use_bnb_nested_quant,
        bnb_4bit_quant_storage=model.bnb_4bit_quant_storage,
        bnb_4bit_compute_dtype=quantized_compute_dtype(model, args),
    )


def quantized_compute_dtype(model: ModelArguments, args: ContrastiveConfig | None = None) -> torch.dtype:
    """Returns the dtype that quantized layers compute with; ``args`` have mixed precision."""
    import torch

    given = torch.float32 if model.dtype == "auto" else getattr(torch, model.dtype)
    return torch.bfloat16 if args and args.bf16 else torch.float16 if args and args.fp16 else given
