"""Has a card moved away from its profile? Measures a sample of a profile's points again, as its own rig measured them.

What is compared is what a step takes: attention, of most steps the smaller part, and the host's times are set beside
the step that they are part of.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any, Literal

from engine.config import ServingConfig
from engine.step import Chunk, Step, StepLoad
from sim.latency_model import LatencyModel
from sim.profile.format import KEYS, Profile, Row
from sim.profiling.device_profiler import rig_for
from sim.profiling.profiler import measure_host
from sim.profiling.samples import Sample, typical
from traces.errors import TandemError

if TYPE_CHECKING:
    from engine.executor.executor import Executor

POINTS, TURNS = 16, 3  # of a table, at most; measurements of each
TURN_LIMIT_S = 40  # no further turn begins after so long
ALLOWED = 0.03  # the median drift of a table that is still the profile's
# What the host takes part in varies more: 5 minutes after an H200's profile copies took 6.6 % less, the host 1.9 %.
HOST_ALLOWED = {"host": 0.05, "swap": 0.10}

Times = dict[tuple[Any, ...], float]  # microseconds by a point's key
Verdict = Literal["trusted", "unclear", "replace"]


def check_same(profile: Profile, executor: Executor, facets: Sequence[str]) -> None:
    """Raises TandemError unless profile and machine agree in `facets`: device, dtype, kernels, model shape."""
    has = {name: profile.meta.get(name, "unknown") for name in ("device", "dtype", "kernels")}
    wanted = {name: getattr(executor, name) for name in has}
    has["model shape"], wanted["model shape"] = (replace(each, name="") for each in (profile.model, executor.model))
    for facet in facets:
        if has[facet] != wanted[facet]:
            other = "other kernels" if facet == "kernels" else f"another {facet}"
            raise TandemError(f"the profile is of {other} ({has[facet]}, not {wanted[facet]})")


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
    def of(cls, table: str, keys: Sequence[str], drifts: Mapping[tuple[Any, ...], float]) -> TableDrift:
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
        if "limits" not in profile.meta:
            raise TandemError("the profile was not measured by tandem profile: there are no points to measure again")
        self._executor, self._profile = executor, profile
        limits = ServingConfig(**profile.meta["limits"])
        self._config = replace(limits, num_blocks=min(limits.num_blocks, executor.measure_blocks(limits)))
        self._rig = rig_for(executor, self._config)
        self._sample = list(self._spread(random.Random(seed)))
        held_out = profile.meta.get("held_out", {}).get("measured_us", ())
        self._held_out = held_out if self._config == limits else ()  # within other limits they are other batches
        self.total = TURNS * len(self._sample) + len(self._held_out)

    def _spread(self, generator: random.Random) -> Iterator[Any]:
        """Of each table's work one item in every stretch of equal length, from small to large."""
        by_table: defaultdict[str, list[Any]] = defaultdict(list)
        for item in sorted(set(self._rig.work)):
            by_table[self._rig.table_of(item)].append(item)
        for items in by_table.values():
            count = min(POINTS, len(items))
            edges = [len(items) * part // count for part in range(count + 1)]
            yield from (items[generator.randrange(*edges[part : part + 2])] for part in range(count))

    def run(self, show: Callable[[int], None] = lambda done: None) -> list[TableDrift]:
        """Measure; `show` is told how many of `total` measurements are done.

        Raises:
            TandemError: the machine is in no state to be measured.
        """
        with self._rig:
            self._rig.state()
            found = [*self._device(self._measure(show)), *self._steps(show)]
        return [*found, *self._copies(), *self._host()]

    def _measure(self, show: Callable[[int], None]) -> list[Sample]:
        samples: list[Sample] = []
        start, done = time.perf_counter(), 0
        for turn in range(TURNS):
            if turn and time.perf_counter() - start > TURN_LIMIT_S:
                break
            for item in self._sample:
                samples += self._rig.measure(item)
                show(done := done + 1)
        return samples

    def _device(self, samples: Sequence[Sample]) -> Iterator[TableDrift]:
        latency = LatencyModel(self._profile)
        for table, rows in self._rig.tables(samples).items():
            then, now = _times(table, self._profile.tables[table]), _times(table, rows)
            drifts = {
                key: (now[key] - then[key]) / (_step_us(latency, table, key) or then[key])
                for key in now.keys() & then.keys()
            }
            if drifts:
                yield TableDrift.of(table, _axes(table), drifts)

    def _steps(self, show: Callable[[int], None]) -> Iterator[TableDrift]:
        """Whole batches that are in no table, as they were measured when the profile was."""
        if not self._held_out:
            return
        drifts = {}
        for number, (batch, then) in enumerate(zip(self._rig.held_out(), self._held_out, strict=True), start=1):
            drifts[number, batch.steps[0].decodes, batch.steps[0].prefill_tokens] = batch.time_us / then - 1
            show(TURNS * len(self._sample) + number)
        yield TableDrift.of("held-out batches", ("batch", "decodes", "prefill_tokens"), drifts)

    def _copies(self) -> Iterator[TableDrift]:
        if "swap" not in self._profile.tables:
            return
        then = _times("swap", self._profile.tables["swap"])
        now = {(where, blocks): typical(of) for where, blocks, of in self._executor.measure_swap(self._config)}
        drifts = {key: now[key] / then[key] - 1 for key in now.keys() & then.keys()}
        if drifts:
            yield TableDrift.of("swap", KEYS["swap"], drifts)

    def _host(self) -> Iterator[TableDrift]:
        """All that the host does around a step, as a share of a decode step of so many sequences."""
        points = {(row["kind"], row["sequences"]) for row in self._profile.tables["host"] if row["kind"] != "any"}
        if not points:
            return
        now = replace(self._profile, tables=self._profile.tables | {"host": measure_host(self._executor, self._config)})
        latency = LatencyModel(self._profile)
        drifts = {}
        for kind, count in sorted(points):
            then_us, now_us = (_host_us(each, kind, count) for each in (self._profile, now))
            step_us = latency.device_ns(Step(0, decodes=count, load=StepLoad(8 * count))) / 1000
            drifts[kind, count] = (now_us - then_us) / (step_us + then_us)
        yield TableDrift.of("host", ("kind", "sequences"), drifts)


def _host_us(profile: Profile, kind: str, sequences: int) -> float:
    curves = (profile.host(term, kind) for term in ("plan", "launch", "notice", "turn"))
    return sum(curve(min(max(sequences, curve.xs[0]), curve.xs[-1])) for curve in curves)


def _axes(table: str) -> tuple[str, ...]:
    """A table's keys; of dense operations the tokens alone, since a step runs all of them."""
    return ("tokens",) if table == "dense" else KEYS[table]


def _times(table: str, rows: Sequence[Row]) -> Times:
    times: defaultdict[tuple[Any, ...], float] = defaultdict(float)
    for row in rows:
        times[tuple(row[key] for key in _axes(table))] += row["time_us"]
    return dict(times)


def _step_us(latency: LatencyModel, table: str, key: tuple[Any, ...]) -> float | None:
    """A whole step of the batch that a point of attention stands for."""
    if table == "prefill_attention":
        chunk, context = key
        return latency.device_ns(Step(0, chunks={0: Chunk(context, chunk, True)})) / 1000
    if table == "decode_attention":
        sequences, kv_tokens, unevenness = key
        squares = round(unevenness * kv_tokens**2 / sequences)
        return latency.device_ns(Step(0, decodes=sequences, load=StepLoad(kv_tokens - sequences, squares))) / 1000
    return None


def judge(found: Sequence[TableDrift]) -> tuple[Verdict, str]:
    """Whether a profile is to be trusted, and why, in a sentence."""
    drifted = [each for each in found if each.verdict == "replace"]
    unclear = [each for each in found if each.verdict == "unclear"]
    worst = max(drifted or unclear or found, key=lambda each: abs(each.median) / each.allowed)
    said = f"{worst.table} takes {abs(worst.median):.1%} {'longer' if worst.median > 0 else 'less'} in the median"
    said += f" of {worst.points} points (± {worst.error:.1%})"
    if drifted:
        return "replace", f"Replace it: {said}, more than the {worst.allowed:.0%} allowed; measure this card anew."
    if unclear:
        return "unclear", f"Not clear: {said}, too uncertain to set against the {worst.allowed:.0%} allowed."
    return "trusted", f"To be trusted: every table is within what is allowed in the median; nearest to it, {said}."


def drift_report(executor: Executor, profile: Profile, found: Sequence[TableDrift]) -> dict[str, Any]:
    """All of it, for JSON and for people."""
    verdict, why = judge(found)
    return {
        "verdict": verdict,
        "why": why,
        "device": executor.device,
        "profiled": profile.meta["device"],
        "tables": [asdict(each) | {"verdict": each.verdict} for each in found],
    }
