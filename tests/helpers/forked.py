"""Runs a function as the ranks of a gloo group, in processes forked from one that has imported the packages once."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
import socket
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

_PRELOADED = ["tests.helpers.forked_imports"]


def run_ranks(
    folder: Path,
    ranks: int,
    function: Callable,
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> list[Any]:
    """Returns what ``function(*arguments)`` returns on every rank. Fails with the traceback of a rank that raised.

    One rank has no group. ``environment`` is set before the function runs.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    results_folder = Path(tempfile.mkdtemp(dir=folder))
    files = [results_folder / f"rank-{rank}.pickle" for rank in range(ranks)]
    common = ranks, port, function, arguments, environment or {}
    processes = [context.Process(target=_rank, args=(rank, file, *common)) for rank, file in enumerate(files)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(timeout)
        results = [pickle.loads(file.read_bytes()) if file.exists() else (False, "no result") for file in files]
        failed = [f"rank {rank}: {text}" for rank, (is_right, text) in enumerate(results) if not is_right]
        assert not failed, "\n".join(failed)[-4000:]
        return [value for _, value in results]
    finally:
        for process in processes:
            process.kill()


def _rank(
    rank: int, file: Path, ranks: int, port: int, function: Callable, arguments: tuple, environment: Mapping[str, str]
) -> None:
    import torch

    torch.set_num_threads(1)
    group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_PORT": port}
    if ranks > 1:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in group.items()}}
    os.environ |= {"ACCELERATE_USE_CPU": "true", **environment}
    try:
        result = True, function(*arguments)
    except BaseException:
        result = False, traceback.format_exc()
    file.with_suffix(".part").write_bytes(pickle.dumps(result))
    file.with_suffix(".part").rename(file)
    if not result[0]:
        os._exit(1)  # the other ranks see that the connection is closed
    atexit._clear()
    torch.distributed.is_initialized() and torch.distributed.barrier()
    os._exit(0)  # at the normal exit, gloo's threads sometimes abort or block the process
