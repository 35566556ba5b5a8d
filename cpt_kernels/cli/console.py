"""Prints the results of a command: tables, then lines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

_WIDTH = 120  # columns of a table that is not printed to a terminal


def print_results(shown: Iterable[Any], lines: Iterable[str]) -> None:
    """Prints rich tables and texts, and plain lines, which are neither wrapped nor read as markup.

    A table in which no column may wrap is printed whole, however narrow the terminal is, so that no name is broken.
    """
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    usual = console.width if console.is_terminal else _WIDTH  # rich would take 80 columns for a file or a pipe
    for each in shown:
        console.width = usual
        if isinstance(each, Table):
            if each.title:  # inside the table it would be wrapped to the table's width
                console.print(f"[italic]{each.title}[/]", highlight=False)
                each.title = None
            console.width = max(usual, _needed_width(each))
        console.print(each)
    for line in lines:
        console.print(line, markup=False, highlight=False)


def _needed_width(table: Any) -> int:
    """Returns the width that a table needs so that no word is broken, and no cell of a table without wrapping."""
    from rich.console import Console
    from rich.measure import Measurement

    console = Console(width=1 << 16)
    measured = Measurement.get(console, console.options, table)
    return measured.maximum if all(column.no_wrap for column in table.columns) else measured.minimum
