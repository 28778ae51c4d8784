"""The simulated backend: the serving loop is a SimPy process, and steps take the time that `timing` says.

Host time never enters: the clock is SimPy's, in integer nanoseconds.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

import simpy

from engine.backend import Filled, Shown, Stop
from engine.decode_set import DecodeSet
from engine.events import EventQueue, EventSource
from engine.prefix_hash import Content, with_output
from engine.step import Step
from sim.device_timing import DeviceTiming
from traces.request import TraceRequest


class SimBackend:
    """Implements `engine.backend.Backend` on a SimPy environment.

    Attributes:
        outputs: what the tokens of requests show. Requests that come later must be shown to it before their first step.
    """

    def __init__(
        self,
        env: simpy.Environment,
        requests: Iterable[TraceRequest],
        timing: DeviceTiming,
        events: EventSource | None = None,
        block_size: int = 0,
    ) -> None:
        """Build the backend.

        Args:
            events: None: the requests, in order of arrival, arrive and are cancelled as their trace says.
            block_size: as in `OutputTracker`.
        """
        self._env = env
        self.outputs = OutputTracker(block_size)
        if events is None:
            events = EventQueue.from_trace(map(self.outputs.seen, requests))
        else:
            for source in requests:
                self.outputs.seen(source)
        self._events = events
        self.due = events.due  # takes the events that are due by a time
        self._timing = timing
        self._in_flight: deque[tuple[int, Shown]] = deque()

    def now(self) -> int:
        """Simulated nanoseconds."""
        now: int = self._env.now
        return now

    def launch(self, step: Step) -> simpy.Event:
        """Takes the host's time; the device works on in the background."""
        now = self._env.now
        launch, resume_ns = self._timing.launch(step, now)
        self._in_flight.append((step.index, self.outputs.shown_by(step)))
        return self._env.timeout(resume_ns - now, launch)

    def complete(self) -> simpy.Event:
        """Waits for the oldest step in flight."""
        index, shown = self._in_flight.popleft()
        now = self._env.now
        completion, resume_ns = self._timing.complete(now, index, shown)
        return self._env.timeout(resume_ns - now, completion)

    def wait(self, until_ns: int | None) -> simpy.Event | None:
        """Waits for the next external event, or until then."""
        due_ns = self._events.next_ns(until_ns)
        return None if due_ns is None else self._env.timeout(self._timing.wake(due_ns) - self.now())

    def close(self) -> None:
        """Nothing is left to do."""


_NOTHING = Shown()


class OutputTracker:
    """What a step's tokens show: which requests end before their `max_tokens`, and which blocks outputs have filled.

    Only a backend may know this beforehand.
    """

    def __init__(self, block_size: int = 0) -> None:
        """`block_size`: tokens of a KV block where prefixes are cached; 0: no block's hash is asked for."""
        self._block_size = block_size
        self._early: dict[int, TraceRequest] = {}
        self._contents: dict[int, Content] = {}  # what requests are, their outputs included
        self._decoding = DecodeSet()

    def seen(self, source: TraceRequest) -> TraceRequest:
        """Take note of a request before it arrives, and hand it on."""
        if source.output_len < source.max_tokens:
            self._early[source.id] = source
        if self._block_size and (content := with_output(source, self._block_size)):
            self._contents[source.id] = content
        return source

    def forget(self, request_id: int) -> None:
        """The request has ended, and all its steps have completed."""
        self._early.pop(request_id, None)
        self._contents.pop(request_id, None)
        self._decoding.discard(request_id)

    def shown_by(self, step: Step) -> Shown:
        """The requests whose end-of-sequence is among the step's tokens, and the blocks whose last token is."""
        if not self._early and not self._contents:
            return _NOTHING
        for request_id in step.leaving:
            self._decoding.discard(request_id)
        for request_id, context in step.joined.items():
            if request_id in self._early or request_id in self._contents:
                self._decoding.add(request_id, context)
                self._wake(request_id, context)
        cached = {request_id: each.start + each.tokens for request_id, each in step.chunks.items() if each.samples}
        if step.decodes:
            ringing = self._decoding.advance()
            cached = ringing | cached
            for request_id, context in ringing.items():
                self._wake(request_id, context)
        for request_id in step.finishing:
            self._decoding.discard(request_id)
        stops = [
            Stop(each, self._early[each].output_len) for each, context in cached.items() if self._ends(each, context)
        ]
        return Shown(
            stops, [each for request_id, context in cached.items() for each in self._fills(request_id, context)]
        )

    def _wake(self, request_id: int, context: int) -> None:
        """Ask for the request to ring when its next token shows something."""
        ticks = []
        if request_id in self._early:
            ticks.append(_last_context(self._early[request_id]) - context)
        if request_id in self._contents:
            ticks.append(self._block_size - (context + 1) % self._block_size)
        for each in ticks:
            if each > 0:
                self._decoding.wake(request_id, each)

    def _ends(self, request_id: int, context: int) -> bool:
        return request_id in self._early and _last_context(self._early[request_id]) == context

    def _fills(self, request_id: int, context: int) -> list[Filled]:
        """The block whose last token is the newest, which is not cached yet, if it is known what the block holds."""
        content, end = self._contents.get(request_id), context + 1
        if content is None or end % self._block_size or end > len(content.ids) * content.width:
            return []
        return [Filled(request_id, content.own(end - self._block_size, end))]


def _last_context(source: TraceRequest) -> int:
    """The context at which a request has made its last token: everything but that token is cached."""
    return source.prompt_len + source.output_len - 1
