"""Does simulation order policies as hardware does? For each metric and pair of policies, with margins.

It compares records with records: one simulated run of each policy, and one real run or more, all of one workload on one
system. What repeated real runs of a policy differ by is its spread, within which hardware itself orders nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import combinations
from typing import Any

from analysis.comparison.compare import RIDERS, common_requests, manifest_differences, relative_spread, rider
from analysis.metrics.summary import asked_for, metrics
from analysis.report.tables import TextTable, percent, signed
from engine.records.run_folder import RunRecords
from traces.errors import TandemError

SCHEMA_VERSION = 1
_NAMES = {"ttft": "TTFT", "tpot": "TPOT", "e2el": "E2E"}
METRICS = {
    **{f"{stat}_{key}_ms": f"{stat} {name}" for key, name in _NAMES.items() for stat in ("mean", "p50", "p90", "p99")},
    "mean_normalized_latency_ms": "normalized latency",
    "output_throughput": "output throughput",
}
"""What policies are ordered by -> its name for people."""

SAME, OTHER, TIE = "same order", "other order", "tie on hardware"
POLICY = "system.scheduler"

Metrics = Mapping[str, float | None]
Policies = dict[str, dict[str, list[Metrics]]]  # policy -> rider -> the metrics of each of its runs


def rank(runs: Mapping[str, RunRecords], allow_different: Collection[str] = ()) -> dict[str, Any]:
    """Compare the order of policies in simulation with that on hardware.

    Args:
        runs: simulated and real runs by name, told apart by `provenance.backend`.
        allow_different: manifest fields, besides the policy, in which they may differ.

    Returns:
        - `policies`: {policy: number of its real runs}
        - `metrics`: {metric: {policy: {real: mean of the runs, spread: (max - min) / mean or None, sim}}}
        - `orders`: [{metric, first, second, hardware, spread, simulation, verdict}]: `hardware` and `simulation` are
          (second - first) / first; `spread` is the larger of the two policies'. The spread of a policy that ran once
          is taken to be the largest of the others'; where no policy was repeated, it is None
        - `decided`, `same`: how many orders hardware decides, and how many of them simulation got right; `sentence`
        - `asked`: requests that were to be served; `completed`: {run: how many were}; `common`: how many in all runs
        - `manifest_differences`: other fields that differ, by run

    Raises:
        TandemError: the runs are not of one workload and system, a policy does not have one simulated run and a real
            one, there are fewer than two policies, or a run was interrupted.
    """
    differences = _differences(runs, allow_different)
    policies = _policies(runs)
    table = {metric: {policy: _values(of, metric) for policy, of in policies.items()} for metric in METRICS}
    orders = [order for metric in METRICS for order in _orders(metric, table[metric])]
    verdicts = [order["verdict"] for order in orders]
    same, decided = verdicts.count(SAME), len(verdicts) - verdicts.count(TIE)
    return {
        "schema": SCHEMA_VERSION,
        "policies": {policy: len(of["real"]) for policy, of in policies.items()},
        "metrics": table,
        "orders": orders,
        "decided": decided,
        "same": same,
        "sentence": _sentence(decided, same, verdicts.count(TIE)),
        "asked": max(map(asked_for, runs.values())),
        "completed": {name: len(common_requests(run)) for name, run in runs.items()},
        "common": len(common_requests(*runs.values())),
        "manifest_differences": differences,
    }


# -- which runs ------------------------------------------------------------------------------------------------


def _differences(runs: Mapping[str, RunRecords], allowed: Collection[str]) -> dict[str, Any]:
    (first, run), *others = runs.items()
    differences = manifest_differences(run, dict(others), {POLICY, *allowed}, reference=first)
    return {field: of_runs for field, of_runs in differences.items() if field != POLICY}


def _policies(runs: Mapping[str, RunRecords]) -> Policies:
    policies: Policies = {}
    for name, run in runs.items():
        if run.partial:
            raise TandemError(f"{name} was interrupted, so it is not of the whole workload: run it to its end")
        of_policy = policies.setdefault(run.manifest["system"]["scheduler"], {each: [] for each in RIDERS.values()})
        of_policy[rider(name, run)].append(metrics(run))
    if len(policies) < 2:
        raise TandemError(
            f"--rank orders policies, and all runs are of {', '.join(policies)}: give runs of another too"
        )
    for policy, of in policies.items():
        if not of["real"] or len(of["simulated"]) != 1:
            counts = ", ".join(f"{len(of[each])} {each}" for each in of)
            raise TandemError(
                f"--rank needs one simulated run of each policy, and a real one or more: {policy} has {counts}"
            )
    return policies


# -- how they are ordered --------------------------------------------------------------------------------------


def _values(of_policy: Mapping[str, list[Metrics]], metric: str) -> dict[str, float | None]:
    real = [run[metric] for run in of_policy["real"]]
    known = [value for value in real if value is not None]
    mean = sum(known) / len(known) if len(known) == len(real) else None
    return {"real": mean, "spread": relative_spread(real), "sim": of_policy["simulated"][0][metric]}


def _orders(metric: str, policies: Mapping[str, Mapping[str, float | None]]) -> Iterator[dict[str, Any]]:
    """The order of each pair of policies for which the metric is known (P99 is not, of few requests)."""
    largest = max((of["spread"] for of in policies.values() if of["spread"] is not None), default=None)
    for first, second in combinations(policies, 2):
        hardware, simulation = (_difference(policies[first][run], policies[second][run]) for run in ("real", "sim"))
        if hardware is None or simulation is None:
            continue
        spreads = [own if (own := policies[each]["spread"]) is not None else largest for each in (first, second)]
        spread = max((each for each in spreads if each is not None), default=None)
        yield {
            **{"metric": metric, "first": first, "second": second},
            **{"hardware": hardware, "spread": spread, "simulation": simulation},
            "verdict": _verdict(hardware, spread or 0.0, simulation),
        }


def _difference(first: float | None, second: float | None) -> float | None:
    return (second - first) / first if first and second is not None else None


def _verdict(hardware: float, spread: float, simulation: float) -> str:
    if abs(hardware) <= spread:
        return TIE
    return SAME if hardware * simulation > 0 else OTHER


def _sentence(decided: int, same: int, ties: int) -> str:
    tied = f" ({ties} more {'is a tie' if ties == 1 else 'are ties'} on hardware)" if ties else ""
    return f"Of the {decided} orders that hardware decides{tied}, simulation got {same} right."


def ranking_tables(ranking: Mapping[str, Any]) -> list[TextTable]:
    """A table for each pair of policies, with a row for each metric; the last says how many orders are right.

    Where the runs completed different requests, a table before them says so, and every row is marked.
    """
    same = {*ranking["completed"].values()} == {ranking["common"]}
    columns = ("", "verdict" if same else "verdict *", "hardware", "spread", "simulation")
    pairs = list(combinations(ranking["policies"], 2))
    tables = [] if same else [_completed_table(ranking)]
    for pair in pairs:
        orders = [order for order in ranking["orders"] if (order["first"], order["second"]) == pair]
        rows = [_row(order, "" if same else " *") for order in orders]
        note = ranking["sentence"] if pair == pairs[-1] else ""
        tables.append(TextTable(f"From {pair[0]} to {pair[1]}", note, columns, rows, labels=2))
    return tables


def _completed_table(ranking: Mapping[str, Any]) -> TextTable:
    rows = [(name, f"{count:,} of {ranking['asked']:,}") for name, count in ranking["completed"].items()]
    note = (
        f"The runs did not complete the same requests ({ranking['common']:,} completed in all). Metrics are of those "
        "that each run completed: an order marked * may come from that alone."
    )
    return TextTable("Before the numbers", note, ("", "completed"), rows)


def _row(order: Mapping[str, Any], mark: str) -> tuple[str, ...]:
    margins = signed(order["hardware"]), percent(order["spread"]), signed(order["simulation"])
    return METRICS[order["metric"]], f"{order['verdict']}{mark}", *margins
