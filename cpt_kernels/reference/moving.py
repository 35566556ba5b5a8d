"""A reference that follows the policy, for ``sync_ref_model``: Gorbatovski et al. (TR-DPO), arXiv 2404.09656."""

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

from ..config import ContrastiveConfig
from ..data.collate import PackedBatch
from ..errors import UserError
from ..model.packed_model import PackedModel

logger = logging.getLogger(__name__)


class MovingReference(TrainerCallback):
    """A reference in memory that is run for every batch; nothing is cached, as its values do not last.

    Every ``ref_model_sync_steps`` steps it becomes ``ref_model_mixup_alpha`` times the policy plus the rest of itself.
    Checkpoints hold it.

    Args:
        policy: the model to be trained.
        ref_model: the reference to start from; default a copy of the policy.

    Raises:
        UserError: an adapter, whose product is not mixed by mixing its factors; weights that are sharded over ranks; a
            reference of another architecture.
    """

    FILE = "reference.safetensors"  # of a checkpoint
    lookup = None  # nothing is known ahead

    def __init__(
        self,
        policy: PackedModel,
        ref_model: nn.Module | None,
        accelerator: Accelerator,
        args: ContrastiveConfig,
    ) -> None:
        if hasattr(policy.model, "peft_config"):
            raise UserError("sync_ref_model mixes weights, which is not defined for an adapter: leave one of both out")
        plugin = accelerator.state.deepspeed_plugin
        if accelerator.distributed_type == DistributedType.FSDP or (plugin is not None and plugin.zero_stage == 3):
            raise UserError("sync_ref_model needs whole weights on every rank: use DDP or ZeRO-1/2, not FSDP or ZeRO-3")
        model = copy.deepcopy(policy.model) if ref_model is None else ref_model
        shapes = [[(name, p.shape) for name, p in m.named_parameters()] for m in (policy.model, model)]
        if shapes[0] != shapes[1]:
            raise UserError("sync_ref_model mixes policy and reference: they must have the same architecture")
        model.requires_grad_(False).eval().to(accelerator.device)
        self.accelerator, self.policy = accelerator, policy
        self.packed = PackedModel(model, args.head_memory_mb, args.attention_backend)
        if accelerator.is_main_process:
            logger.warning(
                "sync_ref_model: the reference follows the policy, so its log-probs are not cached; it stays in memory"
                " and runs in every step"
            )

    @property
    def model(self) -> nn.Module:
        """The reference as it is now."""
        return self.packed.model

    @torch.no_grad()
    def complete(self, batch: PackedBatch) -> None:
        """Score a batch by the reference as it is now."""
        with self.accelerator.autocast():
            batch["ref_token_logps"] = self.packed(batch).tokens.logps.float()
        batch["ref_missing"] = []

    def training(self) -> contextlib.AbstractContextManager:
        """Nothing: it is in memory, and there is no cache."""
        return contextlib.nullcontext()

    def fill(self, *_: Any) -> None:
        """Nothing: there is no cache."""

    def check_start(self, *_: Any) -> None:
        """Nothing: it was a copy, or is another model."""

    @torch.no_grad()
    def on_step_end(self, args, state, control, **_) -> None:
        if state.global_step % args.ref_model_sync_steps == 0:
            alpha = args.ref_model_mixup_alpha
            for ours, theirs in zip(self.packed.model.parameters(), self.policy.model.parameters()):
                ours.mul_(1 - alpha).add_(theirs, alpha=alpha)

    def on_save(self, args, state, control, **_) -> None:
        if state.is_world_process_zero and not args.save_only_model:
            save_model(self.packed.model, str(Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.FILE))

    def load(self, checkpoint: str) -> None:
        """Go on as the checkpoint left it.

        Raises:
            UserError: the checkpoint has no reference.
        """
        file = Path(checkpoint) / self.FILE
        if not file.is_file():
            raise UserError(
                f"{checkpoint} holds no {self.FILE}: it was not saved by a run with sync_ref_model, or that run died"
                " while it was; resume from an earlier one"
            )
        load_model(self.packed.model, file, device=str(self.accelerator.device))
