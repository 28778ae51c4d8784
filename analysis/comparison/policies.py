"""Several policies on one workload, side by side: one table and one page, differences to the first.

It compares records with records. Latencies are of the requests that completed under every policy, lest one look better
for those that it rejects.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis.comparison.compare import CLOSED_LOOP, common_requests
from analysis.metrics.columns import Ints
from analysis.metrics.names import LATENCIES, TOTALS
from analysis.metrics.summary import asked_for, latencies, latency_statistics, summarize
from analysis.report.caveats import NOTHING_COMPLETED, beyond_sentence, p99_sentence, sentences_by_run
from analysis.report.figures import LATENCY_NAMES, policy_figures
from analysis.report.html import write_page
from analysis.report.tables import TextTable, amount, html_table, number, signed
from engine.records.run_folder import RunRecords

SCHEMA_VERSION = 1
STATISTICS = ("mean", "p50", "p90", "p99")
SHOWN_TOTALS = {
    "completed": "completed",
    "rejected": "rejected",
    "cancelled": "cancelled",
    "preemptions": "preemptions",
    "own_slo_attainment": "SLOs met",
    "request_throughput": "requests/s",
    "output_throughput": "tokens/s",
    "duration_s": "seconds",
}
"""Of `analysis.metrics.summary.TOTALS` -> their names for people."""

CLIENT_LATENCIES = ("ttft", "tpot", "e2el")
_NAMES = LATENCY_NAMES | {"normalized_latency": "E2E / output"}

Values = dict[str, float | None]  # by policy


def compare_policies(runs: Mapping[str, RunRecords]) -> dict[str, Any]:
    """Set several policies' runs of one workload side by side.

    Args:
        runs: by policy; others are compared to the first.

    Returns:
        - `policies`: their names, in order
        - `requests`: how many completed under all of them; `asked`: how many were to be served
        - `same`: whether all completed the same ones; `not_completed`: {policy: as `analysis.metrics.summary` says}
        - `coverage`: {policy: as `sim.latency_model.LatencyModel.coverage`, or None}
        - `latencies`: {latency: {statistic: {policy: ms}}}, of these requests; p99 is None below `P99_REQUESTS`
        - `totals`: {total: {policy: value}}, of `SHOWN_TOTALS`
        - `clients`: {client: {"requests": how many, latency: {policy: mean in ms}}}, if there are several
    """
    ids = common_requests(*runs.values())
    found = {policy: latency_statistics(latencies(run, ids)) for policy, run in runs.items()}
    totals = {policy: summarize(run) for policy, run in runs.items()}
    return {
        "schema": SCHEMA_VERSION,
        "policies": list(runs),
        "requests": len(ids),
        "asked": max(map(asked_for, runs.values())),
        "same": all(of["completed"] == len(ids) for of in totals.values()),
        "not_completed": {policy: of["not_completed"] for policy, of in totals.items()},
        "coverage": {policy: run.summary.get("profile_lookups") for policy, run in runs.items()},
        "latencies": {
            name: {stat: {policy: of[name][stat] for policy, of in found.items()} for stat in STATISTICS}
            for name in _NAMES
        },
        "totals": {name: {policy: of[name] for policy, of in totals.items()} for name in SHOWN_TOTALS},
        "clients": _clients(runs, ids),
    }


def _clients(runs: Mapping[str, RunRecords], ids: Ints) -> dict[str, Any]:
    (first, *_) = runs.values()
    table = first.tables["requests"]
    sent = dict(zip(table["request"].to_pylist(), table["client"].to_pylist(), strict=True))
    of_client: dict[str, list[int]] = {}
    for request in ids.tolist():
        of_client.setdefault(str(sent[request]), []).append(request)
    return {name: _client(runs, np.array(of_client[name])) for name in sorted(of_client)} if len(of_client) > 1 else {}


def _client(runs: Mapping[str, RunRecords], ids: Ints) -> dict[str, Any]:
    found = {policy: latency_statistics(latencies(run, ids)) for policy, run in runs.items()}
    means = {name: {policy: of[name]["mean"] for policy, of in found.items()} for name in CLIENT_LATENCIES}
    return {"requests": len(ids)} | means


def policy_tables(comparison: Mapping[str, Any]) -> list[TextTable]:
    """A comparison for people: what is missing; then with a row for each policy latencies, totals and, if there are
    several, each client's."""
    missing = "\n".join(caveats(comparison))
    before = [TextTable("Before the numbers", missing, (), ())] if missing else []
    return [*before, *_number_tables(comparison)]


def caveats(comparison: Mapping[str, Any]) -> Iterator[str]:
    """What must be known before any number: whom a policy did not serve, and what was extrapolated."""
    yield from sentences_by_run(comparison["not_completed"], comparison["asked"])
    if not comparison["same"]:
        yield f"They did not complete the same requests: latencies are of the {comparison['requests']:,} that all did."
    if not comparison["requests"]:
        yield NOTHING_COMPLETED
    for policy, coverage in comparison["coverage"].items():
        if beyond := beyond_sentence(coverage):
            yield f"{policy}: {beyond[0].lower()}{beyond[1:]}"


