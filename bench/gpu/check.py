"""Are the kernels correct on this GPU, and how fast are they?

    python -m bench gpu_check [--minutes 9] [--json OUT]
    python -m bench.gpu.carry --python python3.12     prepare a machine without package index, see there

Runs all tests, comparisons and benchmarks that need a GPU, the most important ones first. Each part runs in its own
process with a share of the time; time that it leaves goes to the others. If a part fails, hangs or breaks the device,
that is recorded, its rows so far are kept, and the next part runs. What there was no time for is reported as skipped.
Prints the rows of each part when it ends, and at the end one line of JSON. With --json, the file is written after each
part, and OUT.rows gets each row as it is measured. The exit code is 1 if anything failed, 2 without a GPU.

``--dry-run`` runs all parts with tiny shapes on a CPU, in this process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ..timing import add_output_options, environment, finish, gpu_name, write_result
from .meter import Context, Row
from .parts import run_limited

NO_GPU = 2


@dataclass(frozen=True)
class Part:
    """A part of the check: a function from a :class:`Context` to rows, and its seconds out of nine minutes."""

    module: str
    function: str
    seconds: float

    def rows(self, context: Context) -> Iterator[Row]:
        """Runs the part and yields its rows."""
        return getattr(import_module(f"bench.gpu.{self.module}"), self.function)(context)


# In the order in which they run. The extension takes its time only if it must be compiled.
PARTS = {
    "environment": Part("parts", "environment", 12),
    "extension": Part("parts", "extension", 20),
    "tests": Part("parts", "tests", 70),
    "sanitizers": Part("parts", "sanitizers", 50),
    "kernels": Part("kernels", "rows", 18),
    "head": Part("head", "rows", 75),
    "attention": Part("attention", "comparisons", 30),
    "attention speed": Part("attention", "benchmarks", 25),
    "steps": Part("steps", "full", 110),
    "LoRA steps": Part("steps", "lora", 110),
    "training": Part("parts", "training", 20),
}


@dataclass
class Outcome:
    """The rows of a part and its duration."""

    rows: list[Row]
    seconds: float

    @property
    def failed(self) -> bool:
        """True if any row failed."""
        return any("failed" in row for row in self.rows)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m bench gpu_check", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=9.0, help="time for all parts together")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"comma-separated list of: {', '.join(PARTS)}")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on this machine's CPU")
    parser.add_argument("--worker", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    add_output_options(parser)
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",")
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown parts {sorted(unknown)}: choose from {', '.join(PARTS)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if options.worker:
        return work(options.worker, options.minutes * 60, options.rows)
    if not options.dry_run and not torch.cuda.is_available():
        print(f"gpu_check needs a CUDA device, and torch {torch.__version__} finds none: --dry-run runs on a CPU")
        return NO_GPU
    gpu_name()  # while it can be asked: a part may break the device
    outcomes = check(options)
    failed = [name for name, outcome in outcomes.items() if outcome.failed]
    print(totals(outcomes))
    summary = {"ok": not failed, "failed": failed, "dry_run": options.dry_run, **headline(outcomes)}
    finish("gpu_check", as_json(outcomes), summary, options)
    return 1 if failed else 0


def check(options: argparse.Namespace) -> dict[str, Outcome]:
    """Runs all parts, one after another. A part gets its share of the time that earlier parts left."""
    deadline = time.monotonic() + options.minutes * 60
    waiting = sum(PARTS[name].seconds for name in options.parts)
    outcomes: dict[str, Outcome] = {}
    rows_file = options.json and options.json.with_name(f"{options.json.name}.rows")
    for name in options.parts:
        left = deadline - time.monotonic()
        limit = left * PARTS[name].seconds / waiting
        waiting -= PARTS[name].seconds
        started = time.monotonic()
        print(f"# {name}: up to {limit:.0f} s", file=sys.stderr, flush=True)
        rows = here(name, limit) if options.dry_run else apart(name, limit, rows_file=rows_file)
        outcomes[name] = Outcome(rows, time.monotonic() - started)
        print(report({name: outcomes[name]}), flush=True)
        if options.json:  # written after each part, so that a later crash loses nothing
            write_result("gpu_check", {**environment(), **as_json(outcomes)}, options.json)
    return outcomes


# --- Running a part ---


def here(name: str, seconds: float) -> list[Row]:
    """Runs a part in this process, with tiny shapes on the CPU."""
    context = Context("cpu", True, time.monotonic() + seconds)
    return [json.loads(json.dumps(row)) for row in guarded(name, context)]


def command(name: str, seconds: float, rows: Path) -> list[str]:
    """Returns a worker's command line. It gets less than the limit of its process, because it needs time to start."""
    minutes = (0.92 * seconds - 4) / 60
    return [sys.executable, "-m", "bench.gpu.check", "--worker", name, "--minutes", str(minutes), "--rows", str(rows)]


