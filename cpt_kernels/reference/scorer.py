"""The reference model of a run: decides which model it is, scores completions with it, and caches their log-probs."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list, gather_object, send_to_device
from datasets import Dataset
from numpy.typing import NDArray
from torch import nn
from tqdm.auto import tqdm

from ..data.collate import PackedBatch, PackedCollator, ReferenceLookup, Tokens, with_all_scored
from ..data.images import ImageId
from ..data.stores import display_name, local_path
from ..errors import UserError
from ..model.conditions import gathered, is_sharded, why_not_finite
from ..model.loading import whole_weights, zero_stage
from ..model.packed_model import PackedModel, base_model, weighted_reference
from ..model.pretrained import load_whole
from ..model.sharding import shard
from ..ops.gather import segment_sum
from .cache import ReferenceCache
from .fingerprint import describe_reference, fingerprint, trained_below_adapters
from .missing import Missing, find_missing, read_sequences, scoring_batches
from .probe import PROBE, ProvenFolder, ReferenceProbe, find_folder, measure

logger = logging.getLogger(__name__)

_TOKENS_PER_BATCH = {"cpu": 4096}  # of a scoring pass, by device, unless the user sets max_tokens_per_batch
_DEFAULT_TOKENS_PER_BATCH = 16384
# Largest difference that packing explains between log-probs of equal weights: nats per token, mean over a batch.
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_ROUNDING = 0.1


class _Origin(NamedTuple):
    """Where a reference can be loaded from again."""

    name: str  # folder or hub name; empty if it was built in memory
    revision: str | None
    cls: type
    dtype: torch.dtype


def scoring_budget(max_tokens: int | None, device: torch.device) -> int:
    """Returns the tokens of a micro-batch of a scoring pass: ``max_tokens_per_batch``, or a default by device."""
    return max_tokens or _TOKENS_PER_BATCH.get(device.type, _DEFAULT_TOKENS_PER_BATCH)


class Reference:
    """The reference of one run, and its cached log-probs.

    The reference is ``ref_model`` if one is given. Else, for an adapter that was made for this run, it is the model
    with adapters off. Else it is the policy at construction: before the first step, and before a checkpoint is loaded.

    Args:
        policy: the model that will be trained.
        ref_model: a separate reference model.
        new_adapter: the policy is a PEFT model whose adapter was made for this run, and which is the model that the
            user gave when its adapter is off.
        keep: the reference must be able to score during training (for streams); copies the policy if necessary, or
            loads it again if it is sharded.
        cache_dir: folder or URL of the cache.
        head_memory_mb: see :class:`PackedModel`.
        progress: show a progress bar while datasets are scored.
        loading: makes the context in which a reference is loaded again; the engine's, if it shards.

    Attributes:
        cache: the log-probs on disk.
        start_cache: those of the reference that the run starts with.
        packed: the model that scores; None while only the cache is available.
        owned: ``packed`` is a separate model, which may be moved between devices; it is not the policy.
        live: the reference can score during training.
        compute_dtype: dtype of the reference's forward.
        found, scored: completions that `complete` found in the cache, and scored, during training.
        seconds: time that `complete` took to score them.
    """

    packed: PackedModel | None
    since = 0  # the optimizer step before which the policy equalled the reference

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
        loading: Callable[[], contextlib.AbstractContextManager] = whole_weights,
    ) -> None:
        self.accelerator, self.policy, self.progress, self._keep = accelerator, policy, progress, keep
        self._loading = loading
        self.found = self.scored = 0
        self.seconds = 0.0

        # Choose the model that scores.
        self.adapters_off = ref_model is None and new_adapter
        is_start = ref_model is None and not new_adapter  # the reference is the policy's start weights
        # The start weights must survive training if data comes later: an adapter's values always, as they are small; a
        # whole model only if `keep` asks for it.
        self._is_sharded = accelerator.distributed_type == DistributedType.FSDP or zero_stage(accelerator.state) == 3
        is_policy = ref_model is None and not (is_start and keep)
        trained = _trained_values(policy.model, self.adapters_off) if is_policy else {}
        if trained and self._is_sharded and self.adapters_off and keep:
            raise UserError(
                "the adapter also trains the model's own biases, which a sharded model cannot set back to score a"
                " stream: set bias='none' in the LoraConfig, or precompute_ref_log_probs=true"
            )
        self._start = {} if self._is_sharded else trained
        self._start_is_checked = ref_model is not None  # a separate model may differ from the policy at the start
        is_copied = is_start and keep
        if is_copied and not self._is_sharded:
            ref_model = copy.deepcopy(policy.model)
        self.owned = ref_model is not None
        self.live = self.owned or bool(self._start) or (self.adapters_off and not trained)
        if ref_model is None:
            self.packed = policy
        else:
            ref_model.requires_grad_(False).eval()
            how = (policy.attention_backend, policy.packing, policy.images, policy.group)
            self.packed = PackedModel(ref_model, head_memory_mb, *how)

        self._identify(cache_dir)
        self.start_cache = self.cache
        if is_copied and self._is_sharded:
            self.packed, self.owned, self.live = self._load_again(), True, True

    def _identify(self, cache_dir: str | Path) -> None:
        """Finds the identity of the model that scores, and opens its part of the cache."""
        # Packing is not part of the identity: it changes only rounding.
        assert self.packed is not None
        model, accelerator = self.packed.model, self.accelerator
        self.compute_dtype = _compute_dtype(model, accelerator)
        # Engines cast weights and inputs, where autocast casts the operands of some operators: the numbers differ.
        engine = "FSDP2" if accelerator.is_fsdp2 else "DeepSpeed" if accelerator.state.deepspeed_plugin else ""
        casts = engine and accelerator.mixed_precision != "no"
        self._identity: dict[str, Any] = {
            "compute_dtype": f"{self.compute_dtype}, cast by {engine}" if casts else self.compute_dtype,
            "attention": "shared_prompt",
            "adapters": not self.adapters_off,
        }
        self._digest = fingerprint(model, **self._identity)
        base = base_model(model)
        dtype = getattr(next(base.parameters()), "loaded_dtype", base.dtype)
        self._origin = _Origin(base.config._name_or_path, getattr(base.config, "_commit_hash", None), type(base), dtype)
        self._is_plain = base is model
        self._probe = self._measure(self.packed)
        folder = self._find_folder(local_path(cache_dir))
        description = describe_reference(model, **self._identity)
        if folder.rivals:
            description |= {"variant_of": self._digest, "difference": folder.difference}
        self.cache = ReferenceCache(cache_dir, folder.fingerprint, description=description)
        if accelerator.is_main_process:
            logger.warning(
                f"reference log-probs are cached in {display_name(self.cache.folder)} (ref_cache_dir), which holds"
                f" {self.cache.num_rows} completions"
            )

    def _measure(self, packed: PackedModel) -> ReferenceProbe:
        model: Any = packed.model
        adapters = model.disable_adapter() if self.adapters_off else contextlib.nullcontext()
        place = _on_device(model, self.accelerator.device)
        with place, gathered(model), adapters, self.accelerator.autocast():
            return measure(packed, self.compute_dtype)

    def _find_folder(self, directory: Path) -> ProvenFolder:
        """Returns the folder of the cache that holds this reference's log-probs, or will; the same on all ranks.

        Raises:
            UserError: ranks hold different references.
        """
        ranks = gather_object([(self._digest, self._probe)])
        for rank, (digest, probe) in enumerate(ranks):
            if digest != ranks[0][0] or not probe.agrees(ranks[0][1]):
                raise UserError(
                    f"rank {rank} holds another reference than rank 0: load the same weights on every process"
                )
        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            found = [find_folder(directory, self._digest, self._probe)]
        (folder,) = broadcast_object_list(found)
        if folder.rivals and self.accelerator.is_main_process:
            rival = (
                f"log-probs of its own differ by {folder.difference:.2g} nats from those of a reference with the same"
                " weights and config, as after a change in memory (an adapter's scale, RoPE frequencies, a hook)"
                if math.isfinite(folder.difference)
                else f"{directory / self._digest} has no readable {PROBE}, so nothing shows whose log-probs it holds"
            )
            logger.warning(f"the reference has a folder of its own: {rival}")
        return folder

    def check_tokens(self, why: str = "ld_alpha needs") -> None:
        """Checks that the cache holds the log-prob of every token.

        Args:
            why: who needs it, for the message.

        Raises:
            UserError: it holds imported sums, whose single tokens are meaningless.
        """
        if self.cache.imported_keys:
            raise UserError(
                f"{why} the reference log-prob of every token, but {self.cache.folder} holds imported sums:"
                " choose another ref_cache_dir, or remove them with cpt cache prune"
            )

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Context of a training run, in which the policy's weights change.

        A reference without a model of its own is reduced to the cache. A separate model waits on the CPU until it is
        needed; if it is sharded and all data are scored, it is freed. At the end, completions that were scored for a
        stream are written to disk, even after an error. After a run without error, the number of completions that were
        found and scored is logged.
        """
        if not self.live or (self.owned and self._is_sharded and not self._keep):
            self.packed = None
        elif self.owned and self.packed is not None and not self._is_sharded:
            self.packed.model.to("cpu")
        self.found = self.scored = 0
        self.seconds, bytes_before = 0.0, self.cache.bytes_written
        with self.cache:
            yield
        counts = [self.found, self.scored, self.seconds, self.cache.bytes_written - bytes_before]
        found, scored, seconds, written = np.sum(gather_object([counts])[:: self._group_size], axis=0)
        if self.accelerator.is_main_process:
            logger.warning(
                f"reference log-probs of {found + scored:.0f} completions while training: {found:.0f} found,"
                f" {scored:.0f} scored in {seconds:.1f} s ({written / 1e6:.1f} MB written)"
            )

    @property
    def _group_size(self) -> int:
        return 1 if self.policy.group is None else self.policy.group.size

    @property
    def model(self) -> nn.Module | None:
        """The separate reference model, if there is one; on the CPU until training needs it."""
        return self.packed.model if self.owned and self.packed is not None else None

    @property
    def lookup(self) -> ReferenceLookup:
        """Returns cached log-probs for the collator. It refers to the cache only: DataLoader workers may pickle it."""
        return self.cache.log_probs

    def complete(self, batch: PackedBatch) -> None:
        """Scores the completions whose log-probs a batch lacks, and puts these into the batch and into the cache."""
        missing, group = batch["ref_missing"], self.policy.group
        if batch["scored"] is not None or batch["token_weights"] is not None:
            self.check_tokens("masks and weights of tokens need")
        if batch["num_pairs"]:
            self.found += len(batch["completion_lengths"]) - len(missing)
        is_missing = bool(missing)
        if self._keep and self._is_sharded:
            # All ranks run a sharded model together, also those that lack nothing.
            is_missing = any(gather_object([is_missing]))
        elif self._keep and group is not None:
            # Ranks of a sequence group score together, also if one of them has just read from disk what others miss.
            is_missing = group.sum(torch.tensor(float(is_missing), device=batch["input_ids"].device)).item() > 0
        if not is_missing:
            return
        started = time.perf_counter()
        # The cache holds the log-prob of every token, whichever are scored in this run.
        mask, device = batch["scored"], batch["input_ids"].device
        whole = batch if mask is None else {**batch, **send_to_device(with_all_scored(batch), device)}
        scored = self._score(cast("PackedBatch", whole))
        self.cache.add_many([(prompt, ids) for _, prompt, ids in missing], [scored[s] for s, *_ in missing])
        values = np.concatenate(scored)
        batch["ref_token_logps"] = torch.from_numpy(values if mask is None else values[mask]).to(device)
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
        """Scores the completions of a prepared dataset that the cache lacks, on all ranks, longest prompt groups first.

        Args:
            collator: the run's; says how sequences are truncated, and which share a prompt.
            max_tokens: budget of a micro-batch in tokens; default by device.
            name, whose: names of the dataset and of the model for log messages and the progress bar.

        Raises:
            UserError: the ranks do not share the cache's folder.
            OSError: the folder cannot be written to.
        """
        # Find what is missing.
        missing = find_missing(dataset, self.cache, collator.max_length, collator.truncation_mode)
        # Ranks must score the same list: another run may have added rows between the look-ups of two ranks.
        (missing,) = broadcast_object_list([missing])
        # Score it.
        started = time.perf_counter()
        bytes_before = self.cache.bytes_written
        if len(missing):
            self._fill(dataset, missing, collator, max_tokens, f"{name} data: {whose} log-probs")
        # See what the other ranks wrote, and report.
        self.accelerator.wait_for_everyone()
        self.cache.refresh()
        self._check_shared(missing)
        written = sum(gather_object([self.cache.bytes_written - bytes_before]))
        if self.accelerator.is_main_process:
            seconds = time.perf_counter() - started
            logger.warning(f"{name} data: {_summary(missing, whose, seconds, written)}")

    def _fill(
        self, dataset: Dataset, missing: Missing, collator: PackedCollator, max_tokens: int | None, description: str
    ) -> None:
        # A sequence group scores its micro-batches together, and its first rank stores them.
        group, size = self.policy.group, self._group_size
        rank, world = self.accelerator.process_index // size, self.accelerator.num_processes // size
        stores = group is None or group.rank == 0
        budget = scoring_budget(max_tokens, self.accelerator.device)
        collator = replace(collator, padded=self._model().padded)
        batches = scoring_batches(missing, collator, budget, world)
        progress = tqdm(
            batches[rank::world],
            desc=description,
            disable=not (self.progress and self.accelerator.is_main_process),
        )
        with (
            _on_device(self._model().model, self.accelerator.device),
            self.cache,
        ):  # the cache is also flushed after an error: what was scored is right
            for groups in progress:
                sequences, images = read_sequences(dataset, missing, groups, collator)
                logps = self.score(sequences, collator, images)
                if stores:
                    self.cache.add_many(sequences, logps)

    def score(
        self, sequences: Sequence[Tokens], collator: PackedCollator, images: Mapping[ImageId, Any] | None = None
    ) -> list[NDArray[np.float32]]:
        """Scores different completions in one packed row, without the cache. All ranks must call it together.

        Args:
            sequences: (prompt key, completion ids), truncated. May be empty on a rank that has nothing left to score.
            collator: says which sequences share their prompt, and reads images.
            images: of the prompts, see `data.images.images_of`.

        Returns:
            (len(completion_ids),) log-probs of each.
        """
        model = self._model()
        collator = replace(collator, reference=None, padded=model.padded, images=model.images)
        batch = send_to_device(collator.pack(sequences, [], [], [], images), self.accelerator.device)
        found = dict(zip(batch["order"], self._score(batch)))
        return [found[s] for s in range(len(sequences))]  # a batch without sequences holds one pad token

    def _check_shared(self, missing: Missing) -> None:
        """Checks that this rank sees the rows that the other ranks wrote."""
        keys = [key.tobytes() for key in missing.keys]
        unseen = self.cache.has_keys(keys, missing.lengths.tolist()).count(False)
        if sum(gather_object([unseen])):
            raise UserError(
                f"rank {self.accelerator.process_index} does not find {unseen} of {len(keys)} completions that were"
                f" scored just now in {self.cache.folder}: set ref_cache_dir to a folder that all nodes share"
            )

    @torch.no_grad()
    def check_start(self, batch: PackedBatch, completion_logps: torch.Tensor) -> None:
        """Warns, once, if policy and reference differ before the first step although they should be equal.

        Args:
            completion_logps: (S,) log-probs under the policy.
        """
        ref_token_logps = weighted_reference(batch)
        if self._start_is_checked or not batch["num_pairs"] or ref_token_logps is None:
            return
        self._start_is_checked = True
        lengths = torch.tensor(batch["completion_lengths"], device=completion_logps.device)
        reference = segment_sum(ref_token_logps, batch["cu_completions"])
        gap = ((completion_logps.float() - reference) / lengths).abs().mean().item()
        if not gap <= start_bound(self.policy.model, self.accelerator):
            logger.warning(
                f"the policy starts from the reference, but in the first step their log-probs differ by {gap:.2g} nats"
                f" per token, so rewards do not start at 0. Likely cause: {self._likely_cause()}"
            )

    def _likely_cause(self) -> str:
        if self.policy.noisy:
            return "the noise that the model adds in training mode: dropout is on, or a router is random"
        if hasattr(base_model(self.policy.model).get_input_embeddings(), "neftune_noise_alpha"):
            return "the noise that neftune_noise_alpha adds during training"
        if self.adapters_off:
            return "the adapter does not start at zero (init_lora_weights)"
        if self.cache.imported_keys:
            return "the cache holds imported sums of another model, dtype or truncation; see cpt cache verify"
        return (
            "the cache holds values of another kernel or program version; check them with cpt cache verify, or remove"
            f" {self.cache.folder}"
        )

    def _model(self) -> PackedModel:
        """Returns the model that scores, and loads it again if training reduced the reference to the cache."""
        if self.packed is None:
            self.packed, self.owned = self._load_again(), True
        return self.packed

    def _load_again(self) -> PackedModel:
        """Loads the start weights from where the policy was loaded: training has changed the policy's own."""
        name, revision, cls, dtype = self._origin
        try:
            if not name or not self._is_plain:
                raise OSError("it was not loaded by name or folder")
            with self._loading():
                model = load_whole(cls, name, dtype=dtype, revision=revision or "main")
            shard(model, self.accelerator)
            if fingerprint(model, **self._identity) != self._digest:
                raise OSError(f"{name} holds other weights than training started from")
            model.requires_grad_(False).eval()
            policy = self.policy
            how = (policy.attention_backend, policy.packing, policy.images, policy.group)
            packed = PackedModel(model, policy.head_memory_mb, *how)
            if not self._measure(packed).agrees(self._probe):
                raise OSError(f"{name} gives other log-probs than training started from")
            return packed
        except (OSError, UserError) as error:
            raise UserError(
                "this data lacks reference log-probs; training has changed the start weights that would score it, and"
                f" they cannot be loaded again ({error}): pass the data when the trainer is made, for a stream set"
                " precompute_ref_log_probs=false, or pass a ref_model"
            ) from error

    @contextlib.contextmanager
    def _at_start(self) -> Iterator[None]:
        """Gives what is trained of the policy the values that it had at the start."""
        now = {parameter: parameter.data for parameter in self._start}
        try:
            for parameter, values in self._start.items():
                parameter.data = values.to(parameter.device)
            yield
        finally:
            for parameter, values in now.items():
                parameter.data = values

    @torch.no_grad()
    def _score(self, batch: PackedBatch) -> list[NDArray[np.float32]]:
        """Scores a batch, which is on the accelerator's device: S arrays of per-token log-probs.

        Raises:
            UserError: a log-prob is not finite.
        """
        packed = self._model()
        model: Any = packed.model
        if self.owned and not self._is_sharded:
            model.to(self.accelerator.device)
        # Without dropout. A policy gets its mode back afterwards.
        training = model.training
        model.eval()
        try:
            adapters = model.disable_adapter() if self.adapters_off else contextlib.nullcontext()
            with adapters, self._at_start(), gathered(model), self.accelerator.autocast():
                logps = packed(batch).tokens.logps
        finally:
            model.train(training)
        values = logps.float().cpu().numpy()
        if not np.isfinite(values).all():
            cause = why_not_finite(base_model(model))
            raise UserError(f"reference log-probs of some completion are not finite: {cause}")
        return np.split(values, np.cumsum(batch["completion_lengths"])[:-1])


