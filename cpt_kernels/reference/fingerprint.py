"""Computes the fingerprint of a reference model: a digest of everything that its log-probs depend on.

It covers the tensors in memory, the config entries that change log-probs, the active adapters, and how the forward
computes. It does not cover files: an overwritten checkpoint is another model, and a copied checkpoint is the same
model. A part that may or may not matter is covered: a needless difference costs one scoring pass, while a missed one
would return the log-probs of another model.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..model.conditions import is_sharded, whole_tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

OP_VERSION = 2  # raise it when an operator changes log-probs by more than rounding

_CHUNK = 1 << 23  # elements that one thread digests at a time; a tensor's digest depends on it
_ADAPTER = "/adapter/"  # part of the names of an adapter's tensors
_TRANSPARENT = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # wrappers inside a model
_WRAPPED = {"base_layer", "original_module", "token_adapter"}  # PEFT's names of the modules that an adapter wraps

# Config entries that do not change log-probs. Dropout entries do not either: a reference is scored without dropout.
_IRRELEVANT = {
    # origin
    "_name_or_path", "name_or_path", "base_model_name_or_path", "revision", "_commit_hash", "architectures", "auto_map",
    "auto_mapping", "transformers_version", "peft_version",
    # the tensors determine these
    "dtype", "torch_dtype", "tie_word_embeddings",
    # outputs and switches; the attention is an argument of `fingerprint`
    "use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits", "torchscript",
    "attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "inference_mode", "task_type",
    # initialization, other heads and losses
    "initializer_range", "init_lora_weights", "loftq_config", "eva_config", "corda_config", "id2label", "label2id",
    "problem_type", "router_aux_loss_coef", "router_z_loss_coef",
    # trainers set these to the tokenizer's
    "bos_token_id", "eos_token_id", "pad_token_id",
}  # fmt: skip


def fingerprint(
    model: nn.Module,
    *,
    compute_dtype: torch.dtype | str,
    attention: str,
    op_version: int = OP_VERSION,
    adapters: bool = True,
) -> str:
    """Returns 32 hex digits that identify a reference model.

    Call it before a checkpoint of the run is loaded into the model. A model that FSDP2 or ZeRO-3 has sharded has the
    fingerprint that it has whole; all ranks must call it then, and each digests its share.

    Args:
        model: a transformers model or a PEFT model around one, also compiled, sharded or under DDP, on any device.
        compute_dtype: dtype of the forward; under autocast it differs from the dtype of the weights.
        attention: family of the attention operator, such as "sdpa". Each family rounds differently.
        op_version: version of the operators between hidden states and log-probs.
        adapters: whether active adapters count. False, like disabled adapters, gives the fingerprint of the model
            without adapters.

    Raises:
        UserError: a tensor is not whole on this process, or is not a plain tensor; an adapter uses prompt learning; an
            adapter is merged although adapters do not count; the model has no config, or its config is not plain data.
    """
    base, configs = _unwrap(model)
    active = _active_adapters(base, configs) if adapters else []
    if not active and any(getattr(layer, "merged", False) is True for layer in base.modules()):
        raise UserError(
            "an adapter is merged into the base weights, so the weights without it are unknown: unmerge it first"
        )
    tensors = _named_tensors(base, configs, active)
    facts = {
        "op_version": op_version,
        "compute_dtype": _dtype_name(compute_dtype),
        "attention": attention,
        "config": _normalized(base.config.to_dict()),
        "adapters": [_normalized(configs[name].to_dict()) for name in active],
        "tensors": _tensor_digests(tensors),
    }
    return sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def fingerprint_without_adapters(model: nn.Module) -> str:
    """Returns 32 hex digits that identify the weights and the config of a model with its adapters off."""
    return fingerprint(model, compute_dtype="", attention="", adapters=False)


def trained_below_adapters(model: nn.Module) -> list[nn.Parameter]:
    """Returns the trained parameters that a model keeps when its adapters are off, such as those of LoRA's ``bias``."""
    return [p for p in _named_tensors(*_unwrap(model), []).values() if isinstance(p, nn.Parameter) and p.requires_grad]


