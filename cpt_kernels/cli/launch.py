"""``cpt-train`` on several processes: splits off the options of ``accelerate launch``, and launches.

``cpt-train --config run.yaml --num_processes 8 --accelerate_config fsdp2`` runs ``accelerate launch`` with the file
``accelerate_configs/fsdp2.yaml``. All its other options (``--num_machines``, ``--main_process_ip``, ...) are passed on
from flags or from the run's file. An option that ``cpt-train`` has under the same name is not passed on.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..errors import UserError, user_error

CONFIGS = {path.stem: path for path in sorted(Path(__file__).with_name("accelerate_configs").glob("*.yaml"))}
_LAUNCHED = "CPT_TRAIN_LAUNCHED"  # an environment variable of the processes that were launched
# accelerate's defaults. Unless they are given, or accelerate was configured, it lists them in a warning.
_DEFAULTS = {"num_machines": "1", "mixed_precision": "no", "dynamo_backend": "no"}
_NOT_PASSED_ON = {"help", "module", "no_python", "training_script", "training_script_args", "env", "vm"}


def launch_options(own: Collection[str]) -> dict[str, bool]:
    """Returns the options of ``accelerate launch`` that are not among ``own``, and whether each takes a value."""
    from accelerate.commands.launch import launch_command_parser

    actions = launch_command_parser()._actions
    theirs = {a.dest: a.nargs != 0 for a in actions if a.dest not in own and a.dest not in _NOT_PASSED_ON}
    return {"accelerate_config": True, **theirs}


def split(argv: Sequence[str], takes_value: Mapping[str, bool]) -> tuple[dict[str, str | None], list[str]]:
    """Splits arguments into options of ``accelerate launch`` (``None`` if one takes no value) and all others.

    Args:
        takes_value: the options of ``accelerate launch``, as `launch_options` returns them.
    """
    options: dict[str, str | None] = {}
    rest = []
    tokens = iter(argv)
    for token in tokens:
        name, given, value = token.removeprefix("--").partition("=")
        name = name.replace("-", "_")
        if not token.startswith("--") or name not in takes_value:
            rest.append(token)
        elif given or not takes_value[name]:
            options[name] = value or None
        elif (following := next(tokens, None)) is not None:
            options[name] = following
        else:
            raise UserError(f"--{name}: expected a value")
    return options, rest


def of_file(values: Mapping[str, Any], takes_value: Mapping[str, bool]) -> dict[str, str | None]:
    """Selects the options of ``accelerate launch`` from a run's file."""
    found = {name: values[name] for name in values if name in takes_value and values[name] not in (None, False)}
    return {name: str(value) if takes_value[name] else None for name, value in found.items()}


def is_launched() -> bool:
    """Returns whether a launcher, ours or torchrun, has started this process."""
    return _LAUNCHED in os.environ or "LOCAL_RANK" in os.environ


def _raise_usage(message: str) -> NoReturn:
    raise UserError(f"accelerate launch: {message}")


def launch(options: Mapping[str, str | None], argv: Sequence[str], use_cpu: bool = False) -> None:
    """Runs ``cpt-train`` with ``argv`` under ``accelerate launch``, and returns when all its processes have ended.

    Raises:
        UserError: an unknown ``accelerate_config``, or a file that accelerate cannot use.
        SystemExit: accelerate refuses an option, or a process failed; either has printed why.
    """
    import torch
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command, launch_command_parser

    options = dict(options)
    for name in ("num_processes", "num_machines"):
        text = options.get(name, "1")
        if text is None or not text.isdecimal() or int(text) < 1:
            raise UserError(f"--{name}: {text!r} is not a whole number above 0")
    if (name := options.pop("accelerate_config", None)) is not None:
        if name not in CONFIGS and not Path(name).is_file():
            raise UserError(f"accelerate_config={name} is no file: give a file, or one of {', '.join(CONFIGS)}")
        options["config_file"] = str(CONFIGS.get(name, name))
        if name in CONFIGS and name != "single_gpu":
            options.setdefault("num_processes", str(max(torch.cuda.device_count(), 1)))
    elif "config_file" not in options and not os.path.isfile(default_config_file):
        options = _DEFAULTS | options
    if use_cpu and options.get("num_processes") not in (None, "1"):
        options["multi_gpu"] = None  # selects torchrun: on a CPU accelerate itself starts one process only
    flags = [part for name, value in options.items() for part in (f"--{name}", value) if part is not None]
    parser = launch_command_parser()
    parser.error = _raise_usage  # its own prints the usage of accelerate launch, 60 lines
    arguments = parser.parse_args([*flags, "-m", "cpt_kernels.cli", "train", *argv])
    os.environ |= {_LAUNCHED: "1"} | ({"ACCELERATE_USE_CPU": "true"} if use_cpu else {})
    with user_error("accelerate launch"):
        launch_command(arguments)
