"""Prints the results of a command: tables, then lines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_WIDTH = 120  # columns of a table that is not printed to a terminal


def print_results(tables: Iterable[Any], lines: Iterable[str]) -> None:
    """Prints rich tables and plain lines, which are neither wrapped nor read as markup.

    A table in which no column may wrap is printed whole, however narrow the terminal is, so that no name is broken.
    """
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(soft_wrap=True)
    usual = console.width if console.is_terminal else _WIDTH  # rich would take 80 columns for a file or a pipe
    for table in tables:
        if table.title:  # inside the table it would be wrapped to the table's width
            console.print(f"[italic]{table.title}[/]", highlight=False)
            table.title = None
        console.width = 1 << 16
        measured = Measurement.get(console, console.options, table)
        whole = all(column.no_wrap for column in table.columns)
        console.width = max(usual, measured.maximum if whole else measured.minimum)
        console.print(table)
    for line in lines:
        console.print(line, markup=False, highlight=False)
