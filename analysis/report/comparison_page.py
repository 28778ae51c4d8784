"""Shows a comparison to people: tables on a console, and one HTML page that needs no network.

It may not compute an error or a verdict: those come from `analysis.comparison`. It draws from the records of the runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from analysis.comparison.compare import equal_steps
from analysis.comparison.runs import flatten_manifest
from analysis.metrics.names import COMPARED_LATENCIES, COMPARED_STATISTICS, LATENCIES, TOTALS
from analysis.report.attribution_tables import ablation_tables, attribution_tables
from analysis.report.caveats import NOTHING_COMPLETED, beyond_sentence, p99_sentence, sentences_by_run
from analysis.report.figures import cdf_figure, steps_figure, time_figure
from analysis.report.html import Definitions, Heading, Part, write_page
from analysis.report.run_facts import run_facts
from analysis.report.tables import TextTable, amount, number, percent, print_tables, signed
from analysis.report.verdict import decisions_sentence, difference_table, spread_cell, verdict_sentences, verdict_table
from engine.records.run_folder import RunRecords
from sim.replay import Replay


def print_comparison(comparison: Mapping[str, Any], console: Console) -> None:
    """Print caveats, the three parts of a comparison, the sources of its error, and the verdict."""
    if said := [*_caveats(comparison)]:
        console.print(Text("\n".join(said) + "\n"))
    print_tables((*_parts(comparison), *_explanations(comparison), verdict_table(comparison)), console)
    console.print(Text(" ".join(verdict_sentences(comparison))))


def write_report(
    comparison: Mapping[str, Any], sim: RunRecords, real: RunRecords, replayed: Replay, path: Path, *, title: str
) -> None:
    """Write a comparison as one self-contained HTML page, or nothing.

    Args:
        comparison: what `compare` returned for these runs.
        sim: the simulated run.
        real: the real run.
        replayed: the real run's batches with predicted times.
        path: the file.
        title: its heading.

    Raises:
        TandemError: the file cannot be written.
    """
    decisions, latency_model, closed_loop = _parts(comparison)
    runs = {"measured": real, "simulated": sim}
    parts: tuple[Part, ...] = (
        verdict_table(comparison),
        decisions,
        latency_model,
        steps_figure(real, replayed, equal_steps(comparison["decisions"])),
        closed_loop,
        Definitions({LATENCIES[name].label: LATENCIES[name].definition for name in COMPARED_LATENCIES}),
        cdf_figure(runs),
        *_explanations(comparison),
        time_figure(runs),
        _totals_table(comparison["metrics"]),
        _manifest_table(real, sim),
    )
    write_page(path, Heading(title, run_facts(runs), headline(comparison)), parts)


def headline(comparison: Mapping[str, Any]) -> str:
    """Caveats, scope and verdicts in plain sentences."""
    return " ".join((*_caveats(comparison), *verdict_sentences(comparison)))


def _caveats(comparison: Mapping[str, Any]) -> Iterator[str]:
    """Sentences before any number: requests that did not complete, and extrapolation."""
    yield from sentences_by_run(comparison["not_completed"], comparison["asked"])
    if not comparison["requests"]:
        yield NOTHING_COMPLETED
    elif comparison["requests"] < comparison["asked"]:
        yield f"Latencies are of the {comparison['requests']:,} that completed in both runs."
    if beyond := beyond_sentence(comparison["coverage"]):
        yield beyond


# -- tables ----------------------------------------------------------------------------------------------------


def _parts(comparison: Mapping[str, Any]) -> tuple[TextTable, TextTable, TextTable]:
    decisions, model = comparison["decisions"], comparison["latency_model"]
    replay = "1. Decisions: the real run against its replay"
    batches = "2. Latency model: predicted against measured time of the same batches"
    errors = [(kind, f"{of['steps']:,}", percent(of["mape"]), signed(of["mean_error"])) for kind, of in model.items()]
    return (
        difference_table(replay, decisions_sentence(decisions), decisions, ("real", "replay")),
        TextTable(batches, "", ("kind of step", "steps", "MAPE", "mean error"), errors),
        _closed_loop_table(comparison),
    )


def _explanations(comparison: Mapping[str, Any]) -> list[TextTable]:
    """Where the error comes from, and the worth of the model's terms if that was asked for."""
    return [*attribution_tables(comparison["attribution"]), *ablation_tables(comparison.get("ablation"))]


def _closed_loop_table(comparison: Mapping[str, Any]) -> TextTable:
    rows = []
    for name in COMPARED_LATENCIES:
        part, spread = comparison["closed_loop"][name], comparison["repeat_spread"][name]
        head, tail = LATENCIES[name].label, (percent(part["mape"]), number(part["ks"]))
        for stat in COMPARED_STATISTICS:
            real, sim, error = part[stat].values()
            if (real, sim) != (None, None):
                values = number(real), number(sim), signed(error), spread_cell(spread[stat], comparison)
                rows.append((head, stat, *values, *tail))
                head, tail = "", ("", "")
    note = "Spread: of repeats of the real run. MAPE: per request. KS: distance of the two distributions."
    note = f"{note} {p99_sentence(comparison['requests'])}".rstrip() if rows else NOTHING_COMPLETED
    columns = ("", "", "real ms", "sim ms", "error", "spread", "MAPE", "KS")
    return TextTable(f"3. Closed loop: what {_whose(comparison)} saw", note, columns, rows, labels=2)


def _whose(comparison: Mapping[str, Any]) -> str:
    if comparison["requests"] == comparison["asked"]:
        return "the requests"
    return f"the {comparison['requests']:,} of {comparison['asked']:,} requests that completed in both runs"


def _totals_table(metrics: Mapping[str, Mapping[str, Any]]) -> TextTable:
    real, sim = metrics["real"], metrics["sim"]
    rows = [
        (name, total.definition, amount(real[name]), amount(sim[name]))
        for name, total in TOTALS.items()
        if (real[name], sim[name]) != (None, None)
    ]
    return TextTable("Totals", "", ("", "", "real", "sim"), rows, labels=2)


def _manifest_table(real: RunRecords, sim: RunRecords) -> TextTable:
    ours, theirs = (flatten_manifest(run, ("workload", "system", "provenance")) for run in (real, sim))
    rows = [(field, str(ours.get(field, "–")), str(theirs.get(field, "–"))) for field in ours | theirs]
    return TextTable("Manifest", "", ("field", "real", "simulated"), rows, labels=3)
