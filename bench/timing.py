"""Shared parts of all benchmarks: worker processes, interleaved rounds, memory, provenance, and result files.

Each contestant runs in a process of its own (:class:`Worker`), because allocator settings and peak memory belong to a
process. The parent sends one line per request; the worker runs it and answers with one line of JSON
(:class:`Channel`). Rounds are interleaved (A, B, C, A, B, C, ...), so that other load on the machine slows all
contestants alike. Results report medians and quartiles.
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


# --- Workers ---


class Worker:
    """The parent's handle of one worker process.

    Args:
        name: The name shown in tables.
        module: The module to run as ``python -m module --worker SPEC``.
        spec: The settings passed to the worker, as JSON.
        environment: Environment variables of this process only.
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
            env={"CUDA_VISIBLE_DEVICES": "0", **os.environ, **(environment or {})},  # all contestants share one GPU
        )

    @functools.cached_property
    def hello(self) -> dict[str, Any]:
        """The worker's first answer. It is read on first use, so that several workers can start in parallel."""
        return self._answer()

    def ask(self, message: str) -> dict[str, Any]:
        """Sends one line and returns the answer.

        Raises:
            RuntimeError: The worker ended; the message has the last lines of its standard error.
        """
        assert self.hello  # waits until the worker is ready
        self.process.stdin.write(message + "\n")
        self.process.stdin.flush()
        return self._answer()

    def end(self) -> None:
        """Closes the worker's input, which ends it, without waiting."""
        if self.process.poll() is None:
            self.process.stdin.close()

    def close(self) -> None:
        """Ends the worker and waits for it; kills it after 30 s."""
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
            raise RuntimeError(f"contestant '{self.name}' ended; its last output:\n{self.errors.read()[-4000:]}")
        return json.loads(line)


class Channel:
    """The worker's side of the connection. Redirects standard output, so that libraries print to standard error."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def receive(self) -> str:
        """Returns the parent's next line, or '' once the parent closed the connection."""
        return sys.stdin.readline().strip()

    def reply(self, **values: Any) -> None:
        """Sends one answer."""
        self._out.write(json.dumps(values) + "\n")
        self._out.flush()


def close_all(workers: Sequence[Worker]) -> None:
    """Ends all workers in parallel; each takes half a second to exit."""
    for worker in workers:
        worker.end()
    for worker in workers:
        worker.close()


def interleave(workers: Sequence[Worker], rounds: int, message: str) -> dict[str, list[dict[str, Any]]]:
    """Sends ``message`` to every worker in every round. Returns the answers by contestant."""
    answers: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    for _ in range(rounds):
        for worker in workers:
            answers[worker.name].append(worker.ask(message))
    return answers


def summarize(values: Sequence[float]) -> dict[str, float]:
    """Returns median, lower quartile and upper quartile."""
    if len(values) < 2:
        return {"median": values[0], "low": values[0], "high": values[0]}
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}


# --- Memory of this process ---


def resident_mib() -> float:
    """Returns the resident memory of this process in MiB, after unused memory was returned to the system."""
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
    return _status("VmRSS")


def reset_peak() -> bool:
    """Resets the peak of resident memory. Returns False if the system cannot; the peak is the process's then."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_mib() -> float:
    """Returns the largest resident memory in MiB since :func:`reset_peak` (VmHWM), including mapped library files."""
    peak = _status("VmHWM")
    return peak if peak == peak else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _status(name: str) -> float:
    """Returns a field of /proc/self/status in MiB, or NaN where it does not exist."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return int(found[1]) / 1024 if found else float("nan")


# --- Provenance ---


def environment() -> dict[str, Any]:
    """Returns machine, versions, commit, date and command of this run."""
    return {
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(["python", "-m", *_module_and_arguments()]),
    }


def machine() -> dict[str, Any]:
    """Returns processor, cores, memory, GPU and load."""
    info = Path("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu": model[1].strip() if model else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(pages / 2**30, 1),
        "gpu": gpu_name(),
        "load": round(os.getloadavg()[0], 2),  # at the end of the run, so that the run itself is included
    }


@functools.cache
def gpu_name() -> str | None:
    """Returns the name of the GPU; None without one.

    It is cached, so that a benchmark that asks at its start knows the name of a GPU that is lost later. A GPU that
    cannot be asked is named by the error, because results are still to be written.
    """
    import torch

    try:
        return torch.cuda.get_device_name() if torch.cuda.is_available() else None
    except RuntimeError as error:
        return f"not known: {str(error).splitlines()[0]}"


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the installed packages that affect the results."""
    import torch

    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found | {"torch": torch.__version__}  # names the CUDA version, which the metadata may omit


def commit() -> str:
    """Returns the short hash of HEAD, with ``+`` if files other than results are modified, or 'none' outside of git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=10", "HEAD")
    return "none" if head is None else head + ("+" if git("status", "--porcelain", ".", ":!bench/results") else "")


def _module_and_arguments() -> list[str]:
    """Returns the command without folders of this machine and without the options that only name an output."""
    main = sys.modules["__main__"].__spec__
    given = [Path(argument).name if Path(argument).is_absolute() else argument for argument in sys.argv[1:]]
    arguments = [a for before, a in zip(["", *given], given) if "--json" not in (before, a) and a != "--record"]
    return [main.name.removesuffix(".__main__") if main else Path(sys.argv[0]).name, *arguments]


# --- Results ---


def result_path() -> Path:
    """Returns ``bench/results/<machine>/<date>-<commit>.json`` for a run that ends now."""
    return RESULTS / folder_name(machine()) / f"{datetime.now(timezone.utc):%Y-%m-%d}-{commit().rstrip('+')}.json"


def folder_name(machine: Mapping[str, Any]) -> str:
    """Returns the name of the folder that holds a machine's results."""
    name = f"{machine['gpu'] or machine['cpu']} {machine['cores']} cores"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_result(subject: str, result: Mapping[str, Any], path: Path) -> Path:
    """Writes a subject's result into a result file. Replaces the subject's previous result and keeps other subjects."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = json.loads(path.read_text()) if path.exists() else {}
    whole[subject] = result
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(whole, indent=1) + "\n")
    temporary.replace(path)
    return path


def add_output_options(parser) -> None:
    """Adds ``--json`` and ``--record`` to a subject's parser."""
    parser.add_argument("--json", type=Path, metavar="OUT", help="also write the result to this file")
    parser.add_argument("--record", action="store_true", help="also write the result to bench/results/<machine>/")


def finish(subject: str, result: Mapping[str, Any], summary: Mapping[str, Any], options) -> None:
    """Writes the result to the files asked for and prints the summary as the last line."""
    result = {**environment(), **summary, **result}
    for path in filter(None, (options.json, result_path() if options.record else None)):
        print(f"written: {write_result(subject, result, path)}")
    print_summary(summary)


def print_summary(summary: Mapping[str, Any]) -> None:
    """Prints a subject's last line: the summary with machine, versions and commit, as JSON."""
    print(json.dumps({**summary, "machine": machine(), "versions": versions(), "commit": commit()}))


def milliseconds(seconds: Mapping[str, float], best: float | None) -> list[str]:
    """Returns table cells: median and quartiles in ms, and ``best`` (the best peer's seconds, or None) / median."""
    median, low, high = (1e3 * seconds[name] for name in ("median", "low", "high"))
    return [f"{median:.2f}", f"{low:.2f}-{high:.2f}", "-" if best is None else f"{1e3 * best / median:.2f}"]


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Formats a text table. The first column is aligned left, all others right."""
    cells = [list(map(str, row)) for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        )
        for row in cells
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
