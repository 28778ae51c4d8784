"""Draws comparisons: predicted against measured steps, latency distributions, the batch over time; and policies.

It may not compute an error: it draws from the records of the runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from analysis.comparison.compare import CLOSED_LOOP, common_requests
from analysis.metrics.columns import NS_PER_MS, NS_PER_S, Floats, Ints, column, step_kinds, waits_ns
from analysis.metrics.summary import latencies
from engine.records.run_folder import RunRecords

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

LATENCY_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "itl": "ITL", "e2el": "E2E"}
COLOURS = {"measured": "#1f5a92", "simulated": "#d9730d"}
KIND_COLOURS = {"decode": "#1f5a92", "mixed": "#7a4fa3", "prefill": "#2e8b57"}
PALETTE = ("#1f5a92", "#d9730d", "#2e8b57", "#7a4fa3", "#c0392b", "#008b9a", "#8a6d00", "#c2548f", "#555555", "#6b8e23")
LOG_AXIS = {"type": "log", "minorloglabels": "complete", "exponentformat": "none"}
MAX_POINTS = 5000  # of one curve: more of them only make the page heavy


def html_figures(
    comparison: Mapping[str, Any], sim: RunRecords, real: RunRecords, replayed: RunRecords
) -> dict[str, str]:
    """The page's figures as HTML by name; the first one brings plotly.js for all."""
    difference = comparison["decisions"]["first_difference"]
    equal_steps = difference["step"] if difference else comparison["decisions"]["steps"]
    runs = {"measured": real, "simulated": sim}
    return {
        "steps_figure": _html_figure("steps", _steps_figure(real, replayed, equal_steps), plotly_js=True),
        "cdf_figure": _html_figure("cdf", _cdf_figure(runs, {run: _line(run) for run in runs})),
        "time_figure": _html_figure("time", _time_figure(runs)),
    }


def policy_figures(
    runs: Mapping[str, RunRecords], statistics: Mapping[str, Mapping[str, Mapping[str, float | None]]]
) -> dict[str, str]:
    """The figures of several policies' runs as HTML by name; the first one brings plotly.js for all.

    Args:
        runs: by policy.
        statistics: {latency: {statistic: {policy: ms}}}, for the bars.
    """
    lines = {run: {"color": PALETTE[place % len(PALETTE)], "width": 2} for place, run in enumerate(runs)}
    return {
        "cdf_figure": _html_figure("cdf", _cdf_figure(runs, lines), plotly_js=True),
        "bar_figure": _html_figure("bar", _bar_figure(statistics, lines)),
    }


