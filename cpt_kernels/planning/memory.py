"""Predicts the memory of a training step by running it on tensors that have shapes but no values.

PyTorch's fake tensors carry shape, dtype and device through forward and backward, and :class:`LiveBytes` adds up what
is alive at each operation. So layers, attention, autocast and activation checkpointing are those of the model itself.
Kernels do not run on fake tensors; so the head only allocates what its passes allocate. Workspace inside of one
operation, such as that of a matrix product, is not seen.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
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
from ..model.heads import head_operands
from ..model.hooks import attention_over, length_dependent_rotaries, set_attention
from ..model.layers import offloaded_activations
from ..model.packed_model import PackedModel, Scores, base_model
from ..ops.backends import autocast_dtype
from ..ops.gather import gather_rows
from ..ops.head.passes import (
    Dtypes,
    GradientSums,
    Operands,
    Wanted,
    add_product,
    empty_sums,
    finished_gradients,
    scored_gradients,
)
from ..ops.head.tiles import HeadOptions, tile_buffer
from ..ops.vocab_score import VocabScore
from ..ops.vocab_score.reference import vocab_score_reference

# Raised where an operation needs the values of a fake tensor, such as the choice of experts in some models.
_NEEDS_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException)


@dataclass(frozen=True)
class StepMemory:
    """Bytes that forward and backward of a step need beside weights and optimizer state.

    Attributes:
        activations: alive when the head starts.
        head: the most that the head's forward adds to them.
        peak: the most that is alive at a time, with gradients.
    """

    activations: int
    head: int
    peak: int


def measure_step(
    packed: PackedModel,
    batch: PackedBatch,
    args: ContrastiveConfig,
    loss: Loss,
    *,
    checkpointing: bool,
    accumulates: bool,
) -> StepMemory | None:
    """Returns the memory of a micro-batch; None if the model's forward depends on values, which fake tensors lack.

    Args:
        packed: its weights may be on any device; they are not read.
        batch: tensors on the CPU.
        checkpointing: recompute activations in the backward.
        accumulates: the step has several micro-batches, so gradients are alive from the start.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    live = LiveBytes(args.device)
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    with mode:
        shapes = ShapesOnly(packed, loss, live)
    live.exclude(shapes.model)
    # Random numbers have no state here that a recomputation would restore.
    set_checkpointing(shapes.model, args, checkpointing, preserve_rng_state=False)
    shapes.model.train()
    try:
        for _ in range(1 + accumulates):
            with mode, live:
                moved = {k: v.to(args.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
                with (
                    torch.autocast(args.device.type, dtype, enabled=bool(args.bf16 or args.fp16)),
                    offloaded_activations(args.activation_offloading),
                ):
                    scores = shapes(moved, loss, general=args.head_mode == "general", statistics=True)
                scores.loss.backward()
                del scores, moved
    except _NEEDS_VALUES:
        return None
    return StepMemory(shapes.activations, shapes.head, live.peak)


def set_checkpointing(model: nn.Module, args: ContrastiveConfig, on: bool, **more: Any) -> None:
    """Turns activation checkpointing on as transformers' Trainer does, with ``more`` keywords, or off."""
    base: Any = base_model(model)
    new = hasattr(base, "activation_checkpointing_enable")  # its name in later versions of transformers
    if not on:
        (base.activation_checkpointing_disable if new else base.gradient_checkpointing_disable)()
        return
    given = {**(args.gradient_checkpointing_kwargs or {}), **more}
    own = {name: given.pop(name) for name in ("every_n_layers", "offload") if name in given}
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

    @contextmanager
    def most(self, found: list[int]) -> Iterator[None]:
        """Appends to ``found`` the most bytes that are alive within the context, beyond those before it."""
        before, peak = self.live, self.peak
        self.peak = before
        yield
        found.append(self.peak - before)
        self.peak = max(self.peak, peak)


# --- The model ---


class ShapesOnly(PackedModel):
    """A packed model on fake tensors, whose head allocates what it would need and computes nothing.

    Attributes:
        activations, head: as in :class:`StepMemory`, of the last forward.
    """

    def __init__(self, packed: PackedModel, loss: Loss, live: LiveBytes) -> None:
        model = _fake_copy(packed.model, live.device)
        base = base_model(model)
        vars(self).update(vars(packed), model=model, rotaries=length_dependent_rotaries(base), quantized=[])
        if not self.padded:
            set_attention(base, attention_over(base.config._attn_implementation))
        self.live, self.is_separable = live, loss.separable
        self.activations = self.head = 0

    def _run_head(self, head: Any, hidden: Tensor, batch: PackedBatch, loss: Any, general: bool, *_: Any) -> Scores:
        found: list[int] = []
        self.activations = self.live.live
        with self.live.most(found):
            rows = gather_rows(hidden, batch["predictor_index"], batch["predictor_rounds"])
            operands = head_operands(head, rows)
            assert operands is not None and self.options is not None, "the proof found the head to be a product"
            options = replace(self.options, statistics=True)
            total = _HeadMemory.apply(*operands, options, self.is_separable and not general)
        self.head = found[0]
        tokens = VocabScore.empty(len(rows), rows, True)
        return Scores(tokens, tokens.logps[: len(batch["completion_lengths"])], total)

    def _score_logits(self, *args: Any) -> Scores:
        found: list[int] = []
        self.activations = self.live.live
        with self.live.most(found):
            scores = super()._score_logits(*args)
        self.head = found[0]
        return scores


def _fake_copy(model: nn.Module, device: torch.device) -> nn.Module:
    """Returns a copy of a model whose parameters and buffers are fake tensors on ``device``."""
    memo: dict[int, Any] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        fake = torch.empty_like(tensor, device=device)
        memo[id(tensor)] = nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(model, memo)


# --- The head ---


class _HeadMemory(torch.autograd.Function):
    """Allocates what the passes of :mod:`cpt_kernels.ops.linear_preference` allocate, mode by mode."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, options: HeadOptions, finishes: bool):
        operands = Operands(hidden, weight, hidden, bias)
        wanted = Wanted(*(tensor is not None and tensor.requires_grad for tensor in (hidden, weight, bias)))
        ctx.wanted, ctx.dtypes, ctx.options = wanted, Dtypes.of(operands), options
        ctx.dtype = autocast_dtype(hidden, weight) or hidden.dtype
        x, w = hidden.to(ctx.dtype), weight.to(ctx.dtype)
        kept: tuple[Tensor | None, ...]
        if options.tile_rows(x, w) >= len(x) or not wanted.head:  # G W, and the tile if the head is trained
            ctx.mode, tile = "scored", _scored_tile(x, w, options)
            kept = (torch.empty_like(x), *((tile, hidden) if wanted.head else (None, None)))
        elif finishes:  # G W, and sums of the gradients
            ctx.mode, kept = "finished", _sum_up(x, w, operands, wanted, options)[:3]
        else:  # the backward computes the tiles again
            ctx.mode, kept = "again", (hidden, weight, bias)
            _scored_tile(x, w, options)
        ctx.save_for_backward(*kept)
        return x.new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor):  # -> gradients of hidden, weight, bias, options, finishes
        saved = ctx.saved_tensors
        g = grad.new_zeros(len(saved[0]))
        if ctx.mode == "scored":
            return *scored_gradients(g, *saved, ctx.wanted, ctx.dtypes, True), None, None
        sums = GradientSums(*saved, None)
        if ctx.mode == "again":
            hidden, weight, bias = saved
            x, w = hidden.to(ctx.dtype), weight.to(ctx.dtype)
            sums = _sum_up(x, w, Operands(hidden, weight, hidden, bias), ctx.wanted, ctx.options)
        return *finished_gradients(grad, g, sums, ctx.dtypes, True), None, None


def _sum_up(x: Tensor, w: Tensor, operands: Operands, wanted: Wanted, options: HeadOptions) -> GradientSums:
    """Allocates sums of gradients, and what is added to them; all but the sums is freed at the end."""
    sums = empty_sums(x, operands, wanted)
    tile = _scored_tile(x, w, options)
    if sums.weight is not None:
        add_product(sums.weight, tile, torch.empty_like(x[: len(tile)]))
    return sums


def _scored_tile(x: Tensor, w: Tensor, options: HeadOptions) -> Tensor:
    """Allocates a tile of logits, and the temporaries of scoring it on a CPU; kernels of a GPU have none."""
    tile = tile_buffer(x, w, options)
    if x.device.type == "cpu":
        vocab_score_reference(tile, x.new_zeros(len(tile), dtype=torch.int64), options.of_tile(None, score=True))
    return tile
