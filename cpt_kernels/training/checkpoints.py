"""Checkpoints on disk: which of them a run may continue from, how a new one becomes complete, and which are deleted.

A checkpoint is written under ``_unfinished`` and moved to its own name when all ranks have written their parts and all
bytes are on disk, so a folder ``checkpoint-N`` is complete. Its record lists the sizes of its files, by which a later
damage is found.
"""

from __future__ import annotations

import json
import shutil
import uuid
import zipfile
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from torch.distributed.checkpoint.api import CheckpointException
from transformers.trainer import TRAINER_STATE_NAME

from ..data.digest import RowsRead
from ..data.stores import display_name
from ..errors import UserError
from ..files import replace_folder, sync_files
from .output_store import OutputStore
from .resume import Run, check_resume, compare_records, read_object, read_record, write_record
from .run_folder import checkpoints_in, step_of

UNFINISHED = "_unfinished"  # in output_dir; the hub uploads no name that starts with an underscore


# --- Damage ---


def find_damage(checkpoint: Path) -> str | None:
    """Returns what is wrong with the files of a checkpoint, as the end of a sentence; None if they are whole.

    Sizes are compared with the record of the checkpoint, JSON is parsed, the header of safetensors is read, and the
    checksums in torch's files are verified.
    """
    try:
        record = read_record(checkpoint) or {}
    except UserError as error:
        return str(error)
    for name, size in record.get("files", {}).items():
        file = checkpoint / name
        if not file.is_file():
            return f"{checkpoint} lacks {name}"
        if (found := file.stat().st_size) != size:
            return f"{file} is damaged: it has {found:,} of {size:,} bytes"
    for file in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        try:
            _read(file)
        except (OSError, ValueError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{file} is damaged ({error})"
    return None


def _read(file: Path) -> None:
    """Raises an exception if a file cannot be read as what its name says."""
    if file.suffix == ".json":
        json.loads(file.read_text(encoding="utf-8"))
    elif file.suffix == ".safetensors":
        with safe_open(file, "pt"):
            pass
    elif file.suffix in (".pt", ".pth", ".bin"):
        with zipfile.ZipFile(file) as archive:
            if (member := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {member} is wrong")


# --- The checkpoint to resume from ---


class Choice(NamedTuple):
    """The checkpoint to resume from, and a line about each later one that cannot be used."""

    checkpoint: str
    lines: list[str]


def choose_checkpoint(folder: Path, run: Run, max_steps: int) -> Choice:
    """Returns the last checkpoint in a folder that is whole, of this run, and of fewer steps than ``max_steps``.

    ``run.json`` in the folder names the run that has written to the folder last. If that is another run than ours, ours
    is the one of the last checkpoint that we may resume from.

    Raises:
        UserError: there is none.
    """
    checkpoints = checkpoints_in(folder)
    if not checkpoints:
        raise UserError(f"resume_from_checkpoint: there is no checkpoint in {display_name(folder)}")
    wanted = _current_run(folder, run)
    lines = []
    for checkpoint in checkpoints:
        try:
            check_usable(checkpoint, run, max_steps)
        except UserError as error:
            lines.append(f"not resumed: {error}")
            continue
        own = run_of(checkpoint)
        wanted = own if wanted is None else wanted
        if own == wanted:
            return Choice(str(checkpoint), lines)
        lines.append(
            f"not resumed: {checkpoint} is of another run in this folder; to continue that one, set"
            f" resume_from_checkpoint={checkpoint}"
        )
    raise UserError("; ".join([f"{display_name(folder)} holds no checkpoint that this run can resume from", *lines]))


def run_of(checkpoint: Path) -> str | None:
    """Returns the id of the run that a checkpoint is of; None if it does not record one, or its record is damaged."""
    try:
        return (read_record(checkpoint) or {}).get("run")
    except UserError:  # reported where the checkpoint is to be used
        return None


def _current_run(folder: Path, run: Run) -> str | None:
    """Returns the id of the run that has written to a folder last, if its record permits that ours continues it."""
    try:
        saved = read_record(folder)
        if saved is None:
            return None
        compare_records(folder, saved, run.record(), run.args.ignore_data_skip)
    except UserError:  # of another run
        return None
    return saved.get("run")


def check_usable(checkpoint: Path, run: Run, max_steps: int) -> list[str]:
    """Returns lines about what differs between a checkpoint and the run that continues from it.

    Raises:
        UserError: the run cannot continue from it (:mod:`.resume`), a file is damaged, or no step is left to train.
    """
    if (store := OutputStore.of(checkpoint.parent)) is not None:
        store.fetch(checkpoint)
    lines = check_resume(run, checkpoint)
    if (damage := find_damage(checkpoint)) is not None:
        raise UserError(f"{damage}: restore the file, or resume from another checkpoint")
    step = read_object(checkpoint / TRAINER_STATE_NAME, "global_step", "log_history")["global_step"]
    if step >= max_steps:
        raise UserError(
            f"{checkpoint} has {step} steps, and the run ends after {max_steps}: to train on, raise max_steps or"
            " num_train_epochs; else use the model in that folder"
        )
    return lines


# --- A new checkpoint ---


def new_run() -> str:
    """Returns an id for a run that begins. A run that resumes keeps its id."""
    return uuid.uuid4().hex


def writing_failure(error: BaseException) -> str | None:
    """Returns why a file could not be written, if that is what an exception of a save means; else None."""
    if isinstance(error, CheckpointException):  # of FSDP's files: an exception for each rank that failed
        return next((reason for cause, _ in error.failures.values() if (reason := writing_failure(cause))), None)
    if isinstance(error, OSError):
        return error.strerror
    text = str(error).strip()
    # torch and safetensors raise errors of their own.
    if "inline_container" in text or "PytorchStreamWriter" in text:
        return "torch could not write a whole file"
    return text.splitlines()[0] if isinstance(error, SafetensorError) else None


def complete_checkpoint(checkpoint: Path, run: Run, read: RowsRead | None, run_id: str | None) -> None:
    """Writes all files of an unfinished checkpoint to disk, records the run, and moves it to its own name."""
    unfinished = checkpoint.parent / UNFINISHED / checkpoint.name
    sizes = sync_files(unfinished)
    write_record(unfinished, run, read, {"run": run_id, "files": sizes})
    replace_folder(unfinished, checkpoint)


def delete_checkpoints(folder: Path, limit: int | None, kept: set[str], run_id: str | None) -> None:
    """Deletes checkpoints until ``limit`` are left: those of other runs first, then those with the fewest steps.

    Args:
        limit: the most checkpoints to keep; None or 0 keeps all.
        kept: names of checkpoints that stay, such as the newest and the best.
    """
    if not limit or limit < 0:
        return
    checkpoints = checkpoints_in(folder)
    others = (path for path in checkpoints if path.name not in kept)
    oldest = sorted(others, key=lambda path: (run_of(path) == run_id, step_of(path)))
    for path in oldest[: max(0, len(checkpoints) - limit)]:
        shutil.rmtree(path, ignore_errors=True)
        if (store := OutputStore.of(folder)) is not None:
            store.delete_checkpoint(path)
