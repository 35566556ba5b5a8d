"""Finds the names, reference, tokenizer and options of trained models that are evaluated."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data.stores import local_folder
from ..errors import UserError
from .models import load_named_tokenizer, load_ref_tokenizer
from .option_table import option_table
from .parsing import CONFIG_FILE, convert_file, make_options, read_options, read_yaml, unknown_argument

if TYPE_CHECKING:
    from ..losses import Loss
    from .options import Options

# The options of cpt-train that affect an evaluation.
SETTINGS = (
    *("beta", "max_length", "truncation_mode", "ranked_pairs", "prompt_format", "dataset_num_proc"),
    *("sharing", "share_prompts", "packing", "max_tokens_per_batch", "head_memory_mb", "attention_backend"),
    *("ref_cache_dir", "assistant_only_loss"),
    *("tokenizer_name", "dtype", "attn_implementation", "model_init_kwargs", "trust_remote_code"),
    *("load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "use_bnb_nested_quant", "bf16", "fp16", "use_cpu"),
)

# Options of a training configuration that may hold a folder.
_MODELS = ("model_name_or_path", "ref_model_name_or_path", "tokenizer_name")
# Options that name the reference of a run: the first one that is set.
_REFERENCES = ("ref_model_name_or_path", "adapter_name_or_path", "model_name_or_path")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")

Configs = Mapping[Path, Mapping[str, Any]]  # training configuration file -> its options


def name_models(given: Sequence[str]) -> dict[str, str]:
    """Returns name -> model.

    The name is given by NAME=MODEL, or consists of the last parts of the model's path, as many as make all names
    different.
    """
    named = [part.split("=", 1) if re.match(r"[^/=]+=", part) else (None, part) for part in given]
    paths = [path.rstrip("/") for _, path in named]
    for parts in range(1, max(path.count("/") for path in paths) + 2):
        names = [name or "/".join(path.split("/")[-parts:]) for (name, _), path in zip(named, paths)]
        if len(set(names)) == len(names):
            return dict(zip(names, paths))
    twice = next(name for name in names if names.count(name) > 1)
    raise UserError(f"models has {twice} twice: give it once, or give one of them another name with NAME=MODEL")


def read_configs(models: Sequence[str], config: Path | None) -> Configs:
    """Reads the given training configuration, or else the one of each model.

    A model's configuration is in its folder, or for a checkpoint in the folder above. Configurations whose loss has a
    reference come first.
    """
    for model in models:
        check_model_name(model, "models")
    # The given file, or for each model the first file that exists.
    files = [config] if config else list(filter(None, map(find_config, models)))
    configs = {file: read_config(file) for file in files}
    return dict(sorted(configs.items(), key=lambda item: not _has_reference(item[1])))


def check_model_name(name: str, option: str) -> None:
    """Raises UserError unless a model's name is a folder's or can be one of the hub."""
    path = Path(local_folder(name)).expanduser()
    if path.is_file():
        raise UserError(f"{option}={name} is a file: give the model's folder")
    if not path.is_dir() and (not _HUB_NAME.fullmatch(name) or ("/" in name and path.parent.is_dir())):
        raise UserError(f"{option}={name}: there is no such folder")


def find_config(model: str) -> Path | None:
    """Returns the training configuration in a model's folder, or for a checkpoint in the folder above, if any."""
    folder = Path(local_folder(model)).expanduser()
    return next((file for file in (folder / CONFIG_FILE, folder.parent / CONFIG_FILE) if file.is_file()), None)


def trained_format(model: str) -> tuple[str | None, Path | None]:
    """Returns the `prompt_format` that a model was trained with, "chat" or "text", and the file that says so."""
    file = find_config(model)
    saved = None if file is None else read_config(file).get("prompt_format")
    return (saved, file) if saved in ("chat", "text") else (None, None)


