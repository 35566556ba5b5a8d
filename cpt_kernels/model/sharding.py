"""Loads models in slices and wraps them for FSDP2, so that a process holds its slices and one wrapped layer at most.

Each process reads its slices of the files only. Until FSDP2 wraps the model, the slices are DTensors without hooks, so
that PEFT can add an adapter before. Rank 0 could also read all weights and broadcast them, as accelerate's
``cpu_ram_efficient_loading`` does; bench/NOTES.md compares both.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, ParallelismConfig, PartialState
from accelerate.utils import AutocastKwargs, FullyShardedDataParallelPlugin, gather_object
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from ..config import ContrastiveConfig
from ..errors import UserError
from .conditions import is_sharded, whole_tensor

logger = logging.getLogger(__name__)

_M_MMAP_THRESHOLD = -3  # glibc's number of the option
_MAPPED_BYTES = 1 << 18  # larger blocks are mapped, and so returned to the system when they are freed
_PLAIN_INITS = (True, False, "gaussian", "orthogonal")  # of LoRA, which read no weight of the model
# Options of LoRA that read or copy weights of the model.
_OF_WEIGHTS = ("use_dora", "target_parameters", "layer_replication", "trainable_token_indices", "modules_to_save")

# Keys of fsdp_config; those of FSDP1 without use in FSDP2; PyTorch/XLA's, which transformers adds; accelerate's names.
_FSDP_KEYS = {"version", "reshard_after_forward", "cpu_offload", "auto_wrap_policy", "transformer_layer_cls_to_wrap"}
_FSDP_KEYS |= {"min_num_params", "cpu_ram_efficient_loading", "state_dict_type", "activation_checkpointing"}
_FSDP1_KEYS = {"forward_prefetch", "backward_prefetch", "use_orig_params", "sync_module_states", "limit_all_gathers"}
_XLA_KEYS = {"xla", "xla_fsdp_v2", "xla_fsdp_settings", "xla_fsdp_grad_ckpt"}
_FSDP_NAMES = {
    "offload_params": "transformers calls it cpu_offload",
    "transformer_cls_names_to_wrap": "transformers calls it transformer_layer_cls_to_wrap",
    "sharding_strategy": "set reshard_after_forward; for replicas of shards dp_replicate_size in parallelism_config",
}


def uses_fsdp(args: ContrastiveConfig) -> bool:
    """Whether a run of several processes asks for FSDP, by ``fsdp`` or by accelerate's environment."""
    asked = args.fsdp_plugin_args is not None or os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    return asked and args.world_size > 1


def check_fsdp(args: ContrastiveConfig) -> None:
    """Checks the configuration of FSDP before a model is loaded, in ``fsdp_config`` or accelerate's environment.

    Raises:
        UserError: it asks for FSDP1 or what FSDP2 cannot do, or has an unknown key, which transformers would ignore.
    """
    is_launched = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if not (args.fsdp or is_launched):
        return
    given = args.fsdp_config if isinstance(args.fsdp_config, dict) else {}
    version = given.get("version", 2) if args.fsdp else os.environ.get("FSDP_VERSION", 1)
    if int(version) == 1:
        raise UserError("FSDP1 is not supported: set fsdp_version to 2 in accelerate's file, or version in fsdp_config")
    if unknown := sorted(given.keys() - _FSDP_KEYS - _FSDP1_KEYS - _XLA_KEYS):
        mend = _FSDP_NAMES.get(unknown[0]) or f"its keys are {', '.join(sorted(_FSDP_KEYS))}"
        raise UserError(f"fsdp_config has no key {unknown[0]!r}: {mend}")
    if given.get("xla"):
        raise UserError("fsdp_config: xla is not supported; leave it out")
    if "SIZE_BASED_WRAP" in (given.get("auto_wrap_policy"), os.environ.get("FSDP_AUTO_WRAP_POLICY")):
        raise UserError(
            "auto_wrap_policy=SIZE_BASED_WRAP would wrap lists of layers, which FSDP2 does not support: set"
            " TRANSFORMER_BASED_WRAP"
        )
    if (unused := sorted(given.keys() & _FSDP1_KEYS)) and PartialState().is_main_process:
        logger.warning("fsdp_config: %s of FSDP1 has no effect in FSDP2", ", ".join(unused))


