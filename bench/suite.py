"""Runs all benchmarks that this machine supports. Writes one result file, and plots beside it.

    python -m bench suite --record
    python -m bench suite --quick         toy sizes, to check that every benchmark runs

Subjects that read responses run only if --data names a file. On CUDA, ``gpu_check`` runs first, so that the kernels are
checked before they are timed. Reports each subject's outcome and duration; the exit code is 1 if a subject failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import plot
from .timing import ROOT, add_output_options, print_summary, result_path, table, write_result


@dataclass(frozen=True)
class Subject:
    """How the suite runs one subject."""

    arguments: Sequence[str] = ()
    devices: Sequence[str] = ("cpu", "cuda")
    takes_device: bool = False
    takes_data: bool = False
    requires: str | None = None  # a package that the subject needs


_PEERS = "ours-unshared,ours-padded,trl,trl-tuned"
SUBJECTS = {
    "gpu_check": Subject(devices=("cuda",)),
    "compile_report": Subject(requires="triton"),
    "step": Subject(("--peers", _PEERS, "--steps", "4", "--rounds", "3"), takes_device=True, requires="trl"),
    "scaling": Subject(("--axes", "completions"), takes_device=True, requires="trl"),
    "head": Subject(("--tokens", "64,1024"), takes_device=True),
    "attention": Subject(takes_device=True),
    "packing": Subject(),
    "cache": Subject(("--rows", "2000000", "--valued", "300000"), devices=("cpu",)),
    "tokenize": Subject(("--pairs", "5000"), takes_data=True, requires="trl"),
}


@dataclass
class SubjectOutcome:
    """The outcome of one subject."""

    result: str  # "ok", or the reason why the subject failed or did not run
    seconds: float = 0.0
    found: dict[str, Any] | None = None  # the result that it wrote


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench suite", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--subjects", default=",".join(SUBJECTS), help="comma-separated list; default: all subjects")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--data", type=Path, help="JSON Lines file with prompt, model and response")
    parser.add_argument("--quick", action="store_true", help="smoke test with toy sizes; on a CPU two subjects at once")
    add_output_options(parser)
    options = parser.parse_args(arguments)
    options.subjects = options.subjects.split(",")
    # Concurrent subjects disturb each other's timings, which a smoke test does not use.
    options.at_once = 2 if options.quick and options.device == "cpu" else 1
    if unknown := set(options.subjects) - set(SUBJECTS):
        parser.error(f"unknown subjects {sorted(unknown)}: choose from {', '.join(SUBJECTS)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.at_once) as pool:
        outcomes = dict(zip(options.subjects, pool.map(lambda one: run(one, options, Path(folder)), options.subjects)))
    seconds = time.perf_counter() - started
    rows = [[name, one.result, f"{one.seconds:.0f}"] for name, one in outcomes.items()]
    print(table(["subject", "result", "seconds"], [*rows, ["all", "", f"{seconds:.0f}"]]))
    for target in filter(None, (options.json, result_path() if options.record else None)):
        for name, one in outcomes.items():
            if one.found is not None:
                write_result(name, one.found, target)
        plot.main([str(target)])
    failed = [name for name, one in outcomes.items() if one.result.startswith("failed")]
    print_summary({"ok": not failed, "failed": failed, "seconds": round(seconds, 1)})
    return 1 if failed else 0


def run(subject: str, options: argparse.Namespace, folder: Path) -> SubjectOutcome:
    """Runs one subject in its own process. Its output is streamed if it runs alone, and else printed at its end."""
    settings = SUBJECTS[subject]
    if options.device not in settings.devices:
        return SubjectOutcome(f"not on {options.device}")
    if settings.takes_data and options.data is None:
        return SubjectOutcome("skipped: needs --data")
    if settings.requires and importlib.util.find_spec(settings.requires) is None:
        return SubjectOutcome(f"skipped: {settings.requires} is not installed")
    arguments = ["--device", options.device] if settings.takes_device else []
    arguments += ["--data", str(options.data.resolve())] if settings.takes_data else []
    arguments += ["--quick"] if options.quick and subject != "gpu_check" else settings.arguments
    heading = f"\n### python -m bench {subject} {' '.join(arguments)}\n"
    path = folder / f"{subject}.json"
    command = [sys.executable, "-m", "bench", subject, *arguments, "--json", str(path)]
    started = time.perf_counter()
    if options.at_once == 1:
        print(heading, flush=True)
        done = subprocess.run(command, cwd=ROOT)
    else:
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        print(f"{heading}\n{done.stdout}", flush=True)
    seconds = time.perf_counter() - started
    result = f"failed: exit code {done.returncode}" if done.returncode else "ok"
    return SubjectOutcome(result, seconds, json.loads(path.read_text())[subject] if path.exists() else None)


if __name__ == "__main__":
    sys.exit(main())
