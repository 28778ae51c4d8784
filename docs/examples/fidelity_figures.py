"""Draws a judged study: latencies by load, their distributions, and the remaining error of the latency model.

    python docs/examples/fidelity_figures.py STUDY FOLDER

STUDY is a folder that `tandem fidelity judge` has judged. FOLDER gets loads.png, cdf.png and residuals.png. The program
needs matplotlib, which Tandem does not install.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from residuals import COMPUTE_BOUND, MEMORIES_MS, Steps, by_captured_size, memory_correlation, recent_rate, study_steps

from analysis.comparison.compare import STATISTICS
from analysis.metrics.summary import latencies
from analysis.report.figures import COLOURS, LATENCY_NAMES
from engine.model.graph_sizes import GraphSizes
from engine.records.run_folder import read_run
from sim.profile.format import read_profile

LATENCIES = ("ttft", "tpot", "e2el")
ALLOWED = {"ttft": 5, "tpot": 2, "e2el": 2}  # percent, up to 90 % load
MEMORY_MS = 40
BINS = 12
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
}
Cases = Sequence[Mapping[str, Any]]


def by_policy(study: Mapping[str, Any]) -> dict[str, Cases]:
    """The judged cases of each policy, by load."""
    cases = sorted(study["cases"].values(), key=lambda case: case["load"])
    return {
        policy: [case for case in cases if case["policy"] == policy] for policy in sorted({c["policy"] for c in cases})
    }


def loads_figure(study: Mapping[str, Any]) -> Figure:
    """Mean latencies by load, real and simulated, above the errors of the policy with the most loads."""
    policies = by_policy(study)
    main = max(policies, key=lambda policy: len(policies[policy]))
    figure = Figure((10, 5.6), layout="constrained")
    axes = figure.subplots(2, len(LATENCIES), sharex=True)
    for column, latency in enumerate(LATENCIES):
        for policy, marker in zip(policies, "osD^v", strict=False):
            _means(axes[0, column], policies[policy], latency, marker, policy)
        axes[0, column].set(title=f"mean {LATENCY_NAMES[latency]}, ms", ylim=(0, None))
        _errors(axes[1, column], policies[main], latency)
    axes[0, 0].legend(fontsize=8)
    axes[1, 0].set_ylabel(f"error of {main}, %")
    axes[1, 0].legend(fontsize=8)
    figure.supxlabel("load, % of the capacity", fontsize=9)
    return figure


def _means(axes: Axes, cases: Cases, latency: str, marker: str, policy: str) -> None:
    loads = [100 * case["load"] for case in cases]
    real, sim = ([case["result"]["closed_loop"][latency]["mean"][of] for case in cases] for of in ("real", "sim"))
    spread = [case["result"]["repeat_spread"][latency]["mean"] or 0.0 for case in cases]
    bars = np.multiply(real, spread) / 2
    axes.errorbar(loads, real, bars, fmt=marker, mfc="none", color=COLOURS["measured"], label=f"{policy}, real")
    axes.plot(loads, sim, ":", marker=marker, ms=3, color=COLOURS["simulated"], label=f"{policy}, simulated")


def _errors(axes: Axes, cases: Cases, latency: str) -> None:
    loads = [100 * case["load"] for case in cases]
    axes.axhspan(-ALLOWED[latency], ALLOWED[latency], color="#888", alpha=0.12)
    axes.axhline(0, color="#888", lw=0.8)
    for statistic, dashes in zip(STATISTICS, ("-", "--", "-.", ":"), strict=True):
        errors = [case["result"]["closed_loop"][latency][statistic]["error"] for case in cases]
        percents = [np.nan if error is None else 100 * error for error in errors]
        axes.plot(loads, percents, dashes, marker="o", ms=3, color=COLOURS["measured"], label=statistic)


def cdf_figure(folder: Path) -> Figure:
    """Distributions over the requests of a case, for each real run and for the simulated run."""
    names = sorted(path.parent.name for path in folder.glob("*/manifest.json"))
    runs = {name: read_run(folder / name) for name in names}
    figure = Figure((10, 3), layout="constrained")
    panels = figure.subplots(1, len(LATENCIES), sharey=True)
    for name, run in runs.items():
        kind, values = "simulated" if name == "sim" else "measured", latencies(run)
        width, dashes = (1.4, "--") if name == "sim" else (1.0, "-")
        for axes, latency in zip(panels, LATENCIES, strict=True):
            points = np.sort(values[latency])
            axes.plot(points, np.arange(1, len(points) + 1) / len(points), dashes, lw=width, color=COLOURS[kind])
            axes.set(xscale="log", xlabel=f"{LATENCY_NAMES[latency]}, ms", ylim=(0, 1))
            axes.xaxis.set_major_locator(LogLocator(subs=(1,) if points[-1] > 30 * points[0] else (1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:,g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
    panels[0].set_ylabel("share of requests")
    panels[0].plot([], [], color=COLOURS["measured"], label=f"real, {len(runs) - 1} runs")
    panels[0].plot([], [], "--", color=COLOURS["simulated"], label="simulated")
    panels[0].legend(fontsize=8)
    figure.suptitle(folder.name, fontsize=9)
    return figure


def residuals_figure(cases: Mapping[str, Steps], sizes: GraphSizes | None) -> Figure:
    """The latency model's error against three causes: the memory, the rate just before, and the captured size."""
    figure = Figure((10, 3.4), layout="constrained")
    memory, rate, size = figure.subplots(1, 3)
    colours = dict(zip(cases, mpl.colormaps["viridis"](np.linspace(0, 0.9, len(cases))), strict=True))
    for name, steps in cases.items():
        line = {"color": colours[name], "marker": "o", "ms": 3, "lw": 1}
        correlations = [memory_correlation(steps, memory_ms) for memory_ms in MEMORIES_MS]
        memory.plot(MEMORIES_MS, [np.nan if each is None else each for each in correlations], label=name, **line)
        rate.plot(*_by_rate(steps), **line)
        errors = by_captured_size(steps, sizes) if sizes else {}
        size.plot(list(errors), [100 * each for each in errors.values()], **line)
    low, high = COMPUTE_BOUND
    memory.set(xscale="log", xlabel="memory, ms", title="correlation of measured / predicted\nwith the rate before")
    memory.set_xticks(MEMORIES_MS, map(str, MEMORIES_MS))
    memory.minorticks_off()
    rate.set(
        xlabel=f"tokens/µs over the last {MEMORY_MS} ms",
        title=f"steps that prefill, {low} to {high - 1:,} tokens:\nerror, %",
    )
    size.set(xlabel="rows of the captured step", title="steps that only decode:\nerror, %")
    figure.legend(loc="outside lower center", ncols=5, fontsize=8)
    return figure


def _by_rate(steps: Steps) -> tuple[list[float], list[float]]:
    """The mean error (%) of compute-bound steps by the rate before them, in bins of equally many."""
    chosen = steps.compute_bound
    rate, error = recent_rate(steps, MEMORY_MS)[chosen], 100 * steps.error[chosen]
    bins = [each for each in np.array_split(np.argsort(rate), BINS) if len(each)]
    return [float(rate[each].mean()) for each in bins], [float(error[each].mean()) for each in bins]


def draw(study: Path, out: Path) -> None:
    """Write the figures. The distributions are those of the heaviest load that was repeated."""
    judged = json.loads((study / "fidelity.json").read_text())
    repeated = [(case["load"], name) for name, case in judged["cases"].items() if case["result"]["repeats"]]
    graphs = read_profile(study / "profile").meta.get("graphs")
    out.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context(STYLE):
        figures = {
            "loads": loads_figure(judged),
            "cdf": cdf_figure(study / max(repeated)[1]),
            "residuals": residuals_figure(study_steps(study), GraphSizes(**graphs) if graphs else None),
        }
        for name, figure in figures.items():
            figure.savefig(out / f"{name}.png", dpi=110)


if __name__ == "__main__":
    draw(*map(Path, sys.argv[1:]))
