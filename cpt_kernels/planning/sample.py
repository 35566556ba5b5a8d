"""Some layers of a model that has shapes but no weights, with random values, which run micro-batches of its run."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from accelerate.utils import send_to_device
from torch import nn

from ..data.collate import PackedBatch
from ..data.images import IMAGES, PlacedImages
from ..model.hooks import attention_over, length_dependent_rotaries, replaced_forward, set_attention
from ..model.images import encode_images
from ..model.packed_model import base_model
from .memory import set_checkpointing
from .model_sizes import layer_stack
from .peer import Sides, run_peer


class Sample:
    """The last layers of a run's model, or all, with random values. Time depends on shapes, not on values.

    Args:
        trainer: a ``ContrastiveTrainer`` of a model on the device "meta"; it is not changed.
        layers: how many of the last layers; ignored for a model without a list of layers.
    """

    def __init__(self, trainer: Any, layers: int) -> None:
        args = trainer.args
        self.device, self.dataset = args.device, trainer.train_dataset
        self.model, self.stack = truncated(trainer.packed.model, layers)
        self.model.to_empty(device=self.device)
        base = base_model(self.model)
        ends = base.get_input_embeddings(), base.get_output_embeddings()
        if not any(hasattr(end, "modules_to_save") for end in ends):  # PEFT's copies are not tied
            base.tie_weights()
        _set_random_values(self.model)
        if args.gradient_checkpointing:
            set_checkpointing(self.model, args, on=True)
        # A trainer of this model has the loss, the precision and the optimizer of the run.
        packed = copy.copy(trainer.packed)
        packed.model, packed.rotaries = self.model, length_dependent_rotaries(base)
        if not packed.padded:
            set_attention(base, attention_over(base.config.get_text_config()._attn_implementation))
        self.packed, self.trainer = packed, copy.copy(trainer)
        self.trainer.packed, self.trainer.model, self.trainer.optimizer = packed, self.model, None
        self.wrapped = trainer.accelerator.prepare_model(self.model)
        self.optimizer = self.trainer.create_optimizer(self.model)
        self.collator = replace(trainer.collator, reference=_no_information if trainer.loss.needs_reference else None)
        self._read: dict[tuple[int, ...], PackedBatch] = {}  # batches with images, by rows

    def needs_logits(self) -> bool:
        """Whether the model's forward reads columns of its logits, which are never whole here, as Chameleon's does."""
        base, token = base_model(self.model), torch.zeros(1, 1, dtype=torch.int64, device=self.device)
        head = base.get_output_embeddings()
        try:
            with torch.no_grad(), self._as_reference(), replaced_forward(head, lambda *_, **__: torch.zeros(1, 1, 1)):
                base(input_ids=token, use_cache=False)
        except IndexError:
            return True
        return False

    def read(self, rows: Sequence[int]) -> None:
        """Collates a packed micro-batch: decodes and preprocesses its images."""
        self._read[tuple(rows)] = self.collator(self.dataset.__getitems__(list(rows)))

    def encode(self, rows: Sequence[int], backward: bool = False) -> None:
        """Runs the forward of the vision tower on the images of a micro-batch that was read, and its backward."""
        inputs = send_to_device(self._read[tuple(rows)]["images"], self.device)
        with torch.set_grad_enabled(backward), self.trainer.accelerator.autocast():
            total = torch.stack([part.float().sum() for part in encode_images(base_model(self.model), inputs)]).sum()
        if total.requires_grad:  # a part of the tower is trained
            self.trainer.accelerator.backward(total)

    def _batch(self, rows: Sequence[int]) -> PackedBatch:
        """Returns a packed micro-batch; tokens of images run as text, because images are timed by themselves."""
        if not self.dataset.features.keys() & {IMAGES}:
            return self.collator(self.dataset.__getitems__(list(rows)))
        if tuple(rows) not in self._read:
            self.read(rows)
        nothing = PlacedImages(
            image_rows=[], images={}, image_tokens=[], image_index=[], image_prompts=[], token_types={}
        )
        batch = self._read[tuple(rows)]
        return cast("PackedBatch", {**batch, **nothing, "token_types": batch["token_types"]})

    def train(self, rows: Sequence[int]) -> None:
        """Runs forward and backward of a packed micro-batch."""
        batch = self._batch(rows)
        self.trainer.training_step(self.wrapped, batch, self.trainer._counts([batch], self.device))

    @torch.no_grad()
    def score(self, rows: Sequence[int]) -> None:
        """Runs the reference's forward of a packed micro-batch."""
        batch = send_to_device(self._batch(rows), self.device)
        with self._as_reference(), self.trainer.accelerator.autocast():
            self.packed(batch).tokens.logps.float().cpu()

    def train_peer(self, sides: Sides) -> None:
        """Runs forward and backward of a padded micro-batch."""
        self.model.train()
        self.trainer.accelerator.backward(run_peer(self.model, self.wrapped, sides, self.collator.images))

    @torch.no_grad()
    def score_peer(self, sides: Sides) -> None:
        """Runs the reference's forward of a padded micro-batch."""
        with self._as_reference():
            run_peer(self.model, self.wrapped, sides, self.collator.images).item()

    def step(self) -> None:
        """Takes an optimizer step with the gradients that are there."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if self.trainer.args.max_grad_norm:
            nn.utils.clip_grad_norm_(parameters, self.trainer.args.max_grad_norm)
        self.optimizer.step()

    def forget_gradients(self) -> None:
        self.optimizer.zero_grad()

    @contextlib.contextmanager
    def only(self, layers: int) -> Iterator[None]:
        """Context in which only so many of the last layers run."""
        whole = dict(self.stack._modules) if self.stack is not None else {}
        if self.stack is not None:
            last = list(whole.values())[len(whole) - layers :]
            self.stack._modules = {str(i): layer for i, layer in enumerate(last)}
        try:
            yield
        finally:
            if self.stack is not None:
                self.stack._modules = whole

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[None]:
        """Context of a model without dropout, checkpointing and adapters."""
        self.model.eval()
        is_adapted = hasattr(self.model, "disable_adapter")
        with self.model.disable_adapter() if is_adapted else contextlib.nullcontext():
            yield
        self.model.train()


def truncated(model: nn.Module, layers: int) -> tuple[nn.Module, nn.ModuleList | None]:
    """Returns a copy of a model that keeps only its last layers, and their list.

    The list is None, and the copy whole, where :func:`.model_sizes.layer_stack` finds none. The last layers are kept,
    because the first ones of some mixtures of experts differ from all others.
    """
    copied = copy.deepcopy(model)
    stack = layer_stack(base_model(copied))
    if stack is not None:
        del stack[: len(stack) - layers]
    return copied, stack


@torch.no_grad()
def _set_random_values(model: nn.Module) -> None:
    for tensor in [*model.parameters(), *model.buffers()]:
        if not tensor.is_floating_point():
            tensor.zero_()
        elif tensor.dim() > 1:
            tensor.uniform_(-0.02, 0.02)
        else:  # scales of norms, frequencies
            tensor.fill_(1.0)


def _no_information(sequences: Sequence[tuple[Sequence[int], Sequence[int]]]) -> np.ndarray:
    """Returns a reference log-prob of -1 for every token, as a look-up that finds all."""
    return np.full(sum(len(completion) for _, completion in sequences), -1.0, np.float32)
