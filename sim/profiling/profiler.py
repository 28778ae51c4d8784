"""Measures a latency profile on the machine at hand, with the executor's own kernels as it launches them.

What is measured, and how, is the rig's business; this module goes through its work, keeps what is done on disk so that
an interrupted profile goes on where it was, and makes tables of it. Part of `sim` that reaches the executor.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from engine.config import ServingConfig
from engine.records.recorder import Recorder
from sim.latency_model import LatencyModel
from sim.profile.format import Profile, Row
from sim.profiling.device_profiler import Batch, Rig, rig_for
from sim.profiling.samples import OUTLIER, Sample, spread, typical
from traces.request import TraceRequest

if TYPE_CHECKING:
    from engine.executor.executor import Executor

SINGLES, BURSTS, BURST_REPEATS = 8, (8, 32, 64, 256), 3  # requests, alone and at once, that the host is timed with
GAP_NS = 400_000_000
TIMED = 3  # a plan of a profile is timed by as many measurements of each table


def measure_profile(
    executor: Executor,
    config: ServingConfig,
    show: Callable[[int], None] = lambda done: None,
    notes: Path | None = None,
) -> Profile:
    """Measure a profile of the executor's model for runs within `config`.

    Args:
        show: told how many of `count_work(executor, config)` measurements are done.
        notes: a file that keeps what is measured, so that a later call with it goes on from there.

    Returns:
        The profile, with the error of its latency model on random batches that were held out.

    Raises:
        TandemError: the machine is in no state to be measured, or cannot be.
    """
    with rig_for(executor, config) as rig:
        state = rig.state()
        kept = Notes.open(notes, _identity(executor, config))
        samples: list[Sample] = []
        for done, item in enumerate(rig.work, start=1):
            samples += kept.next() or kept.add(rig.measure(item))
            show(done)
        held_out = [*_counted(rig.held_out(), len(rig.work), show)]
        state |= rig.state("after")
        facts, tables = rig.facts(), rig.tables(samples)
    tables["host"] = measure_host(executor, config)
    if config.num_cpu_blocks:
        tables["swap"] = [
            {"direction": direction, "blocks": blocks, "time_us": typical(of_count), "spread": spread(of_count)}
            for direction, blocks, of_count in executor.measure_swap(config)
        ]
    meta = _identity(executor, config) | facts | {"machine_state": state, "date": time.strftime("%Y-%m-%d")}
    profile = Profile(meta, tables)
    return replace(profile, meta=meta | {"held_out": held_out_error(LatencyModel(profile), held_out)})


def measure_drift(
    executor: Executor, profile: Profile, show: Callable[[int], None] = lambda done: None
) -> dict[str, float]:
    """How far the machine has moved since it was profiled: the held-out batches, measured again.

    Returns:
        `mean_error`, `mape`: of the old times against the new ones, as if those had been a prediction.
    """
    with rig_for(executor, ServingConfig(**profile.meta["limits"])) as rig:
        now = [batch.time_us for batch in _counted(rig.held_out(), 0, show)]
    return _errors(profile.meta["held_out"]["measured_us"], now)


def count_work(executor: Executor, config: ServingConfig) -> int:
    """How many measurements `measure_profile` makes."""
    rig = rig_for(executor, config)
    return len(rig.work) + rig.num_held_out


def count_drift(executor: Executor, profile: Profile) -> int:
    """How many measurements `measure_drift` makes."""
    return rig_for(executor, ServingConfig(**profile.meta["limits"])).num_held_out


def estimate(executor: Executor, config: ServingConfig) -> tuple[dict[str, int], float]:
    """What `measure_profile` would measure: points by table, and about how many seconds it would take."""
    with rig_for(executor, config) as rig:
        work: defaultdict[str, list[Any]] = defaultdict(list)
        for item in rig.work:
            work[rig.table_of(item)].append(item)
        seconds = sum(len(items) * _seconds_each(rig, items) for items in work.values())
        held_out_s = seconds / len(rig.work) * rig.num_held_out
        return {table: len(set(items)) for table, items in work.items()}, seconds + held_out_s


def _seconds_each(rig: Rig, items: Sequence[Any]) -> float:
    """Of the first few, once one has compiled what all need."""
    rig.measure(items[0])
    start = time.perf_counter()
    for item in items[:TIMED]:
        rig.measure(item)
    return (time.perf_counter() - start) / len(items[:TIMED])


@dataclass(slots=True)
class Notes:
    """Measurements as they are made, a line of JSON each, below a line that says of what."""

    path: Path | None
    found: list[list[Sample]] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path | None, identity: dict[str, Any]) -> Notes:
        """Go on with a file about the same thing, or begin a new one."""
        header = json.dumps(identity, default=str)
        lines = path.read_text().splitlines() if path and path.exists() else []
        if lines[:1] == [header]:
            whole = [line for line in lines[1:] if line.endswith("]")]  # the last may be torn
            found = ([Sample(table, tuple(key), time_us) for table, key, time_us in json.loads(line)] for line in whole)
            return cls(path, [*found][::-1])
        if path:
            path.write_text(header + "\n")
        return cls(path)

    def next(self) -> list[Sample] | None:
        """The next measurement, if it was made before."""
        return self.found.pop() if self.found else None

    def add(self, samples: list[Sample]) -> list[Sample]:
        """Keep a new one."""
        if self.path:
            with self.path.open("a") as file:
                file.write(json.dumps(samples) + "\n")
        return samples


def _identity(executor: Executor, config: ServingConfig) -> dict[str, Any]:
    return {
        "device": executor.device,
        "model": asdict(executor.model),
        "dtype": executor.dtype,
        "source": "measured",
        "kernels": executor.kernels,
        "kv_blocks": config.num_blocks,
        "block_size": config.block_size,
        "limits": asdict(config),
        "statistic": f"mean, outliers clipped at {OUTLIER:g} x median",
    }


def _counted(batches: Iterator[Batch], before: int, show: Callable[[int], None]) -> Iterator[Batch]:
    for done, batch in enumerate(batches, start=before + 1):
        show(done)
        yield batch


def held_out_error(latency: LatencyModel, batches: Sequence[Batch]) -> dict[str, Any]:
    """The error (MAPE and mean) on held-out batches, of all and by kind of step, and what they took, in µs."""
    measured = [batch.time_us for batch in batches]
    predicted = [_predicted_us(latency, batch) for batch in batches]
    places: defaultdict[str, list[int]] = defaultdict(list)
    for place, batch in enumerate(batches):
        places[batch.steps[0].kind].append(place)
    by_kind = {
        kind: _errors([predicted[place] for place in of_kind], [measured[place] for place in of_kind])
        for kind, of_kind in sorted(places.items())
    }
    return {"batches": len(batches), **_errors(predicted, measured), "by_kind": by_kind, "measured_us": measured}


def _predicted_us(latency: LatencyModel, batch: Batch) -> float:
    latency.rest()
    return fmean([latency.device_ns(step) / 1000 for step in batch.steps][batch.counted])


def _errors(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    errors = [one / other - 1 for one, other in zip(predicted, measured, strict=True)]
    return {"mape": fmean(map(abs, errors)), "mean_error": fmean(errors)}


# -- the host ----------------------------------------------------------------------------------------------


def measure_host(executor: Executor, config: ServingConfig) -> list[Row]:
    """The host's times around a step, from a short real run through the serving loop: requests alone, then bursts."""
    at_once = [*(1,) * SINGLES, *(min(count, config.max_seqs) for count in BURSTS if count < 2 * config.max_seqs)]
    at_once += at_once[SINGLES:] * (BURST_REPEATS - 1)
    arrivals = [turn * GAP_NS for turn, count in enumerate(at_once) for _ in range(count)]
    length = min(8, config.max_model_len // 2)
    requests = [TraceRequest(each, arrival, length, length, length) for each, arrival in enumerate(arrivals)]
    recorder = Recorder()
    executor.serve(requests, replace(config, scheduler="fcfs", pipeline_depth=1), recorder)
    tables = {name: table.to_pydict() for name, table in recorder.tables().items()}
    samples = _host_samples(tables["steps"], tables["iterations"])
    samples["wake", "any", 1] = _woken(tables["requests"], tables["iterations"]) or [0.0]
    rows = [
        {"term": term, "kind": kind, "sequences": sequences, "time_us": max(0.0, typical(of)), "spread": spread(of)}
        for (term, kind, sequences), of in sorted(samples.items())
    ]
    return rows


def _host_samples(
    steps: dict[str, list[Any]], turns: dict[str, list[Any]]
) -> defaultdict[tuple[str, str, int], list[float]]:
    """Microseconds by term, kind of step and sequences, of a run at depth 1: a turn of the loop is a step."""
    samples: defaultdict[tuple[str, str, int], list[float]] = defaultdict(list)
    next_read = dict(zip(turns["completed_step"], turns["now_ns"][1:], strict=False))
    for step in range(len(steps["completed_ns"])):
        scheduled, planned, launched, start, work, completed = (
            steps[name][step]
            for name in ("scheduled_ns", "planned_ns", "launched_ns", "device_start_ns", "device_ns", "completed_ns")
        )
        chunks, sequences = steps["chunks"][step], steps["running"][step]
        key = ("prefill", chunks) if chunks else ("decode", sequences)
        samples["plan", *key].append((planned - scheduled) / 1000)
        samples["launch", *key].append((launched - planned) / 1000)
        samples["notice", "any", sequences].append((completed - start - work) / 1000)
        if step in next_read:
            samples["turn", "any", sequences].append((next_read[step] - completed) / 1000)
    return samples


def _woken(served: dict[str, list[Any]], turns: dict[str, list[Any]]) -> list[float]:
    """From arrival to delivery (µs) of the requests that found the serving loop idle."""
    idle = [step is None and done is None for step, done in zip(turns["step"], turns["completed_step"], strict=True)]
    reads = {now for now, was_idle in zip(turns["now_ns"][1:], idle, strict=False) if was_idle}
    pairs = zip(served["delivered_ns"], served["arrival_ns"], strict=True)
    return [(delivered - arrival) / 1000 for delivered, arrival in pairs if delivered in reads]
