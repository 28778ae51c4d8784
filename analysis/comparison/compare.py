"""How far a simulated run is from a real one, and where the error comes from.

The error is split into three parts: decisions (a replay on the recorded times must decide the same), latency
model (predicted against measured time of the very batches that ran), and closed loop (the requests' latencies).
Beside them stands the spread of repeated real runs, without which an error means little. It compares records
with records, and may not know how any of them came about.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from analysis.comparison.attribution import attribute
from analysis.comparison.errors import ks_distance, mean_of_known, relative_difference, relative_errors, relative_spread
from analysis.comparison.runs import common_requests, manifest_differences
from analysis.comparison.targets import NOISY, NOTHING, OUTSIDE, RUN_TARGETS, WITHIN, Drift, Targets, judge_run
from analysis.metrics.columns import Floats, Ints, column, step_kinds
from analysis.metrics.names import COMPARED_LATENCIES, COMPARED_STATISTICS, JUDGED_LATENCIES
from analysis.metrics.summary import asked_for, latencies, latency_statistics, metrics, not_completed, request_metrics
from engine.records.run_folder import RunRecords
from sim.replay import Replay

SCHEMA_VERSION = 1
KINDS = ("prefill", "decode", "mixed", "swap", "all")
DIVERGED = "decisions differ"

# A scheduler's decisions and their inputs: these columns of a step must be equal in a replay.
_DECISION_COLUMNS = (
    *("scheduled_ns", "prefill_tokens", "chunks", "decode_tokens", "kv_tokens", "kv_blocks_used"),
    *("running", "waiting", "preemptions"),
)
TWIN_KV = 0.05  # twin steps' KV tokens differ by no more than this
KV_TOKENS_MAX = 2**40


def compare(
    sim: RunRecords,
    real: RunRecords,
    replayed: Replay,
    repeats: Sequence[RunRecords] = (),
    allow_different: Collection[str] = (),
    targets: Targets = RUN_TARGETS,
    drift: Drift = None,
) -> dict[str, Any]:
    """Compare a simulated run with a real one.

    Args:
        sim: the simulated run.
        real: the real run.
        replayed: the real run, replayed on the profile of the simulated one.
        repeats: the same real run again, any number of times.
        allow_different: dotted manifest fields, such as `system.num_blocks`, in which the runs may differ.
        targets: the errors allowed.
        drift: how far the machine has moved since it was profiled.

    Returns:
        The content of compare.json: `verdict` {what is judged: {error, allowed, spread, drift, verdict}}, and `overall`
        in one word; `manifest_differences` {field: {real, sim or repeat}}; `machine_drift`, `metrics`; and what
        `_coverage` and `_errors` say.

    Raises:
        TandemError: workload or system differ in a field that is not allowed to.
    """
    runs = {"real": real, "sim": sim} | {f"repeat {number}": run for number, run in enumerate(repeats, 1)}
    differences = manifest_differences(runs, allow_different)
    ids = common_requests(sim, real)
    errors = _errors(sim, [real, *repeats], replayed, ids)
    verdict = judge_run(errors, targets, drift or {})
    overall = _overall(errors["decisions"]["identical"], [item["verdict"] for item in verdict.values()])
    head = {"schema": SCHEMA_VERSION, "overall": overall, "verdict": verdict, "requests": len(ids)}
    measured = {"real": metrics(real), "sim": metrics(sim)}
    tail = {"machine_drift": drift, "metrics": measured, "manifest_differences": differences}
    return head | _coverage(runs, replayed) | errors | tail


def _coverage(runs: Mapping[str, RunRecords], replayed: Replay) -> dict[str, Any]:
    """What there is to compare, and what the runs' figures rest on.

    Returns:
        - `asked`: requests of the trace; `not_completed`: {run: as `analysis.metrics.summary.not_completed`}
        - `coverage`: as the replay has it; `machine`: {real run: other load on the machine, or None if that is not on
          record}
        - `partial`: runs that were interrupted
    """
    provenance = {name: run.manifest.get("provenance", {}) for name, run in runs.items() if name != "sim"}
    return {
        "asked": asked_for(runs["real"]),
        "not_completed": {name: not_completed(run) for name, run in runs.items()},
        "coverage": replayed.coverage,
        "machine": {name: of.get("machine") for name, of in provenance.items()},
        "partial": [name for name, run in runs.items() if run.partial],
    }


def _errors(sim: RunRecords, measured: Sequence[RunRecords], replayed: Replay, ids: Ints) -> dict[str, Any]:
    """The errors of a simulated run, beside what the `measured` runs, the real one and its repeats, differ by.

    Returns:
        Latencies are in milliseconds over the requests `ids`, which completed in both runs; errors are fractions with
        sign, (sim - real) / real; what cannot be computed is None:

        - `decisions`: {identical, steps, first_difference}
        - `latency_model`: {kind of step: {steps, mape, mean_error}}
        - `closed_loop`: {latency: {statistic: {real, sim, error}, mape, ks}}; `mape` is over requests (for `itl`
          over their mean gaps), `ks` the Kolmogorov-Smirnov distance of the two distributions
        - `attribution`: where the closed-loop error comes from (`attribution.attribute`), or None where
          the decisions differ
        - `repeats`: their number
        - `repeat_spread`: {latency: {statistic: (max - min) / mean of the real runs}, latency_model: the MAPE that
          a perfect model would show, from the differences of twin steps of the runs}
    """
    real, *repeats = measured
    decisions = compare_decisions(real, replayed.records)
    return {
        "decisions": decisions,
        "latency_model": latency_model_errors(real, replayed.predicted_ns, decisions),
        "closed_loop": closed_loop_errors(sim, real, ids),
        "attribution": attribute(sim, real, replayed, ids) if decisions["identical"] else None,
        "repeats": len(repeats),
        "repeat_spread": _repeat_spread(measured, ids),
    }


def _overall(identical: bool, verdicts: Collection[str]) -> str:
    if not identical:
        return DIVERGED
    return next(word for word in (OUTSIDE, NOISY, NOTHING, WITHIN) if word in verdicts)


def is_met(comparison: Mapping[str, Any]) -> bool:
    """Whether decisions are the same and no error is outside. A machine too noisy to judge fails nobody."""
    verdicts = [item["verdict"] for item in comparison["verdict"].values()]
    return comparison["decisions"]["identical"] and OUTSIDE not in verdicts and comparison["requests"] > 0


# -- part 1: decisions -------------------------------------------------------------------------------------


def compare_decisions(
    real: RunRecords, replayed: RunRecords, names: tuple[str, str] = ("real", "replay")
) -> dict[str, Any]:
    """Whether a replay reproduced every digest, and if not, the first step that differs and how.

    Digests are chained, so that all steps before the first difference are equal in everything. The runs go by `names`.
    """
    ours, theirs = (run.tables["steps"]["digest"].to_pylist() for run in (real, replayed))
    step = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    identical = step == len(ours) == len(theirs)
    difference = None if identical else _first_difference(step, dict(zip(names, (real, replayed), strict=True)))
    return {"identical": identical, "steps": len(ours), "first_difference": difference}


def _first_difference(step: int, runs: Mapping[str, RunRecords]) -> dict[str, Any]:
    found = {name: run.tables["steps"].slice(step, 1).to_pylist() for name, run in runs.items()}
    rows = {name: of[0] if of else {} for name, of in found.items()}
    digests = {name: row["digest"].hex() if row else None for name, row in rows.items()}
    values = {name: {which: row.get(name) for which, row in rows.items()} for name in _DECISION_COLUMNS}
    columns = {name: value for name, value in values.items() if len(set(value.values())) > 1}
    launched_in = next(run for name, run in runs.items() if rows[name]).tables["iterations"]["step"].to_pylist()
    return {"step": step, "iteration": launched_in.index(step), **digests, "columns": columns}


def equal_steps(decisions: Mapping[str, Any]) -> int:
    """The steps before the first difference. After it, the two runs no longer have the same batches."""
    difference = decisions["first_difference"]
    return int(difference["step"] if difference else decisions["steps"])


# -- part 2: latency model ---------------------------------------------------------------------------------


def latency_model_errors(real: RunRecords, predicted_ns: Ints | None, decisions: Mapping[str, Any]) -> dict[str, Any]:
    """The latency model's errors on the real run's own batches, by kind of step, as `compare` returns them."""
    assert predicted_ns is not None, "replayed without a profile"
    equal = equal_steps(decisions)
    steps = real.tables["steps"].slice(0, equal)
    errors = relative_errors(predicted_ns[:equal], column(steps, "device_ns"))
    kinds = step_kinds(steps)
    chosen = {kind: errors if kind == "all" else errors[kinds == kind] for kind in KINDS}
    return {
        kind: {"steps": len(of), "mape": mean_of_known(np.abs(of)), "mean_error": mean_of_known(of)}
        for kind, of in chosen.items()
        if len(of)
    }


# -- part 3: closed loop -----------------------------------------------------------------------------------


def closed_loop_errors(sim: RunRecords, real: RunRecords, ids: Ints) -> dict[str, Any]:
    """How far off the requests' latencies are, as `compare` returns it."""
    ours, theirs = (latencies(run, ids) for run in (sim, real))
    our_table, their_table = map(latency_statistics, (ours, theirs))
    mape = _request_mape(sim, real, ids)
    result: dict[str, Any] = {}
    for name in COMPARED_LATENCIES:
        pairs = {stat: _pair(our_table[name][stat], their_table[name][stat]) for stat in COMPARED_STATISTICS}
        result[name] = pairs | {"mape": mape[name], "ks": ks_distance(ours[name], theirs[name])}
    return result


