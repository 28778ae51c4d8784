"""What happens to a serving system from outside: requests arrive, clients give up."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from engine.request import Request
from traces.request import TraceRequest


class Event(NamedTuple):
    """A request arrives, or is cancelled (and why), at `time_ns`. Ties are broken by `sequence`."""

    time_ns: int
    sequence: int
    request: Request
    is_cancel: bool = False
    reason: str | None = None


class EventSource(Protocol):
    """Where a backend's external events come from: a trace, or clients."""

    def due(self, now: int) -> list[Event]:
        """Take the events whose time has come."""

    def next_ns(self) -> int | None:
        """When the next event is due, or None if none will come. Asked when the loop has nothing else to do."""


class EventQueue:
    """The external events of a run, known beforehand, in the order in which the loop must deliver them."""

    def __init__(self, events: Iterable[Event], due_ns: Sequence[int] | None = None) -> None:
        """`due_ns`: when each event is to be delivered, should that not be its time."""
        events = list(events)
        times = [event.time_ns for event in events] if due_ns is None else due_ns
        self._events = deque(sorted(zip(times, events, strict=True), key=lambda pair: (pair[0], pair[1][:2])))

    @classmethod
    def from_trace(cls, requests: Iterable[TraceRequest]) -> EventQueue:
        """Arrivals in trace order, and cancellations; of events at one time, an earlier request's come first."""
        events = []
        for source in requests:
            request = Request.from_trace(source)
            events.append(Event(source.arrival_ns, 2 * source.id, request))
            if source.cancel_ns is not None:
                events.append(Event(source.cancel_ns, 2 * source.id + 1, request, True))
        return cls(events)

    def due(self, now: int) -> list[Event]:
        """Take the events whose time has come."""
        due = []
        while self._events and self._events[0][0] <= now:
            due.append(self._events.popleft()[1])
        return due

    def next_ns(self) -> int | None:
        """When the next event is due, or None if there is none left."""
        return self._events[0][0] if self._events else None
