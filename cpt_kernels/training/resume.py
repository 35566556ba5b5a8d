"""Decides whether a run may continue from a checkpoint: a checkpoint records its run, and the two are compared.

A difference that would make the continued run wrong is refused: another model, reference, loss or adapter, other data,
another order of the pairs, or values of the optimizer, which a resumed optimizer takes from the checkpoint. A
difference that a user may want is logged, such as another number of steps. What changes no result is not recorded:
logging, saving, workers, kernels and memory.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from accelerate import Accelerator, DistributedType
from datasets import Dataset, IterableDataset
from torch import nn
from transformers import PretrainedConfig
from transformers.trainer import OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, SCALER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from xxhash import xxh3_64_hexdigest

from ..config import ContrastiveConfig
from ..data.collate import PackedCollator
from ..data.curriculum import Curriculum
from ..data.digest import RowsRead
from ..data.loader import StepBudget, order_seed
from ..errors import UserError
from ..files import write_text
from ..losses.options import LossOptions
from ..model.packed_model import base_model
from ..model.pretrained import ADAPTER_CONFIG, active_adapters, stored_adapters
from ..reference.cache import ReferenceCache
from ..reference.missing import iter_sequences
from ..reference.moving import MovingReference, StagedReference
from ..reference.scorer import Reference
from ..version import __version__
from .output_store import RECORD

# Fields of a model's config that decide the shapes of its weights.
_SHAPE = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size")
# Fields of an adapter's config that do not change a trained adapter.
_NOT_OF_ADAPTER = {
    *("base_model_name_or_path", "revision", "inference_mode", "auto_mapping", "task_type", "peft_version"),
    "runtime_config",
}
# Options that the optimizer keeps in its state, so that a resumed run has those of the checkpoint.
_OF_OPTIMIZER = ("optim", "optim_args", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
# Options that take effect when a run resumes.
_SETTINGS = (
    *("max_steps", "num_train_epochs", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm"),
    *("seed", "bf16", "fp16", "disable_dropout", "neftune_noise_alpha", "router_aux_loss_coef"),
    *("ref_model_mixup_alpha", "ref_model_sync_steps"),
)
# Reference log-probs in a record: their name, of how many rows, and the nats per token that rounding explains.
_SAMPLE, _SAMPLED_ROWS, _ROUNDING = "log-probs of the first rows", 8, 1e-4
_NEW_RUN = "or begin a new run from its model, by model_name_or_path"
# Part of the record -> how to mend a difference that is refused.
_MENDS = {
    "trained parameters": f"train the same parameters, {_NEW_RUN}",
    "adapters": f"load and activate the same adapters, {_NEW_RUN}",
    "reference": f"resume with the same model and ref_model, {_NEW_RUN}",
    "loss": f"keep the loss and its options, {_NEW_RUN}",
    "optimizer": f"a resumed optimizer would ignore the new values: keep the old ones, {_NEW_RUN}",
    "data": "give the same rows and truncation, or set ignore_data_skip=true, which begins an epoch of the new data",
    "order of pairs": (
        "on another number of processes keep processes x gradient_accumulation_steps (x per_device_train_batch_size) as"
        " it was; or set ignore_data_skip=true, which begins the epoch again"
    ),
}
_SKIPPED_DATA = ("data", "order of pairs")  # parts that ignore_data_skip permits to differ


@dataclass(frozen=True)
class Run:
    """A training run, as far as it decides whether it may continue from a checkpoint."""

    args: ContrastiveConfig
    accelerator: Accelerator
    model: nn.Module
    reference: Reference | MovingReference | None
    loss_name: str
    has_own_loss: bool  # the user passed the loss in place of ``args.loss_type``
    data: Dataset | IterableDataset  # the prepared training data
    data_digest: str | None  # of stored data, see :func:`.data.digest.digest_rows`
    layout: PackedCollator
    curriculum: Curriculum | None
    batch_size: int  # rows of a micro-batch
    budget: StepBudget | None = None  # that ``max_tokens_per_batch=auto`` chose for this run

    def record(self) -> dict[str, Any]:
        """Returns what a checkpoint records of the run, as plain JSON data: part -> values by name."""
        args = self.args
        trained = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
        names = [name.replace("_checkpoint_wrapped_module.", "") for name in trained]  # of FSDP's checkpointing
        names_digest = xxh3_64_hexdigest("\n".join(names).encode())
        configs = getattr(self.model, "peft_config", None)
        parts = {
            "trained parameters": {"number": len(names), "digest of their names": names_digest},
            "adapters": None if configs is None else {"names": [*configs], "active": active_adapters(self.model)},
            "loss": self._loss(),
            "reference": self._reference(),
            "optimizer": {name: getattr(args, name) for name in _OF_OPTIMIZER},
            "order of pairs": self._order(),
            "data": self._data(),
            "settings": {name: getattr(args, name) for name in _SETTINGS} | {"dropout of adapters": self._dropouts()},
            "processes": {"number": args.world_size},
            "cpt_kernels": {"version": __version__},
        }
        return json.loads(json.dumps(parts, default=_plain))

    def _loss(self) -> dict[str, Any]:
        # The options of args are not those of a user's loss, but beta scales the logged rewards.
        options = ["beta"] if self.has_own_loss else [f.name for f in dataclasses.fields(LossOptions)]
        return {"name": self.loss_name, **{name: getattr(self.args, name) for name in options}}

    def _reference(self) -> dict[str, Any] | None:
        if self.reference is None:
            return None
        if isinstance(self.reference, MovingReference):
            return {"sync_ref_model": True}
        cache = self.reference.start_cache
        return {"fingerprint": cache.fingerprint, **(cache.description or {}), _SAMPLE: self._sample(cache)}

    def _sample(self, cache: ReferenceCache) -> list[float] | None:
        """Returns reference log-probs of the first rows in nats per token, by completion, if they are known ahead."""
        if not isinstance(self.data, Dataset):
            return None
        first = self.data.select(range(min(_SAMPLED_ROWS, len(self.data))))
        ids = [each.ids for part in iter_sequences(first, *self._cut().values()) for each in part]
        found = cache.get_many(ids)
        return None if any(values is None for values in found) else [float(values.mean()) for values in found]

    def _order(self) -> dict[str, Any]:
        """Returns the options that decide which pairs are in which step, on any number of processes."""
        args = self.args
        micro_batches = args.data_ranks * args.gradient_accumulation_steps
        by_tokens = args.max_tokens_per_batch is not None
        whole = args.dataloader_drop_last and not by_tokens
        step_rows = micro_batches * self.batch_size if self.budget is None else self.budget.step_rows
        return {
            "rows a step": None if by_tokens else step_rows,
            "micro-batches a step": micro_batches if by_tokens else None,
            "max_tokens_per_batch": args.max_tokens_per_batch,
            # The layout decides how many tokens a row takes.
            "layout": [self.layout.padded, self.layout.share_prompts] if by_tokens else None,
            "rows a micro-batch of all ranks": args.data_ranks * self.batch_size if whole else None,
            "seed": order_seed(args),
            "train_sampling_strategy": args.train_sampling_strategy,
            # With a budget, what sequences share decides how many trees a micro-batch holds.
            "group_by_prefix": [by_tokens and self.layout.minimum_shared] if args.group_by_prefix else None,
            "curriculum": None if self.curriculum is None else dataclasses.asdict(self.curriculum),
        }

    def _cut(self) -> dict[str, Any]:
        return {"max_length": self.args.max_length, "truncation_mode": self.args.truncation_mode}

    def _data(self) -> dict[str, Any]:
        cut = self._cut()
        if isinstance(self.data, Dataset):
            return {"kind": "rows", "rows": len(self.data), "digest": self.data_digest, **cut}
        return {"kind": "stream", "columns": self.data.column_names, **cut}

    def _dropouts(self) -> dict[str, dict[str, float]]:
        configs = {name: config.to_dict() for name, config in getattr(self.model, "peft_config", {}).items()}
        return {name: {key: v for key, v in config.items() if "dropout" in key} for name, config in configs.items()}


def write_record(folder: Path, run: Run, read: RowsRead | None, more: Mapping[str, Any]) -> None:
    """Writes the record of a run into a folder.

    Args:
        read: the rows of a stream that the run has read so far.
        more: further entries, which are not compared.
    """
    stream = None if read is None else read._asdict()
    budget = None if run.budget is None else run.budget.tokens
    kept: dict[str, Any] = {"budget": budget, "gradient_checkpointing": run.args.gradient_checkpointing}
    if isinstance(run.reference, StagedReference):
        kept["stage"] = run.reference.stage
    record = {**run.record(), "save_only_model": run.args.save_only_model, "stream": stream, **kept, **more}
    write_text(folder / RECORD, json.dumps(record, indent=1) + "\n")


def read_record(folder: Path) -> dict[str, Any] | None:
    """Returns the record of a run in a folder; None if there is none."""
    file = folder / RECORD
    return read_object(file) if file.is_file() else None


def read_object(file: Path, *needed: str) -> dict[str, Any]:
    """Returns the JSON object in a file of a checkpoint.

    Raises:
        UserError: the file holds something else, or the object lacks a key of ``needed``.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"{type(found).__name__} instead of an object")
        if lost := [key for key in needed if key not in found]:
            raise ValueError(f"it has no {lost[0]}")
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is damaged ({error}): restore it, or resume from another checkpoint") from error
    return found