def _pair(sim: float | None, real: float | None) -> dict[str, float | None]:
    return {"real": real, "sim": sim, "error": relative_difference(sim, real)}


def _request_mape(sim: RunRecords, real: RunRecords, ids: Ints) -> dict[str, float | None]:
    ours, theirs = (request_metrics(run, ids) for run in (sim, real))
    mape = {name: mean_of_known(np.abs(relative_errors(ours[name], theirs[name]))) for name in JUDGED_LATENCIES}
    return mape | {"itl": mape["tpot"]}  # the mean of a request's gaps is its TPOT


# -- how much the real runs differ among themselves ------------------------------------------------------------


def _repeat_spread(runs: Sequence[RunRecords], ids: Ints) -> dict[str, Any]:
    ids = np.intersect1d(ids, common_requests(*runs))  # what other requests saw is no noise
    tables = [latency_statistics(latencies(run, ids)) for run in runs]
    closed_loop = {
        name: {stat: relative_spread([table[name][stat] for table in tables]) for stat in COMPARED_STATISTICS}
        for name in COMPARED_LATENCIES
    }
    return closed_loop | {"latency_model": _step_noise(runs)}


def _step_noise(runs: Sequence[RunRecords]) -> float | None:
    """The MAPE that a perfect latency model would show on a machine that differs from itself from step to step.

    Twin decode steps (as many sequences, about as many KV tokens) of the first run and its repeats differ by the noise
    of both; the square root of 2 takes one of them out.
    """
    differences = [_twin_differences(runs[0], repeat) for repeat in runs[1:]]
    known = np.concatenate([np.zeros(0), *differences])
    return float(np.abs(known).mean() / np.sqrt(2)) if len(known) else None


