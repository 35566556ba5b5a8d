"""``cpt-train`` on several processes: which options are for ``accelerate launch``, and the launch itself.

``cpt-train --config run.yaml --num_processes 8 --accelerate_config fsdp2`` is ``accelerate launch`` with the file
``accelerate_configs/fsdp2.yaml``. Any other option of it (``--num_machines``, ``--main_process_ip``, ...) is passed on,
from flags or from the run's file; an option that ``cpt-train`` has itself is its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from accelerate.commands.config.config_args import default_config_file
from accelerate.commands.launch import launch_command, launch_command_parser

from ..errors import UserError
from .options import defaults

CONFIGS = {path.stem: path for path in sorted(Path(__file__).with_name("accelerate_configs").glob("*.yaml"))}
_LAUNCHED = "CPT_TRAIN_LAUNCHED"  # set for the processes that were launched
# accelerate's own defaults, which it would list in a warning where it was not configured.
_UNSAID = {"num_machines": "1", "mixed_precision": "no", "dynamo_backend": "no"}
_NOT_PASSED_ON = {"help", "module", "no_python", "training_script", "training_script_args", "env", "vm"}


@cache
def option_names() -> dict[str, bool]:
    """Options of ``accelerate launch`` that the trainer has none of, and whether each takes a value."""
    actions = launch_command_parser()._actions
    theirs = {a.dest: a.nargs != 0 for a in actions if a.dest not in defaults() and a.dest not in _NOT_PASSED_ON}
    return {"accelerate_config": True, **theirs}


def split(argv: Sequence[str]) -> tuple[dict[str, str | None], list[str]]:
    """Options for ``accelerate launch`` (``None``: it takes no value), and the other arguments.

    Raises:
        UserError: an option without its value.
    """
    options: dict[str, str | None] = {}
    rest = []
    tokens = iter(argv)
    for token in tokens:
        name, given, value = token.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not token.startswith("--") or name not in option_names():
            rest.append(token)
        elif given or not option_names()[name]:
            options[name] = value or None
        elif (value := next(tokens, None)) is not None:
            options[name] = value
        else:
            raise UserError(f"--{name}: expected a value")
    return options, rest


def of_file(values: Mapping[str, Any]) -> dict[str, str | None]:
    """Options for ``accelerate launch`` among those of a run's file."""
    takes_value = option_names()
    found = {name: values[name] for name in values if name in takes_value and values[name] not in (None, False)}
    return {name: str(value) if takes_value[name] else None for name, value in found.items()}


def is_launched() -> bool:
    """Whether a launcher, ours or torchrun, has started this process."""
    return _LAUNCHED in os.environ or "LOCAL_RANK" in os.environ


def launch(options: Mapping[str, str | None], argv: Sequence[str], use_cpu: bool = False) -> None:
    """Run ``cpt-train`` with ``argv`` under ``accelerate launch``; returns when all its processes are done.

    Raises:
        UserError: an unknown ``accelerate_config``.
        SystemExit: accelerate refuses an option, or a process failed; either has said why.
    """
    options = dict(options)
    if (name := options.pop("accelerate_config", None)) is not None:
        if name not in CONFIGS and not Path(name).is_file():
            raise UserError(f"accelerate_config={name} is no file; choose one, or {', '.join(CONFIGS)}")
        options["config_file"] = str(CONFIGS.get(name, name))
        if name in CONFIGS and name != "single_gpu":
            options.setdefault("num_processes", str(max(torch.cuda.device_count(), 1)))
    elif "config_file" not in options and not os.path.isfile(default_config_file):
        options = _UNSAID | options
    if use_cpu and options.get("num_processes") not in (None, "1"):
        options["multi_gpu"] = None  # torchrun, that is; accelerate itself starts but one process on a CPU
    flags = [part for name, value in options.items() for part in (f"--{name}", value) if part is not None]
    arguments = launch_command_parser().parse_args([*flags, "-m", "cpt_kernels.cli", "train", *argv])
    os.environ |= {_LAUNCHED: "1"} | ({"ACCELERATE_USE_CPU": "true"} if use_cpu else {})
    launch_command(arguments)