def _plain(value: Any) -> Any:
    """Returns JSON data for the values of a PEFT config."""
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return value.value if isinstance(value, Enum) else str(value)


# --- Checks before a run continues ---


def check_resume(run: Run, folder: str | Path) -> list[str]:
    """Returns lines about what differs between a checkpoint and the run that continues from it.

    Raises:
        UserError: the checkpoint is of another model, lacks a part of its state, or differs in what must be equal.
    """
    folder = Path(folder)
    _check_model(folder, run.model)
    saved = read_record(folder)
    _check_state(folder, run, saved or {})
    _check_moving_reference(folder, run.reference)
    if saved is None:
        unknown = "so it is unknown whether data, reference, loss and options are the same"
        return [f"{folder} does not record its run ({RECORD}), {unknown}"]
    return compare_records(folder, saved, run.record(), run.args.ignore_data_skip)


def rows_to_expect(run: Run, folder: str | Path) -> RowsRead | None:
    """Returns the first rows of the stream that a checkpoint's run has read, if it recorded them."""
    saved = read_record(Path(folder))
    read = None if saved is None else saved["stream"]
    return None if not read or not read["number"] or run.args.ignore_data_skip else RowsRead(**read)


def _check_model(folder: Path, model: nn.Module) -> None:
    """Raises UserError if the folder is not a checkpoint, or is one of another model or adapter."""
    if (configs := getattr(model, "peft_config", None)) is not None:
        places = stored_adapters(folder, model)
        for name, config in configs.items():
            if name not in places:
                raise UserError(
                    f"{folder} is not a checkpoint of this adapter: it has no {ADAPTER_CONFIG} of '{name}'; name"
                    " another folder"
                )
            saved = read_object(Path(places[name], ADAPTER_CONFIG))
            if changed := _differences(_deciding_entries(saved), _deciding_entries(config.to_dict())):
                raise UserError(
                    f"{folder} is a checkpoint of another adapter '{name}': {', '.join(changed)}; give it the same"
                    f" configuration, {_NEW_RUN}"
                )
        return
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder} is not a checkpoint of this model: it has no {file.name}; name another folder")
    config, saved = base_model(model).config, read_object(file)
    if saved.get("model_type") == config.model_type:  # its class knows the parts of such a file, and their defaults
        config, saved = config.get_text_config(), type(config).from_dict(saved).get_text_config()
    else:
        saved = PretrainedConfig.from_dict(saved)
    for name in _SHAPE:
        ours, theirs = getattr(config, name, None), getattr(saved, name, None)
        if ours != theirs:
            raise UserError(
                f"{folder} is a checkpoint of another model: its {name} is {theirs}, this model's {ours}; name a"
                " checkpoint of this model"
            )