@contextlib.contextmanager
def _on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Moves a model to the accelerator's device for a while: DeepSpeed and FSDP leave it on the CPU at first."""
    first = next(model.parameters())
    moves = first.device.type == "cpu" != device.type and not is_sharded(first)
    if moves:
        model.to(device)
    try:
        yield
    finally:
        if moves:
            model.to("cpu")


def start_bound(policy: nn.Module, accelerator: Accelerator) -> float:
    """Returns the largest difference between log-probs of equal weights that packing explains, in nats per token."""
    dtypes = {p.dtype for p in policy.parameters() if p.requires_grad} | {_compute_dtype(policy, accelerator)}
    return max(_ROUNDING.get(dtype, _HALF_ROUNDING) for dtype in dtypes)


def _compute_dtype(model: nn.Module, accelerator: Accelerator) -> torch.dtype:
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    return mixed or base_model(model).dtype


def _summary(missing: Missing, whose: str, seconds: float, num_bytes: int) -> str:
    """Says how many log-probs were cached and how many were scored; equal completions are scored once."""
    if missing.found == missing.completions:
        return f"all {missing.completions} {whose} log-probs were cached"
    different = "" if len(missing) == missing.completions - missing.found else " different ones"
    return (
        f"{missing.found} of {missing.completions} {whose} log-probs were cached; {len(missing)}{different} were scored"
        f" in {seconds:.1f} s ({num_bytes / 1e6:.1f} MB)"
    )


