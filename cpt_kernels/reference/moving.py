"""A reference that follows the policy (``sync_ref_model``): TR-DPO, Gorbatovski et al., arXiv 2404.09656."""

from __future__ import annotations

import contextlib
import copy
import logging
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import TrainerCallback

from ..data.collate import PackedBatch
from ..errors import UserError
from ..model.packed_model import PackedModel

logger = logging.getLogger(__name__)


class MovingReference(TrainerCallback):
    """A reference that stays in memory and scores every batch. Its log-probs are not cached, because they change.

    Every ``ref_model_sync_steps`` steps its weights become ``alpha * policy + (1 - alpha) * reference``, with ``alpha``
    = ``ref_model_mixup_alpha``. Checkpoints contain the reference.

    Args:
        policy: the model that will be trained.
        ref_model: the reference at the start; default a copy of the policy.

    Raises:
        UserError: the policy has an adapter (mixing the factors of a product does not mix the product); the weights are
            sharded over ranks; policy and reference differ in architecture.
    """

    FILE = "reference.safetensors"  # in a checkpoint
    lookup = None  # the collator has no reference log-probs to put into batches

    def __init__(
        self,
        policy: PackedModel,
        ref_model: nn.Module | None,
        accelerator: Accelerator,
    ) -> None:
        # Refuse what cannot be mixed.
        if hasattr(policy.model, "peft_config"):
            raise UserError("sync_ref_model mixes weights, which is not defined for an adapter: leave out one of them")
        plugin = accelerator.state.deepspeed_plugin
        if accelerator.distributed_type == DistributedType.FSDP or (plugin is not None and plugin.zero_stage == 3):
            raise UserError("sync_ref_model needs whole weights on every rank: use DDP or ZeRO-1/2, not FSDP or ZeRO-3")
        model = copy.deepcopy(policy.model) if ref_model is None else ref_model
        shapes = [[(name, p.shape) for name, p in m.named_parameters()] for m in (policy.model, model)]
        if shapes[0] != shapes[1]:
            raise UserError("sync_ref_model mixes policy and reference: they must have the same architecture")
        # Prepare the reference.
        model.requires_grad_(False).eval().to(accelerator.device)
        self.accelerator, self.policy = accelerator, policy
        self.packed = PackedModel(
            *(model, policy.head_memory_mb, policy.attention_backend),
            *("false" if policy.padded else "true", policy.images),
        )
        if accelerator.is_main_process:
            logger.warning(
                "sync_ref_model: the reference follows the policy, so its log-probs are not cached; it stays in memory"
                " and scores every batch"
            )

    @property
    def model(self) -> nn.Module:
        """The current reference."""
        return self.packed.model

    @torch.no_grad()
    def complete(self, batch: PackedBatch) -> None:
        """Scores a batch with the current reference."""
        with self.accelerator.autocast():
            batch["ref_token_logps"] = self.packed(batch).tokens.logps.float()
        batch["ref_missing"] = []

    def training(self) -> contextlib.AbstractContextManager:
        """Does nothing: the reference stays in memory, and nothing is cached."""
        return contextlib.nullcontext()

    def fill(self, *_: Any) -> None:
        """Does nothing: nothing is cached."""

    def check_start(self, *_: Any) -> None:
        """Does nothing: the reference is a copy of the policy, or a separate model that may differ."""

    @torch.no_grad()
    def on_step_end(self, args, state, control, **_) -> None:
        """Mixes the policy into the reference when it is due."""
        if state.global_step % args.ref_model_sync_steps == 0:
            alpha = args.ref_model_mixup_alpha
            for ours, theirs in zip(self.packed.model.parameters(), self.policy.model.parameters()):
                ours.mul_(1 - alpha).add_(theirs, alpha=alpha)

    def save(self, checkpoint: Path) -> None:
        """Adds the reference to a checkpoint; the main process calls it."""
        save_model(self.packed.model, str(checkpoint / self.FILE))

    def load(self, checkpoint: str) -> None:
        """Loads the reference of a checkpoint."""
        load_model(self.packed.model, Path(checkpoint) / self.FILE, device=str(self.accelerator.device))
