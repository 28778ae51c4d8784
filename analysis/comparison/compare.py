"""How far a simulated run is from a real one, and where the error comes from.

The error is split into three parts: decisions (a replay on the recorded times must decide the same), latency
model (predicted against measured time of the very batches that ran), and closed loop (what the requests saw).
Beside them stands the spread of repeated real runs, without which an error means little. It compares records
with records, and may not know how any of them came about.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import combinations
from typing import Any

import numpy as np

from analysis.comparison.attribution import attribute
from analysis.metrics.columns import Floats, Ints, column, step_kinds
from analysis.metrics.summary import asked_for, latencies, latency_statistics, metrics, not_completed, request_metrics
from engine.records.run_folder import RunRecords
from traces.errors import TandemError

SCHEMA_VERSION = 1

CLOSED_LOOP = ("ttft", "tpot", "itl", "e2el")
STATISTICS = ("mean", "p50", "p90", "p99")
KINDS = ("prefill", "decode", "mixed", "swap", "all")

WITHIN, OUTSIDE, NOISY, NOTHING = "within", "outside", "too noisy to judge", "nothing to judge"
DIVERGED = "decisions differ"

RIDERS = {"executor": "real", "simulator": "simulated"}
"""Backends of a manifest's provenance -> what such a run is called."""

# What a scheduler decided and what it decided on: these columns of a step must be equal in a replay.
_DECISION_COLUMNS = (
    *("scheduled_ns", "prefill_tokens", "chunks", "decode_tokens", "kv_tokens", "kv_blocks_used"),
    *("running", "waiting", "preemptions"),
)
_ABSENT = "(absent)"
_OF_POLICY = ("scheduler_parameters", "scheduler_source")

TWIN_KV = 0.05  # twin steps' KV tokens differ by no more than this
KV_TOKENS_MAX = 2**40


@dataclass(frozen=True, slots=True)
class Targets:
    """The largest errors, as fractions, that a comparison calls `within`."""

    mean_ttft: float = 0.15
    mean_tpot: float = 0.10
    mean_e2el: float = 0.10
    latency_model_mape: float = 0.10


DEFAULT_TARGETS = Targets()


