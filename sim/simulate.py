"""Run a trace in simulation, and replay a recorded run's times to see whether the decisions are the same."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import count
from typing import Any, NamedTuple

import simpy

from engine.config import ServingConfig
from engine.events import Event, EventQueue
from engine.instance import Instance
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords
from engine.request import STOP, Request
from sim.backend import SimBackend
from sim.device_timing import ProfiledTiming, RecordedTiming, ReplayOver, Timing
from sim.latency_model import LatencyModel
from sim.profile.format import Profile
from traces.request import TraceRequest


def simulate(
    requests: Iterable[TraceRequest],
    config: ServingConfig,
    timing: Timing,
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
        refused: requests that are rejected as they arrive, and why, as `refusals` has them.

    Returns:
        How far the times rest on what was measured: `sim.latency_model.LatencyModel.coverage`.
    """
    timing = ProfiledTiming(profile, ignore)
    events = EventQueue.from_trace(requests, lambda source: refused.get(source.id)) if refused else None
    simulate(requests, config, timing, recorder, check=check, events=events)
    return timing.latency.coverage()


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
            **_recorded_prefix(row),
            cancel_ns=row["cancel_ns"],
            ttft_slo_ns=row["ttft_slo_ns"],
            e2e_slo_ns=row["e2e_slo_ns"],
        )
        for row in run.tables["requests"].to_pylist()
    ]
    return sorted(requests, key=lambda request: (request.arrival_ns, request.id))


def _recorded_prefix(row: Mapping[str, Any]) -> dict[str, Any]:
    if row["hash_ids"] is None:
        return {}
    return {name: row[name] for name in ("hash_ids", "hash_block_size", "output_ids")}


def refusals(run: RunRecords) -> dict[int, str]:
    """The requests that a recorded run's backend could not take, and why."""
    rows = run.tables["requests"].select(["request", "refused", "reason"]).to_pylist()
    return {row["request"]: row["reason"] for row in rows if row["refused"]}


def deliveries(run: RunRecords, requests: Sequence[TraceRequest]) -> EventQueue:
    """The events of a recorded run, each due when the serving loop took it, in the order in which it did.

    Behind a server that is later than the client's time by the way there, which is not the scheduler's to know. The
    table of requests is in the order of their deliveries; a cancellation's place among all events is recorded, and the
    counts of events say in which turn that is. What the backend refused, it refuses again.
    """
    columns = ["request", "arrival_ns", "delivered_ns", "cancel_ns", "cancel_event", "reason"]
    rows, refused = run.tables["requests"].select(columns).to_pylist(), refusals(run)
    turns = run.tables["iterations"].select(["now_ns", "events"]).to_pylist()
    taken = [turn["now_ns"] for turn in turns for _ in range(turn["events"])]
    cancels = _cancellations(rows, taken)
    cancelled = set(cancels.values())
    others = (place for place in count() if place not in cancelled)
    sources = {source.id: source for source in requests}
    events: list[tuple[int, int, Event]] = []
    for row, place in zip(rows, others, strict=False):
        source, due_ns = sources[row["request"]], row["delivered_ns"]
        request = Request.from_trace(source, refused.get(source.id))
        arrival = Event(source.arrival_ns, 2 * source.id, request, is_last=row["cancel_ns"] is None)
        events.append((due_ns, place, arrival))
        if (place := cancels.get(source.id, len(taken))) < len(taken):  # else the run was cut off before
            cancel = Event(row["cancel_ns"], 2 * source.id + 1, request, True, row["reason"])
            events.append((max(due_ns, taken[place]), place, cancel))
    return EventQueue((due_ns, event) for due_ns, _, event in sorted(events))


def _cancellations(rows: Sequence[Mapping[str, Any]], taken: Sequence[int]) -> dict[int, int]:
    """Which of the events, taken at those times, cancelled a request.

    Before schema 4 the events of a turn were delivered in the order of their times, and those that were no arrivals
    were cancellations.
    """
    cancelled = [row for row in rows if row["cancel_ns"] is not None]
    if all(row["cancel_event"] is not None for row in cancelled):
        return {row["request"]: row["cancel_event"] for row in cancelled}
    others = Counter(taken) - Counter(row["delivered_ns"] for row in rows)
    cancels = sorted((row["cancel_ns"], 2 * row["request"] + 1) for row in cancelled)
    events = [(row["delivered_ns"], row["arrival_ns"], 2 * row["request"]) for row in rows]
    events += [(due_ns, *cancel) for due_ns, cancel in zip(sorted(others.elements()), cancels, strict=False)]
    return {sequence // 2: place for place, (_, _, sequence) in enumerate(sorted(events)) if sequence % 2}


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


class Predicted(NamedTuple):
    """A replay on a profile, and all that its latency model had to say.

    Attributes:
        records: of the replay, as `replay` returns them.
        parts_us: of each step of the recorded run, what its time is predicted to be made of: `LatencyModel.parts_us`.
        coverage: how far that rests on what was measured: `LatencyModel.coverage`.
    """

    records: RunRecords
    parts_us: list[dict[str, float]]
    coverage: dict[str, Any]


def replay_predicted(run: RunRecords, config: ServingConfig, profile: Profile) -> Predicted:
    """As `replay` on a profile, with what each step is made of: one replay for all of it."""
    recorder, latency = Recorder(), LatencyModel(profile)
    parts_us = _replay(run, config, latency, recorder).parts_us
    return Predicted(RunRecords(run.manifest, recorder.tables(), partial=run.partial), parts_us, latency.coverage())


def replay_parts(run: RunRecords, config: ServingConfig, profile: Profile) -> list[dict[str, float]]:
    """What the latency model takes each step of a recorded run to be made of: `LatencyModel.parts_us`, in order."""
    return _replay(run, config, LatencyModel(profile), Recorder()).parts_us


def _replay(run: RunRecords, config: ServingConfig, latency: LatencyModel | None, recorder: Recorder) -> RecordedTiming:
    steps = run.tables["steps"]
    device = list(zip(steps["device_start_ns"].to_pylist(), steps["device_ns"].to_pylist(), strict=True))
    timing = RecordedTiming(run.tables["iterations"].to_pylist(), device, latency)
    requests = recorded_requests(run)
    with suppress(ReplayOver):
        simulate(requests, config, timing, recorder, timing.start_ns, events=deliveries(run, requests))
    return timing
