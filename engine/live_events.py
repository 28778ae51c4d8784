"""External events as they happen: clients' requests, handed over by another thread, for a loop that runs on live time.

The loop uses it as it uses the events of a trace. What differs is that nobody knows the next event beforehand, so that
asking for it waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from threading import Condition
from weakref import WeakValueDictionary

from engine.events import Event
from engine.request import Request
from engine.stop_condition import StopCondition
from traces.request import TraceRequest

Admit = Callable[[TraceRequest, StopCondition], str | None]


class LiveEvents:
    """Implements `engine.events.EventSource` for events that another thread puts in, and delivers them in that order.

    That need not be the order of their times: while a long prompt was read, somebody may have given up.
    """

    def __init__(self, clock: Callable[[], int], admit: Admit) -> None:
        """Start empty and open.

        Args:
            clock: nanoseconds since the run's start, now; the events' times are on it.
            admit: told of each request just before the loop is, on the loop's thread: what the backend alone may know.
                Returns why the backend cannot take it, or None.
        """
        self._clock = clock
        self._admit = admit
        self._changed = Condition()
        self._inbox: deque[tuple[int, tuple[TraceRequest, StopCondition] | int, str | None]] = deque()
        self._closed = False
        self._requests: WeakValueDictionary[int, Request] = WeakValueDictionary()  # who ended is forgotten

    def arrive(self, source: TraceRequest, condition: StopCondition) -> None:
        """A client has sent a request, at `source.arrival_ns`."""
        self._put(source.arrival_ns, (source, condition), None)

    def cancel(self, request_id: int, time_ns: int, reason: str | None = None) -> None:
        """A client has given up, or wants no more; `reason` is for the records."""
        self._put(time_ns, request_id, reason)

    def cancel_all(self, reason: str) -> None:
        """Nobody is there any more to take what the loop makes. Called by the thread that puts in requests."""
        coming = [what[0].id for _, what, _ in tuple(self._inbox) if isinstance(what, tuple)]
        known = [each.id for ref in self._requests.valuerefs() if (each := ref()) and each.outcome is None]
        for request_id in dict.fromkeys((*coming, *known)):
            self.cancel(request_id, self._clock(), reason)

    def close(self) -> None:
        """Nothing will come any more: the loop ends when it has served what came."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def due(self, now: int) -> list[Event]:
        """Take the events whose time has come, but for those that came after one whose time has not."""
        events = []
        while self._inbox and self._inbox[0][0] <= now:
            if event := self._event(*self._inbox.popleft()):
                events.append(event)
        return events

    def next_ns(self, until_ns: int | None = None) -> int | None:
        """Wait for an event, no longer than `until_ns`; returns the time at which it can be delivered, or that time.

        None if closed, and there is neither.
        """
        patience_s = None if until_ns is None else max(until_ns - self._clock(), 0) / 1e9
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or (self._closed and until_ns is None), patience_s)
            return max(self._inbox[0][0], self._clock()) if self._inbox else until_ns

    def _put(self, time_ns: int, what: tuple[TraceRequest, StopCondition] | int, reason: str | None) -> None:
        with self._changed:
            self._inbox.append((time_ns, what, reason))
            self._changed.notify()

    def _event(self, time_ns: int, what: tuple[TraceRequest, StopCondition] | int, reason: str | None) -> Event | None:
        if isinstance(what, tuple):
            source, condition = what
            request = self._requests[source.id] = Request.from_trace(source, self._admit(source, condition))
            return Event(time_ns, 2 * source.id, request, is_last=False)
        known = self._requests.pop(what, None)
        if known is None:  # it has ended, or was cancelled before
            return None
        return Event(time_ns, 2 * what + 1, known, True, reason)
