"""``cpt-train`` on several processes: splits off the options of ``accelerate launch``, and launches.

``cpt-train --config run.yaml --num_processes 8 --accelerate_config fsdp2`` runs ``accelerate launch`` with the file
``accelerate_configs/fsdp2.yaml``. All its other options (``--num_machines``, ``--main_process_ip``, ...) are passed on
from flags or from the run's file. An option that ``cpt-train`` has under the same name is not passed on.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

import yaml

from ..errors import UserError, user_error

if TYPE_CHECKING:
    from ..planning.engines import Processes

CONFIGS = {path.stem: path for path in sorted(Path(__file__).with_name("accelerate_configs").glob("*.yaml"))}
_LAUNCHED = "CPT_TRAIN_LAUNCHED"  # an environment variable of the processes that were launched
# accelerate's defaults. Unless they are given, or accelerate was configured, it lists them in a warning.
_DEFAULTS = {"num_machines": "1", "mixed_precision": "no", "dynamo_backend": "no"}
_NOT_PASSED_ON = {"help", "module", "no_python", "training_script", "training_script_args", "env", "vm"}
# Keys of DeepSpeed's configuration -> options that must have the same value.
_SAME = {
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
}


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
    for counted in ("num_processes", "num_machines"):
        text = options.get(counted, "1")
        if text is None or not text.isdecimal() or int(text) < 1:
            raise UserError(f"--{counted}: {text!r} is not a whole number above 0")
    if (name := options.pop("accelerate_config", None)) is not None:
        if name not in CONFIGS and not Path(name).is_file():
            raise UserError(f"accelerate_config={name} is no file: give a file, or one of {', '.join(CONFIGS)}")
        options["config_file"] = str(CONFIGS.get(name, name))
        if name in CONFIGS and name != "single_gpu":
            options.setdefault("num_processes", str(max(torch.cuda.device_count(), 1)))
    if "config_file" in options:
        _mapping(options["config_file"], yaml.safe_load)  # accelerate raises errors that do not name the file
    elif not os.path.isfile(default_config_file):
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

    from ..model.sharding import check_fsdp
    from ..planning.engines import Processes

    fsdp, zero, group = (given.pop(name, None) for name in ("fsdp", "deepspeed", "sp_size"))
    own = given.pop("fsdp_config", None) if fsdp else None
    if fsdp and zero:
        raise UserError("fsdp and deepspeed exclude each other: leave one of them out")
    parsed = _parsed(options, ["-"])
    with user_error("accelerate launch"):
        launched = vars(_validate_launch_command(parsed)[0]) if options else vars(parsed) | {"num_processes": 1}
    count, machines = int(launched["num_processes"]), int(launched["num_machines"] or 1)
    if count < 1:
        raise UserError("num_processes is missing, and this machine has no GPU to count")
    if count % machines:
        raise UserError(f"num_processes={count} counts those of all machines: num_machines={machines} must divide it")
    if launched["mixed_precision"] == "bf16" and not given.get("fp16"):
        given.setdefault("bf16", True)

    # Sizes of groups, by accelerate's parallelism_config too.
    reads_sizes = launched["use_parallelism_config"]
    sizes = [int(launched[f"parallelism_config_{name}_size"]) if reads_sizes else 1 for name in ("sp", "dp_replicate")]
    groups = {size for size in (group, sizes[0]) if size not in (None, 1)} or {1}
    if len(groups) > 1:
        raise UserError(f"sp_size={group} contradicts sp_size={sizes[0]} of parallelism_config")
    common = (count, groups.pop(), sizes[1])

    # The engine. What the run asks for by itself counts before the launcher's.
    if count > 1 and (fsdp or (launched["use_fsdp"] and not zero)):
        config = _launched_fsdp(launched) if launched["use_fsdp"] else {}
        if fsdp:
            config |= {"version": 2, "reshard_after_forward": True} | _own_fsdp(fsdp, own)
        check_fsdp(SimpleNamespace(fsdp=True, fsdp_config=config))  # type: ignore[arg-type]
        offloads = str(config.get("cpu_offload")).lower() == "true"
        keeps = str(config["reshard_after_forward"]).lower() == "false"
        return Processes(*common, "FSDP2", offloads, offloads, keeps_layers=keeps)
    if fsdp or not (zero or launched["use_deepspeed"]):
        return Processes(*common)
    return Processes(*common, *_zero_engine(launched, zero, given))


def _zero_engine(launched: Mapping[str, Any], own: Any, given: Mapping[str, Any]) -> tuple[str, bool, bool]:
    """Returns the name of DeepSpeed's engine, and whether its weights and its optimizer wait in the host's memory."""
    from ..config import ContrastiveConfig

    parts = ("param", "optimizer")
    if file := own or launched["deepspeed_config_file"]:
        content = file if isinstance(file, dict) else _mapping(file)
        for key, option in _SAME.items():
            mine = given.get(option, ContrastiveConfig.__dataclass_fields__[option].default)
            if content.get(key, "auto") not in ("auto", mine):
                raise UserError(f"deepspeed: {key}={content[key]} contradicts {option}={mine}: set it to auto")
        zero = content.get("zero_optimization", {})
        offloaded = [zero.get(f"offload_{part}") or {} for part in parts] if isinstance(zero, dict) else []
        if not offloaded or not all(isinstance(each, dict) for each in offloaded):
            raise UserError("deepspeed: zero_optimization, offload_param and offload_optimizer must be JSON objects")
        stage, devices = zero.get("stage", 0), [each.get("device") for each in offloaded]
    else:
        stage, devices = launched["zero_stage"] or 2, [launched[f"offload_{part}_device"] for part in parts]
    if str(stage) not in ("0", "1", "2", "3"):
        raise UserError(f"deepspeed: stage={stage!r} of zero_optimization must be 0, 1, 2 or 3")
    weights, optimizer = (device in ("cpu", "nvme") for device in devices)
    return "DDP" if str(stage) == "0" else f"ZeRO-{stage}", weights, optimizer


def _launched_fsdp(launched: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the launcher's options of FSDP under their names in ``fsdp_config``."""
    names = ("version", "reshard_after_forward", "auto_wrap_policy")
    return {name: launched[f"fsdp_{name}"] for name in names} | {"cpu_offload": launched["fsdp_offload_params"]}


def _own_fsdp(fsdp: str | bool, config: dict[str, Any] | str | None) -> dict[str, Any]:
    """Returns the run's ``fsdp_config`` with the words of ``fsdp``, read as transformers reads them."""
    words = str(fsdp).lower().split()
    if unknown := sorted({*words} - {"true", "full_shard", "shard_grad_op", "offload", "auto_wrap"}):
        raise UserError(f"fsdp={unknown[0]} is not supported: set fsdp=true, and its options in fsdp_config")
    found = {"reshard_after_forward": False} if "shard_grad_op" in words else {}
    given = config if isinstance(config, dict) else _mapping(config)
    found |= {name.removeprefix("fsdp_"): value for name, value in given.items()}
    return found | ({"cpu_offload": True} if "offload" in words else {})


def _mapping(file: str | None, read: Callable[[str], Any] = json.loads) -> dict[str, Any]:
    """Reads the options in a file of accelerate, DeepSpeed or FSDP; there are none without a file."""
    with user_error(str(file), (OSError, ValueError, yaml.YAMLError)):
        content = {} if file is None else read(Path(file).read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold names of options with their values")
    return content
