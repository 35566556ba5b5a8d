"""What the parsers of the commands beside ``cpt-train`` have in common."""

from __future__ import annotations

import argparse
import json
from typing import Any

from ..errors import UserError


class Parser(argparse.ArgumentParser):
    """Complains by ``ValueError``, which :mod:`cpt_kernels.cli` prints as one line."""

    def error(self, message: str):
        raise UserError(message)


class Help(argparse.RawDescriptionHelpFormatter):
    """An option and its meaning on one line where they fit."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=38, width=118)


def add_endpoint_options(group: argparse._ArgumentGroup) -> None:
    """The options of :class:`EndpointOptions` but for the model, under its names and with its defaults."""
    from ..generation.endpoint import ENDPOINT_DEFAULTS  # brings datasets along, which other commands do without

    add = group.add_argument
    add("--base_url", metavar="URL", help="[$OPENAI_BASE_URL, or OpenAI's]")
    add("--api_key_env", metavar="NAME", help="variable that holds the key [%(default)s]")
    add("--concurrency", type=int, metavar="N", help="requests at a time [%(default)s]")
    add("--requests_per_minute", type=float, metavar="N", help="[as many as there are replies]")
    add("--max_retries", type=int, metavar="N", help="of one request [%(default)s]")
    add("--timeout", type=float, metavar="SECONDS", help="of one try [%(default)g]")
    add("--extra_body", type=json_object, metavar="JSON", help="sent with every request")
    group.set_defaults(**ENDPOINT_DEFAULTS)


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