@contextlib.contextmanager
def meshes_on_cpu(args: ContrastiveConfig) -> Iterator[None]:
    """Makes accelerate accept ``parallelism_config`` with FSDP on CPUs; :func:`settle_engine` has it checked."""
    if not (uses_fsdp(args) and args.device.type == "cpu"):
        yield
        return
    original = ParallelismConfig._validate_accelerator
    ParallelismConfig._validate_accelerator = lambda *_: None
    try:
        yield
    finally:
        ParallelismConfig._validate_accelerator = original


def settle_engine(accelerator: Accelerator, args: ContrastiveConfig) -> None:
    """Makes accelerate shard on CPUs as on GPUs, where it would replace FSDP by DDP without a word.

    Under FSDP2 autocast is off: FSDP2 itself casts weights and inputs, and transformers trains without autocast, so a
    reference pass with it would compute other numbers.
    """
    state = accelerator.state
    return_freed_memory(args)
    if uses_fsdp(args) and state.distributed_type == DistributedType.MULTI_CPU:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(**(args.fsdp_plugin_args or {}))
        if accelerator.mixed_precision != "no":
            state.fsdp_plugin.set_mixed_precision(accelerator.mixed_precision)
        state.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        if accelerator.parallelism_config is not None:
            accelerator.parallelism_config._validate_accelerator(accelerator)
        if isinstance(state.fsdp_plugin.cpu_offload, CPUOffloadPolicy):
            state.fsdp_plugin.cpu_offload = CPUOffloadPolicy(pin_memory=False)  # pinning needs a GPU
    if accelerator.is_fsdp2:
        accelerator.autocast_handler = AutocastKwargs(enabled=False)
        # The config turned it into gradient_checkpointing, which does the same; accelerate would wrap sharded layers.
        state.fsdp_plugin.activation_checkpointing = False
        accelerator._prepare_fsdp2 = functools.partial(_prepare_sharded, accelerator._prepare_fsdp2)


def _prepare_sharded(prepare: Callable[..., tuple], *args: Any) -> tuple:
    """Prepares a sharded model and its optimizer with accelerate's ``prepare``; the optimizer keeps its parameters.

    accelerate finds them again by the addresses of their slices, which are 0 for all slices without rows, so that the
    optimizer would hold one of these parameters many times and the others not at all.
    """
    optimizers = [each for each in args if isinstance(each, torch.optim.Optimizer)]
    parameters = [[*group["params"]] for optimizer in optimizers for group in optimizer.param_groups]
    result = prepare(*args)
    for group, own in zip((group for optimizer in optimizers for group in optimizer.param_groups), parameters):
        group["params"] = own
    return result


def check_optimizer(optimizer: type[torch.optim.Optimizer], kwargs: dict[str, Any], accelerator: Accelerator) -> None:
    """Takes two steps on a small weight, whole and sharded as the engine does it. All processes must call it.

    Raises:
        UserError: the optimizer does not take the same steps on a weight that FSDP2 shards. ZeRO trains flat parts of
            weights by design, so there a difference is a warning.
    """
    plugin = accelerator.state.deepspeed_plugin
    is_zero = plugin is not None and plugin.zero_stage > 0
    if not (accelerator.is_fsdp2 or is_zero):
        return
    whole = torch.linspace(-1, 1, 8192, device=accelerator.device).view(64, 128)
    if is_zero:
        parts = list(whole.clone().flatten().chunk(2))
    else:
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        parts = [distribute_tensor(whole, mesh, [Shard(0)])]
    fault = None
    try:
        whole, *parts = (_two_steps(optimizer, kwargs, values) for values in (whole.clone(), *parts))
        both = whole.flatten(), torch.cat([whole_tensor(part).flatten() for part in parts])
        if not torch.allclose(*both, rtol=1e-4, atol=1e-7):
            fault = "its steps depend on how a weight is sharded"
    except Exception as error:  # whatever an optimizer raises that does not know sharded weights
        fault = f"{type(error).__name__}: {error}"
    name = optimizer.__name__
    if fault is not None and is_zero and accelerator.is_main_process:
        logger.warning("optim: %s does not take the steps of one process under ZeRO (%s)", name, fault)
    elif fault is not None and not is_zero:
        raise UserError(f"optim: {name} does not work under FSDP2 ({fault}); choose another, as adamw_torch")


def _two_steps(optimizer: type[torch.optim.Optimizer], kwargs: dict[str, Any], values: Tensor) -> Tensor:
    parameter = nn.Parameter(values)
    steps = optimizer([parameter], **kwargs)
    for _ in range(2):
        parameter.grad = parameter.detach().sin()
        steps.step()
    return parameter.detach()


