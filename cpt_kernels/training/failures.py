"""Failures of ranks: a launcher's restart goes on from the last checkpoint, and a rank that hangs is named.

``torchrun --max-restarts`` starts all processes again when one of them has failed. The run that goes on is the one that
the same launchers began in ``output_dir``: its record names them.

A rank that hangs makes the others wait in a collective operation until ``ddp_timeout`` ends it, with an error that does
not say for whom they waited. So every rank has a thread that writes into a store where the rank is, and reads where all
ranks are shortly before the time is over. transformers gives processes on CPUs no ``ddp_timeout``, so there the thread
ends its process, too.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

from accelerate.utils import gather_object
from torch import distributed

from ..config import ContrastiveConfig
from .checkpoints import run_of
from .resume import read_record
from .run_folder import checkpoints_in, restarts

logger = logging.getLogger(__name__)

_BEATS = 20  # a rank writes where it is this often within ddp_timeout
_WAITING = tuple(
    f"{os.sep}torch{os.sep}{part}{os.sep}" for part in ("distributed", "autograd", f"nn{os.sep}parallel")
)  # in paths of files


# --- Restarts ---


def launchers() -> list[str]:
    """Returns what identifies the launchers of all ranks, which outlive their processes; empty without torchrun."""
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # in a folder of the launcher: .../attempt_1/0/error.json
    own = None if file is None else f"{socket.gethostname()}:{Path(file).parents[2]}"
    return sorted({name for name in gather_object([own]) if name is not None})


def checkpoint_of_restart(folder: Path) -> Path | None:
    """Returns the last checkpoint that this launch has written to a folder before it was restarted, if any.

    All ranks call it, and it returns what the main process sees.
    """
    if not restarts():
        return None
    ours = launchers()
    record = read_record(folder) or {}
    mine = set(ours) & set(record.get("launchers", ()))
    own = (path for path in checkpoints_in(folder) if mine and run_of(path) == record["run"])
    return gather_object([next(own, None)])[0]


# --- Ranks that hang ---


class _Post(NamedTuple):
    """What a rank writes into the store."""

    number: int  # grows with every post
    waits: bool  # in a collective operation, or in a backward, which runs some
    point: str  # the last point that the rank has passed, such as "step 7"
    place: str  # file, line and function


class _Watch:
    """Tells for which ranks the others wait; see the module.

    Args:
        timeout: seconds after which ranks have waited too long.
        exits: end this process then, if it waits.
    """

    def __init__(self, timeout: float, exits: bool) -> None:
        self.rank, self.world = distributed.get_rank(), distributed.get_world_size()
        self.timeout, self.exits, self.interval = timeout, exits, min(5.0, timeout / _BEATS)
        self._point, self._since = "the start", time.monotonic()
        self._main = threading.main_thread().ident
        self._stop = threading.Event()
        # A client of its own, because that of the process group may be blocked.
        address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = distributed.TCPStore(*address, is_master=False, timeout=timedelta(seconds=min(timeout, 60)))
        self._store = distributed.PrefixStore(f"cpt_kernels/{restarts()}", store)
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._post, self._tell)]

    def __enter__(self) -> _Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:  # a thread in a store's call would crash at the interpreter's exit
            thread.join()

    def passed(self, point: str, watched: bool) -> None:
        """Notes that this rank has come to a point."""
        self._point, self._since = point, time.monotonic() if watched else math.inf

    def _post(self) -> None:
        number = 0
        while not self._stop.wait(self.interval):
            number += 1
            self._store.set(str(self.rank), json.dumps([number, *self._place()]))

    def _place(self) -> tuple[bool, str, str]:
        """Returns what the main thread does, as :class:`_Post` has it: the innermost line that is not torch's."""
        frame, waits, place = sys._current_frames().get(self._main or 0), False, "an unknown place"
        while frame is not None:
            code = frame.f_code
            place = f"{code.co_filename}:{frame.f_lineno} ({code.co_name})"
            if f"{os.sep}torch{os.sep}" not in code.co_filename:
                break
            waits |= any(part in code.co_filename for part in _WAITING)
            frame = frame.f_back
        return waits, self._point, place

    def _tell(self) -> None:
        while not self._stop.wait(self.interval):
            waited = time.monotonic() - self._since
            if waited < self.timeout - 4 * self.interval:
                continue
            before = self._read()
            if self._stop.wait(2.5 * self.interval):
                return
            posts = self._read()
            answering = {rank: post for rank, post in posts.items() if post is not None and post != before[rank]}
            is_first = self.rank == min(answering, default=self.rank)
            if is_first:
                silent = sorted(set(posts) - set(answering))
                logger.error(
                    f"no step for {waited:.0f} s (ddp_timeout={self.timeout:g}): {_describe(answering, silent)}"
                )
            if self.exits and self._place()[0]:
                self._stop.wait(0 if is_first else 4 * self.interval)  # the launcher ends all when the first ends
                os._exit(1)
            if self._stop.wait(self.timeout):
                return

    def _read(self) -> dict[int, _Post | None]:
        found: dict[int, _Post | None] = {}
        for rank in range(self.world):
            known = self._store.check([str(rank)])
            found[rank] = _Post(*json.loads(self._store.get(str(rank)))) if known else None
        return found


def _describe(answering: dict[int, _Post], silent: list[int]) -> str:
    """Returns which ranks hang, and where all of them are."""
    parts = [f"{_name(silent)} not answering (stopped, or the machine is lost)"] if silent else []
    groups: dict[tuple[bool, str], list[int]] = {}
    for rank, post in answering.items():
        what = "waiting" if post.waits else "hanging"
        groups.setdefault((post.waits, f"{what} at {post.place}, after {post.point}"), []).append(rank)
    return "; ".join([*parts, *(f"{_name(groups[key])} {key[1]}" for key in sorted(groups))])


def _name(ranks: list[int]) -> str:
    return f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are"


_watch: _Watch | None = None


@contextlib.contextmanager
def named_hanging_ranks(args: ContrastiveConfig) -> Iterator[None]:
    """Names the ranks that hang while the block runs, if there are several ranks; ``args`` has the timeout."""
    global _watch
    if not distributed.is_initialized() or distributed.get_world_size() == 1 or "MASTER_PORT" not in os.environ:
        yield
        return
    with _Watch(args.ddp_timeout, exits=args.device.type == "cpu") as _watch:
        try:
            yield
        finally:
            _watch = None


def passed(point: str, watched: bool = True) -> None:
    """Notes that this rank has come to a point, such as "step 7"; ``watched=False``: what follows may take any time."""
    if _watch is not None:
        _watch.passed(point, watched)
