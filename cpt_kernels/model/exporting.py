"""Reads the weights of a sharded checkpoint, and writes them as transformers and PEFT save a model or an adapter."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from transformers import AutoConfig, AutoModelForCausalLM

from ..errors import UserError, user_error
from ..files import replacing_folder

_FSDP = "pytorch_model_fsdp_0"  # accelerate's folder of FSDP's files
_DEEPSPEED = "latest"  # DeepSpeed's file with the name of the folder of its files
_ADAPTER = "adapter_config.json"
_PREFIX = "model."  # accelerate's, of all names in FSDP's files
# Files of a checkpoint that are of its state, not of its model.
_STATE = ("*.pt", "*.pth", "*.bin", "trainer_state.json", "run.json", "zero_to_fp32.py", "*.safetensors*")


def export(checkpoint: Path, output: Path, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Writes the weights of a sharded checkpoint, with its configuration and tokenizer, to a new folder.

    The whole model must fit into the host's memory.

    Args:
        dtype: of the saved weights; None: that of the checkpoint's config, or for an adapter the stored one.

    Returns:
        The weights by name.

    Raises:
        UserError: the folder is no sharded checkpoint, or its weights are not those of its configuration.
    """
    state = _sharded_weights(checkpoint)
    with replacing_folder(output) as folder:
        shutil.copytree(checkpoint, folder, ignore=_ignored(checkpoint), dirs_exist_ok=True)
        if (checkpoint / _ADAPTER).is_file():
            state = {name.replace(".default.", "."): value for name, value in state.items()}  # DeepSpeed's names
            state = {name: value.to(dtype or value.dtype).contiguous() for name, value in state.items()}
            save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
            return state
        config = AutoConfig.from_pretrained(checkpoint)
        dtype = dtype or config.dtype or torch.float32
        state = {name: value.to(dtype) if value.is_floating_point() else value for name, value in state.items()}
        cls = getattr(transformers, (config.architectures or [""])[0], AutoModelForCausalLM)
        with torch.device("meta"):
            model = (cls._from_config if cls is not AutoModelForCausalLM else cls.from_config)(config, dtype=dtype)
        found = model.load_state_dict(state, strict=False, assign=True)
        model.tie_weights()
        lost = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if lost or found.unexpected_keys:
            raise UserError(
                f"{checkpoint}: the weights are not those of its config.json: {(lost or found.unexpected_keys)[0]} is"
                f" {'missing' if lost else 'left over'}; restore the checkpoint"
            )
        model.save_pretrained(folder)  # also the names that the model has on the hub
    return state


def _ignored(checkpoint: Path):
    """Returns the files of a checkpoint that its model does not need, as ``shutil.copytree`` takes them."""
    folders = [path.name for path in checkpoint.iterdir() if path.is_dir()]
    return shutil.ignore_patterns(*folders, *_STATE, _DEEPSPEED, "latest_universal")


def _sharded_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Returns the weights of a checkpoint of FSDP or DeepSpeed by name."""
    with user_error(f"{checkpoint} cannot be read"):
        if (checkpoint / _FSDP).is_dir():
            reader = dcp.FileSystemReader(checkpoint / _FSDP)
            stored = reader.read_metadata().state_dict_metadata
            tensors = {name: about for name, about in stored.items() if isinstance(about, TensorStorageMetadata)}
            state = {name: torch.empty(a.size, dtype=a.properties.dtype) for name, a in tensors.items()}
            dcp.load(state, storage_reader=reader, no_dist=True)
            return {name.removeprefix(_PREFIX): value for name, value in state.items()}
        if (checkpoint / _DEEPSPEED).is_file():
            try:
                from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
            except ImportError:
                raise UserError("a checkpoint of DeepSpeed is read with deepspeed: pip install deepspeed") from None
            return get_fp32_state_dict_from_zero_checkpoint(str(checkpoint))
    raise UserError(
        f"{checkpoint} holds no sharded weights ({_FSDP} of FSDP, or {_DEEPSPEED} of DeepSpeed): name a folder"
        " checkpoint-N of a sharded run; a folder with model.safetensors needs no export"
    )
