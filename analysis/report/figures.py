"""Draws comparisons: predicted against measured steps, latency distributions, the batch over time; and policies.

It may not compute an error. It draws from the records of the runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.comparison.runs import common_requests
from analysis.metrics.columns import NS_PER_MS, NS_PER_S, Floats, Ints, column, step_kinds, waits_ns
from analysis.metrics.names import COMPARED_LATENCIES, LATENCIES
from analysis.metrics.summary import latencies
from analysis.report.html import HtmlFigure
from engine.records.run_folder import RunRecords
from sim.replay import Replay

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

COLOURS = {"measured": "#1f5a92", "simulated": "#d9730d"}
KIND_COLOURS = {"decode": "#1f5a92", "mixed": "#7a4fa3", "prefill": "#2e8b57"}
PALETTE = ("#1f5a92", "#d9730d", "#2e8b57", "#7a4fa3", "#c0392b", "#008b9a", "#8a6d00", "#c2548f", "#555555", "#6b8e23")
LOG_AXIS = {"type": "log", "minorloglabels": "complete", "exponentformat": "none"}
SERIES = {"decode_tokens": "decodes", "prefill_tokens": "prefill tokens", "kv_blocks_used": "KV blocks used"}
MAX_POINTS = 5000  # of one curve: more of them only make the HTML page heavy
THINNED = "Where there are many, evenly spaced ones are drawn."
CDF_CAPTION = "The fraction of values at or below a latency: of requests, or for ITL of all gaps."

STYLES = {"measured": {"width": 2.5, "dash": "solid"}, "simulated": {"width": 1.5, "dash": "dot"}}


def steps_figure(real: RunRecords, replayed: Replay, equal_steps: int) -> HtmlFigure:
    """Predicted against measured device times of the steps before the first difference. It brings plotly.js along."""
    from plotly.graph_objects import Figure

    steps = real.tables["steps"].slice(0, equal_steps)
    measured = column(steps, "device_ns") / NS_PER_MS
    assert replayed.predicted_ns is not None, "replayed without a profile"
    predicted = replayed.predicted_ns[:equal_steps] / NS_PER_MS
    kinds = step_kinds(steps)
    figure = Figure()
    for kind, colour in KIND_COLOURS.items():
        chosen = np.flatnonzero(kinds == kind)
        shown = chosen[_thin(len(chosen))]
        name = f"{kind}, {_shown(len(shown), len(chosen))} steps"
        marker = {"color": colour, "size": 5, "opacity": 0.5}
        figure.add_scatter(x=measured[shown], y=predicted[shown], mode="markers", name=name, marker=marker)
    if equal_steps:
        ends = [min(measured.min(), predicted.min()), max(measured.max(), predicted.max())]
        figure.add_scatter(x=ends, y=ends, mode="lines", name="equal", line={"color": "#888", "width": 1})
    figure.update_xaxes(LOG_AXIS, title="measured device time of a step, ms")
    figure.update_yaxes(LOG_AXIS, title="predicted, ms")
    caption = f"Each dot is a step of the real run. Above the line, the latency model predicts too much. {THINNED}"
    return _html_figure("steps", figure, 560, caption, plotly_js=True)


def cdf_figure(runs: Mapping[str, RunRecords], caption: str = "", plotly_js: bool = False) -> HtmlFigure:
    """The distributions of latencies, of the requests that completed in all runs."""
    ids, figure, lines = common_requests(*runs.values()), _panels(0.18), _lines(runs)
    for run, records in runs.items():
        values = latencies(records, ids)
        for position, name in enumerate(COMPARED_LATENCIES):
            shown = _thin(len(values[name]))
            x, y = np.sort(values[name])[shown], (shown + 1) / max(len(values[name]), 1)
            figure.add_scatter(x=x, y=y, mode="lines", line=lines[run], **_place(run, position))
    figure.update_xaxes(LOG_AXIS, title="ms", minorloglabels="small digits")
    figure.update_yaxes(range=[0, 1.02], tickformat=".0%")
    return _html_figure("cdf", figure, 720, f"{CDF_CAPTION} {caption}{THINNED}", plotly_js)


def bar_figure(
    statistics: Mapping[str, Mapping[str, Mapping[str, float | None]]], runs: Mapping[str, str]
) -> HtmlFigure:
    """Bars of {latency: {statistic: {run: ms}}}, for runs by name."""
    figure, lines = _panels(0.14), _lines(runs)
    for position, name in enumerate(COMPARED_LATENCIES):
        for run, label in runs.items():
            heights, marker = [of[run] for of in statistics[name].values()], {"color": lines[run]["color"]}
            figure.add_bar(x=[*statistics[name]], y=heights, marker=marker, **_place(label, position))
    figure.update_yaxes(title="ms", rangemode="tozero")
    figure.update_layout(barmode="group")
    return _html_figure("bar", figure, 640)


def time_figure(runs: Mapping[str, RunRecords]) -> HtmlFigure:
    """The batch and the KV cache over time."""
    from plotly.subplots import make_subplots

    figure, lines = make_subplots(len(SERIES), 1, shared_xaxes=True, vertical_spacing=0.04), _lines(runs)
    for run, records in runs.items():
        for row, (name, title) in enumerate(SERIES.items(), 1):
            time_s, values = _over_time(records, name)
            shown = _thin(len(time_s))
            label = f"{run}, {_shown(len(shown), len(time_s))} points"
            # The highest of the points that one stands for: a prefill is a spike that thinning could hide.
            x, y = time_s[shown], np.maximum.reduceat(values, shown) if len(shown) else values
            figure.add_scatter(x=x, y=y, mode="lines", name=label, line=lines[run], showlegend=row == 1, row=row, col=1)
            figure.update_yaxes(title=title, rangemode="tozero", row=row, col=1)
    figure.update_xaxes(title="seconds since the run's start", row=len(SERIES), col=1)
    caption = (
        "As each step was planned; 0 while the serving loop waits for arrivals. In a long run, a point is the highest "
        "of several steps."
    )
    return _html_figure("time", figure, 720, caption, title="Batch and KV cache over time")


def _over_time(run: RunRecords, name: str) -> tuple[Floats, Ints]:
    """A column of the steps at the times they were scheduled, and 0 where the loop began to wait for arrivals."""
    steps, idle_ns = run.tables["steps"], waits_ns(run)
    time_ns = np.concatenate([column(steps, "scheduled_ns"), idle_ns])
    order = np.argsort(time_ns, kind="stable")
    return time_ns[order] / NS_PER_S, np.concatenate([column(steps, name), np.zeros_like(idle_ns)])[order]


# -- common to all ---------------------------------------------------------------------------------------------


def _panels(spacing: float) -> Figure:
    """A panel for each of `COMPARED_LATENCIES`."""
    from plotly.subplots import make_subplots

    titles = [LATENCIES[name].label for name in COMPARED_LATENCIES]
    return make_subplots(2, 2, subplot_titles=titles, vertical_spacing=spacing)


def _lines(runs: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How the curves of each run are drawn: a real and a simulated one in their own ways."""
    plain = {run: {"color": PALETTE[place % len(PALETTE)], "width": 2} for place, run in enumerate(runs)}
    own = {run: {"color": COLOURS[run], **style} for run, style in STYLES.items()}
    return {run: own.get(run, line) | {"shape": "hv"} for run, line in plain.items()}


def _place(run: str, position: int) -> dict[str, Any]:
    """Of a run's curve: its panel and its entry in the legend, one for all panels."""
    entry = {"name": run, "legendgroup": run, "showlegend": position == 0}
    return entry | {"row": position // 2 + 1, "col": position % 2 + 1}


def _html_figure(
    name: str, figure: Figure, height: int, caption: str = "", plotly_js: bool = False, title: str = ""
) -> HtmlFigure:
    figure.update_layout(
        height=height,
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13},
        margin={"l": 70, "r": 20, "t": 60, "b": 50},
        legend={"orientation": "h", "x": 0, "y": 1, "yref": "container", "yanchor": "top"},
    )
    options = {"displaylogo": False, "responsive": True}
    html = figure.to_html(options, full_html=False, include_plotlyjs=plotly_js, div_id=f"figure-{name}")
    return HtmlFigure(html, caption, title)


def _thin(points: int) -> Ints:
    """Evenly spaced indices of at most `MAX_POINTS` of some points, the first and the last among them."""
    return np.unique(np.linspace(0, points - 1, min(points, MAX_POINTS)).astype(np.int64))


def _shown(shown: int, points: int) -> str:
    return f"{points:,}" if shown == points else f"{shown:,} of {points:,}"
