"""Tables for people: one type, shown on a console or in HTML. A table may not know what its numbers are about."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table, if it has rows, and a note about it. The first `labels` columns are words, the others numbers."""

    title: str
    note: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    labels: int = 1


def print_tables(tables: Iterable[TextTable], console: Console) -> None:
    """Print tables, each under its title and above its note. `analysis.report.html` makes HTML of them."""
    for table in tables:
        console.print(Text(table.title, style="bold"))
        if table.rows:
            console.print(_rich_table(table))
        if table.note:
            console.print(Text(table.note + "\n"))


def _rich_table(table: TextTable) -> Table:
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for position, name in enumerate(table.columns):
        shown.add_column(Text(name), justify="left" if position < table.labels else "right", no_wrap=True)
    for row in table.rows:
        shown.add_row(*map(Text, row))
    return shown


# -- numbers; a dash stands for one that could not be computed -------------------------------------------------


def signed(fraction: float | None) -> str:
    """+1.2%."""
    return "–" if fraction is None else f"{fraction:+z.1%}"


def percent(fraction: float | None) -> str:
    """1.2%."""
    return "–" if fraction is None else f"{fraction:.1%}"


def number(value: float | None) -> str:
    """1.23, and 1,235 from a thousand up."""
    return "–" if value is None else f"{value:,.{0 if value >= 1000 else 2}f}"


def amount(value: float | str | None) -> str:
    """An integer, a number, or words as they are."""
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, str) else number(value)
