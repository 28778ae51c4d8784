"""Measures a latency profile on the machine at hand, with the executor's own kernels as it launches them.

A device profiler knows how to measure. This module goes through its work, keeps what is done on disk so that an
interrupted profile goes on where it was, and makes tables of it. The host's times around a step are those of a short
real run through the serving loop.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.config import ServingConfig
from engine.records.recorder import Recorder
from sim.profile.format import KEYS, Profile, Row
from sim.profile.meta import ProfileMeta
from sim.profiling.cpu import CpuProfiler
from sim.profiling.device_profiler import DeviceProfiler, Point
from sim.profiling.gpu import GpuProfiler
from sim.profiling.held_out import HeldOutBatch, held_out_rows, with_held_out_error
from sim.profiling.samples import OUTLIER, Sample, row_of_repeats
from traces.request import TraceRequest

if TYPE_CHECKING:
    from engine.executor.executor import Executor

SINGLES, BURSTS, BURST_REPEATS = 8, (8, 32, 64, 256), 3  # requests, alone and at once, that the host is timed with
GAP_NS = 400_000_000
TIMED = 3  # a plan of a profile is timed by as many measurements of each table


def profiler_for(executor: Executor, config: ServingConfig) -> DeviceProfiler:
    """The device profiler for an executor's machine."""
    return (GpuProfiler if executor.captures else CpuProfiler)(executor, config)


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
    meta = ProfileMeta(executor.device, executor.model, executor.dtype, "measured", executor.kernels)
    said = {"statistic": f"mean, outliers clipped at {OUTLIER:g} x median"}
    meta = replace(meta, kv_blocks=config.num_blocks, block_size=config.block_size, limits=config, notes=said)
    with profiler_for(executor, config) as device:
        state = device.state()
        kept = Notes.open(notes, meta.to_dict())
        samples: list[Sample] = []
        for done, point in enumerate(device.work, start=1):
            samples += kept.next() or kept.add(device.measure(point))
            show(done)
        batches = []
        for done, shape in enumerate(device.held_out, start=len(device.work) + 1):
            batches.append(HeldOutBatch(shape, device.batch_us(shape)))
            show(done)
        state |= device.state("after")
        meta, tables = device.describe(meta), device.tables(samples)
    tables |= {"host": measure_host(executor, config), "held_out": held_out_rows(batches)}
    if config.num_cpu_blocks:
        tables["swap"] = swap_rows(executor, config)
    meta = replace(meta, notes=meta.notes | {"machine_state": state, "date": time.strftime("%Y-%m-%d")})
    return with_held_out_error(Profile(meta, tables))


def count_work(executor: Executor, config: ServingConfig) -> int:
    """How many measurements `measure_profile` makes."""
    device = profiler_for(executor, config)
    return len(device.work) + len(device.held_out)


def estimate(executor: Executor, config: ServingConfig) -> tuple[dict[str, int], float]:
    """What `measure_profile` would measure: points by table, and about how many seconds it would take."""
    with profiler_for(executor, config) as device:
        work: defaultdict[str, list[Point]] = defaultdict(list)
        for point in device.work:
            work[point.table].append(point)
        seconds = sum(len(points) * _seconds_each(device, points) for points in work.values())
        held_out_s = seconds / len(device.work) * len(device.held_out)
        return {table: len(set(points)) for table, points in work.items()}, seconds + held_out_s


def _seconds_each(device: DeviceProfiler, points: Sequence[Point]) -> float:
    """Of the first few, once one has compiled what all need."""
    device.measure(points[0])
    start = time.perf_counter()
    for point in points[:TIMED]:
        device.measure(point)
    return (time.perf_counter() - start) / len(points[:TIMED])


