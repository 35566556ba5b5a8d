"""Parsers of the commands, and how a YAML file and flags become the options of ``cpt-train``.

The flags of ``cpt-train`` are converted by our own :func:`convert` and not by transformers' ``HfArgumentParser``, for
two reasons. That parser needs the dataclasses, whose import takes four seconds, for every ``--help`` and every typing
mistake. And it does not check the values of a YAML file, whereas here one function converts a value wherever it was
written, so both places accept the same values and give the same messages.
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..errors import UserError, at_place
from .option_table import option_table
from .option_types import Option

if TYPE_CHECKING:
    from .options import Options

CONFIG_FILE = "training_config.yaml"  # the options of a run in its output_dir, as a file for --config
DTYPES = ("auto", "bfloat16", "float16", "float32")
_ALIASES = {"streaming": "dataset_streaming"}  # TRL's name in a file with `datasets`


# --- Parsers of all commands ---


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` that raises :class:`UserError` and does not accept abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": Help, "allow_abbrev": False, **kwargs})

        # Python's own pattern lacks exponents, so that -1e-3 would be an option.
        self._negative_number_matcher = re.compile(r"^-(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$|^-(inf|nan)$")

    def parse_args(self, args=None, namespace=None):
        parsed, rest = self.parse_known_args(args, namespace)
        if rest:
            names = [action.option_strings[0].lstrip("-") for action in self._actions if action.option_strings]
            raise UserError(unknown_argument(rest[0], names, self.prog))
        return parsed

    def parse_known_args(self, args=None, namespace=None):
        parsed, rest = super().parse_known_args(args, namespace)
        for name, value in vars(parsed).items():
            if isinstance(value, Path) and re.match(r"[a-z][a-z0-9]+:/", str(value)):
                raise UserError(f"--{name} {value}: this command uses local files here; give a path, and copy the file")
        return parsed, rest

    def error(self, message: str):
        # argparse names every spelling of an option: "argument --max_length/--max-length: expected one argument".
        raise UserError(re.sub(r"^argument (--\w+)\S*:", r"\1:", message))


class Help(argparse.RawDescriptionHelpFormatter):
    """Shows an option and its meaning on one line where they fit, under the first of the option's spellings."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=38, width=118)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        return f"{action.option_strings[0]} {self._format_args(action, action.dest.upper())}"

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        if action.nargs == "+":
            return f"{action.metavar or default_metavar} ..."
        return super()._format_args(action, default_metavar)


def unknown_argument(text: str, known: Iterable[str], prog: str) -> str:
    """Returns the message for an argument that a command does not have."""
    if not text.startswith("-"):
        return f"unexpected argument {text!r}; see {prog} --help"
    name = text.split("=")[0]
    hint = _suggest(name.lstrip("-").replace("-", "_"), known, "--")
    return f"unknown option {name}{hint or f'; see {prog} --help'}"


def add_endpoint_options(group: argparse._ArgumentGroup) -> None:
    """Adds the options of :class:`EndpointOptions` except the model, under its names and with its defaults."""
    from ..generation.endpoint import ENDPOINT_DEFAULTS  # imports datasets, which other commands do without

    add = group.add_argument
    add("--base_url", metavar="URL", help="address of the endpoint [$OPENAI_BASE_URL, or OpenAI's]")
    add("--api_key_env", metavar="NAME", help="environment variable that holds the key [%(default)s]")
    add("--concurrency", type=int, metavar="N", help="requests in flight at a time [%(default)s]")
    add("--requests_per_minute", type=float, metavar="N", help="most requests in a minute [no limit]")
    add("--max_retries", type=int, metavar="N", help="retries of one request [%(default)s]")
    add("--timeout", type=float, metavar="SECONDS", help="time for one try of a request [%(default)g]")
    add("--extra_body", type=json_object, metavar="JSON", help="fields to send with every request")
    group.set_defaults(**ENDPOINT_DEFAULTS)