def _deciding_entries(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries of an adapter's config that decide what it computes, with sets and lists sorted."""
    relevant = {key: value for key, value in config.items() if key not in _NOT_OF_ADAPTER and "dropout" not in key}
    values = json.loads(json.dumps(relevant, default=_plain))
    return {key: sorted(value, key=str) if isinstance(value, list) else value for key, value in values.items()}


def _check_state(folder: Path, run: Run, saved: Mapping[str, Any]) -> None:
    """Raises UserError if a checkpoint lacks a file without which transformers would begin that state anew."""
    args = run.args
    lacking = [TRAINER_STATE_NAME] if not (folder / TRAINER_STATE_NAME).is_file() else []
    # DeepSpeed keeps this state in files of its own, and misses them itself.
    if run.accelerator.distributed_type != DistributedType.DEEPSPEED:
        optimizers = (OPTIMIZER_NAME, OPTIMIZER_NAME_BIN, "optimizer_*")  # the last is FSDP's folder
        if not any(file for pattern in optimizers for file in folder.glob(pattern)):
            lacking.append(OPTIMIZER_NAME)
        if not (folder / SCHEDULER_NAME).is_file():
            lacking.append(SCHEDULER_NAME)
        if getattr(run.accelerator, "scaler", None) is not None and not (folder / SCALER_NAME).is_file():
            lacking.append(SCALER_NAME)
    random = "rng_state.pth" if args.world_size == 1 else f"rng_state_{args.process_index}.pth"
    # The files of another number of processes have other names, and cannot be continued.
    same = saved.get("processes", {}).get("number", args.world_size) == args.world_size
    others = [] if "processes" in saved else list(folder.glob("rng_state*.pth"))
    if same and not others and not (folder / random).is_file():
        lacking.append(random)
    if not lacking:
        return
    if saved.get("save_only_model"):
        raise UserError(
            f"{folder} was saved with save_only_model=true, so it has no {', '.join(lacking)}, and the run cannot"
            f" continue from it: begin a new run from its model, by model_name_or_path={folder}"
        )
    raise UserError(
        f"{folder} lacks {', '.join(lacking)}, without which that state would begin anew: restore the file, resume from"
        f" another checkpoint, or begin a new run from its model, by model_name_or_path={folder}"
    )


def _check_moving_reference(folder: Path, reference: Reference | MovingReference | None) -> None:
    stored = (folder / MovingReference.FILE).is_file()
    if isinstance(reference, Reference) and stored:
        raise UserError(
            f"{folder} was saved with sync_ref_model, so its reference has moved away from the start weights: resume it"
            " with sync_ref_model=true, or begin a new run from its model"
        )
    if isinstance(reference, MovingReference) and not stored:
        raise UserError(
            f"{folder} holds no {MovingReference.FILE}: it was not saved by a run with sync_ref_model; resume from a"
            " checkpoint of one that was"
        )


def compare_records(folder: Path, saved: Mapping[str, Any], ours: Mapping[str, Any], skips_data: bool) -> list[str]:
    """Returns lines about the differences between two records; raises UserError for those that are refused."""
    lines = []
    for part, values in ours.items():
        before, now = saved.get(part), values
        if part == "reference" and before and now:
            if _is_same_reference(before, now):
                continue
            if before.get("op_version") != now.get("op_version"):
                lines.append("the references cannot be compared: another version of cpt_kernels identified the old one")
                continue
        if not (changed := _differences({part: before}, {part: now})):
            continue
        if part in _MENDS and not (skips_data and part in _SKIPPED_DATA):
            raise UserError(
                f"{folder} cannot be resumed with another {part}: it was saved with {', '.join(changed)}."
                f" To continue, {_MENDS[part]}"
            )
        lines.append(f"{folder} was saved with {part}: {', '.join(changed)}")
    return lines


def _is_same_reference(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    """Whether two references have one fingerprint, or else the same log-probs.

    The latter are those of one model in two adapters that both start at zero, but were drawn by different seeds.
    """
    if saved.get("fingerprint") == ours.get("fingerprint"):
        return True
    before, now = saved.get(_SAMPLE), ours.get(_SAMPLE)
    if not before or not now or len(before) != len(now):
        return False
    return all(abs(a - b) <= _ROUNDING for a, b in zip(before, now))


def _differences(saved: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Returns "name old, now new" for the values that differ; names that one side does not know are equal."""
    changed = []
    for name in saved.keys() & ours.keys() - {_SAMPLE}:
        before, now = saved[name], ours[name]
        if isinstance(before, dict) and isinstance(now, dict):
            changed += _differences(before, now)
        elif before != now:
            changed.append(f"{name} {before}, now {now}")
    return sorted(changed)
