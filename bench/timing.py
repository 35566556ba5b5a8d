"""Timing that can be trusted: every contestant in a process of its own, rounds interleaved, medians, spread, memory.

A contestant (:class:`Contestant`) is a worker process with its own environment: allocator settings and peak memory
belong to a process. The parent sends it one line, the worker does that much and answers with one line of JSON
(:class:`Channel`). Rounds go A, B, C, A, B, C, ..., so that whatever slows the machine down slows all of them.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import os
import platform
import re
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
MIB = 2**20

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "numpy", "triton", "trl", "liger-kernel")


# --- Contestants ---


class Contestant:
    """A worker process, seen from the parent.

    Args:
        name: as it stands in the table.
        module: run as ``python -m module --worker SPEC``.
        spec: what the worker is told, as JSON.
        environment: variables set for this process alone.
    """

    def __init__(self, name: str, module: str, spec: Mapping[str, Any], environment: Mapping[str, str] | None = None):
        self.name = name
        self.errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, "--worker", json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
            cwd=ROOT,
            env={"CUDA_VISIBLE_DEVICES": "0", **os.environ, **(environment or {})},  # all on one GPU
        )

    @functools.cached_property
    def hello(self) -> dict[str, Any]:
        """What the worker says once it is ready. Contestants that were made one after another get ready together."""
        return self._answer()

    def ask(self, message: str) -> dict[str, Any]:
        """Send one line, wait for the answer."""
        assert self.hello  # it is ready
        self.process.stdin.write(message + "\n")
        self.process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        """End of input ends the worker. :func:`close_all` waits for several at once."""
        if self.process.poll() is None:
            self.process.stdin.close()

    def close(self) -> None:
        """End the worker, and wait for it."""
        self.end()
        try:
            self.process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.process.stdout.close()
        self.errors.close()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.errors.seek(0)
            raise RuntimeError(f"contestant '{self.name}' ended; its last words:\n{self.errors.read()[-4000:]}")
        return json.loads(line)


class Channel:
    """The worker's end. Takes standard output for itself: what libraries print goes to standard error."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def receive(self) -> str:
        """The next line from the parent; '' when there is none any more."""
        return sys.stdin.readline().strip()

    def reply(self, **values: Any) -> None:
        self._out.write(json.dumps(values) + "\n")
        self._out.flush()


def close_all(contestants: Sequence[Contestant]) -> None:
    """End them together: it takes each of them half a second to go."""
    for contestant in contestants:
        contestant.end()
    for contestant in contestants:
        contestant.close()


def interleave(contestants: Sequence[Contestant], rounds: int, message: str) -> dict[str, list[dict[str, Any]]]:
    """Answers of every contestant to ``message``, one a round, rounds interleaved."""
    answers: dict[str, list[dict[str, Any]]] = {contestant.name: [] for contestant in contestants}
    for _ in range(rounds):
        for contestant in contestants:
            answers[contestant.name].append(contestant.ask(message))
    return answers


def summarise(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


# --- Memory of this process ---


def resident_mib() -> float:
    """Memory that is in RAM now, after what is free was given back."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return _status("VmRSS")


def reset_peak() -> bool:
    """Forget the peak so far. False where the kernel does not offer that: the peak is the whole process's then."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_mib() -> float:
    """Largest resident memory since :func:`reset_peak` (VmHWM), file-backed pages of libraries included."""
    peak = _status("VmHWM")
    return peak if peak == peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _status(name: str) -> float:
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return int(found[1]) / 1024 if found else float("nan")


# --- Where and with what ---


def environment() -> dict[str, Any]:
    """Machine, versions, commit and time of a run."""
    return {
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", *_module_and_arguments()]),
    }


def machine() -> dict[str, Any]:
    """Processor, cores, memory and GPU."""
    import torch

    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": round(os.getloadavg()[0], 2),  # when the run ended; its own work is in it
    }


def versions() -> dict[str, str]:
    """Python and the packages that a benchmark's numbers depend on, where they are installed."""
    import torch

    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}  # with its CUDA, which metadata does not always name


def commit() -> str:
    """Short hash of the checkout, with ``+`` where files besides results differ from it; 'none' outside of git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=10", "HEAD")
    return "none" if head is None else head + ("+" if git("status", "--porcelain", ".", ":!bench/results") else "")


def _module_and_arguments() -> list[str]:
    main = sys.modules["__main__"].__spec__
    # Where files lie is nobody's business but this machine's, nor where the result goes.
    given = [Path(argument).name if Path(argument).is_absolute() else argument for argument in sys.argv[1:]]
    arguments = [a for before, a in zip(["", *given], given) if "--json" not in (before, a) and a != "--record"]
    return [main.name.removesuffix(".__main__") if main else Path(sys.argv[0]).name, *arguments]


# --- Results ---


def result_path() -> Path:
    """``bench/results/<machine>/<date>-<commit>.json`` of a run that ends now."""
    return RESULTS / folder_name(machine()) / f"{datetime.now(timezone.utc):%Y-%m-%d}-{commit().rstrip('+')}.json"


def folder_name(machine: Mapping[str, Any]) -> str:
    """Of a machine's results."""
    name = f"{machine['gpu'] or machine['cpu']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_result(subject: str, result: Mapping[str, Any], path: Path) -> Path:
    """Add a subject's result to a file of results, replacing an older one of that subject."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = json.loads(path.read_text()) if path.exists() else {}
    whole[subject] = result
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(whole, indent=1) + "\n")
    temporary.replace(path)
    return path


def add_output_options(parser) -> None:
    """``--json`` and ``--record``, the same for every subject."""
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result to this file")
    parser.add_argument("--record", action="store_true", help="also write it to bench/results/<machine>/")


def finish(subject: str, result: Mapping[str, Any], summary: Mapping[str, Any], options) -> None:
    """Write what was asked for; print the summary as the last line."""
    result = {**environment(), **summary, **result}
    for path in filter(None, (options.json, result_path() if options.record else None)):
        print(f"written: {write_result(subject, result, path)}")
    print_summary(summary)


def print_summary(summary: Mapping[str, Any]) -> None:
    """The last line of a subject: what came out, where and with what, as JSON."""
    print(json.dumps({**summary, "machine": machine(), "versions": versions(), "commit": commit()}))


def milliseconds(seconds: Mapping[str, float], best: float | None) -> list[str]:
    """Cells of a table: median, quartiles, and how many times as fast as the best peer, where there is one."""
    median, low, high = (1e3 * seconds[name] for name in ("median", "low", "high"))
    return [f"{median:.2f}", f"{low:.2f}-{high:.2f}", "-" if best is None else f"{1e3 * best / median:.2f}"]


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Text columns: the first to the left, the rest to the right."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
