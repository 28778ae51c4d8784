"""The simulated backend: the serving loop is a SimPy process, and steps take the time that `timing` says.

Host time never enters: the clock is SimPy's, in integer nanoseconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

import simpy

from engine.backend import Completion, Stop
from engine.decode_set import DecodeSet
from engine.events import Event, EventQueue, EventSource
from engine.step import Step
from sim.timing import Timing
from traces.request import TraceRequest


class SimBackend:
    """Implements `engine.backend.Backend` on a SimPy environment.

    Attributes:
        endings: where requests stop. Requests that come while it runs must be added before their first step.
    """

    def __init__(
        self,
        env: simpy.Environment,
        requests: Sequence[TraceRequest],
        timing: Timing,
        events: EventSource | None = None,
    ) -> None:
        """`events` None: the requests arrive, and are cancelled, as their trace says."""
        self._env = env
        self._events = events or EventQueue.from_trace(requests)
        self.endings = Endings(requests)
        self._timing = timing
        self._in_flight: deque[tuple[int, list[Stop]]] = deque()

    def now(self) -> int:
        """Simulated nanoseconds."""
        return int(self._env.now)

    def due(self, now: int) -> list[Event]:
        """Events due by `now`."""
        return self._events.due(now)

    def launch(self, step: Step) -> simpy.Event:
        """Takes the host's time; the device works on in the background."""
        launch, resume_ns = self._timing.launch(step, self.now())
        self._in_flight.append((step.index, self.endings.shown_by(step)))
        return self._until(resume_ns, launch)

    def complete(self) -> simpy.Event:
        """Waits for the oldest step in flight."""
        index, stops = self._in_flight.popleft()
        work, resume_ns = self._timing.complete(self.now())
        return self._until(resume_ns, Completion(index, *work, stops))

    def wait(self) -> simpy.Event | None:
        """Waits for the next external event."""
        due_ns = self._events.next_ns()
        return None if due_ns is None else self._until(self._timing.wake(due_ns))

    def _until(self, time_ns: int, value: object = None) -> simpy.Event:
        return self._env.timeout(time_ns - self.now(), value)


class Endings:
    """Which step shows that a request has ended before its `max_tokens`. Only a backend may know this."""

    def __init__(self, requests: Iterable[TraceRequest]) -> None:
        # The context at which a request has made its last token: everything but that token is cached.
        self._last_context: dict[int, tuple[int, int]] = {}
        self._decoding = DecodeSet()
        for source in requests:
            self.add(source)

    def add(self, source: TraceRequest) -> None:
        """Learn where a request stops."""
        if source.output_len < source.max_tokens:
            self._last_context[source.id] = source.prompt_len + source.output_len - 1, source.output_len

    def forget(self, request_id: int) -> None:
        """The request has ended, and all its steps have completed."""
        self._last_context.pop(request_id, None)
        self._decoding.discard(request_id)

    def shown_by(self, step: Step) -> list[Stop]:
        """The requests whose end-of-sequence is among the step's tokens."""
        if not self._last_context:
            return []
        for request_id in (*step.dropped, *step.preempted, *step.swapped_out):
            self._decoding.discard(request_id)
        for request_id, context in step.joined.items():
            self._join(request_id, context)
        cached = [
            (request_id, chunk.start + chunk.tokens) for request_id, chunk in step.chunks.items() if chunk.samples
        ]
        if step.decodes:
            ringing = self._decoding.advance()
            cached += [(each, self._decoding.context(each)) for each in ringing if each in self._decoding]
        for request_id in step.finishing:
            self._decoding.discard(request_id)
        return [Stop(each, self._last_context[each][1]) for each, context in cached if self._ends_at(each, context)]

    def _join(self, request_id: int, context: int) -> None:
        if request_id in self._last_context:
            self._decoding.add(request_id, context)
            if (left := self._last_context[request_id][0] - context) > 0:
                self._decoding.wake(request_id, left)

    def _ends_at(self, request_id: int, context: int) -> bool:
        return request_id in self._last_context and self._last_context[request_id][0] == context