@dataclass(slots=True)
class Notes:
    """Measurements as they are made, a line of JSON each, below a line that says of what."""

    path: Path | None
    found: list[list[Sample]] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path | None, identity: dict[str, Any]) -> Notes:
        """Go on with a file about the same thing, or begin a new one."""
        header = json.dumps(identity, default=str)
        lines = path.read_text(encoding="utf-8").splitlines() if path and path.exists() else []
        if lines[:1] == [header]:
            whole = [line for line in lines[1:] if line.endswith("]")]  # the last may be torn
            found = ([Sample(table, tuple(key), time_us) for table, key, time_us in json.loads(line)] for line in whole)
            return cls(path, [*found][::-1])
        if path:
            path.write_text(header + "\n", encoding="utf-8")
        return cls(path)

    def next(self) -> list[Sample] | None:
        """The next measurement, if it was made before."""
        return self.found.pop() if self.found else None

    def add(self, samples: list[Sample]) -> list[Sample]:
        """Keep a new one."""
        if self.path:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(samples) + "\n")
        return samples


# -- the host and its copies ---------------------------------------------------------------------------------------


def measure_host(executor: Executor, config: ServingConfig) -> list[Row]:
    """Table `host`: requests come alone, then in bursts."""
    at_once = [*(1,) * SINGLES, *(min(count, config.max_seqs) for count in BURSTS if count < 2 * config.max_seqs)]
    at_once += at_once[SINGLES:] * (BURST_REPEATS - 1)
    arrivals = [turn * GAP_NS for turn, count in enumerate(at_once) for _ in range(count)]
    length = min(8, config.max_model_len // 2)
    requests = [TraceRequest(each, arrival, length, length, length) for each, arrival in enumerate(arrivals)]
    recorder = Recorder()
    executor.serve(requests, replace(config, scheduler="fcfs", pipeline_depth=1), recorder)
    tables = {name: table.to_pylist() for name, table in recorder.tables().items()}
    samples = _host_samples(tables["steps"], tables["iterations"])
    samples["wake", "any", 1] = _woken(tables["requests"], tables["iterations"]) or [0.0]
    rows = [row_of_repeats(KEYS["host"], key, times) for key, times in sorted(samples.items())]
    return [row | {"time_us": max(0.0, row["time_us"])} for row in rows]


def swap_rows(executor: Executor, config: ServingConfig) -> list[Row]:
    """Table `swap`, of copies between the tiers."""
    return [row_of_repeats(KEYS["swap"], key, times) for *key, times in executor.measure_swap(config)]


def _host_samples(steps: Sequence[Row], turns: Sequence[Row]) -> defaultdict[tuple[str, str, int], list[float]]:
    """Microseconds by term, kind of step and sequences, of a run at depth 1: a turn of the loop is a step."""
    samples: defaultdict[tuple[str, str, int], list[float]] = defaultdict(list)
    next_read = {turn["completed_step"]: after["now_ns"] for turn, after in pairwise(turns)}
    for number, step in enumerate(steps):
        chunks, sequences, completed = step["chunks"], step["running"], step["completed_ns"]
        key = ("prefill", chunks) if chunks else ("decode", sequences)
        samples["plan", *key].append((step["planned_ns"] - step["scheduled_ns"]) / 1000)
        samples["launch", *key].append((step["launched_ns"] - step["planned_ns"]) / 1000)
        samples["notice", "any", sequences].append((completed - step["device_start_ns"] - step["device_ns"]) / 1000)
        if number in next_read:
            samples["turn", "any", sequences].append((next_read[number] - completed) / 1000)
    return samples


def _woken(requests: Sequence[Row], turns: Sequence[Row]) -> list[float]:
    """From arrival to delivery (us) of the requests that found the serving loop idle."""
    idle = [turn for turn in pairwise(turns) if turn[0]["step"] is None and turn[0]["completed_step"] is None]
    reads = {after["now_ns"] for _, after in idle}
    return [(each["delivered_ns"] - each["arrival_ns"]) / 1000 for each in requests if each["delivered_ns"] in reads]