def _twin_differences(run: RunRecords, repeat: RunRecords) -> Floats:
    """Relative difference in device time between each decode step of `run` and its twin in `repeat`, if it has one."""
    (ours, our_ns), (theirs, their_ns) = _decode_steps(run), _decode_steps(repeat)
    if not len(theirs):
        return np.zeros(0)
    order = np.argsort(theirs, kind="stable")
    twin = order[np.minimum(np.searchsorted(theirs[order], ours), len(order) - 1)]
    (sequences, their_sequences), (tokens, their_tokens) = np.divmod([ours, theirs[twin]], KV_TOKENS_MAX)
    same = (their_sequences == sequences) & (np.abs(their_tokens - tokens) <= TWIN_KV * tokens)
    return np.asarray(their_ns[twin][same] / our_ns[same] - 1)


def _decode_steps(run: RunRecords) -> tuple[Ints, Floats]:
    """Of the steps that only decode: sequences * `KV_TOKENS_MAX` + KV tokens, and device time, (steps,) each."""
    steps = run.tables["steps"].filter(step_kinds(run.tables["steps"]) == "decode")
    batches = column(steps, "decode_tokens") * KV_TOKENS_MAX + column(steps, "kv_tokens")
    return batches, column(steps, "device_ns").astype(np.float64)
