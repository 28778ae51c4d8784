"""The simulated backend: the serving loop is a SimPy process, and steps take the time that `timing` says.

Host time never enters: the clock is SimPy's, in integer nanoseconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import simpy

from engine.backend import Completion, Stop
from engine.decode_set import DecodeSet
from engine.events import EventQueue, EventSource
from engine.step import Step
from sim.timing import Timing
from traces.request import TraceRequest


class SimBackend:
    """Implements `engine.backend.Backend` on a SimPy environment.

    Attributes:
        endings: where requests stop. Requests that come while it runs must be shown to it before their first step.
    """

    def __init__(
        self,
        env: simpy.Environment,
        requests: Iterable[TraceRequest],
        timing: Timing,
        events: EventSource | None = None,
    ) -> None:
        """`events` None: the requests, in order of arrival, arrive and are cancelled as their trace says."""
        self._env = env
        self.endings = Endings()
        if events is None:
            events = EventQueue.from_trace(map(self.endings.seen, requests))
        else:
            for source in requests:
                self.endings.seen(source)
        self._events = events
        self.due = events.due  # takes the events that are due by a time
        self._timing = timing
        self._in_flight: deque[tuple[int, list[Stop]]] = deque()

    def now(self) -> int:
        """Simulated nanoseconds."""
        now: int = self._env.now
        return now

    def launch(self, step: Step) -> simpy.Event:
        """Takes the host's time; the device works on in the background."""
        now = self._env.now
        launch, resume_ns = self._timing.launch(step, now)
        self._in_flight.append((step.index, self.endings.shown_by(step)))
        return self._env.timeout(resume_ns - now, launch)

    def complete(self) -> simpy.Event:
        """Waits for the oldest step in flight."""
        index, stops = self._in_flight.popleft()
        now = self._env.now
        completed_ns, start_ns, device_ns, resume_ns = self._timing.complete(now)
        return self._env.timeout(resume_ns - now, Completion(index, completed_ns, start_ns, device_ns, stops))

    def wait(self) -> simpy.Event | None:
        """Waits for the next external event."""
        due_ns = self._events.next_ns()
        return None if due_ns is None else self._env.timeout(self._timing.wake(due_ns) - self.now())


class Endings:
    """Which step shows that a request has ended before its `max_tokens`. Only a backend may know this."""

    def __init__(self) -> None:
        self._early: dict[int, TraceRequest] = {}
        self._decoding = DecodeSet()

    def seen(self, source: TraceRequest) -> TraceRequest:
        """Take note of a request before it arrives, and hand it on."""
        if source.output_len < source.max_tokens:
            self._early[source.id] = source
        return source

    def forget(self, request_id: int) -> None:
        """The request has ended, and all its steps have completed."""
        self._early.pop(request_id, None)
        self._decoding.discard(request_id)

    def shown_by(self, step: Step) -> list[Stop]:
        """The requests whose end-of-sequence is among the step's tokens."""
        if not self._early:
            return []
        for request_id in (*step.dropped, *step.preempted, *step.swapped_out):
            self._decoding.discard(request_id)
        for request_id, context in step.joined.items():
            self._join(request_id, context)
        cached = [
            (request_id, chunk.start + chunk.tokens) for request_id, chunk in step.chunks.items() if chunk.samples
        ]
        if step.decodes:
            cached += self._decoding.advance().items()
        for request_id in step.finishing:
            self._decoding.discard(request_id)
        return [
            Stop(request_id, self._early[request_id].output_len)
            for request_id, context in cached
            if request_id in self._early and self._last_context(request_id) == context
        ]

    def _join(self, request_id: int, context: int) -> None:
        if request_id in self._early:
            self._decoding.add(request_id, context)
            if (left := self._last_context(request_id) - context) > 0:
                self._decoding.wake(request_id, left)

    def _last_context(self, request_id: int) -> int:
        """The context at which a request has made its last token: everything but that token is cached."""
        source = self._early[request_id]
        return source.prompt_len + source.output_len - 1