def choose_reference(given: str | None, configs: Configs, models: Sequence[str]) -> str | None:
    """Returns the name of the reference, or None for an evaluation without one.

    It is the given one, or else the one that the models were trained against. If their losses have no reference, it is
    the model from which training started.
    """
    if given is not None:
        return None if given.lower() == "none" else given
    # Configurations without a reference count only if no other names one.
    against = {path: values for path, values in configs.items() if _has_reference(values)} or configs
    names = {}
    for path, values in against.items():
        name = next((values[key] for key in _REFERENCES if values.get(key)), None)
        if name is None or (values.get("from_scratch") and not values.get("ref_model_name_or_path")):
            raise UserError(f"{path} names no reference that can be loaded: give --reference MODEL or --reference none")
        names[name] = path
    if not names:
        raise UserError(
            f"there is no {CONFIG_FILE} beside {' or '.join(models)}, so the reference is unknown: give --reference"
            " MODEL, or --reference none for log-probs alone"
        )
    if len(names) > 1:
        raise UserError(f"the models were trained against {' and '.join(names)}: choose one with --reference")
    return next(iter(names))


def loss_of(configs: Configs) -> Loss:
    """Returns the loss of the first training configuration, whose rewards an evaluation computes; default DPO's."""
    values = next(iter(configs.values()), {})
    from ..losses import LossOptions  # imports torch, which --help does not need

    known = {field.name for field in fields(LossOptions)}
    return LossOptions(**{name: value for name, value in values.items() if name in known}).build_loss()


def training_options(
    configs: Configs,
    flags: Sequence[str],
    own: Sequence[str] = (),
    *,
    model: str,
    data: str,
    output_dir: Path,
    reference: str | None,
    prog: str,
) -> Options:
    """Returns the options of ``cpt-train``: those of the first configuration that affect an evaluation, and the flags.

    A flag overrides the configuration.

    Args:
        own: options of the command itself, which a mistyped flag may have meant.

    Raises:
        UserError: a flag is not in ``SETTINGS``, or a value is invalid.
    """
    for text in flags:
        name = text[2:].split("=")[0].replace("-", "_").removeprefix("no_")
        if text.startswith("--") and name not in SETTINGS:
            raise UserError(unknown_argument(text, (*own, *SETTINGS), prog))
    file, values = next(iter(configs.items()), (None, {}))
    saved = {name: values[name] for name in SETTINGS if name in values}
    given = convert_file(saved, file) | read_options(flags, prog)
    if given.get("load_in_4bit") or given.get("load_in_8bit"):
        given["use_peft"] = True  # cpt-train requires it for quantized weights; evaluation creates no adapter
    given |= {"model_name_or_path": model, "dataset_name": data, "output_dir": str(output_dir)}
    return make_options(given | ({"ref_model_name_or_path": reference} if reference else {}))


def load_shared_tokenizer(models: Sequence[str], options: Options, images: bool = False) -> Any:
    """Loads the tokenizer that all models share, or the one that ``tokenizer_name`` names.

    Args:
        images: load the processor of the first model in place of its tokenizer.

    Raises:
        UserError: two models, or a model and the reference, have different tokenizers.
    """
    from ..data.tokenize import check_same_tokenizer
    from ..training.checks import checked_tokenizer

    model, training = options.model, options.training
    trust = training.trust_remote_code
    if model.tokenizer_name is not None:
        given, option, others = model.tokenizer_name, "tokenizer_name", ()
    else:
        given, option, others = models[0], "models", models[1:]
    loaded = load_named_tokenizer(given, option, trust_remote_code=trust, images=images)
    first = checked_tokenizer(loaded)
    for name in others:
        other = load_named_tokenizer(name, "models", trust_remote_code=trust)
        if other.get_vocab() != first.get_vocab() or other.chat_template != first.chat_template:
            raise UserError(
                f"{name} has another tokenizer or chat template than {models[0]}: name one for all with"
                " --tokenizer_name, or evaluate the models separately"
            )
    if (reference := load_ref_tokenizer(model, training, "reference")) is not None:
        check_same_tokenizer(first, reference)
    return loaded


def _has_reference(values: Mapping[str, Any]) -> bool:
    """Returns whether a loss of the configuration needs a reference."""
    from ..losses import LOSSES, loss_names

    losses = loss_names(values.get("loss_type", option_table().defaults["loss_type"]))
    return any(loss in LOSSES and LOSSES[loss].needs_reference for loss in losses)


def read_config(path: Path) -> dict[str, Any]:
    """Reads a training configuration."""
    values = read_yaml(path)
    # Files that were written in another folder, or moved with the models beside them, may hold relative paths.
    for name in _MODELS:
        value = values.get(name)
        if isinstance(value, str) and (path.parent / value).is_dir():
            values[name] = str((path.parent / value).absolute())
    return values