def return_freed_memory(args: ContrastiveConfig) -> None:
    """Makes glibc return freed layers on CPUs; it would keep the memory of gathered ones, up to the whole model's."""
    if args.device.type == "cpu" and args.world_size > 1:
        with contextlib.suppress(OSError, AttributeError):  # another libc
            ctypes.CDLL("libc.so.6").mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


# --- Loading ---


@contextlib.contextmanager
def sliced_loading() -> Iterator[None]:
    """Makes ``from_pretrained`` read this process's slices of parameters only, which become DTensors.

    Quantized models are loaded whole. All processes must load together.

    Raises:
        UserError: some process cannot load its slices; all processes raise it.
    """
    original = PreTrainedModel._load_pretrained_model

    def load(model: Any, state_dict: Any, files: Any, load_config: Any) -> Any:
        if load_config.hf_quantizer is None:
            _slice_parameters(model, load_config.weight_mapping or [])
        return original(model, state_dict, files, load_config)

    PreTrainedModel._load_pretrained_model = staticmethod(load)
    failure: UserError | None = None
    try:
        yield
    except UserError as error:  # a shape may differ in the slices of some processes only
        failure = error
    finally:
        PreTrainedModel._load_pretrained_model = staticmethod(original)
    texts = [text for text in gather_object([None if failure is None else str(failure)]) if text is not None]
    if texts:
        raise UserError(texts[0]) from failure


def _slice_parameters(model: nn.Module, mapping: Sequence[Any]) -> None:
    """Replaces the parameters of a model on the meta device by DTensors, which transformers then loads by slices."""
    world = torch.distributed.get_world_size()
    mesh = init_device_mesh(PartialState().device.type, (world,))
    sliced: dict[int, nn.Parameter] = {}
    for module, name, path in _parameters_of(model):
        parameter = module._parameters[name]
        assert parameter is not None
        chunks = parameter.detach().chunk(world) if parameter.dim() else ()
        if not chunks or _is_converted_whole(path, mapping, has_rows=len(chunks) == world):
            continue
        if id(parameter) not in sliced:
            rank = mesh.get_local_rank()
            local = chunks[rank] if rank < len(chunks) else parameter.detach()[:0]
            sliced[id(parameter)] = _dtensor(local, mesh, (Shard(0),), parameter)
        module._parameters[name] = sliced[id(parameter)]


def _is_converted_whole(path: str, mapping: Sequence[Any], *, has_rows: bool) -> bool:
    """Whether the files hold a parameter in a form that a process cannot read its slice from.

    Single experts can be stacked, and joined along other dimensions than the first, if every process has some. Other
    conversions, such as the split of joined projections, need whole tensors.

    Args:
        has_rows: whether every process has rows of the parameter.
    """
    words = set(re.split(r"\W+", path))
    for converter in mapping:
        if not isinstance(converter, WeightConverter):
            continue
        if has_rows and all(map(_keeps_slices, converter.operations)):
            continue
        for target in converter.target_patterns:
            named = {word for word in re.split(r"\W+", target) if word and not word.isdigit()}
            if named <= words:
                return True
    return False


def _keeps_slices(operation: Any) -> bool:
    if type(operation) is MergeModulelist:
        return operation.dim == 0
    return type(operation) is Concatenate and operation.dim > 0


def _parameters_of(model: nn.Module) -> list[tuple[nn.Module, str, str]]:
    """Returns (module, name in the module, name in the model) of all parameters; a tied one has several places."""
    return [
        (module, name, f"{prefix}.{name}".lstrip("."))
        for prefix, module in model.named_modules()
        for name, parameter in module._parameters.items()
        if parameter is not None
    ]


def _dtensor(local: Tensor, mesh: Any, placements: Sequence[Any], like: Tensor) -> nn.Parameter:
    whole = DTensor.from_local(local, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())
    return nn.Parameter(whole, requires_grad=like.requires_grad)


# --- Adapters and wrapping ---


