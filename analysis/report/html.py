"""HTML pages: one file each, which needs no network and prints well."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from analysis.report.tables import TextTable
from traces.outputs import atomic_file


@dataclass(frozen=True, slots=True)
class HtmlFigure:
    """A figure as HTML, with a caption and perhaps a title, both as text."""

    html: str
    caption: str = ""
    title: str = ""


@dataclass(frozen=True, slots=True)
class Definitions:
    """Words and their meanings."""

    meanings: Mapping[str, str]
    title: str = ""


Part = TextTable | HtmlFigure | Definitions


def write_page(path: Path, title: str, headline: str, parts: Iterable[Part]) -> None:
    """Write an HTML page, whole or not at all.

    Args:
        path: the file.
        title: its heading, as text.
        headline: a summary in plain sentences, as text.
        parts: the rest, in order.

    Raises:
        TandemError: the file cannot be written.
    """
    from jinja2 import Environment

    template = Environment(autoescape=True).from_string(
        Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    )
    page = template.render(title=title, headline=headline, parts=parts)
    with atomic_file(path) as file:
        file.write(page.encode())