def _bar_figure(
    statistics: Mapping[str, Mapping[str, Mapping[str, float | None]]], lines: Mapping[str, Mapping[str, Any]]
) -> Figure:
    from plotly.subplots import make_subplots

    figure = make_subplots(2, 2, subplot_titles=[LATENCY_NAMES[name] for name in statistics], vertical_spacing=0.14)
    for position, by_statistic in enumerate(statistics.values()):
        for policy, line in lines.items():
            heights = [values[policy] for values in by_statistic.values()]
            colour, shown = (
                {"color": line["color"]},
                {"name": policy, "legendgroup": policy, "showlegend": not position},
            )
            place = {"row": position // 2 + 1, "col": position % 2 + 1}
            figure.add_bar(x=list(by_statistic), y=heights, marker=colour, **shown, **place)
    figure.update_yaxes(title="ms", rangemode="tozero")
    return figure.update_layout(height=640, barmode="group")


def _html_figure(name: str, figure: Figure, plotly_js: bool = False) -> str:
    figure.update_layout(
        template="plotly_white",
        font={"family": "system-ui, sans-serif", "size": 13},
        margin={"l": 70, "r": 20, "t": 60, "b": 50},
        legend={"orientation": "h", "x": 0, "y": 1, "yref": "container", "yanchor": "top"},
    )
    options = {"displaylogo": False, "responsive": True}
    return str(figure.to_html(options, full_html=False, include_plotlyjs=plotly_js, div_id=f"figure-{name}"))


def _thin(points: int) -> Ints:
    """Evenly spaced indices of at most `MAX_POINTS` of some points, the first and the last among them."""
    return np.unique(np.linspace(0, points - 1, min(points, MAX_POINTS)).astype(np.int64))


def _steps_figure(real: RunRecords, replayed: RunRecords, equal_steps: int) -> Figure:
    from plotly.graph_objects import Figure

    steps = real.tables["steps"].slice(0, equal_steps)
    measured, predicted = (
        column(run.tables["steps"], "device_ns")[:equal_steps] / NS_PER_MS for run in (real, replayed)
    )
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
    return figure.update_layout(height=560)


def _shown(shown: int, points: int) -> str:
    return f"{points:,}" if shown == points else f"{shown:,} of {points:,}"


def _cdf_figure(runs: Mapping[str, RunRecords], lines: Mapping[str, dict[str, Any]]) -> Figure:
    from plotly.subplots import make_subplots

    ids = common_requests(*runs.values())
    titles = [LATENCY_NAMES[name] for name in CLOSED_LOOP]
    figure = make_subplots(2, 2, subplot_titles=titles, vertical_spacing=0.18)
    for run, records in runs.items():
        values = latencies(records, ids)
        for position, name in enumerate(CLOSED_LOOP):
            line = lines[run] | {"shape": "hv"}
            x, y = _cdf(values[name])
            place = {"row": position // 2 + 1, "col": position % 2 + 1}
            shown = {"name": run, "legendgroup": run, "showlegend": position == 0}
            figure.add_scatter(x=x, y=y, mode="lines", line=line, **shown, **place)
    figure.update_xaxes(LOG_AXIS, title="ms", minorloglabels="small digits")
    figure.update_yaxes(range=[0, 1.02], tickformat=".0%")
    return figure.update_layout(height=720)


def _cdf(values: Floats) -> tuple[Floats, Floats]:
    """Points of the empirical distribution function."""
    shown = _thin(len(values))
    return np.sort(values)[shown], (shown + 1) / max(len(values), 1)


def _line(run: str) -> dict[str, Any]:
    style = {"width": 2.5, "dash": "solid"} if run == "measured" else {"width": 1.5, "dash": "dot"}
    return {"color": COLOURS[run], **style}


def _time_figure(runs: Mapping[str, RunRecords]) -> Figure:
    from plotly.subplots import make_subplots

    series = {"decode_tokens": "decodes", "prefill_tokens": "prefill tokens", "kv_blocks_used": "KV blocks used"}
    figure = make_subplots(len(series), 1, shared_xaxes=True, vertical_spacing=0.04)
    for run, records in runs.items():
        for row, (name, title) in enumerate(series.items(), 1):
            time_s, values = _over_time(records, name)
            shown = _thin(len(time_s))
            label = f"{run}, {_shown(len(shown), len(time_s))} points"
            line = _line(run) | {"shape": "hv"}
            # The highest of the points that one stands for: a prefill is a spike that thinning could hide.
            x, y = time_s[shown], np.maximum.reduceat(values, shown) if len(shown) else values
            figure.add_scatter(x=x, y=y, mode="lines", name=label, line=line, showlegend=row == 1, row=row, col=1)
            figure.update_yaxes(title=title, rangemode="tozero", row=row, col=1)
    figure.update_xaxes(title="seconds since the run's start", row=len(series), col=1)
    return figure.update_layout(height=720)


def _over_time(run: RunRecords, name: str) -> tuple[Floats, Ints]:
    """A column of the steps at the times they were scheduled, and 0 where the loop began to wait for arrivals."""
    steps, idle_ns = run.tables["steps"], waits_ns(run)
    time_ns = np.concatenate([column(steps, "scheduled_ns"), idle_ns])
    order = np.argsort(time_ns, kind="stable")
    return time_ns[order] / NS_PER_S, np.concatenate([column(steps, name), np.zeros_like(idle_ns)])[order]
