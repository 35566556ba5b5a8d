"""The reference model of a run: which one it is, and its log-probs, scored once and kept on disk."""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from datasets import Dataset
from torch import nn
from tqdm.auto import tqdm

from ..data.collate import PackedBatch, PackedCollator, ReferenceLookup
from ..errors import UserError
from ..model.loading import dropout, whole_weights, zero_stage
from ..model.packed_model import PackedModel, base_model, why_not_finite
from ..ops.gather import segment_sum
from .cache import ReferenceCache
from .fingerprint import describe, fingerprint
from .missing import Missing, find_missing, scoring_batches, scoring_rows

logger = logging.getLogger(__name__)

_TOKENS_PER_BATCH = {"cpu": 4096}  # of a scoring pass, unless the user set a budget
_DEFAULT_TOKENS_PER_BATCH = 16384
# Log-probs of equal weights in another packing differ by rounding: nats per token, in the mean over a batch.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_ROUNDING = 0.1


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
        progress: show a bar while data are scored.

    Attributes:
        packed: the model that scores; None while there is the cache alone.
        owned: it is not the policy, so that it may be moved from device to device.
        live: it can score while the policy is trained.
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
        progress: bool = True,
    ) -> None:
        self.accelerator, self.progress = accelerator, progress
        self.adapters_off = ref_model is None and new_adapter
        self._start_is_checked = ref_model is not None  # else policy and reference are the same at the start
        self.owned = given = ref_model is not None
        # An adapter that the policy came with is small: its values at the start are kept for data that come later.
        whole = accelerator.distributed_type != DistributedType.FSDP and zero_stage(accelerator.state) != 3
        trained = (
            [p for p in policy.model.parameters() if p.requires_grad] if hasattr(policy.model, "peft_config") else []
        )
        kept = trained if whole and not (given or self.adapters_off or keep) else []
        self._start = {parameter: parameter.detach().cpu().clone() for parameter in kept}
        self.live = self.owned or self.adapters_off or keep or bool(self._start)
        if ref_model is None and keep and not self.adapters_off:
            ref_model = copy.deepcopy(policy.model)
            self.owned = True
        if ref_model is not None:
            ref_model.requires_grad_(False).eval()
            self.packed = PackedModel(ref_model, head_memory_mb, policy.attention_backend)
        else:
            self.packed = policy
        self.policy = policy
        self.found = self.scored = 0  # completions, by `complete`
        self.seconds = 0.0  # that it took to score them
        model = self.packed.model
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
        self.compute_dtype = mixed or base_model(model).dtype
        identity = {
            "compute_dtype": self.compute_dtype,
            "attention": "shared_prompt",
            "adapters": not self.adapters_off,
        }
        digest = fingerprint(model, **identity)
        self._identity, self._digest = identity, digest
        self.cache = ReferenceCache(cache_dir, digest, description=describe(model, **identity))
        if accelerator.is_main_process:
            logger.warning(
                f"log-probs are kept in {self.cache.folder} (ref_cache_dir): {self.cache.num_rows} completions so far"
            )

    def check_tokens(self) -> None:
        """Raise ValueError where the cache holds sums, of which single tokens mean nothing."""
        if any(shard.kind == "sums" for shard in self.cache.shards):
            raise UserError(
                f"ld_alpha needs the reference log-prob of every token, and {self.cache.folder} holds imported sums:"
                " choose another ref_cache_dir, or remove them with cpt cache prune"
            )

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """While the policy's weights change, a reference without a model of its own is the cache alone.

        What a stream had scored is written, however training ends. If it ends well, what was found is logged.
        """
        if not self.live:
            self.packed = None
        elif self.owned:
            self.packed.model.to("cpu")  # until something is missing
        self.found = self.scored = 0
        self.seconds, written = 0.0, self.cache.bytes_written
        with self.cache:
            yield
        numbers = [self.found, self.scored, self.seconds, self.cache.bytes_written - written]
        found, scored, seconds, written = np.sum(gather_object([numbers]), axis=0)
        if self.accelerator.is_main_process:
            logger.warning(
                f"reference log-probs of {found + scored:.0f} completions while training: {found:.0f} found,"
                f" {scored:.0f} scored in {seconds:.1f} s ({written / 1e6:.1f} MB written)"
            )

    @property
    def model(self) -> nn.Module | None:
        """A model of its own, that is held in memory; on the CPU where training has not needed it yet."""
        return self.packed.model if self.owned else None

    @property
    def lookup(self) -> ReferenceLookup:
        """Log-probs from the cache. Of the cache alone: a DataLoader's workers may get it pickled, without a model."""
        return self.cache.log_probs

    def complete(self, batch: PackedBatch) -> None:
        """Score what a batch lacks, put it in the batch and in the cache."""
        missing = batch["ref_missing"]
        if batch["num_pairs"]:
            self.found += len(batch["completion_lengths"]) - len(missing)
        if not missing:
            return
        started = time.perf_counter()
        scored = self._score(batch)
        self.cache.add_many([ids for _, *ids in missing], [scored[s] for s, *_ in missing])
        batch["ref_token_logps"] = torch.from_numpy(np.concatenate(scored)).to(batch["ref_token_logps"].device)
        batch["ref_missing"] = []
        self.scored += len(missing)
        self.seconds += time.perf_counter() - started

    def fill(
        self,
        dataset: Dataset,
        collator: PackedCollator,
        max_tokens: int | None,
        name: str,
        whose: str = "reference",
    ) -> None:
        """Score what the cache lacks of a prepared dataset, on all ranks, longest groups first.

        Args:
            name, whose: what log and progress bar call the dataset and the model.

        Raises:
            UserError: the cache's folder is not the same one on every rank.
            OSError: it cannot be written to.
        """
        started = time.perf_counter()
        missing = find_missing(dataset, self.cache, collator.max_length, collator.truncation_mode)
        looking = time.perf_counter() - started
        # Another run may have written between two ranks' look-ups; they must agree on what is to be done.
        (missing,) = broadcast_object_list([missing])
        written = self.cache.bytes_written
        if len(missing):
            self._fill(dataset, missing, collator, max_tokens, f"{name} data: {whose} log-probs")
        self.accelerator.wait_for_everyone()
        self.cache.refresh()
        self._check_shared(missing)
        written = sum(gather_object([self.cache.bytes_written - written]))
        if self.accelerator.is_main_process:
            logger.warning(
                f"{name} data: {whose} log-probs of {missing.completions} completions: {missing.found} found"
                f" in {looking:.1f} s, {missing.completions - missing.found} missing, of which"
                f" {len(missing)} different ones were scored in {time.perf_counter() - started - looking:.1f} s"
                f" ({written / 1e6:.1f} MB written)"
            )

    def _fill(
        self, dataset: Dataset, missing: Missing, collator: PackedCollator, max_tokens: int | None, description: str
    ) -> None:
        device, world = self.accelerator.device, self.accelerator.num_processes
        budget = max_tokens or _TOKENS_PER_BATCH.get(device.type, _DEFAULT_TOKENS_PER_BATCH)
        batches = scoring_batches(missing, collator, budget, world)
        collate = PackedCollator(share_prompts=collator.share_prompts, share_limit=collator.share_limit)
        progress = tqdm(
            batches[self.accelerator.process_index :: world],
            desc=description,
            disable=not (self.progress and self.accelerator.is_main_process),
        )
        with self._on_device(), self.cache:  # written also where a batch fails: what was scored is right
            for groups in progress:
                rows = scoring_rows(dataset, missing, groups, collator)
                scored = self._score(send_to_device(collate(rows), device))  # also without rows: ranks run together
                sequences = [(row["prompt_ids"], completion) for row in rows for completion in row["completion_ids"]]
                self.cache.add_many(sequences, scored[: len(sequences)])

    @contextlib.contextmanager
    def _on_device(self) -> Iterator[None]:
        """DeepSpeed and FSDP leave a policy on the host until they shard it, and here it is to score before that."""
        model, device = self._model(), self.accelerator.device
        waits = next(model.parameters()).device.type == "cpu" != device.type
        if waits:
            model.to(device)
        try:
            yield
        finally:
            if waits:
                model.to("cpu")

    def _check_shared(self, missing: Missing) -> None:
        """Whether this rank sees what the others wrote."""
        keys = [key.tobytes() for key in missing.keys]
        unseen = self.cache.has_keys(keys, missing.lengths.tolist()).count(False)
        if sum(gather_object([unseen])):
            raise UserError(
                f"rank {self.accelerator.process_index} does not find {unseen} of {len(keys)} completions that were"
                f" scored just now in {self.cache.folder}: set ref_cache_dir to a folder that all nodes share"
            )

    @torch.no_grad()
    def check_start(self, batch: PackedBatch, completion_logps: torch.Tensor) -> None:
        """Warn, once, where policy and reference should have the same log-probs before the first step, and do not.

        Args:
            completion_logps: (S,) the policy's.
        """
        if self._start_is_checked or not batch["num_pairs"]:
            return
        self._start_is_checked = True
        lengths = torch.tensor(batch["completion_lengths"], device=completion_logps.device)
        reference = segment_sum(batch["ref_token_logps"], batch["cu_completions"])
        gap = ((completion_logps.float() - reference) / lengths).abs().mean().item()
        trained = {p.dtype for p in self.policy.model.parameters() if p.requires_grad}
        if not gap <= max(_ROUNDING.get(dtype, _HALF_ROUNDING) for dtype in {self.compute_dtype, *trained}):
            logger.warning(
                f"the policy starts from the reference, and yet its log-probs differ by {gap:.2g} nats per token in"
                f" the first step, so rewards do not start at 0. Likely: {self._likely_cause()}"
            )

    def _likely_cause(self) -> str:
        if dropout(self.policy.model):
            return "dropout is on while training; set disable_dropout=true"
        if hasattr(base_model(self.policy.model).get_input_embeddings(), "neftune_noise_alpha"):
            return "the noise that neftune_noise_alpha adds while training"
        if self.adapters_off:
            return "the adapter does not start at zero (init_lora_weights)"
        if any(shard.kind == "sums" for shard in self.cache.shards):
            return (
                "reference log-probs were imported that another model, dtype or truncation gave; see cpt cache verify"
            )
        return (
            f"the cache holds values that another kernel or program version gave; see cpt cache verify, or remove"
            f" {self.cache.folder}"
        )

    def _model(self) -> nn.Module:
        if self.packed is None:
            self.packed, self.owned = self._load_again(), True
        return self.packed.model

    def _load_again(self) -> PackedModel:
        """The start weights from where the policy came from: they left memory when training began."""
        base = base_model(self.policy.model)
        name, revision = base.config._name_or_path, getattr(base.config, "_commit_hash", None)
        try:
            if not name or base is not self.policy.model:
                raise OSError("it was not loaded by name or folder")
            with whole_weights():
                model = type(base).from_pretrained(name, dtype=base.dtype, revision=revision or "main")
            if fingerprint(model, **self._identity) != self._digest:
                raise OSError(f"{name} holds other weights than training started from")
        except OSError as error:
            raise UserError(
                "reference log-probs are missing for this data, and the start weights that they would be scored with"
                f" have been trained, and cannot be loaded again ({error}): pass the data when the trainer is made, for"
                " a stream set precompute_ref_log_probs=false, or pass a ref_model"
            ) from error
        model.requires_grad_(False).eval()
        return PackedModel(model, self.policy.head_memory_mb, self.policy.attention_backend)

    @contextlib.contextmanager
    def _at_start(self) -> Iterator[None]:
        """The policy's own adapter as it came."""
        now = {parameter: parameter.data for parameter in self._start}
        try:
            for parameter, values in self._start.items():
                parameter.data = values.to(parameter.device)
            yield
        finally:
            for parameter, values in now.items():
                parameter.data = values

    @torch.no_grad()
    def _score(self, batch: PackedBatch) -> list[np.ndarray]:
        """Per-token reference log-probs of a batch's completions, S arrays of fp32.

        Raises:
            UserError: one is not finite.
        """
        model = self._model()
        if self.owned:
            model.to(self.accelerator.device)
        training = model.training
        model.eval()
        try:
            adapters = model.disable_adapter() if self.adapters_off else contextlib.nullcontext()
            with adapters, self._at_start(), self.accelerator.autocast():
                logps = self.packed(batch).tokens.logps
        finally:
            model.train(training)
        values = logps.float().cpu().numpy()
        if not np.isfinite(values).all():
            cause = why_not_finite(base_model(model))
            raise UserError(f"reference log-probs of some completion are not finite: {cause}")
        return np.split(values, np.cumsum(batch["completion_lengths"])[:-1])


def put_sums(batch: PackedBatch, chosen: torch.Tensor, rejected: torch.Tensor) -> None:
    """Give a batch reference log-probs of its pairs' sides, (P,) each, as those of their first tokens.

    Raises:
        UserError: a completion that is in several pairs has different ones there.
    """
    first = batch["cu_completions"][:-1]
    tokens = torch.zeros_like(batch["targets"], dtype=torch.float32)
    sides = [(first[batch["chosen"]], chosen.to(tokens.dtype)), (first[batch["rejected"]], rejected.to(tokens.dtype))]
    for places, logps in sides:
        tokens[places] = logps
    repeated = any(pairs > 1 for _, pairs in batch["pair_blocks"])
    if repeated and not all(torch.equal(tokens[places], logps) for places, logps in sides):
        raise UserError(
            "compute_ref_log_probs gives a completion another log-prob in another of its pairs: give it one, or train"
            " on rows of one pair each"
        )
    batch["ref_token_logps"] = tokens
