"""What a run may do to the layers between the packed row and the head: Liger's kernels, torch.compile, offloading."""

from __future__ import annotations

import contextlib
import os
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from ..config import ContrastiveConfig
from ..errors import UserError
from .packed_model import base_model

# Of Liger's kernels, those for what the head here does itself.
_LIGER_HEADS = {"fused_linear_cross_entropy": False, "cross_entropy": False}


def prepare_layers(model: nn.Module, args: ContrastiveConfig) -> None:
    """Do what ``args`` ask for, before transformers' Trainer is made, which would do it to the whole model.

    Raises:
        UserError: ``torch_compile`` of a model whose decoder layers are not to be found; Liger's kernels where they
            cannot run, or its head.
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
        raise UserError("liger_kernel_config: leave fused_linear_cross_entropy out, the head here has its own kernels")


def _compile_layers(model: nn.Module, args: ContrastiveConfig) -> None:
    """Compile every decoder layer by itself: one graph for all of them and for any length.

    The head's forward is another one in every step, and attention over segments depends on lengths; both stay outside.
    """
    layers = getattr(base_model(model).get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        name = type(base_model(model)).__name__
        raise UserError(f"torch_compile compiles the layers of a decoder, and {name} keeps them under another name")
    for layer in layers:
        layer.compile(backend=args.torch_compile_backend, mode=args.torch_compile_mode, dynamic=True)
    args.torch_compile, args.torch_compile_backend, args.torch_compile_mode = False, None, None  # or all is compiled


def offloaded_activations(is_on: bool):
    """A context in which what is kept for the backward lies in the host's memory; parameters stay where they are."""
    if not is_on:
        return contextlib.nullcontext()

    def pack(tensor: Tensor) -> tuple[torch.device, Tensor]:
        if isinstance(tensor._base if tensor._is_view() else tensor, nn.Parameter):
            return tensor.device, tensor
        host = torch.empty(tensor.shape, dtype=tensor.dtype, layout=tensor.layout, pin_memory=tensor.is_cuda)
        return tensor.device, host.copy_(tensor, non_blocking=True)  # the way back is behind it on the same stream

    def unpack(packed: tuple[torch.device, Tensor]) -> Tensor:
        device, tensor = packed
        return tensor.to(device, non_blocking=tensor.is_pinned())

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)
