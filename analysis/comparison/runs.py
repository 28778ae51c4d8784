"""Which runs may be compared: real ones and simulated ones, each once, of one workload and system."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from itertools import combinations
from typing import Any

import numpy as np

from analysis.metrics.columns import Ints, completed_ids
from engine.records.run_folder import RunRecords
from traces.errors import TandemError

REAL, SIMULATED = "real", "simulated"
RUN_KINDS = {"executor": REAL, "simulator": SIMULATED}
"""Backends of a manifest's provenance -> what such a run is called."""

_ABSENT = "(absent)"
_OF_POLICY = ("scheduler_parameters", "scheduler_source")


def run_kind(name: str, run: RunRecords) -> str:
    """Whether a run is `real` or `simulated`. Raises TandemError if its manifest says neither."""
    backend = run.manifest.get("provenance", {}).get("backend")
    if backend == "client":
        raise TandemError(
            f"{name} is what a client saw, without steps: compare the server's own run (tandem serve --out), or give "
            "tandem load --against"
        )
    if backend not in RUN_KINDS:
        raise TandemError(
            f"{name}: provenance.backend is {backend}, not {' or '.join(RUN_KINDS)}: is it real or simulated?"
        )
    return RUN_KINDS[backend]


def check_once(runs: Mapping[str, RunRecords]) -> None:
    """Raises TandemError if a real run is given twice, be it as a copy. That it agrees with itself says nothing."""
    real = {name: run for name, run in runs.items() if run_kind(name, run) == REAL}
    for (one, first), (other, second) in combinations(real.items(), 2):
        if all(first.tables[name].equals(second.tables[name]) for name in ("requests", "steps")):
            raise TandemError(f"{one} and {other} are one and the same run: give each run once")


def check_roles(runs: Mapping[str, RunRecords]) -> None:
    """Make sure that the first run is simulated, and the second and its repeats are real.

    Args:
        runs: by name, as the command line gives them.

    Raises:
        TandemError: they are not, with the command that would be right where there is one.
    """
    sim, real, *repeats = runs
    kinds = {name: run_kind(name, run) for name, run in runs.items()}
    again = "".join(f" --repeat {name}" for name in repeats)
    if (kinds[sim], kinds[real]) == (REAL, SIMULATED):
        raise TandemError(
            f"{sim} is the real run, and {real} the simulated one; the simulated one comes first: "
            f"tandem compare {real} {sim}{again} …"
        )
    if kinds[sim] == kinds[real] == REAL:
        raise TandemError(
            f"{sim} and {real} are both real: to set a simulation beside them, tandem compare SIM {sim} "
            f"--repeat {real}{again} …"
        )
    if simulated := [name for name in repeats if kinds[name] == SIMULATED]:
        raise TandemError(f"--repeat {simulated[0]} is simulated: it takes further real runs")


def manifest_differences(runs: Mapping[str, RunRecords], allowed: Collection[str]) -> dict[str, dict[str, Any]]:
    """Fields of `workload` and `system` that differ, with the values of the first run and of each that differs.

    Raises:
        TandemError: a field differs that is not in `allowed`, itself or by a part that it lies in.
    """
    (reference, first), *others = runs.items()
    ours = flatten_manifest(first)
    differences: dict[str, dict[str, Any]] = {}
    for name, run in others:
        theirs = flatten_manifest(run)
        for field in sorted(ours.keys() | theirs.keys()):
            values = {reference: ours.get(field, _ABSENT), name: theirs.get(field, _ABSENT)}
            if values[reference] != values[name] and not _is_of_another_policy(field, first, run):
                differences.setdefault(field, {}).update(values)
    refused = [field for field in differences if not any(f"{field}.".startswith(f"{each}.") for each in allowed)]
    if refused:
        told = "; ".join(f"{field}: {_told(differences[field])}" for field in refused)
        options = " ".join(f"--allow-different {field}" for field in refused)
        raise TandemError(f"the runs are not alike ({told}): run them alike, or compare anyway with {options}")
    return differences


def _told(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _is_of_another_policy(field: str, *runs: RunRecords) -> bool:
    """Whether a field tells of a policy that is another by name, which is said by itself, or a run is silent of it."""
    systems = [run.manifest.get("system", {}) for run in runs]
    part = field.split(".")[1]
    known = all(part in system for system in systems)
    return part in _OF_POLICY and not (known and len({system["scheduler"] for system in systems}) == 1)


def flatten_manifest(run: RunRecords, parts: Sequence[str] = ("workload", "system")) -> dict[str, Any]:
    """A manifest's fields by dotted path, `provenance` left out unless asked for. Values are as JSON has them."""
    return _flatten(json.loads(json.dumps({part: run.manifest.get(part, {}) for part in parts})))


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def common_requests(*runs: RunRecords) -> Ints:
    """Ids of the requests that completed in every run."""
    return reduce(np.intersect1d, map(completed_ids, runs))
