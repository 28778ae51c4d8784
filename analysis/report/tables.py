"""Tables for people: on a console and in HTML, numbers and words laid out alike in both.

It may not know what the numbers are about.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table, if it has rows, and a sentence about it. The first `labels` columns are words, the others numbers."""

    title: str
    note: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    labels: int = 1


def print_tables(tables: Iterable[TextTable], console: Console) -> None:
    """Print tables, each under its title and above its note."""
    from rich.text import Text

    for table in tables:
        console.print(Text(table.title, style="bold"))
        if table.rows:
            console.print(_rich_table(table))
        if table.note:
            console.print(Text(table.note + "\n"))


def _rich_table(table: TextTable) -> RichTable:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for position, name in enumerate(table.columns):
        shown.add_column(Text(name), justify="left" if position < table.labels else "right", no_wrap=True)
    for row in table.rows:
        shown.add_row(*(Text(cell) for cell in row))
    return shown


def html_table(table: TextTable) -> str:
    """The same as HTML."""
    head = _html_row("th", table.columns, table.labels)
    body = "".join(_html_row("td", row, table.labels) for row in table.rows)
    shown = f"<table><thead>{head}</thead><tbody>{body}</tbody></table>" if table.rows else ""
    note = f"<p>{escape(table.note)}</p>" if table.note else ""
    return f"<h2>{escape(table.title)}</h2>\n{shown}{note}"


def _html_row(tag: str, cells: Sequence[str], labels: int) -> str:
    attributes = [' class="label"' if position < labels else "" for position, _ in enumerate(cells)]
    row = "".join(f"<{tag}{kind}>{escape(cell)}</{tag}>" for kind, cell in zip(attributes, cells, strict=True))
    return f"<tr>{row}</tr>"


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
