"""The reference model of a run: which one it is, and its log-probs, scored once and kept on disk."""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, send_to_device
from torch import nn
from tqdm.auto import tqdm

from .data.batches import pack_rows
from .data.collate import PackedBatch, PackedCollator
from .data.loader import row_tokens
from .data.truncation import truncate
from .fingerprint import describe, fingerprint
from .model import PackedModel, base_model
from .reference_cache import ReferenceCache

logger = logging.getLogger(__name__)

_TOKENS_PER_BATCH = {"cpu": 4096}  # of a scoring pass, unless the user set a budget
_DEFAULT_TOKENS_PER_BATCH = 16384


class Reference:
    """Reference log-probs of one run.

    The reference is ``ref_model`` where one is given; for an adapter made for this run, the model with adapters off;
    otherwise the policy as it is now, before the first step and before any checkpoint is loaded.

    Args:
        policy: the model to be trained.
        ref_model: a reference of its own.
        new_adapter: the policy is a PEFT model whose adapter was made for this run.
        keep: the reference is needed while training (streams): a copy of the policy is kept if need be.
        cache_dir: folder of the cache.
    """

    def __init__(
        self,
        policy: PackedModel,
        ref_model: nn.Module | None,
        *,
        new_adapter: bool,
        keep: bool,
        accelerator: Accelerator,
        cache_dir: str,
        head_memory_mb: float | None = None,
    ) -> None:
        self.accelerator = accelerator
        self.adapters_off = ref_model is None and new_adapter
        self.owned = ref_model is not None
        self.live = self.owned or self.adapters_off or keep
        if ref_model is None and keep and not self.adapters_off:
            ref_model = copy.deepcopy(policy.model)
            self.owned = True
        if ref_model is not None:
            ref_model.requires_grad_(False).eval()
            self.packed = PackedModel(ref_model, head_memory_mb, policy.attention_backend)
        else:
            self.packed = policy
        model = self.packed.model
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        identity = {
            "compute_dtype": mixed or base_model(model).dtype,
            "attention": "shared_prompt",
            "adapters": not self.adapters_off,
        }
        self.cache = ReferenceCache(cache_dir, fingerprint(model, **identity), description=describe(model, **identity))

    def start_training(self) -> None:
        """The policy's weights are about to change: a reference without a model of its own is the cache alone now."""
        if not self.live:
            self.packed = None
        elif self.owned:
            self.packed.model.to("cpu")  # until something is missing

    def lookup(self, prompt_ids: Sequence[int], completion_ids: Sequence[int]) -> np.ndarray | None:
        """A completion's log-probs from the cache, (tokens,) fp32, or ``None``."""
        return self.cache.get_or_none(prompt_ids, completion_ids)

    def complete(self, batch: PackedBatch) -> None:
        """Score what a batch lacks, put it in the batch and in the cache."""
        scored = self._score(batch)
        for s, prompt, completion in batch["ref_missing"]:
            self.cache.add(prompt, completion, scored[s])
        batch["ref_token_logps"] = torch.from_numpy(np.concatenate(scored)).to(batch["ref_token_logps"].device)
        batch["ref_missing"] = []

    def fill(
        self, rows: Iterable[Mapping[str, Any]], collator: PackedCollator, max_tokens: int | None, name: str
    ) -> None:
        """Score what the cache lacks of a prepared dataset, on all ranks, longest groups first."""
        started = time.perf_counter()
        missing: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}  # prompt -> its completions
        total = set()
        for row in rows:
            for ids in row["completion_ids"]:
                sequence = truncate(row["prompt_ids"], ids, collator.max_length, collator.truncation_mode)
                prompt, completion = map(tuple, sequence)
                if not completion:  # cut away, and in no pair: the collator leaves it out too
                    continue
                total.add((prompt, completion))
                if self.lookup(prompt, completion) is None:
                    missing.setdefault(prompt, {})[completion] = None
        # Another run may have written between two ranks' look-ups; they must agree on what is to be done.
        (missing,) = broadcast_object_list([missing])
        if missing:
            self._fill(missing, collator, max_tokens, name)
        self.accelerator.wait_for_everyone()
        self.cache.refresh()
        if self.accelerator.is_main_process:
            scored = sum(map(len, missing.values()))
            logger.warning(
                f"{name} data: reference log-probs of {len(total)} completions, {len(total) - scored} from"
                f" {self.cache.folder}, {scored} scored in {time.perf_counter() - started:.1f} s"
            )

    def _fill(self, missing: dict, collator: PackedCollator, max_tokens: int | None, name: str) -> None:
        edges = {"chosen": [], "rejected": [], "targets": []}
        rows = [{"prompt_ids": prompt, "completion_ids": list(ids), **edges} for prompt, ids in missing.items()]
        tokens = row_tokens(rows, None, "keep_start", collator.share_prompts)
        device, world = self.accelerator.device, self.accelerator.num_processes
        budget = max(max_tokens or _TOKENS_PER_BATCH.get(device.type, _DEFAULT_TOKENS_PER_BATCH), int(tokens.max()))
        batches = pack_rows(np.argsort(-tokens, kind="stable"), tokens, budget, world)
        collate = PackedCollator(share_prompts=collator.share_prompts, share_limit=collator.share_limit)
        progress = tqdm(
            batches[self.accelerator.process_index :: world],
            desc=f"Reference log-probs of the {name} data",
            disable=not self.accelerator.is_main_process,
        )
        for batch in progress:
            members = [rows[i] for i in batch]
            scored = self._score(send_to_device(collate(members), device))  # also without rows: ranks run together
            sequences = [(row["prompt_ids"], completion) for row in members for completion in row["completion_ids"]]
            for (prompt, completion), logps in zip(sequences, scored):
                self.cache.add(prompt, completion, logps)
        self.cache.flush()

    @torch.no_grad()
    def _score(self, batch: PackedBatch) -> list[np.ndarray]:
        """Per-token reference log-probs of a batch's completions, S arrays of fp32."""
        if self.packed is None:
            raise ValueError(
                "reference log-probs are missing for this data, and the start weights that they would be scored with"
                " have been trained: pass the data when the trainer is made, or pass a ref_model"
            )
        model = self.packed.model
        if self.owned:
            model.to(self.accelerator.device)
        training = model.training
        model.eval()
        try:
            adapters = model.disable_adapter() if self.adapters_off else contextlib.nullcontext()
            with adapters, self.accelerator.autocast():
                logps = self.packed(batch).tokens.logps
        finally:
            model.train(training)
        return np.split(logps.float().cpu().numpy(), np.cumsum(batch["completion_lengths"])[:-1])
