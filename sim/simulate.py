"""Run a trace in simulation, and replay a recorded run's times to see whether the decisions are the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress

import simpy

from engine.config import ServingConfig
from engine.events import Event, EventQueue
from engine.recorder import Recorder
from engine.records import RunRecords
from engine.request import STOP, Request
from engine.scheduler import load_scheduler
from engine.serving_loop import serving_loop
from sim.backend import SimBackend
from sim.latency import LatencyModel
from sim.profile import Profile
from sim.timing import ProfiledTiming, RecordedTiming, ReplayOver, Timing
from traces.request import TraceRequest


def simulate(
    requests: Sequence[TraceRequest],
    config: ServingConfig,
    timing: Timing,
    recorder: Recorder,
    start_ns: int = 0,
    events: EventQueue | None = None,
) -> None:
    """Serve `requests` in simulated time, from `start_ns` on, noting everything in `recorder`.

    Args:
        events: their arrivals and cancellations, if not at the times of the trace.
    """
    env = simpy.Environment(initial_time=start_ns)
    backend = SimBackend(env, requests, timing, events)
    env.run(until=env.process(serving_loop(backend, load_scheduler(config), recorder)))


def predict(
    requests: Sequence[TraceRequest],
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
    """The workload of a recorded run, each request stopping where it did stop."""
    return [
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


def deliveries(run: RunRecords, requests: Sequence[TraceRequest]) -> EventQueue:
    """The events of a recorded run, each due when the serving loop took it.

    Behind a server that is later than the client's time by the way there, which is not the scheduler's to know. A
    cancellation's delivery follows from the counts of events: those of a turn that are no arrivals are cancellations.
    """
    delivered = run.tables["requests"]["delivered_ns"].to_pylist()
    arrivals = Counter(delivered)
    turns = run.tables["iterations"].select(["now_ns", "events"]).to_pylist()
    taken = (turn["now_ns"] for turn in turns for _ in range(turn["events"] - arrivals.pop(turn["now_ns"], 0)))
    events, due_ns = [], []
    for source, when in zip(requests, delivered, strict=True):
        events.append(Event(source.arrival_ns, 2 * source.id, Request.from_trace(source)))
        due_ns.append(when)
    reasons = run.tables["requests"]["reason"].to_pylist()
    cancels = [
        Event(source.cancel_ns, 2 * source.id + 1, event.request, True, reason)
        for source, event, reason in zip(requests, events, reasons, strict=True)
        if source.cancel_ns is not None
    ]
    for cancel, when in zip(sorted(cancels, key=lambda event: event[:2]), taken, strict=False):
        events.append(cancel)
        due_ns.append(when)
    return EventQueue(events, due_ns)


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
    requests = recorded_requests(run)
    with suppress(ReplayOver):
        simulate(requests, config, timing, recorder, timing.start_ns, deliveries(run, requests))
    return timing