def or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    """Returns the ``type`` of an argument that is of a kind, or the word "none" for None."""

    def convert(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    convert.__name__ = f"{kind.__name__} or none"  # argparse prints it: invalid float or none value
    return convert


def number_type(what: str, least: int, kind: type = int) -> Callable[[str], Any]:
    """Returns the ``type`` of an argument that is a finite number, ``least`` or more; ``what`` names it in errors."""

    def convert(text: str) -> Any:
        number = _read_int(text) if kind is int else _read_float(text)
        if number is None or number < least:
            wanted = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{text} is not {what}: give {wanted}, {least} or more")
        return number

    return convert


def json_object(text: str) -> dict[str, Any]:
    """Parses a JSON object, as the ``type`` of an argument."""
    try:
        return _read_json(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# --- Options of cpt-train ---


def parse(argv: Sequence[str], prog: str = "cpt-train") -> Options:
    """Reads options from flags, which override the YAML file of ``--config``, and checks them together.

    ``--help`` prints and exits.
    """
    return make_options(read_options(argv, prog))


def make_options(given: dict[str, Any]) -> Options:
    """Completes the options that flags and file give, and checks them together."""
    given = dict(given)
    if given.get("adapter_name_or_path") and not given.get("model_name_or_path"):
        given["model_name_or_path"] = given.pop("adapter_name_or_path")  # its own base model is loaded
    for name, kind in (("model_name_or_path", "a folder or hub name"), ("dataset_name", "a file, folder or hub name")):
        if not str(given.get(name) or "").strip() and not (name == "dataset_name" and given.get("datasets")):
            raise UserError(f"{name} is missing: give --{name} with {kind}, or set it in the file of --config")
    if given.get("output_dir") is None:
        given["output_dir"] = f"{Path(given['model_name_or_path']).resolve().name or 'model'}-CPT"
    if not given["output_dir"].strip():
        raise UserError("output_dir is blank: name a folder for everything that the run writes")
    from .options import complete  # imports transformers

    return complete(given)


def read_options(argv: Sequence[str], prog: str) -> dict[str, Any]:
    """Reads the options that flags and file give, each converted, before they are checked together."""
    flags = _read_flags(argv, prog)
    flags.pop("config", None)
    return convert_file(read_file(argv), _file_name(argv)) | flags


# --- Values ---


def convert(value: Any, kinds: dict[str, Any]) -> Any:
    """Converts ``value``, text from a flag or anything from YAML, to one of ``kinds`` (see :class:`Option`).

    Numbers may be text. The text ``none`` unsets an option that does not take text.

    Raises:
        UserError: the value is of another type; the message says which was expected.
    """
    # What YAML has parsed already.
    if value is None and "none" in kinds:
        return None
    if isinstance(value, dict) and "dict" in kinds:
        return value
    if isinstance(value, list) and "list" in kinds:
        return [convert(item, kinds["list"]) for item in value]
    if value is None or isinstance(value, (dict, list)):
        raise UserError(f"{value!r} is not {_expected(kinds)}")

    # Text, tried as each type in turn.
    text = _text(value, kinds)
    if text.lower() in ("none", "null") and "none" in kinds and "str" not in kinds:
        return None
    if "dict" in kinds and text.startswith("{"):
        return _read_json(text)
    for kind, read in _READERS.items():
        if kind in kinds and (number := read(text)) is not None:
            return number
    if "str" in kinds and (not kinds["str"] or text in kinds["str"]):
        return text
    if "list" in kinds:
        return [convert(text, kinds["list"])]
    raise UserError(f"{value!r} is not {_expected(kinds)}{_suggest(text, kinds.get('str') or ())}")


def _text(value: Any, kinds: dict[str, Any]) -> str:
    if isinstance(value, bool):
        # YAML reads the no of `eval_strategy: no` as false.
        return "no" if not value and "no" in (kinds.get("str") or ()) else str(value).lower()
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


_READERS = {"bool": _read_bool, "int": _read_int, "float": _read_float}


def _read_json(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{text!r} is not a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{text!r} is not a JSON object")
    return value


def _expected(kinds: dict[str, Any]) -> str:
    text = f"one of {', '.join(kinds['str'])}" if kinds.get("str") else "text"
    words = {"bool": "true or false", "int": "a whole number", "float": "a number"}
    words |= {"dict": "a mapping", "list": "a list", "str": text}
    return " or ".join(word for kind, word in words.items() if kind in kinds)


def _suggest(name: str, known: Iterable[str], dashes: str = "") -> str:
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {dashes}{close[0]}?" if close else ""


def _check_name(name: str, where: str, dashes: str = "") -> None:
    table = option_table()
    elsewhere = {"was removed": table.removed, "has another name here": table.foreign}
    for reason, mends in (elsewhere | {"cannot be set here": table.refused}).items():
        if name in mends:
            raise UserError(f"{where}{dashes}{name} {reason}: {mends[name]}")
    if name not in table.options:
        raise UserError(f"{where}unknown option {dashes}{name}{_suggest(name, table.options, dashes)}")


def _convert_named(name: str, value: Any, where: str) -> Any:
    if name == "columns" and isinstance(value, dict):
        value = [f"{theirs}={ours}" for theirs, ours in value.items()]
    with at_place(f"{where}{name}"):
        return convert(value, option_table().options[name].kinds)


# --- YAML ---


class _Loader(yaml.SafeLoader):
    """Reads ``1e-5`` as a number, as YAML 1.2 does, and refuses an option that is given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value} is given twice", problem_mark=key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_file(argv: Sequence[str]) -> dict[str, Any]:
    """Reads the YAML file of ``--config``, see :func:`read_yaml`; empty without ``--config``."""
    name = _file_name(argv)
    return {} if name is None else read_yaml(name)


def read_yaml(file: str | Path) -> dict[str, Any]:
    """Reads a file of options without converting values.

    Raises:
        UserError: the file cannot be read, or holds no YAML mapping.
    """
    try:
        values = yaml.load(Path(file).read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except OSError as error:
        raise UserError(f"--config {file} cannot be read ({error.strerror})") from error
    except yaml.MarkedYAMLError as error:
        raise UserError(f"{file}, line {error.problem_mark.line + 1}: {error.problem}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{file} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{file}: expected lines of 'option: value', found {type(values).__name__}")
    return values


def environment(values: dict[str, Any]) -> dict[str, str]:
    """Returns the environment variables that a file sets under ``env``."""
    variables = values.get("env") or {}
    if not isinstance(variables, dict):
        raise UserError(f"env: expected a mapping of variables, found {type(variables).__name__}")
    return {name: str(value) for name, value in variables.items()}


def _file_name(argv: Sequence[str]) -> str | None:
    parser = Parser(add_help=False)
    parser.add_argument("--config")
    return parser.parse_known_args(argv)[0].config


def convert_file(file: dict[str, Any], name: str | Path | None) -> dict[str, Any]:
    """Converts the options in a file; its other entries are for the environment and the launcher."""
    where = f"{name}: "
    aliases = _ALIASES | option_table().aliases
    values = {aliases.get(option, option): value for option, value in file.items() if option != "env"}
    values = {option: value for option, value in values.items() if option not in option_table().launch}
    for option in values:
        _check_name(str(option), where)
    return {option: _convert_named(option, value, where) for option, value in values.items()}


# --- Flags ---


def _read_flags(argv: Sequence[str], prog: str) -> dict[str, Any]:
    raw, rest = _train_parser(prog).parse_known_args(argv)
    for text in rest:
        if not text.startswith("--"):
            hint = f"; did you mean --config {text}?" if text.endswith((".yaml", ".yml")) else ""
            raise UserError(f"unexpected argument {text!r}{hint}")
        _check_name(text[2:].split("=")[0].replace("-", "_"), "", "--")
    values = vars(raw)
    for name in values.keys() - {"config"}:
        value = values[name]
        # argparse makes a list even of one value. As a list, `--report_to none` would name a tracker.
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        values[name] = _convert_named(name, value, "--")
    return values


def _train_parser(prog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog,
        usage=f"{prog} [--config run.yaml] [--option value ...]",
        description="Contrastive post-training on preference pairs: DPO, SLiC, RSO, IPO, and SFT. Flags override the"
        " file.\nAn option that is true or false can also be given as --option or --no_option.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of options, under the names below")
    groups: dict[str, Any] = {}
    for name, option in option_table().options.items():
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        _add_flag(groups[option.group], name, option)
    return parser


def _add_flag(group: Any, name: str, option: Option) -> None:
    kinds = option.kinds
    of_items = {"float": "NUMBER", "dict": "JSON"}
    of_list = next((word for kind, word in of_items.items() if kind in kinds.get("list", ())), "NAME")
    words = {"bool": "BOOL", "int": "INT", "float": "NUMBER", "list": of_list, "dict": "JSON", "str": "TEXT"}
    extra: dict[str, Any] = {"metavar": next(word for kind, word in words.items() if kind in kinds)}
    spellings = [f"--{name}", f"--{name.replace('_', '-')}"]
    spellings += [f"--{alias}" for alias, option_name in option_table().aliases.items() if option_name == name]
    if "list" in kinds:
        extra["nargs"] = "+"
    elif "bool" in kinds:
        extra |= {"nargs": "?", "const": "true"}
        negations = [f"--no_{name}", f"--no-{name.replace('_', '-')}"]
        group.add_argument(*negations, dest=name, action="store_const", const="false", help=argparse.SUPPRESS)
    group.add_argument(*spellings, dest=name, help=option.help.replace("%", "%%"), **extra)
