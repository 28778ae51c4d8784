"""The real backend: the machine's clock, and a data plane that works through steps in the order of launching.

The data plane runs in a thread of its own, so that `launch` returns before the step is done and the serving loop
can plan the next one meanwhile. It imports no torch: what a step computes is the business of the `DataPlane`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple, Protocol

from engine.backend import Completion, Launch, Stop
from engine.events import Event, EventQueue
from engine.step import Step


class DataPlane(Protocol):
    """Runs steps, one after the other, on one thread."""

    def prepare_thread(self) -> None:
        """Called once on the thread that will run the steps."""

    def run(self, step: Step) -> list[Stop]:
        """Apply the step's delta, compute its tokens, and say which requests were found to have ended."""


class _Done(NamedTuple):
    """Something that has happened already."""

    value: Any = None

    def wait(self) -> Any:
        return self.value


@dataclass(frozen=True, slots=True)
class _Later:
    """Something to block for."""

    wait: Callable[[], Any]


class ExecutorBackend:
    """Implements `engine.backend.Backend` on the machine's own time. Use as a context manager: it owns a thread."""

    def __init__(self, data_plane: DataPlane, events: EventQueue) -> None:
        self._data_plane = data_plane
        self._events = events
        self._steps: SimpleQueue[Step | None] = SimpleQueue()
        self._results: SimpleQueue[tuple[int, int, int, Sequence[Stop]] | BaseException] = SimpleQueue()
        self._worker = Thread(target=self._work, name="data-plane", daemon=True)
        self._start_ns = 0

    def __enter__(self) -> ExecutorBackend:
        self._worker.start()
        self._next_result()  # the thread is ready
        gc.collect()
        gc.freeze()  # nothing allocated so far is looked at again: collections during the run stay short
        self._start_ns = time.perf_counter_ns()
        return self

    def __exit__(self, *_: object) -> None:
        self._steps.put(None)
        self._worker.join()
        gc.unfreeze()

    def now(self) -> int:
        """Nanoseconds since the run's start."""
        return time.perf_counter_ns() - self._start_ns

    def due(self, now: int) -> list[Event]:
        """Events due by `now`."""
        return self._events.due(now)

    def launch(self, step: Step) -> _Done:
        """Hands the step to the data plane's thread."""
        planned_ns = self.now()
        self._steps.put(step)
        return _Done(Launch(planned_ns, self.now()))

    def complete(self) -> _Later:
        """Waits for the oldest step in flight; raises what the data plane raised."""
        return _Later(self._next_result)

    def wait(self) -> _Later | None:
        """Sleeps until the next external event."""
        due_ns = self._events.next_ns
        return None if due_ns is None else _Later(lambda: time.sleep(max(0, due_ns - self.now()) / 1e9))

    def _next_result(self) -> Completion:
        result = self._results.get()
        completed_ns = self.now()
        if isinstance(result, BaseException):
            raise result
        index, start_ns, device_ns, stops = result
        return Completion(index, completed_ns, start_ns, device_ns, stops)

    def _work(self) -> None:
        try:
            self._data_plane.prepare_thread()
            self._results.put((-1, 0, 0, ()))
            while (step := self._steps.get()) is not None:
                start_ns = self.now()
                stops = self._data_plane.run(step)
                self._results.put((step.index, start_ns, self.now() - start_ns, stops))
        except BaseException as error:
            self._results.put(error)
