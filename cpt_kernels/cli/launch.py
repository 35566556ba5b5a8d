"""``cpt-train`` on several processes: splits off the options of ``accelerate launch``, and launches.

``cpt-train --config run.yaml --num_processes 8 --accelerate_config fsdp2`` runs ``accelerate launch`` with the file
``accelerate_configs/fsdp2.yaml``. All its other options (``--num_machines``, ``--main_process_ip``, ...) are passed on
from flags or from the run's file. An option that ``cpt-train`` has under the same name is not passed on.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ..errors import UserError, user_error

if TYPE_CHECKING:
    from ..planning.engines import Processes

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
    from accelerate.commands.launch import launch_command

    arguments = _parsed(options, ["-m", "cpt_kernels.cli", "train", *argv], use_cpu)
    os.environ |= {_LAUNCHED: "1"} | ({"ACCELERATE_USE_CPU": "true"} if use_cpu else {})
    with user_error("accelerate launch"):
        launch_command(arguments)


def _parsed(options: Mapping[str, str | None], script: Sequence[str], use_cpu: bool = False) -> argparse.Namespace:
    """Returns the arguments of ``accelerate launch`` that run ``script``."""
    import torch
    from accelerate.commands.config.config_args import default_config_file
    from accelerate.commands.launch import launch_command_parser

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
    return parser.parse_args([*flags, *script])


def planned_processes(options: Mapping[str, str | None], given: dict[str, Any]) -> Processes:
    """Returns the processes that ``options`` of accelerate launch and the run's own engine ask for.

    The options of the engine, and ``sp_size``, are taken out of ``given``, because a plan runs on one process.

    Raises:
        UserError: accelerate refuses an option or a file.
    """
    from accelerate.commands.launch import _validate_launch_command

    from ..planning.engines import Processes

    fsdp, zero, group = (given.pop(name, None) for name in ("fsdp", "deepspeed", "sp_size"))
    own = given.pop("fsdp_config", None) if fsdp else None
    parsed = _parsed(options, ["-"])
    with user_error("accelerate launch"):
        launched = vars(_validate_launch_command(parsed)[0]) if options else vars(parsed) | {"num_processes": 1}

    # Sizes of groups, by accelerate's parallelism_config too.
    sizes = [int(launched[f"parallelism_config_{name}_size"]) for name in ("sp", "dp_replicate")]
    groups = {size for size in (group, sizes[0]) if size not in (None, 1)} or {1}
    if len(groups) > 1:
        raise UserError(f"sp_size={group} contradicts sp_size={sizes[0]} of parallelism_config")
    common = (int(launched["num_processes"]), groups.pop(), sizes[1])

    # The engine. What the run asks for by itself counts before the launcher's.
    if common[0] > 1 and (fsdp or (launched["use_fsdp"] and not zero)):
        config = own if isinstance(own, dict) else _engine_file(own)
        offloads = {str(each).lower() for each in (launched["fsdp_offload_params"], config.get("cpu_offload"))}
        keeps = {
            str(each).lower() for each in (launched["fsdp_reshard_after_forward"], config.get("reshard_after_forward"))
        }
        return Processes(*common, "FSDP2", *2 * ["true" in offloads], keeps_layers="false" in keeps)
    if fsdp or not (zero or launched["use_deepspeed"]):
        return Processes(*common)
    parts = ("param", "optimizer")
    if file := zero or launched["deepspeed_config_file"]:
        content = (file if isinstance(file, dict) else _engine_file(file)).get("zero_optimization", {})
        stage, devices = (
            content.get("stage", 0),
            [(content.get(f"offload_{part}") or {}).get("device") for part in parts],
        )
    else:
        stage, devices = launched["zero_stage"] or 2, [launched[f"offload_{part}_device"] for part in parts]
    return Processes(
        *common, f"ZeRO-{stage}" if int(stage) else "DDP", *(device in ("cpu", "nvme") for device in devices)
    )


def _engine_file(file: str | None) -> dict[str, Any]:
    with user_error(str(file)):
        return {} if file is None else json.loads(Path(file).read_text())
