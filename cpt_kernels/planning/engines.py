"""Bytes of the training state that a process holds: its shards by engine, and what the engine needs beside them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..errors import UserError
from ..model.packed_model import base_model

# Values that an optimizer keeps for each value that it trains, in the same dtype.
_MOMENTS = {"adamw_torch": 2, "adamw_torch_fused": 2}
_BUCKET, _GATHERED = 500_000_000, 1_000_000_000  # DeepSpeed's defaults: values of a bucket, and of gathered weights
_SHARDS = {"weights": ("FSDP2", "ZeRO-3"), "gradients": ("FSDP2", "ZeRO-2", "ZeRO-3")}
_SHARDS["optimizer"] = (*_SHARDS["gradients"], "ZeRO-1")


@dataclass(frozen=True)
class Processes:
    """The processes of a planned run, and how its engine divides the training state among them."""

    count: int = 1
    group: int = 1  # sp_size: processes that run a micro-batch together
    replicas: int = 1  # of all shards
    engine: str = "DDP"  # or "FSDP2", "ZeRO-1", "ZeRO-2", "ZeRO-3"
    offloads_weights: bool = False  # they wait in the host's memory
    offloads_optimizer: bool = False  # likewise, with the gradients
    keeps_layers: bool = False  # FSDP2 gathers all layers in the forward, and frees them in the backward

    def __post_init__(self) -> None:
        for name, size in (("sp_size", self.group), ("dp_replicate_size", self.replicas)):
            if size < 1:
                raise UserError(f"{name}={size} must be at least 1")
            if self.count % size:
                raise UserError(
                    f"{name}={size} needs a multiple of {size} processes, and num_processes is {self.count}"
                )

    def shards(self, part: str) -> bool:
        """Whether a process holds a part of the training state ("weights", "gradients" or "optimizer") in a shard."""
        return self.engine in _SHARDS[part]

    def share(self, part: str, parameters: Iterable[nn.Parameter], width: int | None) -> int:
        """Returns the bytes that rank 0, whose shards are the largest, holds of a part.

        Args:
            width: bytes of a value; None: those of the parameter's dtype.
        """
        ranks, total = self.count // self.replicas if self.shards(part) else 1, 0.0
        for p in parameters:
            size = width or p.element_size()
            if hasattr(p, "quantized_bytes"):  # these stay whole
                total += p.quantized_bytes
            elif self.engine == "FSDP2" and p.dim():  # cuts every parameter along its rows, ZeRO all of them as one
                total += math.ceil(len(p) / ranks) * (p.numel() // len(p)) * size
            else:
                total += p.numel() * size / ranks
        return math.ceil(total)


def state_bytes(model: nn.Module, args: Any, processes: Processes | None = None) -> dict[str, int | None]:
    """Returns the bytes of weights, gradients and optimizer state of rank 0; None if they are not known.

    There may be two more parts: "engine" are weights that it gathers and buckets of gradients, "host" is what waits in
    the host's memory.

    Args:
        processes: default those of the run.
    """
    processes = processes or args.planned or Processes(args.world_size)
    is_zero = processes.engine.startswith("ZeRO")
    trained, frozen = ([p for p in model.parameters() if p.requires_grad is kind] for kind in (True, False))
    own = trained_width(model, args)
    width = own if is_zero else None
    state: dict[str, Any] = {
        "weights": processes.share("weights", frozen, width) + processes.share("weights", trained, own),
        "gradients": processes.share("gradients", trained, own),
    }
    moments = _MOMENTS.get(getattr(args.optim, "value", args.optim))
    values = processes.share("optimizer", trained, 4 if is_zero else own)
    state["optimizer"] = None if moments is None else (moments + is_zero) * values
    # Parts in the host's memory.
    offloaded = ["weights"] * processes.offloads_weights + ["gradients", "optimizer"] * processes.offloads_optimizer
    host = sum(state[part] or 0 for part in offloaded)
    state |= {part: 0 for part in offloaded if state[part] is not None}
    state["weights"] += sum(buffer.nbytes for buffer in model.buffers())
    compute = 2 if args.bf16 or args.fp16 else None
    more = {"engine": _engine_bytes(model, trained, processes, compute), "host": host}
    return state | {part: size for part, size in more.items() if size}


def trained_width(model: nn.Module, args: Any) -> int | None:
    """Returns the bytes in which an engine holds a trained value and its gradient; None: those of its dtype.

    In mixed precision accelerate casts trained weights for FSDP2 to fp32, unless some are quantized. ZeRO casts all
    weights to half precision, and its optimizer keeps an fp32 copy of the trained ones.
    """
    engine = (args.planned or Processes()).engine
    if engine == "DDP" or not (args.bf16 or args.fp16):
        return None
    if engine == "FSDP2":
        return None if any(hasattr(p, "quantized_bytes") for p in model.parameters()) else 4
    return 2


def checkpoint_bytes(model: nn.Module, args: Any) -> dict[str, int | None]:
    """Returns the bytes of weights and optimizer state in a checkpoint, of an adapter where one is trained.

    FSDP2's files hold a tied weight under each of its names.
    """
    own, is_adapted = trained_width(model, args), hasattr(model, "peft_config")
    named = model.named_parameters(remove_duplicate=args.planned.engine != "FSDP2")
    saved = [p for _, p in named if p.requires_grad or not is_adapted]
    whole = state_bytes(model, args, replace(args.planned, count=1, group=1, replicas=1, offloads_optimizer=False))
    optimizer = 0 if args.save_only_model else whole["optimizer"]
    return {"weights": sum(p.numel() * (own or p.element_size()) for p in saved), "optimizer": optimizer}


def most_moments(state: Mapping[str, int | None]) -> int:
    """Returns the bytes of :func:`state_bytes` for the optimizer; one that is not known keeps less than AdamW."""
    return 2 * state["gradients"] if state["optimizer"] is None else state["optimizer"]


def _engine_bytes(model: nn.Module, trained: list[nn.Parameter], processes: Processes, width: int | None) -> int:
    """Returns the bytes that an engine needs beside shards: gathered weights, and gradients that are being reduced.

    FSDP2 holds what is outside layers, the layer that runs, the one that it fetches meanwhile, and the buffer of the
    fetch; in the backward also the whole gradients of a layer and their buffer.
    """

    def size(parameters: Iterable[nn.Parameter], most: float = math.inf) -> int:
        values = [(p.numel(), width or p.element_size()) for p in parameters if not hasattr(p, "quantized_bytes")]
        total = sum(count * each for count, each in values)
        return int(min(total, most * max((each for _, each in values), default=0)))

    # bitsandbytes computes with the values of one quantized weight at a time.
    dequantized = max((2 * p.numel() for p in model.parameters() if hasattr(p, "quantized_bytes")), default=0)
    if processes.engine == "DDP":
        return dequantized + (sum(p.nbytes for p in trained) if processes.count > 1 else 0)  # in the gradients' dtype
    if processes.engine != "FSDP2":
        gathered = size(model.parameters(), _GATHERED) if processes.shards("weights") else 0
        return dequantized + gathered + size(trained, _BUCKET)
    if processes.keeps_layers:
        return dequantized + size(model.parameters())
    base = base_model(model)
    names = {*(getattr(base, "_no_split_modules", None) or ())}
    layers = [[*m.parameters()] for m in model.modules() if type(m).__name__ in names]
    layers = layers or [[*model.parameters()]]  # without names of layers FSDP2 gathers the model as one
    wrapped = {id(p) for layer in layers for p in layer}
    outside = [p for p in model.parameters() if id(p) not in wrapped]
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    if head is not None and head.weight is not embedding.weight:  # the input embedding is freed after its forward
        outside = [p for p in outside if p is not embedding.weight]
    whole = max(3 * size(layer) + 2 * size(p for p in layer if p.requires_grad) for layer in layers)
    return dequantized + size(outside) + whole
