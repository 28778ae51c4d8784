"""Measures the host's times around a step, from a short real run through the serving loop."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from engine.config import ServingConfig
from engine.records.recorder import Recorder
from sim.profile.format import KEYS, Row
from sim.profiling.device_profiler import row_of_repeats
from traces.request import TraceRequest

if TYPE_CHECKING:
    from engine.executor.executor import Executor

SINGLES, BURSTS, BURST_REPEATS = 8, (8, 32, 64, 256), 3  # requests, alone and at once, that the host is timed with
GAP_NS = 400_000_000
Columns = dict[str, list[Any]]


def measure_host(executor: Executor, config: ServingConfig) -> list[Row]:
    """Table `host`: requests come alone, then in bursts."""
    at_once = [*(1,) * SINGLES, *(min(count, config.max_seqs) for count in BURSTS if count < 2 * config.max_seqs)]
    at_once += at_once[SINGLES:] * (BURST_REPEATS - 1)
    arrivals = [turn * GAP_NS for turn, count in enumerate(at_once) for _ in range(count)]
    length = min(8, config.max_model_len // 2)
    requests = [TraceRequest(each, arrival, length, length, length) for each, arrival in enumerate(arrivals)]
    recorder = Recorder()
    executor.serve(requests, replace(config, scheduler="fcfs", pipeline_depth=1), recorder)
    tables = {name: table.to_pydict() for name, table in recorder.tables().items()}
    samples = _samples(tables["steps"], tables["iterations"])
    samples["wake", "any", 1] = _woken(tables["requests"], tables["iterations"]) or [0.0]
    rows = [row_of_repeats(KEYS["host"], key, times) for key, times in sorted(samples.items())]
    return [row | {"time_us": max(0.0, row["time_us"])} for row in rows]


def _samples(steps: Columns, turns: Columns) -> defaultdict[tuple[str, str, int], list[float]]:
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


def _woken(requests: Columns, turns: Columns) -> list[float]:
    """From arrival to delivery (us) of the requests that found the serving loop idle."""
    idle = [step is None and done is None for step, done in zip(turns["step"], turns["completed_step"], strict=True)]
    reads = {now for now, was_idle in zip(turns["now_ns"][1:], idle, strict=False) if was_idle}
    pairs = zip(requests["delivered_ns"], requests["arrival_ns"], strict=True)
    return [(delivered - arrival) / 1000 for delivered, arrival in pairs if delivered in reads]
