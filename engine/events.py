"""What happens to a serving system from outside: requests arrive, clients give up."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

from engine.request import Request
from traces.request import TraceRequest


class Event(NamedTuple):
    """A request arrives, or is cancelled, at `time_ns`. Ties are broken by `sequence`."""

    time_ns: int
    sequence: int
    request: Request
    is_cancel: bool = False


class EventQueue:
    """The external events of a run in the order in which the loop must deliver them."""

    def __init__(self, events: Iterable[Event]) -> None:
        self._events = deque(sorted(events, key=lambda event: event[:2]))

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
        while self._events and self._events[0].time_ns <= now:
            due.append(self._events.popleft())
        return due

    @property
    def next_ns(self) -> int | None:
        """When the next event is due, or None if there is none left."""
        return self._events[0].time_ns if self._events else None
