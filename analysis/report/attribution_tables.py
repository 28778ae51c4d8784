"""Where a closed-loop error comes from, and the worth of each term of the latency model: tables and sentences."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from analysis.comparison.ablation import FULL, KV_BLOCKS
from analysis.comparison.attribution import CERTAIN, NEGLIGIBLE, STEPS_MIN, TERMS
from analysis.comparison.compare import KINDS
from analysis.metrics.names import JUDGED_LATENCIES, LATENCIES, latency_label
from analysis.report.tables import TextTable, percent, signed

TITLE = "Where the closed-loop error of the means comes from"
LABELS = {term: f"{term} steps" for term in TERMS} | {"host": "host between steps", "queueing": "queueing and batching"}


def attribution_sentence(attribution: Mapping[str, Any]) -> str:
    """The largest term of each latency's error, and the kernel whose prediction is clearly wrong."""
    return " ".join(_sentences(attribution["latencies"], attribution["kernels"] or {}))


def _sentences(found: Mapping[str, Any], kernels: Mapping[str, Any]) -> Iterator[str]:
    largest = {name: (part["largest"], part["terms"][part["largest"]]["error"]) for name, part in found.items()}
    told = [
        f"of {latency_label('mean', name)} ({signed(found[name]['error'])}), {LABELS[term]} ({signed(error)})"
        for name, (term, error) in largest.items()
        if abs(error) >= NEGLIGIBLE
    ]
    if told:
        yield f"The largest term of the error is: {'; '.join(told)}."
    else:
        yield "There is no closed-loop error to break down."
    if name := kernels.get("largest"):
        kernel = kernels["kernels"][name]
        off = f"{abs(kernel['error']):.1%} too {'long' if kernel['error'] > 0 else 'short'}"
        yield f"By kernel, {name} is predicted {off}, {abs(kernel['ms_per_step']):.3g} ms a step."
    elif kernels.get("kernels"):
        yield "No kernel's prediction is clearly too long or too short."


def attribution_tables(attribution: Mapping[str, Any] | None) -> list[TextTable]:
    """The error by term, and by kernel where there was something to fit."""
    if attribution is None:
        return [TextTable(TITLE, "Not broken down: the decisions differ, so that the error is not of times alone.")]
    found, kernels = attribution["latencies"], attribution["kernels"]
    columns = ["", *(name for latency in found for name in (f"{LATENCIES[latency].label} ms", "error"))]
    terms = [term for term in TERMS if any(term in part["terms"] for part in found.values())]
    rows = [[LABELS[term], *_cells(part["terms"][term] for part in found.values())] for term in terms]
    if found:
        rows.append(["all", *_cells({"ms": part["error_ms"], "error": part["error"]} for part in found.values())])
    table = TextTable(TITLE, attribution_sentence(attribution), columns, rows)
    return [table, _kernel_table(kernels)] if kernels and kernels["kernels"] else [table]


def _cells(errors: Iterable[Mapping[str, float]]) -> list[str]:
    return [cell for error in errors for cell in (f"{error['ms']:+z,.3f}", signed(error["error"]))]


def _kernel_table(kernels: Mapping[str, Any]) -> TextTable:
    rows = []
    for name, kernel in kernels["kernels"].items():
        off, off_ms = kernel["uncertainty"], kernel["ms_uncertainty"]
        share = signed(kernel["error"]), "–" if off is None else f"±{percent(off)}"
        absolute = f"{kernel['ms_per_step']:+z.3f}", "–" if off_ms is None else f"±{off_ms:.3f}"
        rows.append((name, f"{kernel['steps']:,}", *share, *absolute, "yes" if kernel["certain"] else "no"))
    note = (
        f"Each kernel's predicted times, fitted by a factor to the {kernels['steps']:,} measured steps. "
        f"±: how far one standard error moves the number before it. Clear: at least {STEPS_MIN} steps, and "
        f"{CERTAIN:.0f} standard errors in ms a step."
    )
    columns = ("kernel", "steps", "predicted", "±", "ms a step", "±", "clear")
    return TextTable("Which kernel is predicted too long (+) or too short (-)", note, columns, rows)


def ablation_tables(ablation: Mapping[str, Any] | None) -> list[TextTable]:
    """Errors of the full model and of the model without each term, if an ablation was asked for."""
    if not ablation:
        return []
    named = {"nothing" if term == FULL else term: result for term, result in ablation.items()}
    kinds = [kind for kind in KINDS if kind in ablation[FULL]["latency_model"]]
    open_loop = [(name, *(_both(of["latency_model"][kind]) for kind in kinds)) for name, of in named.items()]
    closed_loop = [
        (name, f"{of['num_blocks']:,}", *map(signed, of["closed_loop"].values())) for name, of in named.items()
    ]
    batches = "Ablation, open loop: predicted against measured time of the same batches, without a term"
    simulation = "Ablation, closed loop: errors of the means in a simulation without a term"
    note = f"Without {KV_BLOCKS}: as many as fit in the usable memory less the weights." * (KV_BLOCKS in ablation)
    means = [latency_label("mean", name) for name in JUDGED_LATENCIES]
    return [
        TextTable(batches, "MAPE and mean error, by kind of step.", ("without", *kinds), open_loop),
        TextTable(simulation, note, ("without", "KV blocks", *means), closed_loop),
    ]


def _both(errors: Mapping[str, float | None]) -> str:
    return f"{percent(errors['mape'])} {signed(errors['mean_error']):\u2007>7}"  # HTML keeps this space
