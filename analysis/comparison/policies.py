"""Several policies on one workload, side by side: their numbers, and differences to the first.

It compares records with records. Latencies are of the requests that completed under every policy, so that no policy
looks better for those that it rejects.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from analysis.comparison.compare import compare_decisions
from analysis.comparison.runs import common_requests, flatten_manifest, manifest_differences
from analysis.metrics.columns import Ints, completed_requests
from analysis.metrics.names import COMPARED_LATENCIES, COMPARED_STATISTICS, JUDGED_LATENCIES
from analysis.metrics.summary import asked_for, latencies, latency_statistics, summarize
from engine.records.run_folder import RunRecords

SCHEMA_VERSION = 1
LATENCIES = (*COMPARED_LATENCIES, "normalized_latency")
TOTALS = (
    *("completed", "rejected", "cancelled", "preemptions", "own_slo_attainment"),
    *("request_throughput", "output_throughput", "duration_s"),
)
_PROVENANCE = ("provenance.commit", "provenance.profile", "provenance.source")
"""In which two simulations may well differ."""


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
        - `totals`: {total: {policy: value}}, of `TOTALS`
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
            name: {stat: {policy: of[name][stat] for policy, of in found.items()} for stat in COMPARED_STATISTICS}
            for name in LATENCIES
        },
        "totals": {name: {policy: of[name] for policy, of in totals.items()} for name in TOTALS},
        "clients": _clients(runs, ids),
    }


def _clients(runs: Mapping[str, RunRecords], ids: Ints) -> dict[str, Any]:
    (first, *_) = runs.values()
    clients = np.array([str(name) for name in completed_requests(first, ids, ("client",))["client"].to_pylist()])
    names = sorted({*clients.tolist()})
    return {name: _client(runs, ids[clients == name]) for name in names} if len(names) > 1 else {}


def _client(runs: Mapping[str, RunRecords], ids: Ints) -> dict[str, Any]:
    found = {policy: latency_statistics(latencies(run, ids)) for policy, run in runs.items()}
    means = {name: {policy: of[name]["mean"] for policy, of in found.items()} for name in JUDGED_LATENCIES}
    return {"requests": len(ids)} | means


def compare_simulations(runs: Mapping[str, RunRecords], allow_different: Collection[str] = ()) -> dict[str, Any]:
    """Set two simulations of one workload side by side.

    Args:
        runs: two, by name; differences are to the first.
        allow_different: manifest fields of the workload in which they may differ.

    Returns:
        As `compare_policies`, by name, and `manifest_differences`: {field: {name: value}}; `decisions`: as
        `analysis.comparison.compare.compare_decisions`, by name.

    Raises:
        TandemError: the workloads differ in a field that is not allowed to.
    """
    (one, first), (other, second) = runs.items()
    # The worth of a limit or policy is why one compares.
    differences = manifest_differences(runs, {"system", *allow_different})
    return compare_policies(runs) | {
        "manifest_differences": differences | _provenance(runs),
        "decisions": compare_decisions(first, second, (one, other)),
    }


def _provenance(runs: Mapping[str, RunRecords]) -> dict[str, dict[str, Any]]:
    flat = {name: flatten_manifest(run, ("provenance",)) for name, run in runs.items()}
    values = {field: {name: of.get(field) for name, of in flat.items()} for field in _PROVENANCE}
    return {field: of for field, of in values.items() if len({*of.values()}) > 1}
