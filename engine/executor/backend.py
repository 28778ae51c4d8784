"""The real backend: the machine's clock, and a data plane that works through steps in the order of launching.

It imports no torch: the `DataPlane` alone knows the work of a step and the device.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from threading import Thread
from typing import Any, NamedTuple, Protocol

from engine.backend import Completion, Launch, Shown
from engine.events import Event, EventSource
from engine.step import Step


class CompletedStep(NamedTuple):
    """A completed step, and the results it showed.

    Attributes:
        start_ns: when the data plane began to work on it, by `perf_counter_ns`.
        device_ns: how long it worked.
    """

    step: int
    start_ns: int
    device_ns: int
    shown: Shown


class DataPlane(Protocol):
    """Runs steps, one after the other, beside the thread that launches them. Used as a context manager."""

    def __enter__(self) -> Any:
        """Get ready to run."""

    def __exit__(self, *exception: object) -> None:
        """Let launched steps finish."""

    def launch(self, step: Step) -> None:
        """Put a step behind those launched before; returns before it is done."""

    def complete(self) -> CompletedStep:
        """Wait for the oldest step in flight; raises its error."""


class _Done(NamedTuple):
    """Something that has happened already."""

    value: Any = None

    def wait(self) -> Any:
        return self.value


class _Later(NamedTuple):
    """Something to block for."""

    wait: Callable[[], Any]


@contextmanager
def no_collections() -> Iterator[None]:
    """For a run that ends: a collection can take as long as many steps, and a run's records hold no cycles."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


class ExecutorBackend:
    """Implements `engine.backend.Backend` on the machine's own time. Use as a context manager.

    Attributes:
        start_ns: when the run began, by `time.perf_counter_ns`.
    """

    def __init__(self, data_plane: DataPlane, events: EventSource) -> None:
        self._data_plane = data_plane
        self._events = events
        self.start_ns = 0

    def __enter__(self) -> ExecutorBackend:
        self._data_plane.__enter__()
        self.start_ns = time.perf_counter_ns()
        return self

    def __exit__(self, *exception: object) -> None:
        self._data_plane.__exit__(*exception)

    def now(self) -> int:
        """Nanoseconds since the run's start."""
        return time.perf_counter_ns() - self.start_ns

    def due(self, now: int) -> list[Event]:
        """Events due by `now`."""
        return self._events.due(now)

    def launch(self, step: Step) -> _Done:
        """Hands the step to the data plane."""
        planned_ns = self.now()
        self._data_plane.launch(step)
        return _Done(Launch(planned_ns, self.now()))

    def complete(self) -> _Later:
        """Waits for the oldest step in flight; raises the data plane's error."""
        return _Later(self._complete)

    def wait(self, until_ns: int | None) -> _Later | None:
        """Sleeps until the next external event, or until then."""
        due_ns = self._events.next_ns(until_ns)
        return None if due_ns is None else _Later(lambda: time.sleep(max(0, due_ns - self.now()) / 1e9))

    def close(self) -> None:
        """Nothing is left to do."""

    def _complete(self) -> Completion:
        step, start_ns, device_ns, shown = self._data_plane.complete()
        return Completion(step, self.now(), start_ns - self.start_ns, device_ns, *shown)


class Runs(Protocol):
    """Runs one step at a time, in the calling thread."""

    def prepare_thread(self) -> None:
        """Called once on the thread that will run the steps."""

    def run(self, step: Step) -> Shown:
        """Apply the step's delta, compute its tokens, and return the results they show."""


class ThreadedDataPlane:
    """A data plane for a machine whose processors compute and launch alike: it runs in a thread of its own.

    The thread is a daemon. Ctrl-C may break off anything, and Python waits for other threads before it exits.
    """

    def __init__(self, runner: Runs) -> None:
        self._runner = runner
        self._steps: SimpleQueue[Step | None] = SimpleQueue()
        self._results: SimpleQueue[CompletedStep | BaseException | None] = SimpleQueue()
        self._worker = Thread(target=self._work, name="data-plane", daemon=True)

    def __enter__(self) -> ThreadedDataPlane:
        self._worker.start()
        self._next_result()  # the thread is ready
        return self

    def __exit__(self, *_: object) -> None:
        self._steps.put(None)
        self._worker.join()

    def launch(self, step: Step) -> None:
        """Hands the step to the thread."""
        self._steps.put(step)

    def complete(self) -> CompletedStep:
        """Waits for the thread; raises its error."""
        completed = self._next_result()
        assert completed is not None
        return completed

    def _next_result(self) -> CompletedStep | None:
        result = self._results.get()
        if isinstance(result, BaseException):
            raise result
        return result

    def _work(self) -> None:
        try:
            self._runner.prepare_thread()
            self._results.put(None)
            while (step := self._steps.get()) is not None:
                start_ns = time.perf_counter_ns()
                shown = self._runner.run(step)
                self._results.put(CompletedStep(step.index, start_ns, time.perf_counter_ns() - start_ns, shown))
        except BaseException as error:
            self._results.put(error)
