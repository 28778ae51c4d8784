"""Run a trace in simulation, and replay a recorded run's times to see whether the decisions are the same."""

from __future__ import annotations

import gc
from collections.abc import Collection, Iterable
from contextlib import suppress

import simpy

from engine.config import ServingConfig
from engine.recorder import Recorder
from engine.records import RunRecords
from engine.request import STOP
from engine.scheduler import load_scheduler
from engine.serving_loop import serving_loop
from sim.backend import SimBackend
from sim.latency import LatencyModel
from sim.profile import Profile
from sim.timing import ProfiledTiming, RecordedTiming, ReplayOver, Timing
from traces.request import TraceRequest


def simulate(
    requests: Iterable[TraceRequest], config: ServingConfig, timing: Timing, recorder: Recorder, start_ns: int = 0
) -> None:
    """Serve `requests`, in order of arrival, in simulated time, from `start_ns` on, noting everything in `recorder`."""
    env = simpy.Environment(initial_time=start_ns)
    backend = SimBackend(env, requests, timing)
    gc.freeze()  # what there is by now stays: to look through it for garbage again and again would take 5 % of the time
    try:
        env.run(until=env.process(serving_loop(backend, load_scheduler(config), recorder)))
    finally:
        gc.unfreeze()


def predict(
    requests: Iterable[TraceRequest],
    config: ServingConfig,
    profile: Profile,
    recorder: Recorder,
    ignore: Collection[str] = (),
) -> dict[str, int]:
    """Simulate on the times of a profile.

    Args:
        ignore: what is to count for nothing: `sim.latency.PARTS`, and `host`.

    Returns:
        How often the profile was asked outside its measured range, by table; `lookups` counts all questions.
    """
    timing = ProfiledTiming(profile, ignore)
    simulate(requests, config, timing, recorder)
    return {"lookups": timing.latency.lookups.total()} | dict(timing.latency.outside)


def recorded_requests(run: RunRecords) -> list[TraceRequest]:
    """The workload of a recorded run in order of arrival, each request stopping where it did stop."""
    requests = [
        TraceRequest(
            id=row["request"],
            arrival_ns=row["arrival_ns"],
            prompt_len=row["prompt_len"],
            output_len=row["output_len"] if row["outcome"] == STOP else row["max_tokens"],
            max_tokens=row["max_tokens"],
            predicted_length=row["predicted_length"],
            priority=row["priority"],
            client=row["client"],
            cancel_ns=row["cancel_ns"],
        )
        for row in run.tables["requests"].to_pylist()
    ]
    return sorted(requests, key=lambda request: (request.arrival_ns, request.id))


def replay(
    run: RunRecords, config: ServingConfig, profile: Profile | None = None, ignore: Collection[str] = ()
) -> RunRecords:
    """Give the simulator a recorded run's workload and times, never its plans, and see what it decides.

    Args:
        run: the recorded run.
        config: its limits and policy.
        profile: if given, `device_ns` in the result is the latency model's prediction for the recorded batches.
        ignore: parts of the latency model that are to count for nothing.

    Returns:
        Records of the replay: equal digests mean equal decisions. It ends early where the recorded times no longer
        fit the decisions.
    """
    recorder = Recorder()
    _replay(run, config, LatencyModel(profile, ignore) if profile else None, recorder)
    return RunRecords(run.manifest, recorder.tables(), partial=run.partial)


def replay_parts(run: RunRecords, config: ServingConfig, profile: Profile) -> list[dict[str, float]]:
    """What the latency model takes each step of a recorded run to be made of: `LatencyModel.parts_us`, in order."""
    return _replay(run, config, LatencyModel(profile), Recorder()).parts_us


def _replay(run: RunRecords, config: ServingConfig, latency: LatencyModel | None, recorder: Recorder) -> RecordedTiming:
    steps = run.tables["steps"]
    device = list(zip(steps["device_start_ns"].to_pylist(), steps["device_ns"].to_pylist(), strict=True))
    timing = RecordedTiming(run.tables["iterations"].to_pylist(), device, latency)
    with suppress(ReplayOver):
        simulate(recorded_requests(run), config, timing, recorder, timing.start_ns)
    return timing
