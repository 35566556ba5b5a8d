"""``cpt-train``: reads the options, then trains in this process or on the processes that it launches.

``--help`` and mistakes in single options end before anything imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from . import launch
from .option_table import option_table
from .parsing import environment, make_options, read_file, read_options


def main(argv: Sequence[str], prog: str = "cpt-train") -> None:
    """Parses the options, trains, saves and prints the results; on several processes if the options ask for it."""
    takes_value = option_table().launch
    flags, argv = launch.split(argv, takes_value)
    file = read_file(argv)
    os.environ.update(environment(file))  # before torch is imported, which reads some variables then
    given = read_options(argv, prog)
    processes = launch.of_file(file, takes_value) | flags
    if processes and not launch.is_launched():
        launch.launch(processes, argv, use_cpu=given.get("use_cpu", False))
        return
    options = make_options(given)
    # The modules that run it import torch and transformers.
    if options.script.check:
        from .check import check_run

        check_run(options)
    else:
        from .run import train

        train(options)
