"""The output folder of a run: one run at a time writes to it, and an earlier run in it is found."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import PartialState
from accelerate.utils import gather_object
from filelock import FileLock, Timeout
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data.stores import list_files
from ..errors import UserError
from .output_store import OutputStore

logger = logging.getLogger(__name__)

# The hub uploads no file whose name starts with an underscore.
_LOCK = "_run.lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL)  # of a file system without them
_WORKERS_END = 60  # seconds in which the DataLoader workers of a killed process end, which hold its lock
_locks: dict[tuple[int, Path], FileLock] = {}  # that this process holds; a forked process has another id
_inside: list[tuple[int, Path]] = []  # of this process, whether or not it has the lock
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model*.bin", "adapters.json")


def restarts() -> int:
    """Returns how often torchrun has started this process again after one failed; 0 without torchrun."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


# --- The lock ---


@contextmanager
def held(folder: str | Path, writes: bool = True) -> Iterator[None]:
    """Holds a folder for this run. All ranks call it, and the main process takes the lock.

    The operating system frees the lock when its process ends, however it ends. In a process that holds the folder
    already nothing happens. A process that torchrun has restarted waits for the workers of its predecessor to end.
    A file system without locks is said in a warning.

    For a folder on a store, the lock is that of the local folder; other machines are told by :meth:`OutputStore.take`.
    The local folder gets what is on the store, and at the end its files are uploaded.

    Args:
        writes: whether the run writes to the folder, which then becomes this run's on a store.

    Raises:
        UserError: on all ranks, if another live process holds the folder, or if it cannot be written to.
    """
    key = os.getpid(), Path(folder).resolve()
    store = None if key in _inside else OutputStore.of(folder)
    lock, refusal = None, None
    if PartialState().is_main_process and key not in _locks:
        try:
            lock = _take(Path(folder))
        except UserError as error:
            refusal = str(error)
    if lock is not None:
        _locks[key] = lock
    _inside.append(key)
    try:
        if (refusal := gather_object([refusal])[0]) is not None:
            raise UserError(refusal)
        if store is not None:
            _on_nodes(store.pull)
            _on_nodes(store.take, writes and PartialState().is_main_process)
        yield
        if store is not None and writes:
            _on_nodes(store.push, PartialState().is_main_process)
            _on_nodes(store.release, PartialState().is_main_process)
    finally:
        _inside.remove(key)
        if lock is not None:
            _locks.pop(key).release()


def _on_nodes(action: Callable[[], None], wanted: bool = True) -> None:
    """Calls an action in one process of each node that wants it; raises UserError on all ranks if one failed."""
    refusal = None
    if wanted and PartialState().is_local_main_process:
        try:
            action()
        except UserError as error:
            refusal = str(error)
    if refusals := [each for each in gather_object([refusal]) if each is not None]:
        raise UserError(refusals[0])


def check_free(folder: str | Path) -> None:
    """Raises UserError, on all ranks, if another live process holds the folder. Creates no file, except for a store."""
    if OutputStore.of(folder) is not None or gather_object([Path(folder, _LOCK).exists()])[0]:
        with held(folder, writes=False):
            pass


def _take(folder: Path) -> FileLock | None:
    file = folder.resolve() / _LOCK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file)
        lock.acquire(timeout=_WORKERS_END if restarts() else 0)
    except Timeout:
        raise UserError(
            f"output_dir={folder} is in use by another run{_holder(file)}: wait until it ends, or choose another folder"
        ) from None
    except (OSError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno not in _NO_LOCKS:
            raise UserError(f"output_dir={folder} cannot be written to ({error.strerror})") from error
        logger.warning(
            f"output_dir={folder} is on a file system without locks ({error}), so a second run that writes to it at the"
            " same time would not be noticed"
        )
        return None
    try:
        file.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    except OSError as error:
        lock.release()
        raise UserError(f"output_dir={folder} cannot be written to ({error.strerror})") from error
    return lock


def _holder(file: Path) -> str:
    try:
        name = file.read_text(encoding="utf-8").strip()
    except OSError:  # Windows denies reading a locked file
        name = ""
    return f", {name}" if name else ""


# --- An earlier run ---


def step_of(checkpoint: Path) -> int:
    """Returns the steps of a checkpoint by its name."""
    return int(checkpoint.name.rpartition("-")[2])


def checkpoints_in(folder: str | Path) -> list[Path]:
    """Returns the checkpoints in a folder, the one with the most steps first."""
    found = Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    numbered = (path for path in found if path.name.rpartition("-")[2].isdecimal() and path.is_dir())
    return sorted(numbered, key=step_of, reverse=True)


def weights_in(folder: str | Path) -> list[Path]:
    """Returns the files in a folder that hold the weights of a model or adapter; of a store, those that are there."""
    if (store := OutputStore.of(folder)) is not None:
        paths = [Path(folder, name) for name in list_files(store.url) if "/" not in name]
        return sorted(path for path in paths if any(path.match(pattern) for pattern in _WEIGHTS))
    return sorted(file for pattern in _WEIGHTS for file in Path(folder).glob(pattern))


def remove_weights(folder: str | Path) -> None:
    """Deletes the files of :func:`weights_in`."""
    files = weights_in(folder)
    if (store := OutputStore.of(folder)) is not None:
        store.delete_files({file.name for file in files})
    for file in files:
        file.unlink(missing_ok=True)


def earlier_run(folder: str | Path) -> str | None:
    """Returns a few words about the run whose model or checkpoints a folder holds; None without any."""
    checkpoints, weights = checkpoints_in(folder), weights_in(folder)
    if not checkpoints and not weights:
        return None
    names = [path.name for path in (*checkpoints[:1], *weights[:1])]
    return f"{'a finished' if is_finished(folder) else 'an earlier'} run ({', '.join(names)})"


def is_finished(folder: str | Path) -> bool:
    """Whether a folder holds a trained model, or a checkpoint of the last step of its run."""
    if weights_in(folder):
        return True
    for checkpoint in checkpoints_in(folder)[:1]:
        try:
            state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
            return state["global_step"] >= state["max_steps"]
        except (OSError, ValueError, KeyError, TypeError):  # a damaged checkpoint, which resuming reports
            return False
    return False
