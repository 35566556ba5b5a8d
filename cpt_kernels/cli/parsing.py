"""How a YAML file and flags become :class:`Options`.

A value is converted by one function, :func:`convert`, wherever it was written, so both places accept the same and
complain alike. Every complaint is a ``ValueError`` that names the option.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import types
from collections.abc import Iterable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from ..config import REMOVED_OPTIONS
from ..errors import UserError
from . import launch
from .options import CLASSES, HELP, NAMES, NOT_OPTIONS, Options, check_together, defaults, groups, type_hints

_ALIASES = {"streaming": "dataset_streaming"}  # TRL's name beside `datasets`
_LONGEST_LIST = 12  # choices that an error message lists


def parse(argv: Sequence[str], prog: str = "cpt-train") -> Options:
    """Options from flags over those of the YAML file that ``--config`` names. ``--help`` prints and exits.

    Raises:
        UserError: an unknown option, a value of the wrong type, or options that do not go together.
    """
    given = read_options(argv, prog)
    for name, kind in (("model_name_or_path", "a folder or hub name"), ("dataset_name", "a file, folder or hub name")):
        if not given.get(name) and not (name == "dataset_name" and given.get("datasets")):
            raise UserError(f"{name} is missing: give --{name} with {kind}, or set it in the file of --config")
    if given.get("output_dir") is None:
        given["output_dir"] = f"{Path(given['model_name_or_path']).name}-CPT"
    values = defaults() | given
    check_together(values)
    parts = [cls(**{name: given[name] for name in NAMES[cls] if name in given}) for cls in CLASSES]
    return Options(*parts, values)


def read_options(argv: Sequence[str], prog: str) -> dict[str, Any]:
    """The options that flags and file give, each converted, before they are looked at together.

    Raises:
        UserError: an unknown option, or a value of the wrong type.
    """
    flags = _read_flags(argv, prog)
    flags.pop("config", None)
    return _options_of(read_file(argv), _file_name(argv)) | flags


# --- Values ---


def convert(value: Any, hint: Any) -> Any:
    """``value``, text from a flag or anything from YAML, as the type ``hint``.

    Numbers may be text; ``none`` unsets an option that is no text.

    Raises:
        UserError: it is of another type; the message says which was expected.
    """
    kinds = _kinds(hint)
    if value is None and type(None) in kinds:
        return None
    if isinstance(value, dict) and dict in kinds:
        return value
    if isinstance(value, list) and list in kinds:
        return [convert(item, kinds[list]) for item in value]
    if value is None or isinstance(value, (dict, list)):
        raise UserError(f"{value!r} is not {_expected(kinds)}")
    text = _text(value, kinds)
    if text.lower() in ("none", "null") and type(None) in kinds and str not in kinds:
        return None
    if dict in kinds and text.startswith("{"):
        return _read_json(text)
    for kind, read in _READERS.items():
        if kind in kinds and (number := read(text)) is not None:
            return number
    if str in kinds and (not kinds[str] or text in kinds[str]):
        return text
    if list in kinds:
        return [convert(text, kinds[list])]
    raise UserError(f"{value!r} is not {_expected(kinds)}{_suggest(text, kinds.get(str) or ())}")


def _kinds(hint: Any) -> dict[type, Any]:
    """The types that a hint allows; with ``list`` comes the hint of its items, with ``str`` its choices, if any."""
    kinds: dict[type, Any] = {}
    for part in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,):
        origin = get_origin(part) or part
        if origin is list:
            kinds[list] = get_args(part)[0]
        elif origin is Literal:
            kinds[str] = [choice for choice in get_args(part) if isinstance(choice, str)]
        elif origin is str:
            kinds.setdefault(str, ())  # SchedulerType | str means the former's values
        elif issubclass(origin, Enum):
            kinds[str] = [choice.value for choice in origin]
        else:
            kinds[origin] = None
    return kinds


def _text(value: Any, kinds: dict[type, Any]) -> str:
    if isinstance(value, bool):
        # YAML reads the no of `eval_strategy: no` as false.
        return "no" if not value and "no" in (kinds.get(str) or ()) else str(value).lower()
    return str(value)


def _read_bool(text: str) -> bool | None:
    return {"true": True, "1": True, "false": False, "0": False}.get(text.lower())


def _read_int(text: str) -> int | None:
    return int(text) if re.fullmatch(r"[+-]?\d+", text) else None


def _read_float(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


_READERS = {bool: _read_bool, int: _read_int, float: _read_float}


def _read_json(text: str) -> dict:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{text!r} is not a JSON object: {error}") from None


def _expected(kinds: dict[type, Any]) -> str:
    words = {bool: "true or false", int: "a whole number", float: "a number", dict: "a mapping", list: "a list"}
    parts = [words[kind] for kind in words if kind in kinds]
    choices = kinds.get(str)
    if choices:
        parts.append(f"one of {', '.join(choices)}" if len(choices) <= _LONGEST_LIST else "a known value")
    elif str in kinds:
        parts.append("text")
    return " or ".join(parts)


def _suggest(name: str, known: Iterable[str], dashes: str = "") -> str:
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {dashes}{close[0]}?" if close else ""


def _check_name(name: str, where: str, dashes: str = "") -> None:
    if name in REMOVED_OPTIONS:
        raise UserError(f"{where}{dashes}{name} was removed: {REMOVED_OPTIONS[name]}")
    if name in NOT_OPTIONS:
        raise UserError(f"{where}{dashes}{name} cannot be set here: {NOT_OPTIONS[name]}")
    if name not in defaults():
        raise UserError(f"{where}unknown option {dashes}{name}{_suggest(name, defaults(), dashes)}")


def _convert_named(name: str, value: Any, where: str) -> Any:
    if name == "columns" and isinstance(value, dict):
        value = [f"{theirs}={ours}" for theirs, ours in value.items()]
    try:
        return convert(value, type_hints()[name])
    except ValueError as error:
        raise UserError(f"{where}{name}: {error}") from None


# --- YAML ---


class _Loader(yaml.SafeLoader):
    """Reads ``1e-5`` as a number, as YAML 1.2 has it, and refuses an option that is there twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is there twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_file(argv: Sequence[str]) -> dict[str, Any]:
    """What the YAML file that ``--config`` names holds, as it stands there; nothing without ``--config``.

    Raises:
        UserError: it cannot be read, or is no YAML mapping.
    """
    name = _file_name(argv)
    if name is None:
        return {}
    try:
        values = yaml.load(Path(name).read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except OSError as error:
        raise UserError(f"--config {name} cannot be read ({error.strerror})") from error
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{name}, line {error.problem_mark.line + 1}: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{name} is no YAML text: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{name}: expected lines of 'option: value', found {type(values).__name__}")
    return values


def environment(values: dict[str, Any]) -> dict[str, str]:
    """Environment variables that a file sets under ``env``.

    Raises:
        UserError: ``env`` is no mapping.
    """
    variables = values.get("env") or {}
    if not isinstance(variables, dict):
        raise UserError(f"env: expected a mapping of variables, found {type(variables).__name__}")
    return {name: str(value) for name, value in variables.items()}


def _file_name(argv: Sequence[str]) -> str | None:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return parser.parse_known_args(argv)[0].config


def _options_of(file: dict[str, Any], name: str | None) -> dict[str, Any]:
    """The options among what a file holds, converted; the rest is the environment's and the launcher's."""
    where = f"{name}: "
    values = {_ALIASES.get(option, option): value for option, value in file.items() if option != "env"}
    values = {option: value for option, value in values.items() if option not in launch.option_names()}
    for option in values:
        _check_name(str(option), where)
    return {option: _convert_named(option, value, where) for option, value in values.items()}


# --- Flags ---


def _read_flags(argv: Sequence[str], prog: str) -> dict[str, Any]:
    raw, rest = _parser(prog).parse_known_args(argv)
    for text in rest:
        if not text.startswith("--"):
            hint = f"; did you mean --config {text}?" if text.endswith((".yaml", ".yml")) else ""
            raise UserError(f"unexpected argument {text!r}{hint}")
        _check_name(text[2:].split("=")[0].replace("-", "_"), "", "--")
    values = vars(raw)
    for name in values.keys() - {"config"}:
        value = values[name]
        # argparse gives an option that takes several values a list even of one; report_to none is no list.
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        values[name] = _convert_named(name, value, "--")
    return values


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(re.sub(r"^argument (--\w+)\S*:", r"\1:", message))


class _Help(argparse.HelpFormatter):
    """Option, value, meaning and default on one line; without the spellings --with-dashes."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=38, width=118)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        return f"{action.option_strings[0]} {action.metavar or ''}"


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        usage=f"{prog} [--config run.yaml] [--option value ...]",
        description="Contrastive post-training on preference pairs: DPO, SLiC, RSO, IPO, and SFT. Flags override the"
        " file. An option that is true or false can be given as --option or --no_option, too.",
        formatter_class=_Help,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of options, under the names below")
    helps = {f.name: f.metadata.get("help", "") for cls in CLASSES for f in fields(cls)} | HELP
    for title, names in groups().items():
        group = parser.add_argument_group(title)
        for name in names:
            _add_flag(group, name, _kinds(type_hints()[name]), defaults()[name], helps[name])
    return parser


def _add_flag(group: Any, name: str, kinds: dict[type, Any], default: Any, help: str) -> None:
    # transformers describes an option in up to six sentences, and escapes % for argparse
    text = re.split(r"(?<=[.])\s(?=[A-Z])", help.replace("%%", "%"))[0] if name not in HELP else help
    if "Default: " in help:
        text = help
    elif default not in (None, False, "", []):
        shown = " ".join(default) if isinstance(default, list) else str(default).lower() if default is True else default
        text += f" [{shown}]"
    item = {float: "NUMBER", dict: "JSON"}.get(kinds.get(list), "NAME")
    words = {bool: "BOOL", int: "INT", float: "NUMBER", list: f"{item} ...", dict: "JSON", str: "TEXT"}
    extra: dict[str, Any] = {"metavar": next(word for kind, word in words.items() if kind in kinds)}
    spellings = [f"--{name}", f"--{name.replace('_', '-')}"]
    if list in kinds:
        extra["nargs"] = "+"
    elif bool in kinds:
        extra |= {"nargs": "?", "const": "true"}
        negations = [f"--no_{name}", f"--no-{name.replace('_', '-')}"]
        group.add_argument(*negations, dest=name, action="store_const", const="false", help=argparse.SUPPRESS)
    group.add_argument(*spellings, dest=name, help=text.replace("%", "%%"), **extra)
