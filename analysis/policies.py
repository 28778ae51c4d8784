"""Several policies on one workload, side by side: one table and one page, differences to the first.

It compares records with records. Latencies are of the requests that completed under every policy, lest one look better
for those that it rejects.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from analysis.compare import CLOSED_LOOP, common_requests
from analysis.figures import LATENCY_NAMES, policy_figures
from analysis.metrics import LATENCIES, P99_REQUESTS, TOTALS, Ints, latencies, latency_statistics, metrics
from analysis.page import write_page
from analysis.tables import TextTable, amount, html_table, number, signed
from engine.records import RunRecords

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
"""Of `analysis.metrics.TOTALS` -> their names for people."""

CLIENT_LATENCIES = ("ttft", "tpot", "e2el")
_NAMES = LATENCY_NAMES | {"normalized_latency": "E2E / output"}

Values = dict[str, float | None]  # by policy


def compare_policies(runs: Mapping[str, RunRecords]) -> dict[str, Any]:
    """Set several policies' runs of one workload side by side.

    Args:
        runs: by policy; others are compared to the first.

    Returns:
        - `policies`: their names, in order
        - `requests`: how many completed under all of them
        - `latencies`: {latency: {statistic: {policy: ms}}}, of these requests; p99 is None below `P99_REQUESTS`
        - `totals`: {total: {policy: value}}, of `SHOWN_TOTALS`
        - `clients`: {client: {"requests": how many, latency: {policy: mean in ms}}}, if there are several
    """
    ids = common_requests(*runs.values())
    found = {policy: latency_statistics(latencies(run, ids)) for policy, run in runs.items()}
    totals = {policy: metrics(run) for policy, run in runs.items()}
    return {
        "schema": SCHEMA_VERSION,
        "policies": list(runs),
        "requests": len(ids),
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
    """A comparison for people, a row for each policy: latencies, totals and, if there are several, each client's."""
    policies = comparison["policies"]
    note = (
        f"Of the {comparison['requests']:,} requests that completed under every policy; differences to {policies[0]}."
    )
    if comparison["requests"] < P99_REQUESTS:
        note += f" P99 is shown from {P99_REQUESTS} requests up."
    latency_rows = [
        (_NAMES[name] if place == 0 else "", policy, *_with_differences(by_statistic.values(), policy, policies[0]))
        for name, by_statistic in comparison["latencies"].items()
        for place, policy in enumerate(policies)
    ]
    columns = [text for stat in STATISTICS for text in (stat, "")]
    latency = TextTable("Latency, ms", note, ("", "", *columns), latency_rows, labels=2)
    return [latency, _totals_table(comparison), *_client_tables(comparison)]


def _totals_table(comparison: Mapping[str, Any]) -> TextTable:
    shown = {name: values for name, values in comparison["totals"].items() if any(values.values())}
    rows = [(policy, *(amount(values[policy]) for values in shown.values())) for policy in comparison["policies"]]
    return TextTable("Totals", "", ("", *(SHOWN_TOTALS[name] for name in shown)), rows)


def _client_tables(comparison: Mapping[str, Any]) -> list[TextTable]:
    policies = comparison["policies"]
    rows = [
        (
            *((client, f"{of['requests']:,}") if place == 0 else ("", "")),
            policy,
            *_with_differences((of[name] for name in CLIENT_LATENCIES), policy, policies[0]),
        )
        for client, of in comparison["clients"].items()
        for place, policy in enumerate(policies)
    ]
    columns = [text for name in CLIENT_LATENCIES for text in (f"mean {_NAMES[name]}", "")]
    return [TextTable("By client, ms", "", ("", "requests", "", *columns), rows, labels=3)] if rows else []


def _with_differences(values: Iterable[Values], policy: str, first: str) -> Iterator[str]:
    for of in values:
        value, reference = of[policy], of[first]
        yield number(value)
        yield signed(value / reference - 1) if value is not None and reference and policy != first else ""


def write_policy_page(comparison: Mapping[str, Any], runs: Mapping[str, RunRecords], path: Path, title: str) -> None:
    """Write the comparison as one self-contained HTML page. Raises TandemError if it cannot be written."""
    latency, totals, *clients = policy_tables(comparison)
    bars = {name: comparison["latencies"][name] for name in CLOSED_LOOP}
    figures = policy_figures(runs, bars)
    words = [f"<dt>{name}</dt><dd>{LATENCIES[key]}</dd>" for key, name in LATENCY_NAMES.items()]
    words += [f"<dt>{name}</dt><dd>{TOTALS[key]}</dd>" for key, name in SHOWN_TOTALS.items()]
    body = [
        html_table(latency),
        f"<figure>{figures['cdf_figure']}<figcaption>The fraction of values at or below a latency: of requests, or for "
        "ITL of all gaps. A click on a policy hides it. Where there are many values, evenly spaced ones are drawn."
        "</figcaption></figure>",
        f"<figure>{figures['bar_figure']}</figure>",
        *map(html_table, (totals, *clients)),
        f"<h2>Definitions</h2><dl>{''.join(words)}</dl>",
    ]
    write_page(path, title, _headline(comparison), "\n".join(body))


def _headline(comparison: Mapping[str, Any]) -> str:
    """Which policy is best by each mean, in a sentence."""
    best = []
    for name in ("ttft", "tpot", "e2el"):
        values: Values = comparison["latencies"][name]["mean"]
        known = {policy: value for policy, value in values.items() if value is not None}
        if known:
            policy = min(known, key=lambda each: known[each])
            best.append(f"mean {LATENCY_NAMES[name]} {policy} ({number(known[policy])} ms)")
    lowest = f" Lowest: {', '.join(best)}." if best else ""
    return f"{comparison['requests']:,} requests completed under all of {', '.join(comparison['policies'])}.{lowest}"
