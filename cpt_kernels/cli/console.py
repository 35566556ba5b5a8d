"""Prints the results of a command: tables, then lines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_WIDTH = 120  # columns of a table that is not printed to a terminal


def print_results(tables: Iterable[Any], lines: Iterable[str]) -> None:
    """Prints rich tables and plain lines, which are neither wrapped nor read as markup."""
    from rich.console import Console

    console = Console(soft_wrap=True)
    if not console.is_terminal:  # rich would take 80 columns for a file or a pipe
        console.width = _WIDTH
    for table in tables:
        console.print(table)
    for line in lines:
        console.print(line, markup=False, highlight=False)
