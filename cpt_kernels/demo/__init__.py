"""``cpt demo``: contrastive post-training in miniature (arXiv 2310.02263), from scratch, on a CPU, without a network.

Three teachers of different strength answer short exercises and make mistakes. A small Llama is pre-trained on the
responses of all three and fine-tuned on those of the strong teacher. Every arm of the experiment starts from that model
and trains for the same number of steps: on more responses of the strong teacher (SFT), or on pairs whose chosen
response is the stronger teacher's (SLiC and DPO; easy pairs, hard pairs, or a curriculum over both). A judge that
training never uses then compares each arm's responses to new exercises with the medium teacher's.

``world``, ``teachers`` and ``judge`` define the task; ``arms`` and ``experiment`` train on it; ``findings`` and
``report`` present the results. ``quickstart`` writes the files of the README's quickstart.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..cli.parsing import Parser
from ..errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from .experiment import SeedResult, Size

# The keys of `arms.ARMS`, here as well because --help must not import transformers.
ARM_NAMES = ("sft", "slic-easy", "dpo-easy", "dpo-hard", "dpo-easy-to-hard", "dpo-hard-to-easy")


def main(argv: Sequence[str], prog: str = "cpt demo") -> None:
    """Runs the experiment, prints its table and findings, and writes the report; or writes the quickstart's files.

    Raises:
        UserError: an unknown option or arm, or a folder that cannot be written to.
    """
    parser = Parser(prog=prog, description=(__doc__ or "").split("\n\n")[0].replace("``", ""))
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to write to [runs/demo, runs/STUDY]")
    parser.add_argument(
        "--study",
        choices=["order"],
        help="instead: which pairs, in which order, against which reference? Takes an hour of one core, and continues"
        " in its folder when it is stopped",
    )
    parser.add_argument("--arms", nargs="+", choices=ARM_NAMES, metavar="ARM", help=", ".join(ARM_NAMES))
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="one run each [0; 0 to 9 with --study]")
    parser.add_argument("--quick", action="store_true", help="run every stage, too briefly to learn much")
    parser.add_argument(
        "--quickstart",
        type=Path,
        metavar="DIR",
        help="only write the files of the README's quickstart to DIR: 51 responses and a small random model",
    )
    options = parser.parse_args(argv)
    if options.study and (options.arms or options.quickstart):
        raise UserError(f"--{'arms' if options.arms else 'quickstart'} has no meaning with --study: leave it out")
    options.output = options.output or Path("runs", options.study or "demo")
    options.arms = options.arms or list(ARM_NAMES)
    options.seeds = options.seeds or list(range(10 if options.study else 1))
    for seed in options.seeds:
        if not 0 <= seed < 2**32:
            raise UserError(f"--seeds {seed}: must be at least 0 and below 2**32")
    if options.quickstart is not None:
        for name in ("responses.jsonl", "model"):
            if (options.quickstart / name).exists():
                raise UserError(
                    f"--quickstart {options.quickstart}: {name} is there already and would be overwritten; remove it,"
                    " or choose another folder"
                )

    import datasets
    import torch
    import transformers
    from rich.console import Console

    from . import report
    from .experiment import FULL, QUICK
    from .findings import find
    from .quickstart import write_quickstart

    transformers.utils.logging.disable_progress_bar()
    console = Console(soft_wrap=True, highlight=False)
    if options.quickstart is not None:
        with _writing("--quickstart", options.quickstart):
            write_quickstart(options.quickstart)
        console.print(f"written to {options.quickstart}: responses.jsonl and model", markup=False)
        return
    with _writing("--output", options.output):
        options.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # more threads gain little on matrices this small, and lose much on a busy machine
    logging.getLogger("cpt_kernels").setLevel(logging.ERROR)  # the demo makes its own data: its warnings help nobody
    datasets.disable_progress_bars()
    if options.study:
        run_order_study(options.seeds, options.quick, options.output, console)
        return
    size = QUICK if options.quick else FULL
    started = time.perf_counter()
    results = run_seeds(options.seeds, options.arms, size, options.output, console)
    seconds = time.perf_counter() - started
    findings = find(results)
    report.write_findings(findings, results, size, seconds, options.output, " ".join([prog, *argv]))
    console.print(report.make_table(findings))
    for sentence in findings.sentences():
        console.print(sentence)
    if options.quick:
        console.print("This run was too short to learn the exercises: it only shows that every stage runs.")
    console.print(f"{seconds:.0f} s. Curves, responses side by side, and the limits of this experiment: ", end="")
    console.print(options.output / "report.html")


def run_order_study(seeds: Sequence[int], quick: bool, output: Path, console: Console) -> None:
    """Runs what is missing of the study of the order of pairs, and reports on it after each block."""
    from ..cli.console import print_results
    from .order import FULL_ORDER, QUICK_ORDER, OrderStudy
    from .order_report import write_order_report

    study = OrderStudy(output, seeds, QUICK_ORDER if quick else FULL_ORDER, console.print)
    console.print(study.cost())
    for block in study.run():
        tables = write_order_report(output)
        console.print(f"complete: {block}")
    print_results(tables, [f"Tables, figures and a page: {output / 'report.html'}"])


@contextmanager
def _writing(option: str, folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"{option} {folder} cannot be written to ({error.strerror})") from error


def run_seeds(
    seeds: Sequence[int], arms: Sequence[str], size: Size, output: Path, console: Console
) -> list[SeedResult]:
    """Runs the experiment once per seed, with one progress bar for all seeds."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from .experiment import Experiment

    seeds, arms = list(dict.fromkeys(seeds)), list(dict.fromkeys(arms))
    columns = (TextColumn("{task.description:32}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("", total=size.work(arms) * len(seeds))

        def run_one(seed: int) -> SeedResult:
            def advance(title: str, done: int) -> None:
                description = f"seed {seed}: {title}"
                # Without a terminal no bar is drawn: print each stage once, when it starts.
                if not console.is_terminal and description != progress.tasks[bar].description:
                    console.print(description)
                progress.update(bar, advance=done, description=description)

            return Experiment(seed, size, output / f"seed-{seed}", advance).run(arms)

        return [run_one(seed) for seed in seeds]
