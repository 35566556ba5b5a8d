"""All benchmarks of a machine, one after another, their results in one file, pictures beside it.

    python -m bench suite --record
    python -m bench suite --quick         does everything run?

Subjects that read a file of responses run where --data names one. On CUDA ``gpu_check`` comes first: is it right?
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
class Part:
    """A subject, as the suite runs it."""

    arguments: Sequence[str] = ()
    devices: Sequence[str] = ("cpu", "cuda")
    takes_device: bool = False
    takes_data: bool = False
    wants: str | None = None  # a package without which it cannot run


_PEERS = "ours-unshared,ours-padded,trl,trl-tuned"
PARTS = {
    "gpu_check": Part(devices=("cuda",)),
    "compile_report": Part(wants="triton"),
    "step": Part(("--peers", _PEERS, "--steps", "4", "--rounds", "3"), takes_device=True, wants="trl"),
    "scaling": Part(("--axes", "completions"), takes_device=True, wants="trl"),
    "head": Part(("--tokens", "64,1024"), takes_device=True),
    "attention": Part(takes_device=True),
    "packing": Part(),
    "cache": Part(("--rows", "2000000", "--valued", "300000"), devices=("cpu",)),
    "tokenize": Part(("--pairs", "5000"), takes_data=True, wants="trl"),
}


@dataclass
class Outcome:
    """What became of a subject."""

    result: str  # "ok", or why not
    seconds: float = 0.0
    found: dict[str, Any] | None = None  # what it wrote


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("bench suite", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--subjects", default=",".join(PARTS), help="comma-separated, of these")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--data", type=Path, help="JSON lines with prompt, model, response")
    parser.add_argument(
        "--quick", action="store_true", help="toy sizes, on a CPU two subjects at once: does everything run?"
    )
    add_output_options(parser)
    options = parser.parse_args(arguments)
    options.subjects = options.subjects.split(",")
    options.at_once = 2 if options.quick and options.device == "cpu" else 1  # toy figures may disturb each other
    if unknown := set(options.subjects) - set(PARTS):
        parser.error(f"unknown subjects {sorted(unknown)}: choose of {', '.join(PARTS)}")
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


def run(subject: str, options: argparse.Namespace, folder: Path) -> Outcome:
    """One subject in a process of its own; alone, what it prints is seen as it comes."""
    part = PARTS[subject]
    if options.device not in part.devices:
        return Outcome(f"not on {options.device}")
    if part.takes_data and options.data is None:
        return Outcome("skipped: wants --data")
    if part.wants and importlib.util.find_spec(part.wants) is None:
        return Outcome(f"skipped: {part.wants} is not installed")
    arguments = ["--device", options.device] if part.takes_device else []
    arguments += ["--data", str(options.data.resolve())] if part.takes_data else []
    arguments += ["--quick"] if options.quick and subject != "gpu_check" else part.arguments
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
    return Outcome(result, seconds, json.loads(path.read_text())[subject] if path.exists() else None)


if __name__ == "__main__":
    sys.exit(main())