def describe_reference(
    model: nn.Module, *, compute_dtype: torch.dtype | str, attention: str, adapters: bool = True
) -> dict[str, Any]:
    """Returns the content of `reference.json`, which people read; arguments as of `fingerprint`."""
    base, configs = _unwrap(model)
    active = _active_adapters(base, configs) if adapters else []
    tensors = _named_tensors(base, configs, active)
    return {
        "model": base.config._name_or_path,
        "model_type": base.config.model_type,
        "adapters": active,
        "parameters": sum(getattr(t, "ds_numel", t.numel()) for t in {id(t): t for t in tensors.values()}.values()),
        "weights_dtype": sorted({_dtype_name(_loaded_dtype(tensor)) for tensor in tensors.values()}),
        "compute_dtype": _dtype_name(compute_dtype),
        "attention": attention,
        "op_version": OP_VERSION,
    }


def _unwrap(model: nn.Module) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """Returns the transformers model inside torch.compile, DDP and PEFT, and its PEFT configs by adapter name."""
    configs: Mapping[str, Any] = {}
    base: Any = model
    while True:
        configs = getattr(base, "peft_config", None) or configs
        if hasattr(base, "get_base_model"):  # PEFT
            inner = base.get_base_model()
        else:
            wrapped = (getattr(base, name, None) for name in ("_orig_mod", "module"))
            inner = next((m for m in wrapped if isinstance(m, nn.Module)), None)
        if inner is None:
            break
        base = inner
    if not hasattr(getattr(base, "config", None), "to_dict"):
        raise UserError(f"{type(base).__name__} has no config; a reference must be a transformers model")
    return base, configs


def _active_adapters(base: nn.Module, configs: Mapping[str, Any]) -> list[str]:
    if any(config.is_prompt_learning for config in configs.values()):
        raise UserError(
            "a prompt-learning adapter adds tokens of its own, which packed rows do not support: use another kind, such"
            " as LoRA"
        )
    layers: list[Any] = [m for m in base.modules() if isinstance(getattr(m, "disable_adapters", None), bool)]
    return list(dict.fromkeys(name for layer in layers if not layer.disable_adapters for name in layer.active_adapters))


def _named_tensors(base: nn.Module, configs: Mapping[str, Any], active: Sequence[str]) -> dict[str, Tensor]:
    """Returns parameters and persistent buffers by their names in the model without wrappers and adapters.

    A tied tensor appears under each of its names, so a checkpoint that lost the tie has the same names. The tensors of
    an active adapter are named after the adapter's position among the active ones, because the name that a user gives
    an adapter changes no log-prob.
    """
    state = base.state_dict(keep_vars=True)
    for prefix, layer in base.named_modules():  # scales of 4-bit weights, which FSDP2 takes off the weights
        if getattr(layer, "quant_state", None) is not None and is_sharded(layer.weight):
            scales = layer.quant_state.as_dict(packed=True)
            state |= {f"{prefix}.weight.{name}": value for name, value in scales.items()}
    paths = {name: [part for part in name.split(".") if part not in _TRANSPARENT] for name in state}
    wrappers = {tuple(path[:i]) for path in paths.values() for i, part in enumerate(path) if part in _WRAPPED}
    named: dict[str, Tensor] = {}
    for name, tensor in state.items():
        path = paths[name]
        canonical = ".".join(part for part in path if not (configs and part in _WRAPPED))
        # A tensor belongs to an adapter if its path leaves a wrapper by a child other than the wrapped module.
        below = [i for i, part in enumerate(path) if part not in _WRAPPED and tuple(path[:i]) in wrappers]
        if configs and below:
            if not active or any(part in configs and part not in active for part in path[below[0] :]):
                continue
            place = [str(active.index(part)) if part in active else part for part in path[below[0] :]]
            canonical = ".".join(path[: below[0]]) + _ADAPTER + "/".join(place)
        if named.setdefault(canonical, tensor) is not tensor:
            raise UserError(f"two tensors of the model have the name {canonical} once wrappers are removed")
        _check_whole(canonical, tensor)
    return named


def _check_whole(name: str, tensor: object) -> None:
    if not isinstance(tensor, Tensor):
        raise UserError(f"{name} is a {type(tensor).__name__}, not a tensor, and cannot be fingerprinted")
    if "_flat_param" in name or tensor.is_meta:
        raise UserError(
            f"{name} is not on this process (offloaded, not loaded, or in a shard of FSDP1): take a reference's"
            " fingerprint of a model that is loaded"
        )
    if hasattr(tensor, "__tensor_flatten__") and not is_sharded(tensor):
        raise UserError(f"{name} is a {type(tensor).__name__}, which cannot be fingerprinted")