def make_whole(model: nn.Module, reason: str) -> None:
    """Gives every process all weights of a sliced model until FSDP2 wraps it."""
    whole: dict[int, nn.Parameter] = {}
    for module, name, _ in _parameters_of(model):
        parameter = module._parameters[name]
        if isinstance(parameter, DTensor):
            if id(parameter) not in whole:
                values = parameter.detach().full_tensor()
                whole[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            module._parameters[name] = whole[id(parameter)]
    if whole and PartialState().is_main_process:
        logger.warning("every process holds all weights until they are sharded, because %s", reason)


def prepare_for_adapter(model: nn.Module, config: Any) -> None:
    """Makes a sliced model whole for an adapter that is made of its weights, or that copies some."""
    is_plain = (
        type(config).__name__ == "LoraConfig"
        and config.init_lora_weights in _PLAIN_INITS
        and not any(getattr(config, name, None) for name in _OF_WEIGHTS)
    )
    if not is_plain:
        make_whole(model, f"this {config.peft_type.value} adapter starts from values of the model's weights")


def shard(model: nn.Module, accelerator: Accelerator) -> None:
    """Wraps a model for FSDP2 as accelerate does, or casts it for DeepSpeed. All processes must call it.

    DeepSpeed casts weights when it wraps a model, which would be after the reference has scored with them. A sliced
    model keeps its slices: FSDP2 wraps it on the meta device, and then takes them over. ``loaded_dtype`` of a parameter
    is its dtype before accelerate casts trained weights to fp32 for mixed precision.
    """
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    if accelerator.state.deepspeed_plugin is not None and dtype and not any(map(is_sharded, model.parameters())):
        for parameter in model.parameters():
            if parameter.is_floating_point() and parameter.dtype.itemsize > 1:  # not the blocks of quantized weights
                parameter.data = parameter.data.to(dtype)
    if not accelerator.is_fsdp2:
        return
    # Parameters on the meta device take the places of the slices.
    places = _parameters_of(model)
    dtypes = [module._parameters[name].dtype for module, name, _ in places]
    slices: dict[tuple[nn.Module, str], DTensor] = {}
    empty: dict[int, nn.Parameter] = {}
    for module, name, _ in places:
        parameter = module._parameters[name]
        if isinstance(parameter, DTensor):
            slices[module, name] = parameter
            if id(parameter) not in empty:
                values = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
                empty[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
            module._parameters[name] = empty[id(parameter)]
    # FSDP2 wraps the layers. An image model may name layers of a vision model that it does not have.
    plugin = accelerator.state.fsdp_plugin
    classes = {type(module).__name__ for module in model.modules()}
    layers = [name for name in getattr(model, "_no_split_modules", None) or () if name in classes]
    if plugin.transformer_cls_names_to_wrap is None:
        plugin.transformer_cls_names_to_wrap = layers or None  # without any, accelerate says which it does not find
    elif unknown := [name for name in plugin.transformer_cls_names_to_wrap if name not in classes]:
        raise UserError(
            f"transformer_layer_cls_to_wrap names {unknown[0]}, and {type(model).__name__} has no such layer:"
            f" leave it out, or name {' or '.join(layers) or 'the class of its layers'}"
        )
    is_efficient = plugin.cpu_ram_efficient_loading
    if slices:
        plugin.cpu_ram_efficient_loading = False  # it would broadcast rank 0's weights
    try:
        fsdp2_prepare_model(accelerator, model)
    finally:
        plugin.cpu_ram_efficient_loading = is_efficient
    # The slices take their places again.
    _take_over(slices, keeps_on_cpu=isinstance(plugin.cpu_offload, CPUOffloadPolicy))
    for (module, name, _), dtype in zip(places, dtypes):
        module._parameters[name].loaded_dtype = dtype


def _take_over(slices: dict[tuple[nn.Module, str], DTensor], keeps_on_cpu: bool) -> None:
    """Gives a wrapped model its slices, in memory of their own; until now they may be pages of a mapped file."""
    taken: dict[int, nn.Parameter] = {}
    for place in [*slices]:
        (module, name), part = place, slices.pop(place)  # memory for one copy of a slice is enough
        wrapped: Any = module._parameters[name]
        if id(part) not in taken:
            if not isinstance(wrapped, DTensor):  # FSDP2 was told to ignore its module
                values = part.detach().full_tensor().to(wrapped.dtype)
                taken[id(part)] = nn.Parameter(values, requires_grad=wrapped.requires_grad)
            else:
                same = tuple(wrapped.placements) == tuple(part.placements)
                local = part.detach() if same else _redistributed(part.detach(), wrapped)
                local = local.to_local().to("cpu" if keeps_on_cpu else part.device, wrapped.dtype, copy=True)
                assert local.shape == wrapped._local_tensor.shape, f"FSDP2 slices {name} in another way"
                taken[id(part)] = _dtensor(local, wrapped.device_mesh, wrapped.placements, wrapped)
        module._parameters[name] = taken[id(part)]


def _redistributed(part: DTensor, like: DTensor) -> DTensor:
    """Returns the slice that a mesh of several dimensions gives this process (replicas of shards)."""
    return distribute_tensor(part.full_tensor(), like.device_mesh, like.placements, src_data_rank=None)
