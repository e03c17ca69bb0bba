"""What the terminal shows: tables, progress and one clear line for an error. The only place in nasq that prints."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Json", "Output", "Quiet"]

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
"""The option that every command has for :class:`Output`'s ``as_json``."""

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no tables.")]
"""The option that every command has for :class:`Output`'s ``quiet``."""

_WIDTH = 80


class Output:
    """Where a command writes: results to stdout, everything else to stderr.

    Args:
        as_json: Results are one JSON document on stdout.
        quiet: No progress and no tables; errors and JSON only.
    """

    def __init__(self, as_json: bool, quiet: bool) -> None:
        self.as_json, self.quiet = as_json, quiet

    def console(self, stderr: bool = False) -> Console:
        """A rich console; piped output is 80 columns wide."""
        from rich.console import Console

        stream = sys.stderr if stderr else sys.stdout
        width = None if stream.isatty() else _WIDTH
        # No emoji: "add:one: ..." would lose a word to a picture.
        return Console(file=stream, width=width, highlight=False, soft_wrap=False, emoji=False)

    def log(self, text: str) -> None:
        """A line of progress on stderr."""
        if not self.quiet:
            self.console(stderr=True).print(text, markup=False)

    def result(self, value: object, text: str = "") -> None:
        """The result: JSON, or ``text``."""
        if self.as_json:
            sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")
        elif text and not self.quiet:
            sys.stdout.write(text.rstrip("\n") + "\n")

    def table(self, rows: Sequence[Mapping[str, object]], title: str = "", value: object = None) -> None:
        """Rows as a table, or as JSON (``value``, if it holds more than the table shows)."""
        if self.as_json:
            self.result(list(rows) if value is None else value)
            return
        if self.quiet:
            return
        from rich.table import Table

        table = Table(box=None, pad_edge=False, header_style="bold")
        columns = list(rows[0]) if rows else []
        for column in columns:
            numeric = all(isinstance(row[column], (int, float)) for row in rows)
            table.add_column(column, justify="right" if numeric else "left", overflow="fold")
        for row in rows:
            table.add_row(*(_cell(row[column]) for column in columns))
        console = self.console()
        if title:  # a table's own title would wrap at the table's width
            console.print(title, markup=False, style="italic")
        console.print(table)


def _cell(value: Any) -> str:
    from rich.markup import escape

    if isinstance(value, float):
        # 54482 bytes are 54,482 and not 5.448e+04.
        whole = math.isfinite(value) and abs(value) < 1e15 and (value.is_integer() or abs(value) >= 1e4)
        return f"{value:,.0f}" if whole else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else escape(str(value))