def apart(
    name: str,
    seconds: float,
    command: Callable[[str, float, Path], list[str]] = command,
    rows_file: Path | None = None,
) -> list[Row]:
    """Runs a part in its own process, which is killed after ``seconds`` with all processes that it started.

    The process appends its rows to ``rows_file``, by default a temporary file.
    """
    with contextlib.ExitStack() as stack:
        path = rows_file or Path(stack.enter_context(tempfile.TemporaryDirectory()), "rows")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
        start = path.stat().st_size
        code, output = run_limited(command(name, seconds, path.resolve()), seconds)
        # The last line may be torn if the process was killed.
        *lines, torn = path.read_bytes()[start:].decode(errors="replace").split("\n")
        if torn and rows_file:
            with path.open("a") as file:
                file.write("\n")
    rows = [json.loads(line) for line in lines]
    if code is None:
        rows.append({"what": name, "failed": f"killed after {seconds:.0f} s; its last output:\n{output[-4000:]}"})
    elif code != 0 and not any("failed" in row for row in rows):
        rows.append({"what": name, "failed": f"exit code {code}; its last output:\n{output[-4000:]}"})
    return rows


def work(name: str, seconds: float, path: Path) -> int:
    """Runs a part in a worker process; each row is appended to ``path`` as soon as it is measured."""
    failed = False
    with path.open("a") as lines:
        for row in guarded(name, Context("cuda", False, time.monotonic() + seconds)):
            failed |= "failed" in row
            lines.write(json.dumps(row) + "\n")
            lines.flush()
    return int(failed)


def guarded(name: str, context: Context) -> Iterator[Row]:
    """Yields the rows of a part. Any exception outside of a row becomes a failed row, which makes the exit code 1.

    Otherwise one broken part would take the results of all others with it.
    """
    try:
        yield from PARTS[name].rows(context)
    except Exception:
        yield {"what": name, "failed": traceback.format_exc()}


# --- Report ---


def as_json(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """Returns the outcomes as they are written to a result file."""
    return {"parts": {name: {"seconds": round(o.seconds, 1), "rows": o.rows} for name, o in outcomes.items()}}


def headline(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """Returns milliseconds and shares of every timed row, by name."""
    rows = [row for outcome in outcomes.values() for row in outcome.rows]
    keys = ("ms", "floor_ms", "copy_share", "kernel_us", "share_of_bound", "floor_share", "busy", "peak_mib")
    found = {row["what"]: {key: round(row[key], 4) for key in keys if row.get(key) is not None} for row in rows}
    return {"measured": {what: numbers for what, numbers in found.items() if numbers}}


def report(outcomes: dict[str, Outcome]) -> str:
    """Formats one line per row, each followed by its profile if it has one."""
    rows = [(name, row) for name, outcome in outcomes.items() for row in outcome.rows]
    widths = [max((len(cell) for cell in column), default=0) for column in zip(*((n, row["what"]) for n, row in rows))]
    lines = []
    for name, row in rows:
        lines.append(f"{name:<{widths[0]}}  {row['what']:<{widths[1]}}  {result(row)}")
        lines += [f"    {line}" for line in row.get("profile", ())]
    return "\n".join(lines)


def totals(outcomes: dict[str, Outcome]) -> str:
    """Formats the rows that failed or were skipped once more, their counts, and the seconds of every part."""
    lines, counts = [], {}
    for kind in ("failed", "skipped"):
        chosen = {name: Outcome([row for row in o.rows if kind in row], o.seconds) for name, o in outcomes.items()}
        counts[kind] = sum(len(outcome.rows) for outcome in chosen.values())
        lines += [report(chosen)] if counts[kind] else []
    every = sum(len(outcome.rows) for outcome in outcomes.values())
    times = ", ".join(f"{name} {outcome.seconds:.0f} s" for name, outcome in outcomes.items())
    return "\n".join(["", *lines, f"{every} rows, {counts['failed']} failed, {counts['skipped']} skipped; {times}"])


def result(row: Row) -> str:
    """Returns a row's result as one line."""
    if "failed" in row:
        return f"FAILED: {row['failed'].strip().splitlines()[-1]}"
    return f"skipped: {row['skipped']}" if "skipped" in row else row.get("result", "ok")


if __name__ == "__main__":
    sys.exit(main())
