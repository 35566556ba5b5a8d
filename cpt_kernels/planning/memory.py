"""Predicts the memory of a training step by running it on tensors that have shapes but no values.

PyTorch's fake tensors carry shape, dtype and device through forward and backward, and :class:`LiveBytes` adds up what
is alive at each operation. So layers, attention, head, autocast and activation checkpointing are those of training.
Workspace inside of one operation, such as that of a matrix product, is not seen.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..config import ContrastiveConfig
from ..data.collate import PackedBatch
from ..losses import Loss
from ..model.hooks import attention_over, length_dependent_rotaries, set_attention
from ..model.layers import offloaded_activations
from ..model.packed_model import PackedModel, Scores, base_model
from .engines import Processes, trained_width
from .model_sizes import layer_stack

# Raised where an operation needs the values of a fake tensor, such as the choice of experts in some models.
_NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)


@dataclass(frozen=True)
class StepMemory:
    """Bytes that forward and backward of a step need beside weights and optimizer state."""

    activations: int  # alive when the head starts
    head: int  # the most that the head's forward adds to them
    peak: int  # the most that is alive at a time, with gradients
    gradients: int  # alive after the last backward

    def extended(self, more: StepMemory, times: float, accumulates: bool) -> StepMemory:
        """Returns the memory with ``times`` as many more layers as ``more`` has more than this.

        The peak lies at the start of the backward, where it grows by the activations of a layer, or at its end, where
        it grows by the gradients; the larger of both is an upper bound.
        """
        grown = {part.name: getattr(more, part.name) - getattr(self, part.name) for part in fields(self)}
        values = {name: round(getattr(self, name) + times * growth) for name, growth in grown.items()}
        values["peak"] = round(more.peak + (times - 1) * (grown["peak"] if accumulates else max(grown.values())))
        return StepMemory(**values)

    def cut(self, parts: int) -> StepMemory:
        """Returns the memory of a process that holds one of ``parts`` parts of the activations."""
        spared = self.activations - self.activations // parts
        return replace(self, activations=self.activations - spared, peak=self.peak - spared)


def measure_step(
    packed: PackedModel,
    batch: PackedBatch,
    args: ContrastiveConfig,
    loss: Loss,
    *,
    checkpointing: bool,
    accumulates: bool,
    layers: int | None = None,
) -> StepMemory | None:
    """Returns the memory of a micro-batch; None if the model's forward depends on values, which fake tensors lack.

    In a planned run whose engine shards weights or casts them, weights have the dtype that layers compute with, and a
    gradient is reduced to a shard as soon as it is there.

    Args:
        packed: its weights may be on any device; they are not read.
        batch: tensors on the CPU. Its reference log-probs are replaced by zeros.
        checkpointing: recompute activations in the backward.
        accumulates: the step has several micro-batches, so gradients are alive from the start.
        layers: how many of the last layers run; default all.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    live = LiveBytes(args.device)
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    is_mixed, engine = bool(args.bf16 or args.fp16), args.planned or Processes()
    is_cast = is_mixed and engine.engine != "DDP"
    with mode:
        shapes = ShapesOnly(packed, live, dtype if is_cast else None, layers)
    live.exclude(shapes.model)
    if loss.needs_reference:
        batch["ref_token_logps"] = torch.zeros(sum(batch["completion_lengths"]))
    # Random numbers have no state here that a recomputation would restore.
    set_checkpointing(shapes.model, args, checkpointing, preserve_rng_state=False)
    shapes.model.train()
    try:
        with mode, live:
            _hold_gradients(shapes.model, engine, trained_width(packed.model, args), accumulates)
            gradients = live.live  # of the micro-batch before
            moved = {k: v.to(args.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            moved["targets"] = mode.from_tensor(moved["targets"])  # their values would be checked
            with (
                torch.autocast(args.device.type, dtype, enabled=is_mixed and not is_cast),
                offloaded_activations(args.activation_offloading),
            ):
                scores = shapes(moved, loss, general=args.head_mode == "general", statistics=True)
            scores.loss.backward()
            del scores, moved
    except _NEEDS_VALUES:
        return None
    return StepMemory(shapes.activations - gradients, shapes.head, live.peak, live.live)


def _hold_gradients(model: nn.Module, engine: Processes, width: int | None, accumulates: bool) -> None:
    """Makes gradients, if they are there from the start; makes those that are sharded shrink as soon as they are whole.

    Args:
        width: bytes of a value of a shard; None: those of the parameter's dtype.
    """
    shards: dict[nn.Parameter, Tensor] = {}

    def reduce(parameter: nn.Parameter) -> None:
        parameter.grad = None
        if parameter not in shards:
            size = 0 if engine.offloads_optimizer else engine.share("gradients", [parameter], width)
            shards[parameter] = torch.empty(size, dtype=torch.uint8, device=parameter.device)

    for parameter in (p for p in model.parameters() if p.requires_grad):
        if engine.shards("gradients"):
            parameter.register_post_accumulate_grad_hook(reduce)
        if accumulates:
            if engine.shards("gradients"):
                reduce(parameter)
            else:
                parameter.grad = torch.zeros_like(parameter)


def set_checkpointing(model: nn.Module, args: ContrastiveConfig, on: bool, **more: Any) -> None:
    """Turns activation checkpointing on as transformers' Trainer does, with ``more`` keywords, or off."""
    base: Any = base_model(model)
    new = hasattr(base, "activation_checkpointing_enable")  # its name in later versions of transformers
    if not on:
        (base.activation_checkpointing_disable if new else base.gradient_checkpointing_disable)()
        return
    given = dict(args.gradient_checkpointing_kwargs or {})
    own = {name: given.pop(name) for name in ("every_n_layers", "offload") if name in given}
    given = (given or {"use_reentrant": False}) | more  # transformers' default where no other keyword is given
    if new:
        base.activation_checkpointing_enable(activation_checkpointing_kwargs=given, **own)
    else:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=given)


# --- Counting ---


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors on one kind of device that operations make while the mode is on.

    Attributes:
        live, peak: bytes that are alive now, and the most so far.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device, self.live, self.peak = device, 0, 0
        self._storages: set[int] = set()

    def exclude(self, module: nn.Module) -> None:
        """Leaves the parameters and buffers of a module out."""
        self._storages |= {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self.device.type:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        # Views share the storage of their tensor. Its Python object lives as long as the storage itself.
        if (key := storage._cdata) in self._storages:
            return
        self._storages.add(key)
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._storages.discard(key)
        self.live -= size


# --- The model ---


class ShapesOnly(PackedModel):
    """A packed model on fake tensors.

    Attributes:
        activations, head: as in :class:`StepMemory`, of the last forward.
    """

    def __init__(
        self, packed: PackedModel, live: LiveBytes, dtype: torch.dtype | None, layers: int | None = None
    ) -> None:
        model = _fake_copy(packed.model, live.device, dtype, layers)
        base = base_model(model)
        own = {"model": model, "rotaries": length_dependent_rotaries(base), "quantized": [], "group": None}
        vars(self).update(vars(packed) | own)
        if not self.padded:
            set_attention(base, attention_over(base.config.get_text_config()._attn_implementation))
        self.live = live
        self.activations = self.head = 0

    def _run_head(self, *args: Any) -> Scores:
        return self._counted(super()._run_head, *args)

    def _score_logits(self, *args: Any) -> Scores:
        return self._counted(super()._score_logits, *args)

    def _counted(self, run: Callable[..., Scores], *args: Any) -> Scores:
        before, peak = self.live.live, self.live.peak
        self.live.peak = before
        scores = run(*args)
        self.activations, self.head = before, self.live.peak - before
        self.live.peak = max(self.live.peak, peak)
        return scores


def _fake_copy(model: nn.Module, device: torch.device, dtype: torch.dtype | None, layers: int | None) -> nn.Module:
    """Returns a copy of a model whose parameters and buffers are fake tensors on ``device``.

    Args:
        dtype: of all parameters; None: their own.
        layers: how many of the last layers are kept; None: all.
    """
    stack = None if layers is None else layer_stack(base_model(model))
    dropped = [] if stack is None else [*stack][: len(stack) - layers]
    memo: dict[int, Any] = {id(layer): nn.Identity() for layer in dropped}
    outside = {id(t) for layer in dropped for t in (*layer.parameters(), *layer.buffers())}
    for tensor in (*model.parameters(), *model.buffers()):
        if id(tensor) in outside:
            continue
        is_cast = isinstance(tensor, nn.Parameter) and tensor.is_floating_point()
        fake = torch.empty_like(tensor, device=device, dtype=dtype if is_cast else None)
        memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    copied = copy.deepcopy(model, memo)
    if stack is not None:
        del memo[id(stack)][: len(dropped)]  # of the copy
    return copied
