"""``cpt demo``: contrastive post-training in miniature (arXiv 2310.02263), from nothing, on a CPU, with no network.

Three teachers of different strength answer short exercises, and make faults. A small Llama is pre-trained on the
answers of all three and tuned on the strong one's. From there the arms go on, each for as many steps: more of the same
(SFT), or pairs whose chosen answer is the stronger teacher's (SLiC and DPO; easy pairs, hard ones, or from one to the
other). Then a judge, which training never sees, compares what they answer to new exercises with the medium teacher's.

Read on in ``world``, ``teachers`` and ``judge``; then ``arms`` and ``experiment``.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import datasets
import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ..errors import UserError
from . import report
from .arms import ARMS
from .experiment import FULL, QUICK, Experiment, SeedResult, Size
from .findings import find


def main(argv: Sequence[str], prog: str = "cpt demo") -> None:
    """Run the experiment, print the table and what follows from it, and write the report.

    Raises:
        UserError: the folder cannot be written to.
    """
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n\n")[0].replace("``", ""))
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder to write to [%(default)s]")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED", help="one run each [0]")
    parser.add_argument("--quick", action="store_true", help="run through all of it, too short to learn much")
    options = parser.parse_args(argv)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {options.output} cannot be written to ({error.strerror})") from error
    torch.set_num_threads(1)  # for matrices this small more threads gain little, and lose much on a busy machine
    logging.getLogger("cpt_kernels").setLevel(logging.ERROR)  # of data made here there is nothing to report
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    console = Console(soft_wrap=True, highlight=False)
    size = QUICK if options.quick else FULL
    started = time.perf_counter()
    results = run(options.seeds, options.arms, size, options.output, console)
    seconds = time.perf_counter() - started
    findings = find(results)
    report.write(findings, results, size, seconds, options.output, " ".join([prog, *argv]))
    console.print(report.make_table(findings))
    for sentence in findings.sentences():
        console.print(sentence)
    if options.quick:
        console.print("All this was too short to learn the exercises, and shows only that everything runs.")
    console.print(f"{seconds:.0f} s. Curves, responses side by side, and what this does not show: ", end="")
    console.print(options.output / "report.html")


def run(seeds: Sequence[int], arms: Sequence[str], size: Size, output: Path, console: Console) -> list[SeedResult]:
    """Run every seed, with one bar for all of it."""
    seeds, arms = list(dict.fromkeys(seeds)), list(dict.fromkeys(arms))
    columns = (TextColumn("{task.description:32}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("", total=size.work(arms) * len(seeds))

        def run_one(seed: int) -> SeedResult:
            def advance(title: str, done: int) -> None:
                description = f"seed {seed}: {title}"
                if not console.is_terminal and description != progress.tasks[bar].description:
                    console.print(description)  # where no bar is drawn
                progress.update(bar, advance=done, description=description)

            return Experiment(seed, size, output / f"seed-{seed}", advance).run(arms)

        return [run_one(seed) for seed in seeds]
