"""Replays a recorded run: its workload and times, never its plans, to see whether the decisions are the same.

With a profile, the latency model predicts the time of each step that is replayed.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from functools import reduce
from itertools import count
from operator import add
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backend import Completion, Launch, Shown
from engine.config import ServingConfig
from engine.events import Event, EventQueue
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords
from engine.request import FAILED, STOP, Request
from engine.step import Step
from sim.latency_model import PARTS, LatencyModel
from sim.profile.format import Profile
from sim.simulate import simulate
from traces.request import TraceRequest


@dataclass(frozen=True, slots=True)
class Replay:
    """A recorded run, replayed.

    Attributes:
        records: equal digests mean equal decisions. They end where the recorded times no longer fit the decisions.
            Times, `device_ns` included, are the recorded ones.
        predicted_ns: (steps,), the latency model's times of the same batches; None without a profile.
        parts_us: of each step, microseconds by `sim.latency_model.PARTS`; nothing, of copies.
        coverage: how far predictions rest on what was measured, as `LatencyModel.coverage` returns it.
    """

    records: RunRecords
    predicted_ns: NDArray[np.int64] | None = None
    parts_us: Sequence[Mapping[str, float]] = ()
    coverage: Mapping[str, Any] | None = None

    def without_ns(self, part: str) -> NDArray[np.int64]:
        """(steps,), `predicted_ns` of a latency model that ignores one of its parts."""
        assert self.predicted_ns is not None, "replayed without a profile"
        times = zip(self.predicted_ns.tolist(), self.parts_us, strict=True)
        return np.array([round(1000 * (reduce(add, us.values()) - us[part])) if us else ns for ns, us in times], int)


def replay(
    run: RunRecords, config: ServingConfig, profile: Profile | None = None, ignore: Collection[str] = ()
) -> Replay:
    """Give the simulator a recorded run's workload and times, and see what it decides.

    Args:
        run: the recorded run.
        config: its limits and policy.
        profile: what the latency model is made of.
        ignore: parts of the latency model that are to count for nothing.
    """
    recorder, latency = Recorder(), LatencyModel(profile, ignore) if profile else None
    timing = RecordedTiming(run, latency)
    requests = recorded_requests(run)
    with suppress(ReplayOver):
        simulate(requests, config, timing, recorder, timing.start_ns, events=deliveries(run, requests))
    records = RunRecords(run.manifest, recorder.tables(), partial=run.partial)
    if latency is None:
        return Replay(records)
    predicted = timing.predictions[: len(records.tables["steps"])]  # those in flight at the end are not in the records
    predicted_ns = np.array([device_ns for device_ns, _ in predicted], np.int64)
    parts_us = [dict(zip(PARTS, parts, strict=False)) for _, parts in predicted]
    return Replay(records, predicted_ns, parts_us, latency.coverage())


class ReplayOver(Exception):
    """The recorded times are used up, or the decisions differ from the recorded ones so that no time fits."""


class RecordedTiming:
    """The times of a recorded run, iteration by iteration, and of its decisions nothing.

    Attributes:
        predictions: of the latency model, if there is one, for each step that was launched: as `LatencyModel.predict`.
    """

    def __init__(self, run: RunRecords, latency: LatencyModel | None = None) -> None:
        steps = run.tables["steps"]
        self._iterations: list[dict[str, Any]] = run.tables["iterations"].to_pylist()
        works = (steps[name].to_pylist() for name in ("device_start_ns", "device_ns"))
        self._device: Iterator[tuple[int, int]] = zip(*works, strict=True)
        self._latency = latency
        self.predictions: list[tuple[int, Sequence[float]]] = []
        self._turn = 0
        self._in_flight: deque[tuple[int, int] | None] = deque()  # when the device began, how long it worked

    @property
    def start_ns(self) -> int:
        """The first clock read."""
        return int(self._row["now_ns"])

    @property
    def _row(self) -> dict[str, Any]:
        if self._turn >= len(self._iterations):
            raise ReplayOver
        return self._iterations[self._turn]

    def launch(self, step: Step, now: int) -> tuple[Launch, int]:
        """The recorded launch of this iteration. Raises ReplayOver if the recorded run launched nothing here."""
        row = self._row
        if row["launched_ns"] is None:
            raise ReplayOver
        recorded = next(self._device, None)  # None if the step was cut off
        if recorded is not None and self._latency:
            self.predictions.append(self._latency.predict(step, recorded[0]))
        self._in_flight.append(recorded)
        launch = Launch(row["planned_ns"], row["launched_ns"])
        return launch, launch.launched_ns if row["completed_ns"] is not None else self._next_read(launch.launched_ns)

    def complete(self, now: int, step: int, shown: Shown) -> tuple[Completion, int]:
        """The recorded completion of this iteration. Raises ReplayOver if the recorded run waited for none here."""
        completed, work = self._row["completed_ns"], self._in_flight.popleft()
        if completed is None or work is None:
            raise ReplayOver
        return Completion(step, completed, *work, *shown), self._next_read(completed)

    def wake(self, due_ns: int) -> int:
        """When the recorded run woke up. Raises ReplayOver if it was over by then."""
        if self._turn + 1 >= len(self._iterations):
            raise ReplayOver
        return self._next_read(due_ns)

    def _next_read(self, otherwise: int) -> int:
        """The next iteration's clock read; after the last there is none, and the next question ends the replay."""
        self._turn += 1
        return int(self._row["now_ns"]) if self._turn < len(self._iterations) else otherwise


# -- the workload --------------------------------------------------------------------------------------------------


def recorded_requests(run: RunRecords) -> list[TraceRequest]:
    """The workload of a recorded run in order of arrival, each request stopping where it did stop."""
    names, requests = {field.name for field in fields(TraceRequest)}, []
    for row in run.tables["requests"].to_pylist():
        known = {name: value for name, value in row.items() if name in names and value is not None}
        stop = {} if row["outcome"] in (STOP, FAILED) else {"output_len": row["max_tokens"]}
        requests.append(TraceRequest(**known | {"id": row["request"]} | stop))
    return sorted(requests, key=lambda request: (request.arrival_ns, request.id))


def refusals(run: RunRecords) -> dict[int, str]:
    """The requests that a recorded run's backend could not take, and why."""
    rows = run.tables["requests"].select(["request", "refused", "reason"]).to_pylist()
    return {row["request"]: row["reason"] for row in rows if row["refused"]}


def deliveries(run: RunRecords, requests: Sequence[TraceRequest]) -> EventQueue:
    """The events of a recorded run, each due when the serving loop took it, in the order in which it did.

    Behind a server that is later than the client's time by the way there, which is not the scheduler's to know. The
    table of requests is in the order of their deliveries. The place of a cancellation among all events is recorded; the
    counts of events say in which turn that is. Requests that the backend refused are refused again.
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