def _number_tables(comparison: Mapping[str, Any]) -> list[TextTable]:
    policies = comparison["policies"]
    note = (
        f"Of the {comparison['requests']:,} requests that all completed; differences to {policies[0]}. "
        f"{p99_sentence(comparison['requests'])}"
    )
    found = {name: of for name, of in comparison["latencies"].items() if _is_known(of["mean"])}
    shown = [stat for stat in STATISTICS if any(_is_known(of[stat]) for of in found.values())]
    latency_rows = [
        (
            _NAMES[name] if place == 0 else "",
            *_label(comparison, policy),
            *_with_differences((of[stat] for stat in shown), policy, policies[0]),
        )
        for name, of in found.items()
        for place, policy in enumerate(policies)
    ]
    columns = [text for stat in shown for text in (stat, "")]
    heads = _heads(comparison)
    latency = TextTable("Latency, ms", note.rstrip(), ("", *heads, *columns), latency_rows, labels=1 + len(heads))
    return [latency, _totals_table(comparison), *_client_tables(comparison)]


def _is_known(values: Values) -> bool:
    return any(value is not None for value in values.values())


def _heads(comparison: Mapping[str, Any]) -> tuple[str, ...]:
    return ("",) if comparison["same"] else ("", "completed")


def _label(comparison: Mapping[str, Any], policy: str) -> tuple[str, ...]:
    """The policy and, where they completed different requests, how many it did: beside every number."""
    return (policy,) if comparison["same"] else (policy, _completed(comparison, policy))


def _name(comparison: Mapping[str, Any], policy: str) -> str:
    """As `_label`, in one."""
    return policy if comparison["same"] else f"{policy} ({_completed(comparison, policy)})"


def _completed(comparison: Mapping[str, Any], policy: str) -> str:
    return f"{comparison['totals']['completed'][policy]:,} of {comparison['asked']:,}"


def _totals_table(comparison: Mapping[str, Any]) -> TextTable:
    shown = {name: values for name, values in comparison["totals"].items() if any(values.values())}
    if not comparison["same"]:
        shown.pop("completed", None)  # it is in the label
    rows = [
        (*_label(comparison, policy), *(amount(values[policy]) for values in shown.values()))
        for policy in comparison["policies"]
    ]
    heads, note = _heads(comparison), "" if comparison["same"] else "Of the requests that each completed."
    return TextTable("Totals", note, (*heads, *(SHOWN_TOTALS[name] for name in shown)), rows, labels=len(heads))


def _client_tables(comparison: Mapping[str, Any]) -> list[TextTable]:
    policies = comparison["policies"]
    rows = [
        (
            *((client, f"{of['requests']:,}") if place == 0 else ("", "")),
            *_label(comparison, policy),
            *_with_differences((of[name] for name in CLIENT_LATENCIES), policy, policies[0]),
        )
        for client, of in comparison["clients"].items()
        for place, policy in enumerate(policies)
    ]
    columns = [text for name in CLIENT_LATENCIES for text in (f"mean {_NAMES[name]}", "")]
    heads, note = _heads(comparison), "" if comparison["same"] else "Of the requests that all completed."
    labels = 2 + len(heads)
    return [TextTable("By client, ms", note, ("", "requests", *heads, *columns), rows, labels)] if rows else []


def _with_differences(values: Iterable[Values], policy: str, first: str) -> Iterator[str]:
    for of in values:
        value, reference = of[policy], of[first]
        yield number(value)
        yield signed(value / reference - 1) if value is not None and reference and policy != first else ""


def write_policy_page(
    comparison: Mapping[str, Any],
    runs: Mapping[str, RunRecords],
    path: Path,
    title: str,
    opening: str = "",
    further: Sequence[TextTable] = (),
) -> None:
    """Write the comparison as one self-contained HTML page.

    Args:
        comparison: what `compare_policies` returned for these runs.
        runs: by policy.
        path: the page.
        title: its heading.
        opening: a sentence that comes before all others.
        further: tables that come after its own.

    Raises:
        TandemError: the page cannot be written.
    """
    latency, totals, *clients = _number_tables(comparison)
    names = {policy: _name(comparison, policy) for policy in runs}
    bars = {
        name: {
            stat: {names[policy]: value for policy, value in values.items()}
            for stat, values in comparison["latencies"][name].items()
        }
        for name in CLOSED_LOOP
    }
    figures = policy_figures({names[policy]: run for policy, run in runs.items()}, bars)
    words = [f"<dt>{name}</dt><dd>{LATENCIES[key].definition}</dd>" for key, name in LATENCY_NAMES.items()]
    words += [f"<dt>{name}</dt><dd>{TOTALS[key].definition}</dd>" for key, name in SHOWN_TOTALS.items()]
    body = [
        html_table(latency),
        f"<figure>{figures['cdf_figure']}<figcaption>The fraction of values at or below a latency: of requests, or for "
        "ITL of all gaps. A click on a policy hides it. Where there are many values, evenly spaced ones are drawn."
        "</figcaption></figure>",
        f"<figure>{figures['bar_figure']}</figure>",
        *map(html_table, (totals, *clients, *further)),
        f"<h2>Definitions</h2><dl>{''.join(words)}</dl>",
    ]
    headline = " ".join(filter(None, (opening, *caveats(comparison), _headline(comparison))))
    write_page(path, title, headline, "\n".join(body))


def _headline(comparison: Mapping[str, Any]) -> str:
    """Which policy is best by each mean, in a sentence."""
    best = []
    for name in ("ttft", "tpot", "e2el"):
        values: Values = comparison["latencies"][name]["mean"]
        known = {policy: value for policy, value in values.items() if value is not None}
        if known:
            policy = min(known, key=lambda each: known[each])
            best.append(f"mean {LATENCY_NAMES[name]} {_name(comparison, policy)} ({number(known[policy])} ms)")
    lowest = f" Lowest: {', '.join(best)}." if best else ""
    return f"{comparison['requests']:,} requests completed under all of {', '.join(comparison['policies'])}.{lowest}"
