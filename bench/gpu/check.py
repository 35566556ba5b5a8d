"""Are the kernels correct on this GPU, and how fast are they?

    python -m bench gpu_check [--minutes 8] [--json OUT]

Runs all tests, comparisons and benchmarks that need a GPU. Each part runs in its own process with a share of the time.
If a part fails, hangs or breaks the device, that is recorded, its rows so far are kept, and the next part runs. Prints
a table and one line of JSON. The exit code is 1 if anything failed, 2 without a GPU. ``--dry-run`` runs all parts with
tiny shapes on a CPU, in this process.
"""

from __future__ import annotations

import argparse
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

from ..timing import add_output_options, finish, write_result
from .meter import Context, Row
from .parts import run_limited

NO_GPU = 2


@dataclass(frozen=True)
class Part:
    """A part of the check: a function from a :class:`Context` to rows, and its seconds out of eight minutes."""

    module: str
    function: str
    seconds: float

    def rows(self, context: Context) -> Iterator[Row]:
        """Runs the part and yields its rows."""
        return getattr(import_module(f"bench.gpu.{self.module}"), self.function)(context)


# Correctness comes before speed.
PARTS = {
    "environment": Part("parts", "environment", 20),
    "attention": Part("attention", "comparisons", 60),
    "tests": Part("parts", "tests", 140),
    "head speed": Part("head", "rows", 140),
    "attention speed": Part("attention", "benchmarks", 70),
    "training": Part("parts", "training", 50),
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
    parser.add_argument("--minutes", type=float, default=8.0, help="time for all parts together")
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
    outcomes = check(options)
    failed = [name for name, outcome in outcomes.items() if outcome.failed]
    print(report(outcomes))
    summary = {"ok": not failed, "failed": failed, "dry_run": options.dry_run, **headline(outcomes)}
    finish("gpu_check", as_json(outcomes), summary, options)
    return 1 if failed else 0


def check(options: argparse.Namespace) -> dict[str, Outcome]:
    """Runs all parts, one after another. A part gets its share of the time that earlier parts left."""
    deadline = time.monotonic() + options.minutes * 60
    waiting = sum(PARTS[name].seconds for name in options.parts)
    outcomes: dict[str, Outcome] = {}
    for name in options.parts:
        left = deadline - time.monotonic()
        limit = left * PARTS[name].seconds / waiting
        waiting -= PARTS[name].seconds
        started = time.monotonic()
        print(f"# {name}: up to {limit:.0f} s", file=sys.stderr, flush=True)
        rows = here(name, limit) if options.dry_run else apart(name, limit)
        outcomes[name] = Outcome(rows, time.monotonic() - started)
        if options.json:  # written after each part, so that a later crash loses nothing
            write_result("gpu_check", as_json(outcomes), options.json)
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


def apart(name: str, seconds: float, command: Callable[[str, float, Path], list[str]] = command) -> list[Row]:
    """Runs a part in its own process, which is killed after ``seconds`` with all processes that it started."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "rows")
        path.touch()
        code, output = run_limited(command(name, seconds, path), seconds)
        rows = [json.loads(line) for line in path.read_text().splitlines()]
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
    """Yields the rows of a part. An exception outside of a row becomes a failed row."""
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
    keys = ("ms", "floor_ms", "copy_share", "kernel_us", "share_of_bound")
    found = {row["what"]: {key: round(row[key], 4) for key in keys if key in row} for row in rows}
    return {"measured": {what: numbers for what, numbers in found.items() if numbers}}


def report(outcomes: dict[str, Outcome]) -> str:
    """Formats one line per row, and the counts of failed and skipped rows."""
    cells = [(name, row["what"], result(row)) for name, outcome in outcomes.items() for row in outcome.rows]
    widths = [max(map(len, column)) for column in list(zip(*cells))[:2]]
    lines = [f"{part:<{widths[0]}}  {what:<{widths[1]}}  {text}" for part, what, text in cells]
    times = ", ".join(f"{name} {outcome.seconds:.0f} s" for name, outcome in outcomes.items())
    counts = {kind: sum(kind in row for o in outcomes.values() for row in o.rows) for kind in ("failed", "skipped")}
    return "\n".join(
        [*lines, "", f"{len(cells)} rows, {counts['failed']} failed, {counts['skipped']} skipped; {times}"]
    )


def result(row: Row) -> str:
    """Returns a row's result as one line."""
    if "failed" in row:
        return f"FAILED: {row['failed'].strip().splitlines()[-1]}"
    return f"skipped: {row['skipped']}" if "skipped" in row else row.get("result", "ok")


if __name__ == "__main__":
    sys.exit(main())
