"""Measures the host's times around a step, from a short real run through the serving loop, and copies to it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

from engine.config import ServingConfig
from engine.records.recorder import Recorder
from sim.profile.format import KEYS, Row
from sim.profiling.device_profiler import row_of_repeats
from traces.request import TraceRequest

if TYPE_CHECKING:
    from engine.executor.executor import Executor

SINGLES, BURSTS, BURST_REPEATS = 8, (8, 32, 64, 256), 3  # requests, alone and at once, that the host is timed with
GAP_NS = 400_000_000


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
    samples = _samples(tables["steps"], tables["iterations"])
    samples["wake", "any", 1] = _woken(tables["requests"], tables["iterations"]) or [0.0]
    rows = [row_of_repeats(KEYS["host"], key, times) for key, times in sorted(samples.items())]
    return [row | {"time_us": max(0.0, row["time_us"])} for row in rows]


def swap_rows(executor: Executor, config: ServingConfig) -> list[Row]:
    """Table `swap`, of copies between the tiers."""
    return [row_of_repeats(KEYS["swap"], key, times) for *key, times in executor.measure_swap(config)]


def _samples(steps: Sequence[Row], turns: Sequence[Row]) -> defaultdict[tuple[str, str, int], list[float]]:
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
    reads = {
        after["now_ns"] for turn, after in pairwise(turns) if turn["step"] is None and turn["completed_step"] is None
    }
    return [(each["delivered_ns"] - each["arrival_ns"]) / 1000 for each in requests if each["delivered_ns"] in reads]
