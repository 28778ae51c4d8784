"""A run's summary, and other facts, as tables with units."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from analysis.metrics.names import COMPARED_STATISTICS, LATENCIES, P99_REQUESTS, TOTALS, Metric, latency_key
from analysis.report.caveats import p99_sentence
from analysis.report.tables import TextTable, amount, number, percent

SHARES = ("own_slo_attainment", "prefix_cache_hit_rate")  # totals that are fractions
OF_CACHE = ("cached_tokens", "prefix_cache_hit_rate")
COUNTED = {
    **dict.fromkeys(("completed", "rejected", "cancelled", "unfinished"), "requests"),
    **dict.fromkeys(("total_input_tokens", "total_output_tokens", "wasted_tokens", "cached_tokens"), "tokens"),
    **dict.fromkeys(("steps_prefill", "steps_decode", "steps_mixed"), "steps"),
    "preemptions": "times",
    "mean_batch": "sequences",
    "own_slo_attainment": "of requests",
    "prefix_cache_hit_rate": "of tokens",
}
"""What totals without a unit count."""
HOST = ("median_schedule_us", "median_launch_us")  # of a machine, not of the requests
SEND_LAG = Metric("send lag, P99", "from a request's arrival to the client's sending it", "ms")


class Fact(NamedTuple):
    """A value with its name and unit."""

    name: str
    value: str
    unit: str = ""


def facts_table(facts: list[Fact], title: str, note: str = "") -> TextTable:
    """Facts, a row each."""
    return TextTable(title, note, ("", "value", "unit"), facts)


def run_tables(summary: Mapping[str, Any], title: str, limits: str, caches: bool) -> list[TextTable]:
    """A run's totals and latencies; what was not measured has no row, and a reason if it is a latency.

    Args:
        summary: as `analysis.metrics.summary.summarize`, of which keys may be missing.
        title: of the run.
        limits: that it was served within, in words.
        caches: whether prompt prefixes were shared.
    """
    head, totals = TextTable(title, limits), facts_table([*_totals(summary, caches)], "Totals")
    return [head, totals, _latency_table(summary)] if summary["completed"] else [head, totals]


def _totals(summary: Mapping[str, Any], caches: bool) -> Iterator[Fact]:
    for name, metric in (TOTALS | {"p99_send_lag_ms": SEND_LAG}).items():
        value = summary.get(name)
        if value is None or name in HOST or (name in OF_CACHE and not caches):
            continue
        shown = percent(value) if name in SHARES else amount(value)
        yield Fact(metric.label, shown, metric.unit or COUNTED[name])


def _latency_table(summary: Mapping[str, Any]) -> TextTable:
    rows = {name: [summary.get(latency_key(each, name)) for each in COMPARED_STATISTICS] for name in LATENCIES}
    known = {name: of for name, of in rows.items() if of[0] is not None}
    cells = [(LATENCIES[name].label, *map(number, of)) for name, of in known.items()]
    columns = ("", *(name.replace("p", "P") for name in COMPARED_STATISTICS))
    single = " and ".join(LATENCIES[name].label for name in ("tpot", "itl") if name not in known)
    unmeasured = f"Not measured: {single}, for no output has a second token." if single else ""
    note = f"{unmeasured} {p99_sentence(summary['completed'])}".strip()
    end = None if summary["completed"] >= P99_REQUESTS else -1  # there is no P99, which is the last
    return TextTable("Latency, ms", note, columns[:end], [row[:end] for row in cells])
