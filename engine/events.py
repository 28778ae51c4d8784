"""What happens to a serving system from outside: requests arrive, clients give up."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from heapq import heappop, heappush
from typing import NamedTuple, Protocol

from engine.request import Request
from traces.request import TraceRequest

Refusal = Callable[[TraceRequest], str | None]
"""Why a backend cannot take a request, or None. What is refused is delivered all the same, and recorded as rejected."""


class Event(NamedTuple):
    """A request arrives, or is cancelled (and why), at `time_ns`. A trace's ties are broken by `sequence`.

    `is_last` says that no other event of the request will follow.
    """

    time_ns: int
    sequence: int
    request: Request
    is_cancel: bool = False
    reason: str | None = None
    is_last: bool = True


class EventSource(Protocol):
    """Where a backend's external events come from: a trace, or clients."""

    def due(self, now: int) -> list[Event]:
        """Take the events whose time has come, in the order in which they are to be delivered."""

    def next_ns(self, until_ns: int | None = None) -> int | None:
        """When the next event is due, or `until_ns` if that comes first; None if there is neither.

        Asked when the loop has nothing else to do.
        """


class EventQueue:
    """The external events of a run, known beforehand, in the order in which the loop must deliver them.

    Made as they come near: what is held grows with the requests that may yet be cancelled, not with the trace.
    """

    def __init__(self, events: Iterator[tuple[int, Event]]) -> None:
        """`events`: with the time from which each may be delivered, in that order."""
        self._events = events
        self._next = next(events, None)

    @classmethod
    def from_trace(cls, requests: Iterable[TraceRequest], refusal: Refusal | None = None) -> EventQueue:
        """Arrivals, and cancellations; of events at one time, an earlier request's come first.

        Args:
            requests: in order of arrival; taken one by one.
            refusal: of the backend, if there is something that it cannot take.
        """
        return cls(_in_order(requests, refusal))

    def due(self, now: int) -> list[Event]:
        """Take the events whose time has come."""
        due: list[Event] = []
        while self._next is not None and self._next[0] <= now:
            due.append(self._next[1])
            self._next = next(self._events, None)
        return due

    def next_ns(self, until_ns: int | None = None) -> int | None:
        """As in `EventSource`."""
        if self._next is None:
            return until_ns
        return self._next[0] if until_ns is None else min(self._next[0], until_ns)


def _in_order(requests: Iterable[TraceRequest], refusal: Refusal | None) -> Iterator[tuple[int, Event]]:
    """The events of requests that are in order of arrival; one is cancelled no sooner than it arrives."""
    latest_ns = 0
    cancels: list[Event] = []  # a heap: sequences differ, so that no two events compare by more than these
    for source in requests:
        if source.arrival_ns < latest_ns:
            raise ValueError(f"request {source.id} is not in order of arrival")
        latest_ns = source.arrival_ns
        arrival = (source.arrival_ns, 2 * source.id)
        while cancels and cancels[0] < arrival:
            yield cancels[0].time_ns, heappop(cancels)
        request = Request.from_trace(source, refusal and refusal(source))
        yield latest_ns, Event(*arrival, request, is_last=source.cancel_ns is None)
        if source.cancel_ns is not None:
            heappush(cancels, Event(source.cancel_ns, 2 * source.id + 1, request, is_cancel=True))
    while cancels:
        yield cancels[0].time_ns, heappop(cancels)
