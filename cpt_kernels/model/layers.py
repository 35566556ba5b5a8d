"""Fuses the layers below the head by torch.compile or Liger's kernels, and offloads their activations."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import torch
import torch._dynamo.config
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..config import ContrastiveConfig
from ..errors import UserError
from .adapters import spare_input_copies
from .loading import is_quantised, zero_stage
from .packed_model import base_model
from .states import leave_out_of_graphs

# Liger kernels that are switched off, because the head here replaces them.
_LIGER_HEADS = {"fused_linear_cross_entropy": False, "cross_entropy": False}
# Attention interrupts the graph inside a module of the layer. With this option the two graphs around it are whole;
# without it each is cut again where that module begins and ends. Not every version has it.
_DYNAMO_OPTIONS = {"nested_graph_breaks": True} if hasattr(torch._dynamo.config, "nested_graph_breaks") else {}
_COMPILE_OPTIONS = ("torch_compile", "torch_compile_backend", "torch_compile_mode")


@contextlib.contextmanager
def prepared_layers(model: nn.Module, args: ContrastiveConfig) -> Iterator[str]:
    """Applies ``layers``, ``torch_compile`` and ``use_liger_kernel``, also to LoRA; gives a line for the log.

    transformers' Trainer must be constructed inside: it would apply ``torch_compile`` to the whole model. It applies
    Liger's kernels itself, in ``train``.

    Raises:
        UserError: the model has no decoder layers to compile; Liger's kernels cannot run here, or its head is asked
            for.
    """
    spare_input_copies(model)
    kinds, reason = _choose(model, args)
    if "liger" in kinds:
        if problem := _liger_problem(args):
            raise UserError(problem)
        args.use_liger_kernel = True
        args.liger_kernel_config = _LIGER_HEADS | (args.liger_kernel_config or {})
    if "compiled" in kinds:
        _compile_layers(model, args)
    with not_compiled_whole(args):
        yield f"layers: {', '.join(kinds) or 'eager'}{reason}"


@contextlib.contextmanager
def not_compiled_whole(args: ContrastiveConfig) -> Iterator[None]:
    """Hides ``torch_compile`` from transformers' Trainer and the accelerator that it makes."""
    given = {name: getattr(args, name) for name in _COMPILE_OPTIONS}
    args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None
    try:
        yield
    finally:
        for name, value in given.items():
            setattr(args, name, value)


def _choose(model: nn.Module, args: ContrastiveConfig) -> tuple[list[str], str]:
    """Returns "compiled", "liger", both or neither, and why "auto" does not compile on a GPU.

    Compiled layers move the fewest bytes, see ``bench bytes``; Liger's come next.
    """
    if args.layers != "auto":
        return [kind for kind in ("compiled", "liger") if kind == args.layers], ""
    asked = {"compiled": args.torch_compile, "liger": args.use_liger_kernel}
    if any(asked.values()) or args.device.type != "cuda":
        return [kind for kind, is_on in asked.items() if is_on], ""
    if (problem := _compile_problem(model, args)) is None:
        return ["compiled"], ""
    return [] if _liger_problem(args) else ["liger"], f" (not compiled, because {problem})"


def _compile_problem(model: nn.Module, args: ContrastiveConfig) -> str | None:
    """Returns why ``layers=auto`` does not compile the layers, None if it does."""
    if _decoder_layers(model) is None:
        return f"{type(base_model(model)).__name__} has no list of decoder layers"
    if find_spec("triton") is None or not any(map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))):
        return "torch.compile needs Triton and a C compiler"
    if zero_stage(args) == 3 or args.fsdp or os.environ.get("ACCELERATE_USE_FSDP") == "true":
        return "their weights are sharded"
    if is_quantised(model):
        return "their weights are quantized"
    return "their activations are offloaded" if args.activation_offloading else None


def _liger_problem(args: ContrastiveConfig) -> str | None:
    if find_spec("liger_kernel") is None:
        return "use_liger_kernel needs the liger-kernel package: pip install liger-kernel"
    if args.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "use_liger_kernel needs a GPU: leave it out on a CPU"
    if (args.liger_kernel_config or {}).get("fused_linear_cross_entropy"):
        return "liger_kernel_config: leave fused_linear_cross_entropy out, as the head has its own kernels"
    return None


def _decoder_layers(model: nn.Module) -> nn.ModuleList | None:
    decoder = base_model(model).get_decoder()
    lists = (getattr(decoder, name, None) for name in ("layers", "h"))  # GPT-2's are h
    return next((layers for layers in lists if isinstance(layers, nn.ModuleList)), None)


def _compile_layers(model: nn.Module, args: ContrastiveConfig) -> None:
    """Compiles every decoder layer separately: one graph serves all layers and all lengths.

    The head, the attention and state layers stay outside of the graph: the head's forward is a new function in every
    step, and the others depend on the lengths of the segments.
    """
    layers = _decoder_layers(model)
    if layers is None:
        raise UserError(
            f"{type(base_model(model)).__name__} has no list of decoder layers to compile: set layers=eager, without"
            " torch_compile"
        )
    leave_out_of_graphs(model)
    backend, mode = args.torch_compile_backend or "inductor", args.torch_compile_mode
    compiled = functools.partial(torch.compile, backend=backend, mode=mode, dynamic=True)
    for layer in layers:
        # What Module.compile sets. It is not part of the module's state, so copies of the model run in eager mode.
        layer._compiled_call_impl = _compiled_call(layer, compiled)


def _compiled_call(layer: Any, compiled: Callable[[Callable], Callable]) -> Callable:
    """Returns what runs in place of a layer's call: compiled, and below activation checkpointing, if that is on.

    Checkpointing runs in eager mode: it would not be compiled around attention, which interrupts the graph, and
    everything inside would not be compiled, either. So the function that it recomputes is compiled.
    """
    call = compiled(layer._call_impl)
    inside = functools.cache(compiled)
    # transformers before 5.24 checkpoints the call, and so reaches this function inside.
    is_inside = "__call__" in vars(GradientCheckpointingLayer)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._dynamo.config.patch(_DYNAMO_OPTIONS):
            return run_compiled(*args, **kwargs)

    def run_compiled(*args: Any, **kwargs: Any) -> Any:
        is_checkpointed = getattr(layer, "gradient_checkpointing", False) and layer.training
        if is_inside or not is_checkpointed or not torch.is_grad_enabled():
            return call(*args, **kwargs)
        checkpoint = layer._gradient_checkpointing_func

        def checkpoint_compiled(function: functools.partial, *inputs: Any) -> Any:
            return checkpoint(functools.partial(inside(function.func), *function.args, **function.keywords), *inputs)

        layer._gradient_checkpointing_func = checkpoint_compiled
        try:
            return layer._call_impl(*args, **kwargs)
        finally:
            layer._gradient_checkpointing_func = checkpoint

    return run


def offloaded_activations(is_on: bool) -> contextlib.AbstractContextManager:
    """Returns a context that keeps the tensors saved for the backward in host memory, except parameters."""
    if not is_on:
        return contextlib.nullcontext()

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if isinstance(tensor._base if tensor._is_view() else tensor, nn.Parameter):
            return tensor.device, tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, layout=tensor.layout, pin_memory=tensor.is_cuda)
        return tensor.device, host.copy_(tensor, non_blocking=True)  # the copy back comes later on the same stream

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor.to(device, non_blocking=tensor.is_pinned())

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
