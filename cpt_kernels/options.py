"""What the parsers of the commands beside ``cpt-train`` have in common."""

from __future__ import annotations

import argparse
import json
from typing import Any


class Parser(argparse.ArgumentParser):
    """Complains by ``ValueError``, which :mod:`cpt_kernels.cli` prints as one line."""

    def error(self, message: str):
        raise ValueError(message)


class Help(argparse.RawDescriptionHelpFormatter):
    """An option and its meaning on one line where they fit."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=38, width=118)


def json_object(text: str) -> dict[str, Any]:
    """A value that is a JSON object.

    Raises:
        ArgumentTypeError: it is something else.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object")
    return value