def _trained_values(model: nn.Module, adapters_off: bool) -> dict[nn.Parameter, torch.Tensor]:
    """Copies what is trained of a PEFT model, so that the policy can score as at the start; empty without an adapter.

    Args:
        adapters_off: copy only what the model keeps with its adapters off.
    """
    if not hasattr(model, "peft_config"):
        return {}
    trained = trained_below_adapters(model) if adapters_off else [p for p in model.parameters() if p.requires_grad]
    return {parameter: parameter.detach().cpu().clone() for parameter in trained}


def put_sums(batch: PackedBatch, chosen: torch.Tensor, rejected: torch.Tensor) -> None:
    """Gives a batch (P,) reference log-probs of its pairs' sides, each as the log-prob of the completion's first token.

    Raises:
        UserError: a completion has different values in different pairs.
    """
    first = batch["cu_completions"][:-1]
    assert batch["rejected"] is not None, "a loss with a reference has a rejected side"
    tokens = torch.zeros(sum(batch["completion_lengths"]), dtype=torch.float32, device=first.device)
    sides = [(first[batch["chosen"]], chosen.to(tokens.dtype)), (first[batch["rejected"]], rejected.to(tokens.dtype))]
    for places, logps in sides:
        tokens[places] = logps
    is_repeated = any(pairs > 1 for _, pairs in batch["pair_blocks"])
    if is_repeated and not all(torch.equal(tokens[places], logps) for places, logps in sides):
        raise UserError(
            "compute_ref_log_probs returns different log-probs for one completion in two of its pairs: return the same"
            " one, or train on rows of one pair each"
        )
    batch["ref_token_logps"] = tokens
