"""Tables for people: one type, shown on a console or in HTML. A table may not know what its numbers are about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from textwrap import wrap

from rich import box
from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

GAP = 2  # columns between two columns of a table


@dataclass(frozen=True, slots=True)
class TextTable:
    """A table, if it has rows, and a note about it. The first `labels` columns are words, the others numbers."""

    title: str
    note: str = ""
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    labels: int = 1


def print_tables(tables: Iterable[TextTable], console: Console) -> None:
    """Print tables, each under its title and above its note. `analysis.report.html` makes HTML of them.

    Nothing is cut off. On a console that is too narrow for a table, its words wrap; where that is not enough, some of
    its numbers stand below the others.
    """
    for table in tables:
        print_text(table.title, console, "bold")
        if table.rows:
            blocks = (_rich_table(block, console.width) for block in _blocks(table, console.width))
            console.print("", *(part for block in blocks for part in (block, "")), sep="\n", crop=False)
        if table.note:
            print_text(table.note + "\n", console)


def print_text(text: str, console: Console, style: str = "") -> None:
    """Print lines, which wrap between words where the console is too narrow."""
    fill = partial(wrap, width=console.width, break_long_words=False, break_on_hyphens=False)
    lines = [part for line in text.split("\n") for part in fill(line) or [""]]
    console.print(Text("\n".join(lines), style=style), soft_wrap=True)


def _blocks(table: TextTable, room: int) -> Iterator[TextTable]:
    """The table; if it is too wide even with its words wrapped, several with some of its numbers each."""
    least, labels = _least(table), [*range(table.labels)]
    blocks = [labels]
    for group in _groups(table):
        if blocks[-1] != labels and _whole(least[place] for place in (*blocks[-1], *group)) > room:
            blocks.append(labels)
        blocks[-1] = [*blocks[-1], *group]
    for block in blocks:
        rows = [[row[place] for place in block] for row in table.rows]
        yield replace(table, columns=[table.columns[place] for place in block], rows=rows)


def _groups(table: TextTable) -> Iterator[list[int]]:
    """Columns of numbers that stay together: one with a name, and those without one behind it."""
    places = range(table.labels, len(table.columns))
    starts = [place for place in places if table.columns[place] or place == table.labels]
    for start, end in pairwise((*starts, len(table.columns))):
        yield [*range(start, end)]


def _rich_table(table: TextTable, room: int) -> Table:
    """A table as wide as it needs, or as `room` columns; wider still where even single words and numbers are."""
    widths = _widths(table, room)
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True, width=_whole(widths))
    for position, (name, width) in enumerate(zip(table.columns, widths, strict=True)):
        shown.add_column(Text(name), justify="left" if position < table.labels else "right", width=width)
    for row in table.rows:
        shown.add_row(*map(Text, row))
    return shown


def _whole(widths: Iterable[int]) -> int:
    """Of a table with such columns."""
    return sum(width + GAP for width in widths) - GAP


def _widths(table: TextTable, room: int) -> list[int]:
    """Of the columns. Words and headings wrap if there is no room for all of them; a number never does."""
    least = _least(table)
    most = [max(map(cell_len, column)) for column in zip(table.columns, *table.rows, strict=True)]
    for cap in range(max(most), 0, -1):
        widths = [max(low, min(high, cap)) for low, high in zip(least, most, strict=True)]
        if _whole(widths) <= room:
            return widths
    return least


def _least(table: TextTable) -> list[int]:
    """Widths in which every word and every number fits."""
    columns = [*zip(table.columns, *table.rows, strict=True)]
    labels = [max(map(_longest_word, column)) for column in columns[: table.labels]]
    return labels + [max(_longest_word(name), *map(cell_len, of)) for name, *of in columns[table.labels :]]


def _longest_word(text: str) -> int:
    return max(map(cell_len, text.split()), default=0)


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
