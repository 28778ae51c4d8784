"""The targets by which runs are judged, and the verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from analysis.metrics.names import COMPARED_STATISTICS, JUDGED_LATENCIES, latency_label
from traces.errors import TandemError

Drift = Mapping[str, float] | None
"""How far a machine has moved since it was profiled, {mean_error, mape}, if that was measured."""
WITHIN, OUTSIDE, NOISY, NOTHING = "within", "outside", "too noisy to judge", "nothing to judge"
CAPACITY = 1.0  # the load at which queueing amplifies errors


@dataclass(frozen=True, slots=True)
class Targets:
    """The largest errors, as fractions, that are judged `within`.

    Attributes:
        ttft, tpot, e2el: errors of latencies.
        model: the latency model's MAPE, by kind of step.
        spread_factor: the spread of repeated real runs widens a latency's target, up to so many times the target.
        at_capacity: the targets of latencies at a load of `CAPACITY` and above, if they are others there.
    """

    ttft: float = 0.15
    tpot: float = 0.10
    e2el: float = 0.10
    model: Mapping[str, float] = field(default_factory=lambda: {"all": 0.10})
    spread_factor: float = 1.0
    at_capacity: Targets | None = None

    def at_load(self, load: float) -> Targets:
        """Those that hold at a load, which is a fraction of the capacity."""
        return self.at_capacity if self.at_capacity and load >= CAPACITY else self

    def of_latency(self, name: str, spread: float | None = None) -> float:
        """Of a latency whose real runs differ by `spread`."""
        target: float = getattr(self, name)
        return max(target, min(spread or 0.0, self.spread_factor * target))


RUN_TARGETS = Targets()
"""Of a single comparison, on any machine."""

_MODEL = {"decode": 0.02, "prefill": 0.03, "mixed": 0.03}
_AT_CAPACITY = Targets(ttft=0.10, tpot=0.05, e2el=0.05)
STUDY_TARGETS = Targets(ttft=0.05, tpot=0.02, e2el=0.02, model=_MODEL, spread_factor=2.0, at_capacity=_AT_CAPACITY)
"""Of a study, on a machine that does nothing else."""


def read_targets(text: str | None, default: Targets) -> Targets:
    """Read `--targets`: TTFT,TPOT,E2E in percent, and the latency model's MAPE if a fourth is given.

    They hold at every load. Without `text`, the default.

    Raises:
        TandemError: these are not three or four numbers above 0.
    """
    if text is None:
        return default
    try:
        given = [float(each) / 100 for each in text.split(",")]
    except ValueError:
        given = []
    if len(given) not in (3, 4) or not all(0 < each < math.inf for each in given):
        raise TandemError(
            f"--targets: cannot read '{text}'; write TTFT,TPOT,E2E or TTFT,TPOT,E2E,MAPE in percent, for example "
            "--targets 15,10,10"
        )
    ttft, tpot, e2el, *mape = given
    model = dict.fromkeys(default.model, mape[0]) if mape else default.model
    return replace(default, ttft=ttft, tpot=tpot, e2el=e2el, model=model, at_capacity=None)


def judge_run(errors: Mapping[str, Any], targets: Targets, drift: Mapping[str, float]) -> dict[str, dict[str, Any]]:
    """Judge the means of a comparison and its latency model: {what: {error, allowed, spread, drift, verdict}}."""
    spread, verdicts = errors["repeat_spread"], {}
    for name in JUDGED_LATENCIES:
        error, allowed = errors["closed_loop"][name]["mean"]["error"], targets.of_latency(name)
        verdicts[f"mean_{name}"] = _judge(error, allowed, spread[name]["mean"], drift.get("mean_error"))
    mape = errors["latency_model"].get("all", {}).get("mape")
    model = _judge(mape, targets.model["all"], spread["latency_model"], drift.get("mape"))
    return verdicts | {"latency_model_mape": model}


def _judge(error: float | None, allowed: float, spread: float | None, drift: float | None) -> dict[str, Any]:
    """No error is judged on a machine that differs from itself by more than the error allowed."""
    if error is None:
        verdict = NOTHING
    elif any(noise is not None and abs(noise) > allowed for noise in (spread, drift)):
        verdict = NOISY
    else:
        verdict = WITHIN if abs(error) <= allowed else OUTSIDE
    return {"error": error, "allowed": allowed, "spread": spread, "drift": drift, "verdict": verdict}


def judge_case(name: str, load: float, comparison: Mapping[str, Any], targets: Targets) -> Iterator[dict[str, Any]]:
    """Judge a case of a study by every statistic: {case, what, error, allowed, spread, within}."""
    for kind, allowed in targets.model.items():
        if kind in comparison["latency_model"]:
            error = comparison["latency_model"][kind]["mape"]
            yield _judged(name, f"latency model, {kind}", error, allowed, None)
    for latency, statistic in product(JUDGED_LATENCIES, COMPARED_STATISTICS):
        error = comparison["closed_loop"][latency][statistic]["error"]
        spread = comparison["repeat_spread"][latency][statistic]
        allowed = targets.at_load(load).of_latency(latency, spread)
        yield _judged(name, latency_label(statistic, latency), error, allowed, spread)


def _judged(case: str, what: str, error: float | None, allowed: float, spread: float | None) -> dict[str, Any]:
    within = None if error is None else abs(error) <= allowed
    return {"case": case, "what": what, "error": error, "allowed": allowed, "spread": spread, "within": within}
