"""References that follow the policy.

With ``sync_ref_model`` the reference moves every few steps and scores every batch: TR-DPO, Gorbatovski et al., arXiv
2404.09656. With ``refresh_reference`` of a curriculum the policy becomes the reference at the start of each stage, and
the rows of the stage are scored into the cache before it begins.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from numpy.typing import NDArray
from safetensors.torch import load_model, save_model
from torch import nn
from transformers import TrainerCallback

from ..data.collate import PackedBatch, ReferenceLookup
from ..errors import UserError
from ..model.loading import zero_stage
from ..model.packed_model import PackedModel
from .cache import ReferenceCache
from .keys import Sequences
from .scorer import Reference

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
    since = 0  # see Reference

    def __init__(self, policy: PackedModel, ref_model: nn.Module | None, accelerator: Accelerator) -> None:
        # Refuse what cannot be mixed.
        if hasattr(policy.model, "peft_config"):
            raise UserError("sync_ref_model mixes weights, which is not defined for an adapter: leave out one of them")
        if accelerator.distributed_type == DistributedType.FSDP or zero_stage(accelerator.state) == 3:
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
            *("false" if policy.padded else "true", policy.images, policy.group),
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


class StagedReference(Reference):
    """A reference that becomes the policy at the start of every stage of a curriculum but the first.

    Its log-probs are on disk, under the fingerprint of the policy at that time. Batches get them when a step runs, and
    not when a DataLoader worker collates them, which may be before the stage begins. A checkpoint records the
    fingerprint of its stage, so that a resumed run finds the log-probs again.
    """

    @property
    def lookup(self) -> ReferenceLookup:
        return _unknown

    def complete(self, batch: PackedBatch) -> None:
        """Puts the log-probs of a batch into it; a completion that the stage's reference did not score is an error."""
        if batch["scored"] is not None or batch["token_weights"] is not None:
            self.check_tokens("masks and weights of tokens need")
        if missing := batch["ref_missing"]:
            logps = self.cache.log_probs([(prompt, ids) for _, prompt, ids in missing])
            if np.isnan(logps).any():
                raise UserError(
                    f"{self.cache.folder} lacks completions of a batch, and the reference of this stage has changed"
                    " since: evaluate on data that the trainer was made with, and use its own data_collator"
                )
            self.found += len(missing)
            logps = logps if batch["scored"] is None else logps[batch["scored"]]  # all completions are missing
            batch["ref_token_logps"] = torch.from_numpy(logps).to(batch["input_ids"].device)
            batch["ref_missing"] = []

    def begin_stage(self, step: int) -> None:
        """Makes the policy, as it is before ``step``, the reference. The caller then fills the cache, and ends it."""
        self.packed, self.owned, self.live = self.policy, False, False
        self.adapters_off, self._start = False, {}
        # FSDP2 trains bf16 weights in fp32. Policies of two stages may be equal in bf16, so all bits count from now on.
        for parameter in self.policy.model.parameters():
            vars(parameter).pop("loaded_dtype", None)
        self._identify(self.cache.directory)
        self.since, self._start_is_checked = step, False

    def end_scoring(self) -> None:
        """Reduces the reference to the cache, because the policy is about to change."""
        self.packed = None

    def reopen(self, stage: Mapping[str, Any]) -> None:
        """Opens the log-probs of the stage that a checkpoint records, see :attr:`stage`."""
        self.since = stage["step"]
        self.cache = ReferenceCache(self.cache.directory, stage["fingerprint"]) if self.since else self.start_cache

    @property
    def stage(self) -> dict[str, Any]:
        """The step at which the reference became the policy, and its fingerprint, as plain data."""
        return {"step": self.since, "fingerprint": self.cache.fingerprint}


def _unknown(sequences: Sequences) -> NDArray[np.float32]:
    """Looks up nothing: every log-prob is NaN."""
    return np.full(sum(len(completion) for _, completion in sequences), np.nan, np.float32)
