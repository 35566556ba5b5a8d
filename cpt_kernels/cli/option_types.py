"""The types of the table of options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Option:
    """An option, with all that parsing and ``--help`` need."""

    group: str  # title under which ``--help`` shows it
    # the types that it allows, see :func:`cpt_kernels.cli.parsing.convert`: ``bool``, ``int``, ``float``, ``dict``
    # and ``none`` with ``None``, ``list`` with the kinds of its items, ``str`` with its choices, empty for any text
    kinds: dict[str, Any]
    default: Any
    help: str


@dataclass(frozen=True)
class OptionTable:
    """Everything that is known of options by name."""

    options: dict[str, Option]  # in the order of ``--help``
    removed: dict[str, str]  # options of older versions of TRL and transformers -> what to do in their place
    foreign: dict[str, str]  # options of other trainers -> the option that does the same here
    aliases: dict[str, str]  # other names of options, which are accepted
    refused: dict[str, str]  # options of ``TrainingArguments`` that a flag cannot express -> what to do in their place
    launch: dict[str, bool]  # options of ``accelerate launch`` -> whether each takes a value

    @property
    def defaults(self) -> dict[str, Any]:
        return {name: option.default for name, option in self.options.items()}
