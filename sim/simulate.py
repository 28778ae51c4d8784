"""Run a trace in simulation."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import simpy

from engine.config import ServingConfig
from engine.events import EventQueue
from engine.instance import Instance
from engine.records.recorder import Recorder
from sim.backend import SimBackend
from sim.device_timing import DeviceTiming, ProfiledTiming
from sim.profile.format import Profile
from traces.request import TraceRequest


def simulate(
    requests: Iterable[TraceRequest],
    config: ServingConfig,
    timing: DeviceTiming,
    recorder: Recorder,
    start_ns: int = 0,
    check: bool = False,
    events: EventQueue | None = None,
) -> None:
    """Serve `requests`, in order of arrival, in simulated time, from `start_ns` on, noting everything in `recorder`.

    Args:
        check: whether every step is looked at.
        events: their arrivals and cancellations, if not at the times of the trace.

    Raises:
        IntegrityError: `check` is set, and a step breaks an invariant.
        PolicyError: as `Instance.serve`.
    """
    env = simpy.Environment(initial_time=start_ns)
    block_size = config.block_size if config.prefix_caching else 0
    backend = SimBackend(env, requests, timing, events, block_size)
    instance = Instance.assemble(config, backend, recorder, check)
    gc.freeze()  # what there is by now stays: to look through it for garbage again and again would take 5 % of the time
    try:
        env.run(until=env.process(instance.serve()))
    finally:
        gc.unfreeze()


def predict(
    requests: Iterable[TraceRequest],
    config: ServingConfig,
    profile: Profile,
    recorder: Recorder,
    ignore: Collection[str] = (),
    check: bool = False,
    refused: Mapping[int, str] | None = None,
) -> dict[str, Any]:
    """Simulate on the times of a profile.

    Args:
        ignore: what is to count for nothing: `sim.latency_model.PARTS`, and `host`.
        check: whether `engine.checks.step_checker` looks at every step.
        refused: requests that are rejected as they arrive, and why, as `sim.replay.refusals` returns them.

    Returns:
        How far the times rest on what was measured: `sim.latency_model.LatencyModel.coverage`.
    """
    timing = ProfiledTiming(profile, ignore)
    events = EventQueue.from_trace(requests, lambda source: refused.get(source.id)) if refused else None
    simulate(requests, config, timing, recorder, check=check, events=events)
    return timing.latency.coverage()
