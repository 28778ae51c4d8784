"""Has a machine moved away from its profile? Measures a sample of the profile's points again, as they were measured.

What is compared is what a step takes: attention, of most steps the smaller part, and the host's times are set beside
the step that they are part of.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from engine.step import Step, StepLoad
from sim.latency_model import LatencyModel
from sim.profile.format import KEYS, Profile, Row
from sim.profiling.batches import BatchShape
from sim.profiling.device_profiler import Point
from sim.profiling.held_out import errors, held_out_batches
from sim.profiling.profiler import measure_host, profiler_for, swap_rows
from sim.profiling.samples import Sample
from sim.terms import Host
from traces.errors import TandemError

if TYPE_CHECKING:
    from engine.executor.executor import Executor

POINTS, TURNS = 16, 3  # of a table, at most; measurements of each
TURN_LIMIT_S = 40  # no further turn begins after so long
ALLOWED = 0.03  # the median drift of a table that is still the profile's
# What the host takes part in varies more: 5 minutes after an H200's profile copies took 6.6 % less, the host 1.9 %.
HOST_ALLOWED = {"host": 0.05, "swap": 0.10}
HELD_OUT = "held-out batches"

Key = tuple[Any, ...]
Times = dict[Key, float]  # microseconds by a point's key
Verdict = Literal["trusted", "unclear", "replace"]


def check_same(profile: Profile, executor: Executor, facets: Sequence[str]) -> None:
    """Raises TandemError unless profile and machine agree in `facets`: device, dtype, kernels, model shape."""
    meta = profile.meta
    has: dict[str, Any] = {"device": meta.device, "dtype": meta.dtype, "kernels": meta.kernels or "unknown"}
    wanted = {name: getattr(executor, name) for name in has}
    has["model shape"], wanted["model shape"] = (replace(each, name="") for each in (meta.model, executor.model))
    for facet in facets:
        if has[facet] != wanted[facet]:
            other = "other kernels" if facet == "kernels" else f"another {facet}"
            raise TandemError(f"the profile is of {other} ({has[facet]}, not {wanted[facet]})")


def count_drift(profile: Profile) -> int:
    """How many measurements `measure_drift` makes."""
    return len(held_out_batches(profile))


def measure_drift(
    executor: Executor, profile: Profile, show: Callable[[int], None] = lambda done: None
) -> dict[str, float]:
    """How far the machine has moved since it was profiled: the held-out batches, measured again.

    Returns:
        `mean_error`, `mape`: of the old times against the new ones, as if those had been a prediction.

    Raises:
        TandemError: the profile keeps no held-out batches.
    """
    batches = held_out_batches(profile)
    if not batches:
        raise TandemError("the profile keeps no held-out batches to measure again: measure it again (tandem profile)")
    now = []
    with profiler_for(executor, profile.meta.measured_within) as device:
        for done, batch in enumerate(batches, start=1):
            now.append(device.batch_us(batch.shape))
            show(done)
    return errors([batch.time_us for batch in batches], now)


@dataclass(frozen=True, slots=True)
class TableDrift:
    """How a table's points take other times now; shares of a step, above 0 where it takes longer.

    Attributes:
        points: that were measured again.
        median: of their drifts.
        error: of the median, two standard errors.
        worst: the largest drift.
        at: its point, by its keys.
    """

    table: str
    points: int
    median: float
    error: float
    worst: float
    at: dict[str, Any]

    @classmethod
    def of(cls, table: str, keys: Sequence[str], drifts: Mapping[Key, float]) -> TableDrift:
        """Sum up the drifts of some points."""
        middle = median(drifts.values())
        # 1.4826 times the median deviation is a standard deviation; the median's is 1.25 times the mean's.
        deviation = 1.4826 * median(abs(drift - middle) for drift in drifts.values())
        worst = max(drifts, key=lambda key: abs(drifts[key]))
        at = dict(zip(keys, worst, strict=True))
        return cls(table, len(drifts), middle, 2 * 1.25 * deviation / len(drifts) ** 0.5, drifts[worst], at)

    @property
    def allowed(self) -> float:
        """The largest median drift with which the table holds."""
        return HOST_ALLOWED.get(self.table, ALLOWED)

    @property
    def verdict(self) -> Verdict:
        """Whether the table holds: what is beyond what is allowed by less than its own error is not clear."""
        if abs(self.median) + self.error <= self.allowed:
            return "trusted"
        return "replace" if abs(self.median) - self.error > self.allowed else "unclear"


class DriftCheck:
    """A sample of a profile's points, to be measured on the machine at hand.

    Attributes:
        total: measurements to make.
    """

    def __init__(self, executor: Executor, profile: Profile, seed: int = 0) -> None:
        """Raises TandemError if the profile is of another model, dtype or kernels, or was not measured by Tandem."""
        check_same(profile, executor, ("kernels", "dtype", "model shape"))
        limits = profile.meta.measured_within
        self._executor, self._profile = executor, profile
        self._config = replace(limits, num_blocks=min(limits.num_blocks, executor.measure_blocks(limits)))
        self._latency = LatencyModel(profile)
        self._device = profiler_for(executor, self._config)
        self._sample = list(self._spread(random.Random(seed)))
        self._held_out = held_out_batches(profile) if self._config == limits else []  # others may not fit
        self.total = TURNS * len(self._sample) + len(self._held_out)

    def _spread(self, generator: random.Random) -> Iterator[Point]:
        """Of each table's points one in every stretch of equal length, from small to large."""
        for _, of_table in groupby(sorted(set(self._device.work)), lambda point: point.table):
            points = list(of_table)
            count = min(POINTS, len(points))
            edges = [len(points) * part // count for part in range(count + 1)]
            yield from (points[generator.randrange(*edges[part : part + 2])] for part in range(count))

    def run(self, show: Callable[[int], None] = lambda done: None) -> list[TableDrift]:
        """Measure; `show` is told how many of `total` measurements are done.

        Raises:
            TandemError: the machine is in no state to be measured.
        """
        with self._device as device:
            device.state()
            tables = device.tables(self._measure(show))
            held_out = {}
            for number, (shape, then_us) in enumerate(self._held_out, start=1):
                prefill_tokens = sum(tokens for tokens, _ in shape.chunks)
                held_out[number, len(shape.decodes), prefill_tokens] = device.batch_us(shape) / then_us - 1
                show(TURNS * len(self._sample) + number)
        found = [(table, _axes(table), self._table(table, rows)) for table, rows in tables.items()]
        found.append((HELD_OUT, ("batch", "decodes", "prefill_tokens"), held_out))
        if "swap" in self._profile.tables:
            found.append(("swap", KEYS["swap"], self._table("swap", swap_rows(self._executor, self._config))))
        found.append(("host", ("kind", "sequences"), self._host()))
        return [TableDrift.of(*each) for each in found if each[-1]]

    def _measure(self, show: Callable[[int], None]) -> list[Sample]:
        samples: list[Sample] = []
        start, done = time.perf_counter(), 0
        for turn in range(TURNS):
            if turn and time.perf_counter() - start > TURN_LIMIT_S:
                break
            for point in self._sample:
                samples += self._device.measure(point)
                show(done := done + 1)
        return samples

    def _table(self, table: str, rows: Sequence[Row]) -> Times:
        then, now = _times(table, self._profile.tables[table]), _times(table, rows)
        return {
            key: (now[key] - then[key]) / (_step_us(self._latency, table, key) or then[key])
            for key in now.keys() & then.keys()
        }

    def _host(self) -> Times:
        """All that the host does around a step, as a share of a decode step of so many sequences."""
        points = {(row["kind"], row["sequences"]) for row in self._profile.tables["host"] if row["kind"] != "any"}
        if not points:
            return {}
        tables = self._profile.tables | {"host": measure_host(self._executor, self._config)}
        then, now = Host(self._profile), Host(replace(self._profile, tables=tables))
        self._latency.rest()
        drifts = {}
        for kind, count in sorted(points):
            chunks, terms = count if kind == "prefill" else 0, ("plan", "launch", "notice", "turn")
            then_us, now_us = (sum(host.us(term, chunks, count) for term in terms) for host in (then, now))
            step_us = self._latency.device_ns(Step(0, decodes=count, load=StepLoad(kv_tokens=8 * count))) / 1000
            drifts[kind, count] = (now_us - then_us) / (step_us + then_us)
        return drifts


def _axes(table: str) -> tuple[str, ...]:
    """A table's keys; of dense operations the tokens alone, since a step runs all of them."""
    return ("tokens",) if table == "dense" else KEYS[table]


def _times(table: str, rows: Sequence[Row]) -> Times:
    times: defaultdict[Key, float] = defaultdict(float)
    for row in rows:
        times[tuple(row[key] for key in _axes(table))] += row["time_us"]
    return dict(times)


def _step_us(latency: LatencyModel, table: str, key: Key) -> float | None:
    """A whole step of the batch that a point of attention stands for."""
    if table == "prefill_attention":
        (step,) = BatchShape((key,), ()).steps(1)
    elif table == "decode_attention":
        sequences, kv_tokens, imbalance = key
        squares = round(imbalance * kv_tokens**2 / sequences)
        step = Step(0, decodes=sequences, load=StepLoad(kv_tokens=kv_tokens - sequences, kv_squares=squares))
    else:
        return None
    return latency.device_ns(step) / 1000


def judge(found: Sequence[TableDrift]) -> tuple[Verdict, str]:
    """Whether a profile is to be trusted, and why, in a sentence."""
    verdict = min((each.verdict for each in found), key=("replace", "unclear", "trusted").index)
    worst = max((each for each in found if each.verdict == verdict), key=lambda each: abs(each.median) / each.allowed)
    said = f"{worst.table} takes {abs(worst.median):.1%} {'longer' if worst.median > 0 else 'less'} in the median"
    said += f" of {worst.points} points (± {worst.error:.1%})"
    why = {
        "replace": f"Replace it: {said}, more than the {worst.allowed:.0%} allowed; measure this machine again.",
        "unclear": f"Not clear: {said}, too uncertain to set against the {worst.allowed:.0%} allowed.",
        "trusted": f"To be trusted: every table is within what is allowed in the median; nearest to it, {said}.",
    }
    return verdict, why[verdict]


def drift_report(executor: Executor, profile: Profile, found: Sequence[TableDrift]) -> dict[str, Any]:
    """All of it, for JSON and for people."""
    verdict, why = judge(found)
    return {
        "verdict": verdict,
        "why": why,
        "device": executor.device,
        "profiled": profile.meta.device,
        "tables": [asdict(each) | {"verdict": each.verdict} for each in found],
    }
