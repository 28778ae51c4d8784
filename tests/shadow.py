"""Simulations whose every step is checked, and a profile with round numbers to run them on."""

from __future__ import annotations

from dataclasses import replace

import simpy

from engine.checks.step_checker import CheckedBackend
from engine.config import ServingConfig
from engine.instance import Instance
from engine.model.config import load_model_config
from engine.records.recorder import Recorder
from engine.request import Request
from engine.scheduler import load_scheduler
from engine.scheduler.base import Scheduler
from sim.backend import SimBackend
from sim.device_timing import DeviceTiming, ProfiledTiming
from sim.profile.format import HOST_TERMS, Profile
from sim.profile.meta import ProfileMeta
from traces.request import TraceRequest

SMALL = replace(load_model_config("llama-3.2-1b"), name="small", vocab_size=100)


def serve(
    requests: list[TraceRequest],
    config: ServingConfig,
    timing: DeviceTiming | None = None,
    scheduler: Scheduler | None = None,
) -> tuple[Recorder, list[Request]]:
    """Serve in checked simulation; returns the records and the scheduler's requests in order of id."""
    env = simpy.Environment(initial_time=0)
    scheduler = scheduler or load_scheduler(config)
    block_size = config.block_size if config.prefix_caching else 0
    simulated = SimBackend(env, requests, timing or ProfiledTiming(small_profile()), block_size=block_size)
    backend = CheckedBackend(simulated, scheduler.config)
    recorder = Recorder()
    env.run(until=env.process(Instance(scheduler, backend, recorder).serve()))
    assert scheduler.pool.used == 0 and scheduler.cpu_pool.used == 0, "blocks were lost"
    return recorder, [life.request for _, life in sorted(recorder._lives.items())]


def small_profile(scale: float = 1.0) -> Profile:
    """Step times with round numbers: 1 ms + 10 us a token, 0.1 us a KV token. For decisions, not for fidelity."""

    def rows(**columns: list[float]) -> list[dict[str, float]]:
        names = list(columns)
        return [
            dict(zip(names, values, strict=True)) | {"spread": 0.0} for values in zip(*columns.values(), strict=True)
        ]

    dense = [row | {"op": "all"} for row in rows(tokens=[1, 4096], time_us=[1010 * scale, (1000 + 40960) * scale])]
    grid = [(x, y) for x in (1, 4096) for y in (0, 4096)]
    prefill = rows(chunk=[x for x, _ in grid], context=[y for _, y in grid], time_us=[x * y * 1e-4 for x, y in grid])
    decode = rows(
        sequences=[1, 1, 256, 256],
        kv_tokens=[1, 4096, 256, 256 * 4096],
        imbalance=[1, 1, 1, 1],
        time_us=[0.1 * scale, 409.6 * scale, 25.6 * scale, 25.6 * 4096 * scale],
    )
    head = rows(samples=[1, 256], time_us=[100 * scale, 200 * scale])
    swap = rows(blocks=[1, 64], time_us=[50 * scale, 50 * 64 * scale])
    host = [{"term": term, "kind": "any", "sequences": 1, "time_us": 20.0, "spread": 0.0} for term in HOST_TERMS]
    tables = {
        "dense": dense,
        "prefill_attention": prefill,
        "decode_attention": decode,
        "head": head,
        "host": host,
        "swap": [row | {"direction": "out"} for row in swap] + [row | {"direction": "in"} for row in swap],
    }
    return Profile(ProfileMeta("test", SMALL, "float32", "invented"), tables)