def compare(
    sim: RunRecords,
    real: RunRecords,
    replayed: RunRecords,
    repeats: Sequence[RunRecords] = (),
    allow_different: Collection[str] = (),
    *,
    targets: Targets = DEFAULT_TARGETS,
    drift: Mapping[str, float] | None = None,
    parts: Sequence[Mapping[str, float]] = (),
    coverage: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compare a simulated run with a real one.

    Args:
        sim: the simulated run.
        real: the real run.
        replayed: the real run's times replayed in the simulator, `device_ns` being the latency model's prediction.
        repeats: the same real run again, any number of times.
        allow_different: dotted manifest fields, such as `system.num_blocks`, in which the runs may differ.
        targets: the errors allowed.
        drift: how far the machine has moved since it was profiled, {mean_error, mape}, if that was measured.
        parts: for each of the real run's steps, the microseconds that each of its kernels is predicted to take.
        coverage: how far these predictions rest on what was measured: `sim.latency_model.LatencyModel.coverage`.

    Returns:
        The content of compare.json. Latencies are in milliseconds over the `requests` that completed in both runs;
        errors are fractions with sign, (sim - real) / real; what cannot be computed is None:

        - `decisions`: {identical, steps, first_difference}
        - `latency_model`: {kind of step: {steps, mape, mean_error}}
        - `closed_loop`: {latency: {statistic: {real, sim, error}, mape, ks}}; `mape` is over requests (for `itl`
          over their mean gaps), `ks` the Kolmogorov-Smirnov distance of the two distributions
        - `attribution`: where the closed-loop error comes from (`attribution.attribute`), or None where
          the decisions differ
        - `repeat_spread`: {latency: {statistic: (max - min) / mean of the real runs}, latency_model: the MAPE that
          a perfect model would show, from what twin steps of the runs differ by}
        - `verdict`: {what is judged: {error, allowed, spread, drift, verdict}}, and `overall` in one word
        - `asked`: requests of the trace; `not_completed`: {run: what `analysis.metrics.summary.not_completed` says}
        - `coverage`: as given; `machine`: {real run: what the machine did besides, or None if that is not on record}
        - `manifest_differences`: {field: {real, sim or repeat}}; `metrics`, `partial`, `repeats`.

    Raises:
        TandemError: workload or system differ in a field that is not allowed to.
    """
    others = {"sim": sim} | {f"repeat {number}": run for number, run in enumerate(repeats, 1)}
    differences = manifest_differences(real, others, allow_different)
    ids = common_requests(sim, real)
    decisions = compare_decisions(real, replayed)
    latency_model = latency_model_errors(real, replayed, decisions)
    closed_loop = closed_loop_errors(sim, real, ids)
    spread = _repeat_spread([real, *repeats], ids)
    verdict = _verdict(closed_loop, latency_model, spread, targets, drift or {})
    return {
        "schema": SCHEMA_VERSION,
        "overall": _overall(decisions["identical"], [item["verdict"] for item in verdict.values()]),
        "verdict": verdict,
        "requests": len(ids),
        "asked": asked_for(real),
        "not_completed": {name: not_completed(run) for name, run in ({"real": real} | others).items()},
        "coverage": coverage,
        "machine": {name: _machine(run) for name, run in ({"real": real} | others).items() if name != "sim"},
        "partial": [name for name, run in ({"real": real} | others).items() if run.partial],
        "decisions": decisions,
        "latency_model": latency_model,
        "closed_loop": closed_loop,
        "attribution": attribute(sim, real, replayed, ids, parts) if decisions["identical"] else None,
        "repeats": len(repeats),
        "repeat_spread": spread,
        "machine_drift": drift,
        "metrics": {"real": metrics(real), "sim": metrics(sim)},
        "manifest_differences": differences,
    }


def _machine(run: RunRecords) -> dict[str, Any] | None:
    seen: dict[str, Any] | None = run.manifest.get("provenance", {}).get("machine")
    return seen


def is_met(comparison: Mapping[str, Any]) -> bool:
    """Whether decisions are the same and no error is outside. A machine too noisy to judge fails nobody."""
    verdicts = [item["verdict"] for item in comparison["verdict"].values()]
    return comparison["decisions"]["identical"] and OUTSIDE not in verdicts and comparison["requests"] > 0


# -- what was run ------------------------------------------------------------------------------------------


def rider(name: str, run: RunRecords) -> str:
    """Whether a run is `real` or `simulated`. Raises TandemError if its manifest says neither."""
    backend = run.manifest.get("provenance", {}).get("backend")
    if backend == "client":
        raise TandemError(
            f"{name} is what a client saw, without steps: compare the server's own run (tandem serve --out), or give "
            "tandem replay --against"
        )
    if backend not in RIDERS:
        raise TandemError(
            f"{name}: provenance.backend is {backend}, not {' or '.join(RIDERS)}: is it real or simulated?"
        )
    return RIDERS[backend]


def check_once(runs: Mapping[str, RunRecords]) -> None:
    """Raises TandemError if a real run is given twice, be it as a copy: that it agrees with itself says nothing."""
    real = {name: run for name, run in runs.items() if rider(name, run) == "real"}
    for (one, first), (other, second) in combinations(real.items(), 2):
        if all(first.tables[name].equals(second.tables[name]) for name in ("requests", "steps")):
            raise TandemError(f"{one} and {other} are one and the same run: give each run once")


def check_roles(sim: str, real: str, runs: Mapping[str, RunRecords], repeats: Collection[str] = ()) -> None:
    """Make sure that `sim` is simulated, and `real` and its repeats are real.

    Args:
        sim, real, repeats: names of runs, as the command line gives them.
        runs: by these names.

    Raises:
        TandemError: they are not, with the command that would be right where there is one.
    """
    riders = {name: rider(name, run) for name, run in runs.items()}
    again = "".join(f" --repeat {name}" for name in repeats)
    if (riders[sim], riders[real]) == ("real", "simulated"):
        raise TandemError(
            f"{sim} is the real run, and {real} the simulated one; the simulated one comes first: "
            f"tandem compare {real} {sim}{again} …"
        )
    if riders[sim] == riders[real] == "real":
        raise TandemError(
            f"{sim} and {real} are both real: to set a simulation beside them, tandem compare SIM {sim} "
            f"--repeat {real}{again} …"
        )
    if simulated := [name for name in repeats if riders[name] != "real"]:
        raise TandemError(f"--repeat {simulated[0]} is simulated: it takes further real runs")


def manifest_differences(
    real: RunRecords, others: Mapping[str, RunRecords], allowed: Collection[str] = (), *, reference: str = "real"
) -> dict[str, dict[str, Any]]:
    """Fields of `workload` and `system` that differ, with the values of the real run and of each that differs.

    The real run, or whichever the others are to be like, goes by the name `reference`.

    Raises:
        TandemError: a field differs that is not in `allowed`, itself or by a part that it lies in.
    """
    ours = flatten_manifest(real)
    differences: dict[str, dict[str, Any]] = {}
    for name, run in others.items():
        theirs = flatten_manifest(run)
        for field in sorted(ours.keys() | theirs.keys()):
            values = {reference: ours.get(field, _ABSENT), name: theirs.get(field, _ABSENT)}
            if values[reference] != values[name] and not _is_of_another_policy(field, real, run):
                differences.setdefault(field, {}).update(values)
    refused = [field for field in differences if not any(f"{field}.".startswith(f"{each}.") for each in allowed)]
    if refused:
        told = "; ".join(f"{field}: {_both(differences[field])}" for field in refused)
        options = " ".join(f"--allow-different {field}" for field in refused)
        raise TandemError(f"the runs are not alike ({told}): run them alike, or compare anyway with {options}")
    return differences


def _is_of_another_policy(field: str, *runs: RunRecords) -> bool:
    """Whether a field tells of a policy that is another by name, which is said by itself, or a run is silent of it."""
    systems = [run.manifest.get("system", {}) for run in runs]
    part = field.split(".")[1]
    known = all(part in system for system in systems)
    return part in _OF_POLICY and not (known and len({system["scheduler"] for system in systems}) == 1)


def flatten_manifest(run: RunRecords, parts: Sequence[str] = ("workload", "system")) -> dict[str, Any]:
    """A manifest's fields by dotted path, `provenance` left out unless asked for."""
    return _flatten({part: run.manifest.get(part, {}) for part in parts})


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _both(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


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
    rows = {name: _step_row(run, step) for name, run in runs.items()}
    digests = {name: row["digest"].hex() if row else None for name, row in rows.items()}
    values = {name: {which: row.get(name) for which, row in rows.items()} for name in _DECISION_COLUMNS}
    columns = {name: value for name, value in values.items() if len(set(value.values())) > 1}
    launched_in = next(run for name, run in runs.items() if rows[name]).tables["iterations"]["step"].to_pylist()
    return {"step": step, "iteration": launched_in.index(step), **digests, "columns": columns}


def _step_row(run: RunRecords, step: int) -> dict[str, Any]:
    rows: list[dict[str, Any]] = run.tables["steps"].slice(step, 1).to_pylist()
    return rows[0] if rows else {}


# -- part 2: latency model ---------------------------------------------------------------------------------


def latency_model_errors(real: RunRecords, replayed: RunRecords, decisions: Mapping[str, Any]) -> dict[str, Any]:
    """The latency model's errors on the real run's own batches, by kind of step, as `compare` returns them."""
    # After the first difference the two no longer run the same batches.
    difference = decisions["first_difference"]
    equal_steps = difference["step"] if difference else decisions["steps"]
    steps, predicted = (run.tables["steps"].slice(0, equal_steps) for run in (real, replayed))
    errors = _errors(column(predicted, "device_ns"), column(steps, "device_ns"))
    kinds = step_kinds(steps)
    chosen = {kind: np.full(len(kinds), True) if kind == "all" else kinds == kind for kind in KINDS}
    return {
        kind: {"steps": int(mask.sum()), "mape": _mean(np.abs(errors[mask])), "mean_error": _mean(errors[mask])}
        for kind, mask in chosen.items()
        if mask.any()
    }


def _errors(sim: Ints | Floats, real: Ints | Floats) -> Floats:
    """(sim - real) / real, element by element; NaN where it is undefined."""
    known = np.where(real > 0, real, np.nan)
    return np.asarray((sim - known) / known)


def _mean(values: Floats) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None


# -- part 3: closed loop -----------------------------------------------------------------------------------


def common_requests(*runs: RunRecords) -> Ints:
    """Ids of the requests that completed in every run."""
    return reduce(np.intersect1d, (request_metrics(run)["request"] for run in runs))


def closed_loop_errors(sim: RunRecords, real: RunRecords, ids: Ints) -> dict[str, Any]:
    """How far off the requests' latencies are, as `compare` returns it."""
    values = {"sim": latencies(sim, ids), "real": latencies(real, ids)}
    tables = {run: latency_statistics(of_run) for run, of_run in values.items()}
    mape = _request_mape(sim, real, ids)
    result: dict[str, Any] = {}
    for name in CLOSED_LOOP:
        result[name] = {stat: _pair(tables["sim"][name][stat], tables["real"][name][stat]) for stat in STATISTICS}
        result[name] |= {"mape": mape[name], "ks": _ks_distance(values["sim"][name], values["real"][name])}
    return result


def _ks_distance(ours: Floats, theirs: Floats) -> float | None:
    from scipy.stats import ecdf

    if not (len(ours) and len(theirs)):
        return None
    values = np.concatenate([ours, theirs])
    return float(np.abs(ecdf(ours).cdf.evaluate(values) - ecdf(theirs).cdf.evaluate(values)).max())


def _request_mape(sim: RunRecords, real: RunRecords, ids: Ints) -> dict[str, float | None]:
    ours, theirs = (request_metrics(run, ids) for run in (sim, real))
    mape = {name: _mean(np.abs(_errors(ours[name], theirs[name]))) for name in ("ttft", "tpot", "e2el")}
    return mape | {"itl": mape["tpot"]}  # the mean of a request's gaps is its TPOT


def _pair(sim: float | None, real: float | None) -> dict[str, float | None]:
    error = (sim - real) / real if sim is not None and real else None
    return {"real": real, "sim": sim, "error": error}


# -- how much the real runs differ among themselves ------------------------------------------------------------


def _repeat_spread(runs: Sequence[RunRecords], ids: Ints) -> dict[str, Any]:
    ids = np.intersect1d(ids, common_requests(*runs))  # what other requests saw is no noise
    tables = [latency_statistics(latencies(run, ids)) for run in runs]
    closed_loop = {
        name: {stat: relative_spread([table[name][stat] for table in tables]) for stat in STATISTICS}
        for name in CLOSED_LOOP
    }
    return closed_loop | {"latency_model": _step_noise(runs)}


def relative_spread(values: Sequence[float | None]) -> float | None:
    """(max - min) / mean of what runs gave; None of a single run, or where one gave nothing."""
    known = [value for value in values if value is not None]
    if len(values) < 2 or len(known) < len(values) or not sum(known):
        return None
    return (max(known) - min(known)) / (sum(known) / len(known))


def _step_noise(runs: Sequence[RunRecords]) -> float | None:
    """The MAPE that a perfect latency model would show on a machine that differs from itself from step to step.

    Twin decode steps (as many sequences, about as many KV tokens) of the first run and its repeats differ by the noise
    of both; the square root of 2 takes one of them out.
    """
    differences = [_twin_differences(runs[0], repeat) for repeat in runs[1:]]
    known = np.concatenate(differences) if differences else np.zeros(0)
    return float(np.abs(known).mean() / np.sqrt(2)) if len(known) else None


def _twin_differences(run: RunRecords, repeat: RunRecords) -> Floats:
    """Relative difference in device time between each decode step of `run` and its twin in `repeat`, if it has one."""
    (ours, our_ns), (theirs, their_ns) = _decode_steps(run), _decode_steps(repeat)
    if not len(theirs):
        return np.zeros(0)
    order = np.lexsort(theirs.T[::-1])
    theirs, their_ns = theirs[order], their_ns[order]
    keys = theirs[:, 0] * KV_TOKENS_MAX + theirs[:, 1]
    twin = np.minimum(np.searchsorted(keys, ours[:, 0] * KV_TOKENS_MAX + ours[:, 1]), len(keys) - 1)
    same = (theirs[twin, 0] == ours[:, 0]) & (np.abs(theirs[twin, 1] - ours[:, 1]) <= TWIN_KV * ours[:, 1])
    return np.asarray(their_ns[twin][same] / our_ns[same] - 1)


def _decode_steps(run: RunRecords) -> tuple[Ints, Floats]:
    """Sequences and KV tokens (steps, 2), and device time (steps,), of the steps that only decode."""
    steps = run.tables["steps"].filter(step_kinds(run.tables["steps"]) == "decode")
    load = np.stack([column(steps, "decode_tokens"), column(steps, "kv_tokens")], axis=1)
    return load, column(steps, "device_ns").astype(np.float64)


# -- judgement ---------------------------------------------------------------------------------------------


def _verdict(
    closed_loop: Mapping[str, Any],
    latency_model: Mapping[str, Any],
    spread: Mapping[str, Any],
    targets: Targets,
    drift: Mapping[str, float],
) -> dict[str, dict[str, Any]]:
    moved = drift.get("mean_error")
    means = {
        f"mean_{name}": _judge(
            closed_loop[name]["mean"]["error"], getattr(targets, f"mean_{name}"), spread[name]["mean"], moved
        )
        for name in ("ttft", "tpot", "e2el")
    }
    mape = latency_model["all"]["mape"] if latency_model else None
    model = _judge(mape, targets.latency_model_mape, spread["latency_model"], drift.get("mape"))
    return means | {"latency_model_mape": model}


def _judge(error: float | None, allowed: float, spread: float | None, drift: float | None) -> dict[str, Any]:
    """No error is judged on a machine that differs from itself by more than the error allowed."""
    if error is None:
        verdict = NOTHING
    elif any(noise is not None and abs(noise) > allowed for noise in (spread, drift)):
        verdict = NOISY
    else:
        verdict = WITHIN if abs(error) <= allowed else OUTSIDE
    return {"error": error, "allowed": allowed, "spread": spread, "drift": drift, "verdict": verdict}


def _overall(identical: bool, verdicts: Collection[str]) -> str:
    if not identical:
        return DIVERGED
    return next(word for word in (OUTSIDE, NOISY, NOTHING, WITHIN) if word in verdicts)
