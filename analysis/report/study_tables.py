"""Shows policies ranked, and studies of fidelity, as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

from analysis.comparison.targets import CAPACITY, Targets
from analysis.metrics.names import COMPARED_STATISTICS, JUDGED_LATENCIES, LATENCIES, RANKED_METRICS
from analysis.report.caveats import beyond_sentences, sentences_by_run
from analysis.report.tables import TextTable, amount, number, percent, signed

KINDS = ("decode", "prefill", "mixed")


def ranking_sentence(ranking: Mapping[str, Any]) -> str:
    """How many orders simulation got right."""
    decided, ties = ranking["decided"], len(ranking["orders"]) - ranking["decided"]
    tied = f" ({ties} more {'is a tie' if ties == 1 else 'are ties'} on hardware)" if ties else ""
    return f"Of the {decided} orders that hardware decides{tied}, simulation got {ranking['same']} right."


def ranking_tables(ranking: Mapping[str, Any]) -> list[TextTable]:
    """A table for each pair of policies, with a row for each metric; the last says how many orders are right.

    Where the runs completed different requests, a table before them says so, and every row gets a star.
    """
    star = "" if {*ranking["completed"].values()} == {ranking["common"]} else " *"
    columns = ("", f"verdict{star}", "hardware", "spread", "simulation")
    tables = [_completed_table(ranking)] if star else []
    for pair in combinations(ranking["policies"], 2):
        orders = [order for order in ranking["orders"] if (order["first"], order["second"]) == pair]
        rows = [_order_row(order, star) for order in orders]
        tables.append(TextTable(f"From {pair[0]} to {pair[1]}", "", columns, rows, labels=2))
    return [*tables[:-1], replace(tables[-1], note=ranking_sentence(ranking))]


def _order_row(order: Mapping[str, Any], star: str) -> tuple[str, ...]:
    margins = signed(order["hardware"]), percent(order["spread"]), signed(order["simulation"])
    return RANKED_METRICS[order["metric"]], f"{order['verdict']}{star}", *margins


def _completed_table(ranking: Mapping[str, Any]) -> TextTable:
    rows = [(name, f"{count:,} of {ranking['asked']:,}") for name, count in ranking["completed"].items()]
    note = (
        f"The runs did not complete the same requests ({ranking['common']:,} completed in all). Metrics are of those "
        "that each run completed: an order with a * may come from that alone."
    )
    return TextTable("Before the numbers", note, ("", "completed"), rows)


def study_tables(study: Mapping[str, Any], targets: Targets) -> list[TextTable]:
    """The latency model and the closed loop of every case, the rankings, and the errors beyond their targets."""
    cases = sorted(study["cases"].values(), key=lambda case: (case["policy"], case["load"]))
    said = "\n".join(sentence for name, case in study["cases"].items() for sentence in _caveats(name, case["result"]))
    rankings = [
        replace(table, title=f"{load} load: {table.title}")
        for load, ranking in study["rankings"].items()
        for table in ranking_tables(ranking)
    ]
    return [
        *([TextTable("Before the numbers", said)] if said else []),
        _model_table(cases),
        *(_closed_loop_table(cases, latency) for latency in JUDGED_LATENCIES),
        *rankings,
        _verdict_table(study["verdicts"], targets),
    ]


def _caveats(name: str, result: Mapping[str, Any]) -> Iterator[str]:
    """The requests that a case's runs did not complete, and extrapolation."""
    yield from (f"{name}, {sentence}" for sentence in sentences_by_run(result["not_completed"], result["asked"]))
    yield from beyond_sentences({name: result["coverage"]})


def _model_table(cases: Sequence[Mapping[str, Any]]) -> TextTable:
    rows = []
    for case in cases:
        decisions, model = case["result"]["decisions"], case["result"]["latency_model"]
        known = [model.get(kind, {}) for kind in KINDS]
        errors = [f"{percent(of.get('mape'))} ({signed(of.get('mean_error'))})" for of in known]
        identical = "identical" if decisions["identical"] else "DIFFER"
        rows.append((case["policy"], f"{case['load']:.0%}", identical, f"{decisions['steps']:,}", *errors))
    title = "Latency model: MAPE (mean error) of predicted against measured time of the same batches"
    return TextTable(title, "", ("policy", "load", "decisions", "steps", *KINDS), rows, labels=3)


def _closed_loop_table(cases: Sequence[Mapping[str, Any]], latency: str) -> TextTable:
    rows = []
    for case in cases:
        errors, spread = (case["result"][part][latency] for part in ("closed_loop", "repeat_spread"))
        cells = [
            f"{number(errors[stat]['real'])} {signed(errors[stat]['error'])} ({percent(spread[stat])})"
            for stat in COMPARED_STATISTICS
        ]
        rows.append((case["policy"], f"{case['load']:.0%}", *cells))
    title = f"Closed loop: {LATENCIES[latency].label}: real ms, error, (spread of repeated real runs)"
    return TextTable(title, "", ("policy", "load", *COMPARED_STATISTICS), rows, labels=2)


def _verdict_table(verdicts: Sequence[Mapping[str, Any]], targets: Targets) -> TextTable:
    judged = [verdict for verdict in verdicts if verdict["within"] is not None]
    outside = [verdict for verdict in judged if not verdict["within"]]
    rows = [
        (each["case"], each["what"], signed(each["error"]), percent(each["allowed"]), percent(each["spread"]))
        for each in outside
    ]
    note = f"{len(judged) - len(outside)} of {len(judged)} errors are within what is allowed. {_told(targets)}"
    return TextTable("Not within what is allowed", note, ("case", "what", "error", "allowed", "spread"), rows, labels=2)


def _told(targets: Targets) -> str:
    """The targets in sentences."""
    model = ", ".join(f"{percent(mape)} of {kind} steps" for kind, mape in targets.model.items())
    wider = f", and up to {targets.spread_factor:g} times that within the spread of repeated real runs"
    at_capacity = f"; {_latencies(targets.at_capacity)} at {CAPACITY:.0%} load" if targets.at_capacity else ""
    widened = wider if targets.spread_factor > 1 else ""
    return f"Allowed: {_latencies(targets)}{widened}{at_capacity}; latency model MAPE {model}."


def _latencies(targets: Targets) -> str:
    return ", ".join(f"{LATENCIES[name].label} {percent(targets.of_latency(name))}" for name in JUDGED_LATENCIES)


def matrix_table(rows: Sequence[Mapping[str, Any]]) -> TextTable:
    """What `analysis.jobs.study.validate_matrix` found."""
    cells = [[_cell(value) for value in row.values()] for row in rows]
    return TextTable("Decisions: each real run against its replay in the simulator", "", [*rows[0]], cells)


def _cell(value: bool | float | str) -> str:
    return ("yes" if value else "NO") if isinstance(value, bool) else amount(value)
