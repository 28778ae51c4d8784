"""Draws comparisons: predicted against measured steps, latency distributions, the batch over time; and policies.

It may not compute an error. It draws from the records of the runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from analysis.comparison.runs import common_requests
from analysis.metrics.columns import NS_PER_MS, NS_PER_S, Floats, Ints, column, step_kinds, waits_ns
from analysis.metrics.names import COMPARED_LATENCIES, LATENCIES
from analysis.metrics.summary import latencies
from analysis.report.html import HtmlFigure, LegendEntry
from engine.records.run_folder import RunRecords
from sim.replay import Replay

COLOURS = {"measured": "#0072b2", "simulated": "#d55e00"}
# Of Okabe and Ito's colours, which the colour-blind can tell apart, those that stand out on white and on black.
HUES = ("#0072b2", "#d55e00", "#009e73", "#c06a9c", "#7f7f7f")
DASHES = {"solid": "", "7px,3px": "/", "2px,2px": "x"}  # of the first five curves, the next five ... -> pattern of bars
KINDS = {
    "decode": ("#0072b2", "circle"),
    "mixed": ("#d55e00", "diamond"),
    "prefill": ("#009e73", "triangle-up"),
    "swap": ("#7f7f7f", "square"),
}
CLEAR = "rgba(0,0,0,0)"  # the page gives the background, and by its style the colours of text and grid
NUMBERS = {"tickformat": ",~r", "hoverformat": ",.4~r"}
# Three ticks or so for each length of axis: plotly then writes 1, 2, 5 and 10 within two decades, tens beyond.
LOG_AXIS = {"type": "log", "nticks": 3, "tickangle": 0, "minor": {"ticks": "outside", "ticklen": 3}, **NUMBERS}
PLOT_HEIGHT = 300  # px, of a plot that has others beside it
SERIES = {"decode_tokens": "decodes", "prefill_tokens": "prefill tokens", "kv_blocks_used": "KV blocks used"}
MANY_POINTS = 500  # that lie over each other
MAX_POINTS = 5000  # of one curve: more of them only make the HTML page heavy
THINNED = "Where there are many, evenly spaced ones are drawn."
CDF_CAPTION = "The fraction of values at or below a latency: of requests, or for ITL of all gaps."

Line = dict[str, Any]  # how a curve is drawn: colour, dash, width

STYLES = {"measured": {"width": 2.5, "dash": "solid"}, "simulated": {"width": 1.5, "dash": "3px,3px"}}


def steps_figure(real: RunRecords, replayed: Replay, equal_steps: int) -> HtmlFigure:
    """Predicted against measured device times of the steps before the first difference, by kind of step."""
    steps = real.tables["steps"].slice(0, equal_steps)
    measured = column(steps, "device_ns") / NS_PER_MS
    assert replayed.predicted_ns is not None, "replayed without a profile"
    predicted = replayed.predicted_ns[:equal_steps] / NS_PER_MS
    kinds, plot, legend = step_kinds(steps), _Plot("steps", 480), []
    for kind, (colour, symbol) in KINDS.items():
        if len(chosen := np.flatnonzero(kinds == kind)):
            shown = chosen[_thin(len(chosen))]
            legend.append(LegendEntry(f"{kind}, {_shown(len(shown), len(chosen))} steps", colour, symbol))
            marker = {"color": colour, "symbol": symbol, "size": 6, "opacity": 0.3 if len(shown) > MANY_POINTS else 0.7}
            x, y = measured[shown], predicted[shown]
            plot.figure.add_scatter(x=x, y=y, mode="markers", name=legend[-1].name, marker=marker)
    if equal_steps:
        ends = [min(measured.min(), predicted.min()), max(measured.max(), predicted.max())]
        legend.append(LegendEntry("predicted = measured", "#7f7f7f"))
        line = {"color": legend[-1].colour, "width": 1}
        plot.figure.add_scatter(x=ends, y=ends, mode="lines", name=legend[-1].name, line=line)
    plot.figure.update_xaxes(LOG_AXIS, title="measured device time of a step, ms")
    plot.figure.update_yaxes(LOG_AXIS, title="predicted, ms", matches="x")
    caption = f"Each symbol is a step of the real run. Above the line, the latency model predicts too much. {THINNED}"
    return HtmlFigure([plot.html()], legend, caption, stacked=True)


def cdf_figure(runs: Mapping[str, RunRecords], caption: str = "") -> HtmlFigure:
    """The distributions of latencies, of the requests that completed in all runs."""
    ids, lines = common_requests(*runs.values()), _lines(runs)
    values = {run: latencies(records, ids) for run, records in runs.items()}
    plots = [_cdf_plot(name, {run: of[name] for run, of in values.items()}, lines) for name in COMPARED_LATENCIES]
    return HtmlFigure(plots, _legend(lines), f"{CDF_CAPTION} {caption}{THINNED}")


def _cdf_plot(name: str, values: Mapping[str, Floats], lines: Mapping[str, Line]) -> str:
    plot = _Plot(f"cdf-{name}")
    for run, of in values.items():
        shown = _thin(len(of))
        x, y = np.sort(of)[shown], (shown + 1) / max(len(of), 1)
        x, y = np.append(x[:1], x), np.append(np.zeros(len(x[:1])), y)  # one request alone is a line, not a point
        plot.figure.add_scatter(x=x, y=y, mode="lines", name=run, line=lines[run] | {"shape": "hv"})
    plot.figure.update_xaxes(LOG_AXIS, title=f"{LATENCIES[name].label}, ms")
    of_what = "gaps" if name == "itl" else "requests"
    plot.figure.update_yaxes(range=[0, 1.02], tickformat=".0%", hoverformat=".1%", title=f"fraction of {of_what}")
    return plot.html()


def bar_figure(
    statistics: Mapping[str, Mapping[str, Mapping[str, float | None]]], runs: Mapping[str, str]
) -> HtmlFigure:
    """Bars of {latency: {statistic: {run: ms}}}, for runs by name."""
    lines = _lines(runs.values())
    plots = [_bar_plot(name, statistics[name], runs, lines) for name in COMPARED_LATENCIES]
    return HtmlFigure(plots, _legend(lines, "bar"))


def _bar_plot(
    name: str,
    statistics: Mapping[str, Mapping[str, float | None]],
    runs: Mapping[str, str],
    lines: Mapping[str, Line],
) -> str:
    plot = _Plot(f"bar-{name}")
    known = {stat: of for stat, of in statistics.items() if any(value is not None for value in of.values())}
    for run, label in runs.items():
        pattern = {"shape": DASHES[lines[label]["dash"]], "fillmode": "replace", "size": 5, "solidity": 0.5}
        marker = {"color": lines[label]["color"], "line": {"width": 0}, "pattern": pattern}
        plot.figure.add_bar(x=[*known], y=[of[run] for of in known.values()], marker=marker, name=label)
    plot.figure.update_yaxes(NUMBERS, title=f"{LATENCIES[name].label}, ms", rangemode="tozero")
    plot.figure.update_layout(barmode="group")
    return plot.html()


def time_figure(runs: Mapping[str, RunRecords]) -> HtmlFigure:
    """The batch and the KV cache over time."""
    lines = {run: line | {"width": 1.2, "shape": "hv"} for run, line in _lines(runs).items()}
    plot, legend = _Plot("time", 640, rows=len(SERIES)), []
    for run, records in runs.items():
        legend.append(LegendEntry(_points_label(run, records), lines[run]["color"], dash=lines[run]["dash"]))
        for row, name in enumerate(SERIES, 1):
            x, y = _highest(*_over_time(records, name))
            plot.figure.add_scatter(x=x, y=y, mode="lines", name=legend[-1].name, line=lines[run], row=row, col=1)
    for row, title in enumerate(SERIES.values(), 1):
        plot.figure.update_yaxes(NUMBERS, title=title, rangemode="tozero", row=row, col=1)
    plot.figure.update_xaxes(NUMBERS)
    plot.figure.update_xaxes(title="seconds since the run's start", row=len(SERIES), col=1)
    caption = (
        "As each step was planned; 0 while the serving loop waits for arrivals. In a long run, a point is the highest "
        "of several steps."
    )
    return HtmlFigure([plot.html()], legend, caption, "Batch and KV cache over time", stacked=True)


def _highest(time_s: Floats, values: Ints) -> tuple[Floats, Ints]:
    """Fewer points, each the highest of those that it stands for: a prefill is a spike that thinning could hide."""
    shown = _thin(len(time_s))
    return time_s[shown], np.maximum.reduceat(values, shown) if len(shown) else values


def _points_label(run: str, records: RunRecords) -> str:
    points = len(records.tables["steps"]) + len(waits_ns(records))
    return f"{run}, {_shown(min(points, MAX_POINTS), points)} points"


def _over_time(run: RunRecords, name: str) -> tuple[Floats, Ints]:
    """A column of the steps at the times they were scheduled, and 0 where the loop began to wait for arrivals."""
    steps, idle_ns = run.tables["steps"], waits_ns(run)
    time_ns = np.concatenate([column(steps, "scheduled_ns"), idle_ns])
    order = np.argsort(time_ns, kind="stable")
    return time_ns[order] / NS_PER_S, np.concatenate([column(steps, name), np.zeros_like(idle_ns)])[order]


# -- common to all ---------------------------------------------------------------------------------------------


def _lines(runs: Iterable[str]) -> dict[str, Line]:
    """How the curves of each run are drawn: a real and a simulated one in their own ways."""
    dashes = [*DASHES]
    plain = {
        run: {"color": HUES[place % len(HUES)], "dash": dashes[place // len(HUES) % len(dashes)], "width": 2}
        for place, run in enumerate(runs)
    }
    own = {run: {"color": COLOURS[run], **style} for run, style in STYLES.items()}
    return {run: own.get(run, line) for run, line in plain.items()}


def _legend(lines: Mapping[str, Line], kind: str = "line") -> list[LegendEntry]:
    return [LegendEntry(run, line["color"], kind, line["dash"]) for run, line in lines.items()]


class _Plot:
    """A plot of its own, to be filled: its size, and colours that the page's style can change."""

    def __init__(self, name: str, height: int = PLOT_HEIGHT, rows: int = 1) -> None:
        from plotly.subplots import make_subplots

        self.name = f"figure-{name}"
        self.figure = make_subplots(rows, 1, shared_xaxes=True, vertical_spacing=0.05)
        self.figure.update_layout(
            height=height,
            template="plotly_white",
            paper_bgcolor=CLEAR,
            plot_bgcolor=CLEAR,
            font={"family": "system-ui, sans-serif", "size": 12},
            margin={"l": 20, "r": 20, "t": 30, "b": 20},
            showlegend=False,
        )
        # Ticks so long that the first label of one axis does not touch that of the other.
        self.figure.update_xaxes(automargin=True, ticks="outside", ticklen=8)
        self.figure.update_yaxes(automargin=True, ticks="outside", ticklen=4)

    def html(self) -> str:
        """A `div` and the script that draws it."""
        options = {"displaylogo": False, "responsive": True}
        html: str = self.figure.to_html(options, full_html=False, include_plotlyjs=False, div_id=self.name)
        return html


def _thin(points: int) -> Ints:
    """Evenly spaced indices of at most `MAX_POINTS` of some points, the first and the last among them."""
    return np.unique(np.linspace(0, points - 1, min(points, MAX_POINTS)).astype(np.int64))


def _shown(shown: int, points: int) -> str:
    return f"{points:,}" if shown == points else f"{shown:,} of {points:,}"
