"""Applies Liger's kernels, torch.compile and activation offloading to the layers below the head."""

from __future__ import annotations

import contextlib
import os
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from ..config import ContrastiveConfig
from ..errors import UserError
from .packed_model import base_model

# Liger kernels that are switched off, because the head here replaces them.
_LIGER_HEADS = {"fused_linear_cross_entropy": False, "cross_entropy": False}


def prepare_layers(model: nn.Module, args: ContrastiveConfig) -> None:
    """Applies ``use_liger_kernel`` and ``torch_compile``. transformers' Trainer would apply them to the whole model.

    Must run before transformers' Trainer is constructed.

    Raises:
        UserError: ``torch_compile`` does not find the decoder layers; Liger's kernels cannot run here, or its head is
            asked for.
    """
    if args.use_liger_kernel:
        _check_liger(args)
        args.liger_kernel_config = _LIGER_HEADS | (args.liger_kernel_config or {})
    if args.torch_compile:
        _compile_layers(model, args)


def _check_liger(args: ContrastiveConfig) -> None:
    if find_spec("liger_kernel") is None:
        raise UserError("use_liger_kernel needs the liger-kernel package: pip install liger-kernel")
    if args.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UserError("use_liger_kernel needs a GPU: leave it out on a CPU")
    if (args.liger_kernel_config or {}).get("fused_linear_cross_entropy"):
        raise UserError("liger_kernel_config: leave fused_linear_cross_entropy out, as the head has its own kernels")


def _compile_layers(model: nn.Module, args: ContrastiveConfig) -> None:
    """Compiles every decoder layer separately: one graph serves all layers and all lengths.

    The head and the attention stay outside of the graph: the head's forward is a new function in every step, and
    attention depends on the lengths of the segments.
    """
    layers = getattr(base_model(model).get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        name = type(base_model(model)).__name__
        raise UserError(f"torch_compile compiles decoder.layers, which {name} does not have: leave torch_compile out")
    for layer in layers:
        layer.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode, dynamic=True)
    # Otherwise the Trainer would compile the whole model.
    args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None


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
