"""``cpt plan``: what a run of ``cpt-train`` will do, without its weights and before anything is trained.

  cpt plan MODEL DATA [any option of cpt-train] [--json FILE] [--picture FILE]
  cpt plan --config run.yaml

Rows, pairs, steps and tokens are counted through the data preparation and the loader of training, so they are exact.
They assume packed rows unless packing=false, or the architecture is known to need padded ones: only weights prove that
a model runs packed rows.

Seconds are predicted from ten seconds of the run's own micro-batches on this machine, with random weights. TRL's are of
an imitation of its padded step, so that TRL need not be installed.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError
from ..files import write_text
from . import launch
from .option_table import option_table
from .parsing import Parser, make_options, read_file, read_options


def main(argv: Sequence[str], prog: str = "cpt plan") -> None:
    """Parses the options, counts the run and prints the plan."""
    own, options_argv = _plan_parser(prog).parse_known_args(with_names(argv))
    picture = None if own.picture is None else Path(own.picture)
    if picture is not None and picture.suffix not in (".png", ".svg"):
        raise UserError(f"--picture {picture}: its name must end in .png or .svg")
    if own.device_gib is not None and not 0 < own.device_gib < math.inf:
        raise UserError(f"--device_gib {own.device_gib}: must be a positive number of GiB")
    table = option_table()
    flags, rest = launch.split(options_argv, table.launch)
    flags = launch.of_file(read_file(rest), table.launch) | flags
    with tempfile.TemporaryDirectory(prefix="cpt-plan-") as folder:  # a trainer creates its output folder
        given = read_options([*rest, "--output_dir", folder], prog)
        processes = launch.planned_processes(flags, given)
        options = make_options(given)
        options.training.planned, options.training.sp_size = processes, processes.group
        options.training.check_sp_size()
        from .planned import show_plan  # imports torch and transformers

        plan = show_plan(options, picture, own.device_gib)
    if own.json is not None:
        write_text(Path(own.json), json.dumps(plan, indent=1) + "\n")


def with_names(argv: Sequence[str]) -> list[str]:
    """Gives the arguments MODEL and DATA in front of all options the names of these options."""
    count = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    if count > 2:
        raise UserError(f"unexpected argument {argv[2]!r}: expected MODEL and DATA, then options")
    names = ("--model_name_or_path", "--dataset_name")
    return [*(part for pair in zip(names, argv[:count]) for part in pair), *argv[count:]]


def _plan_parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        usage=f"{prog} [MODEL DATA] [--config run.yaml] [--option value ...] [--json FILE] [--picture FILE]",
        description=__doc__,
        epilog="All options of cpt-train are allowed; cpt-train --help lists them.",
    )
    parser.add_argument("--json", metavar="FILE", help="write the plan as JSON, too")
    parser.add_argument("--picture", metavar="FILE", help="draw lengths, micro-batches, memory, seconds: PNG, SVG")
    text = "memory of the GPU of each process, for a run on another machine; default what is free here"
    parser.add_argument("--device_gib", metavar="GIB", type=float, help=text)
    return parser