def _tensor_digests(tensors: Mapping[str, Tensor]) -> dict[str, list]:
    """Returns [dtype, shape, digest of the bytes in row-major order] by name. A shared tensor is read once.

    SHA-256 runs at about 2 GB/s per core on processors with instructions for it, twice as fast as BLAKE2.
    """
    unique = {id(tensor): tensor for tensor in tensors.values()}
    tasks: list[tuple[Tensor, range]] = []
    for tensor in (tensor for tensor in unique.values() if not is_sharded(tensor)):
        chunks = range(0, tensor.numel(), _CHUNK)
        # Reading one chunk of a non-contiguous tensor copies the whole tensor, so all its chunks are one task.
        tasks += [(tensor, range(i, i + 1)) for i in chunks] if tensor.is_contiguous() else [(tensor, chunks)]
    digests = {key: sha256() for key in unique}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()  # not on macOS
    with ThreadPoolExecutor(cores) as pool:  # hashlib releases the GIL
        for (tensor, _), digest in zip(tasks, pool.map(_chunk_digests, tasks)):
            digests[id(tensor)].update(digest)
        sharded = [tensor for tensor in unique.values() if is_sharded(tensor)]
        for tensor, digest in zip(sharded, _digest_together(sharded, pool)):
            digests[id(tensor)].update(digest)
    described = {}
    for name, tensor in tensors.items():
        shape = list(getattr(tensor, "ds_shape", tensor.shape))
        described[name] = [_dtype_name(_loaded_dtype(tensor)), shape, digests[id(tensor)].hexdigest()]
    return described


def _digest_together(tensors: Sequence[Tensor], pool: ThreadPoolExecutor) -> list[bytes]:
    """Returns the digests of the chunks of sharded tensors. Tensors are gathered in turn; ranks share the chunks."""
    if not tensors:
        return []
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    own: list[list[bytes]] = []
    counts = []
    for i, tensor in enumerate(tensors):
        whole = whole_tensor(tensor).reshape(-1)
        starts = range(0, whole.numel(), _CHUNK)
        mine = starts[(rank - i) % world :: world]
        chunks = (whole[start : start + _CHUNK].to(_loaded_dtype(tensor)) for start in mine)
        own.append([*pool.map(_chunk_digests, [(chunk, range(1)) for chunk in chunks])])
        counts.append(len(starts))
    ranks: list[Any] = [None] * world
    torch.distributed.all_gather_object(ranks, own)
    return [
        b"".join(ranks[(i + chunk) % world][i][chunk // world] for chunk in range(count))
        for i, count in enumerate(counts)
    ]


def _loaded_dtype(tensor: Tensor) -> torch.dtype:
    """Returns the dtype that a tensor was loaded in: FSDP2 trains in fp32 for mixed precision, an exact cast."""
    return getattr(tensor, "loaded_dtype", tensor.dtype)


def _chunk_digests(task: tuple[Tensor, range]) -> bytes:
    tensor, starts = task
    flat = tensor.detach().reshape(-1)
    chunks = (flat[start : start + _CHUNK].cpu().view(torch.uint8).numpy() for start in starts)
    return b"".join(sha256(chunk.data).digest() for chunk in chunks)


def _normalized(value: Any) -> Any:
    """Returns a config as plain JSON data, without irrelevant entries and None (an older version lacks the field)."""
    if isinstance(value, Mapping):
        kept = {str(key): _normalized(item) for key, item in value.items() if _is_relevant(str(key))}
        return {key: item for key, item in kept.items() if item is not None}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [_normalized(item) for item in value]
    if isinstance(value, Enum):
        return _normalized(value.value)
    if isinstance(value, torch.dtype):
        return _dtype_name(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    # str(value) may contain a memory address, and the fingerprint would then differ in every process.
    raise UserError(f"the model's config holds a {type(value).__name__}, which cannot be fingerprinted")


def _is_relevant(key: str) -> bool:
    return key not in _IRRELEVANT and "dropout" not in key and not key.endswith("pdrop")


def _dtype_name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")
