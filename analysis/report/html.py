"""HTML pages: one file each, which needs no network, and reads well on paper, on a phone and in the dark."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from analysis.report.tables import TextTable
from traces.outputs import atomic_file

if TYPE_CHECKING:
    from markupsafe import Markup

SWATCHES = {
    "line": "M0 5h26",
    "bar": "M0 5h26",
    "circle": "M13 1a4 4 0 1 0 .01 0z",
    "diamond": "M13 0l5 5-5 5-5-5z",
    "square": "M9 1h8v8h-8z",
    "triangle-up": "M13 0l5.5 9.5h-11z",
}
"""How a legend's entry is drawn, by kind: an SVG path in a box of 26 x 10. The symbols are plotly's."""


@dataclass(frozen=True, slots=True)
class LegendEntry:
    """A curve, a kind of points or of bars: the name of its traces, and how it is drawn.

    Attributes:
        name: as text.
        colour: for CSS.
        kind: of `SWATCHES`.
        dash: of its line: `solid`, or lengths as CSS and plotly have them.
    """

    name: str
    colour: str
    kind: str = "line"
    dash: str = "solid"


@dataclass(frozen=True, slots=True)
class HtmlFigure:
    """Plots as HTML under one legend: side by side where there is room, or stacked. Caption and title are text."""

    plots: Sequence[str]
    legend: Sequence[LegendEntry] = ()
    caption: str = ""
    title: str = ""
    stacked: bool = False


@dataclass(frozen=True, slots=True)
class Definitions:
    """Words and their meanings."""

    meanings: Mapping[str, str]
    title: str = ""


Part = TextTable | HtmlFigure | Definitions


@dataclass(frozen=True, slots=True)
class Heading:
    """The top of a page, all as text.

    Attributes:
        title: the heading.
        facts: of the runs: label -> value.
        headline: a summary in plain sentences.
        full_names: short name -> the name in full, which is shown to whom points at the short one.
    """

    title: str
    facts: Mapping[str, str] = field(default_factory=dict)
    headline: str = ""
    full_names: Mapping[str, str] = field(default_factory=dict)

    @property
    def window_title(self) -> str:
        """The title and the facts."""
        return ", ".join(filter(None, (self.title, *self.facts.values())))


def write_page(path: Path, heading: Heading, parts: Iterable[Part]) -> None:
    """Write an HTML page, whole or not at all.

    Args:
        path: the file.
        heading: its top.
        parts: the rest, in order.

    Raises:
        TandemError: the file cannot be written.
    """
    from jinja2 import Environment
    from plotly.offline import get_plotlyjs

    environment = Environment(autoescape=True)
    environment.filters["breakable"] = _breakable
    template = environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    page = template.render(heading=heading, parts=parts, swatches=SWATCHES, plotly_js=get_plotlyjs())
    with atomic_file(path) as file:
        file.write(page.encode())


def _breakable(text: str) -> Markup:
    """Text that may be broken within a long name: after a `:`, a `/` or an `=`, and within a word of 24 letters."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([:/=](?=\S)|\w{16}(?=\w{8}))", r"\1<wbr>", str(escape(text))))
