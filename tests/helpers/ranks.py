"""Runs modules of this folder as processes, one alone or several as ranks of torchrun."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping

from tests.helpers import ROOT


def torchrun(
    script: str,
    processes: int,
    *arguments: str,
    environment: Mapping[str, str] | None = None,
    timeout: int = 300,
) -> None:
    """Runs a module of this folder, under torchrun if there are several processes. Fails with the end of its stderr."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launcher = [] if processes == 1 else [
        "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"
    ]  # fmt: skip
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1", **(environment or {})}
    command = [sys.executable, *launcher, "-m", f"tests.helpers.{script}", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
