"""Does simulation order policies as hardware does? For each metric and pair of policies, with margins.

It compares records with records: one simulated run of each policy, and one real run or more, all of one workload on one
system. The spread of a policy is the difference between its repeated real runs. Within it, hardware orders nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from itertools import combinations
from typing import Any

from analysis.comparison.errors import relative_difference, relative_spread
from analysis.comparison.runs import REAL, SIMULATED, common_requests, manifest_differences, run_kind
from analysis.metrics.names import RANKED_METRICS
from analysis.metrics.summary import asked_for, metrics
from engine.records.run_folder import RunRecords
from traces.errors import TandemError

SCHEMA_VERSION = 1
SAME, OTHER, TIE = "same order", "other order", "tie on hardware"
POLICY = "system.scheduler"

Metrics = Mapping[str, float | None]
Policies = dict[str, dict[str, list[Metrics]]]  # policy -> real or simulated -> the metrics of each of its runs


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
        - `decided`, `same`: how many orders hardware decides, and how many of them simulation got right
        - `asked`: requests that were to be served; `completed`: {run: how many were}; `common`: how many in all runs
        - `manifest_differences`: other fields that differ, by run

    Raises:
        TandemError: the runs are not of one workload and system, a policy does not have one simulated run and a real
            one, there are fewer than two policies, or a run was interrupted.
    """
    differences = manifest_differences(runs, {POLICY, *allow_different})
    differences.pop(POLICY, None)
    policies = _policies(runs)
    table = {metric: {policy: _values(of, metric) for policy, of in policies.items()} for metric in RANKED_METRICS}
    orders = [order for metric in RANKED_METRICS for order in _orders(metric, table[metric])]
    verdicts = [order["verdict"] for order in orders]
    return {
        "schema": SCHEMA_VERSION,
        "policies": {policy: len(of[REAL]) for policy, of in policies.items()},
        "metrics": table,
        "orders": orders,
        "decided": len(verdicts) - verdicts.count(TIE),
        "same": verdicts.count(SAME),
        "asked": max(map(asked_for, runs.values())),
        "completed": {name: len(common_requests(run)) for name, run in runs.items()},
        "common": len(common_requests(*runs.values())),
        "manifest_differences": differences,
    }


# -- which runs ------------------------------------------------------------------------------------------------


def _policies(runs: Mapping[str, RunRecords]) -> Policies:
    policies: Policies = {}
    for name, run in runs.items():
        if run.partial:
            raise TandemError(f"{name} was interrupted, so it is not of the whole workload: run it to its end")
        of_policy = policies.setdefault(run.manifest["system"]["scheduler"], {REAL: [], SIMULATED: []})
        of_policy[run_kind(name, run)].append(metrics(run))
    first, *others = policies
    if not others:
        raise TandemError(f"--rank orders policies, and all runs are of {first}: give runs of another too")
    for policy, of in policies.items():
        if not of[REAL] or len(of[SIMULATED]) != 1:
            counts = ", ".join(f"{len(of[each])} {each}" for each in of)
            raise TandemError(
                f"--rank needs one simulated run of each policy, and a real one or more: {policy} has {counts}"
            )
    return policies


# -- how they are ordered --------------------------------------------------------------------------------------


def _values(of_policy: Mapping[str, list[Metrics]], metric: str) -> dict[str, float | None]:
    real = [run[metric] for run in of_policy[REAL]]
    known = [value for value in real if value is not None]
    mean = sum(known) / len(known) if len(known) == len(real) else None
    return {"real": mean, "spread": relative_spread(real), "sim": of_policy[SIMULATED][0][metric]}


def _orders(metric: str, policies: Mapping[str, Mapping[str, float | None]]) -> Iterator[dict[str, Any]]:
    """The order of each pair of policies for which the metric is known (P99 is not, of few requests)."""
    spreads = {policy: of["spread"] for policy, of in policies.items()}
    largest = max((spread for spread in spreads.values() if spread is not None), default=None)
    for first, second in combinations(policies, 2):
        one, other = policies[first], policies[second]
        hardware, simulation = (relative_difference(other[of], one[of]) for of in ("real", "sim"))
        if hardware is None or simulation is None:
            continue
        pair = [largest if spreads[policy] is None else spreads[policy] for policy in (first, second)]
        spread = max((each for each in pair if each is not None), default=None)
        yield {
            **{"metric": metric, "first": first, "second": second},
            **{"hardware": hardware, "spread": spread, "simulation": simulation},
            "verdict": _verdict(hardware, spread or 0.0, simulation),
        }


def _verdict(hardware: float, spread: float, simulation: float) -> str:
    if abs(hardware) <= spread:
        return TIE
    return SAME if hardware * simulation > 0 else OTHER
