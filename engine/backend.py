"""The seam: what the serving loop asks of whatever runs its steps, and who is told of what happens.

A backend owns the clock, delivers what comes from outside, and launches and completes steps. It alone knows
where requests stop. `launch`, `complete` and `wait` return something to wait on: a SimPy event in the
simulator, a `Waitable` on hardware. The loop yields it, and is sent the value described here.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, Protocol

from engine.events import Event
from engine.step import Step


class Launch(NamedTuple):
    """A step is on its way: when the backend was handed it, and when the host's work for it was done (ns)."""

    planned_ns: int
    launched_ns: int


class Stop(NamedTuple):
    """A request's end was found: it made `output_len` tokens that count.

    `fault` says why it failed, or is None; the last token of a request that failed is none of the vocabulary.
    """

    request_id: int
    output_len: int
    fault: str | None = None


class Filled(NamedTuple):
    """The tokens of a request's next KV block, beyond those that its prompt fills, are all known.

    `own` says what they are: token ids, or the ids that a trace has in their place.
    """

    request_id: int
    own: Sequence[int]


class Shown(NamedTuple):
    """What the tokens of a step show: as in `Completion`."""

    stops: Sequence[Stop] = ()
    filled: Sequence[Filled] = ()


class Completion(NamedTuple):
    """The tokens of a step are known to the host.

    Attributes:
        step: the step's index.
        completed_ns: when the host took notice: the time of the step's tokens.
        device_start_ns: when the data plane began to work on it.
        device_ns: how long the data plane worked on it.
        stops: requests found to have ended, by something other than their `max_tokens`.
        filled: blocks of outputs whose last token this step made, where outputs are cached.
    """

    step: int
    completed_ns: int
    device_start_ns: int
    device_ns: int
    stops: Sequence[Stop] = ()
    filled: Sequence[Filled] = ()


class Backend(Protocol):
    """The simulator and the executor implement it."""

    def now(self) -> int:
        """Nanoseconds since the run's start."""

    def due(self, now: int) -> Sequence[Event]:
        """Take the external events that are due by `now`, in the order in which they are to be delivered."""

    def launch(self, step: Step) -> Any:
        """Start a step; yields a `Launch` once the host's work for it is done."""

    def complete(self) -> Any:
        """Wait for the oldest step in flight; yields its `Completion`."""

    def wait(self, until_ns: int | None) -> Any:
        """Wait for the next external event, but no longer than `until_ns` (yields None).

        Returns None when there will be no event, and no time is given.
        """

    def close(self) -> None:
        """The run is over: no request is left, and none will come."""


class Observer(Protocol):
    """The serving loop tells it what happens. It decides nothing."""

    def delivered(self, event: Event, now: int) -> None:
        """An event was handed to the scheduler."""

    def launched(self, step: Step, now: int, launch: Launch) -> None:
        """A step that was planned at `now` is on its way."""

    def completed(self, completion: Completion) -> None:
        """A step's tokens are known."""

    def iteration(
        self, now: int, events: int, step: Step | None, launch: Launch | None, completion: Completion | None
    ) -> None:
        """One turn of the loop is over."""


class Waitable(Protocol):
    """What a backend without an event loop of its own hands out."""

    def wait(self) -> Any:
        """Block until it has happened and return its value."""


def drive(loop: Generator[Waitable, Any, None]) -> None:
    """Run a serving loop on the machine's own time, where SimPy would run it as a process."""
    value = None
    while True:
        try:
            waitable = loop.send(value)
        except StopIteration:  # of the loop alone: one out of a wait is a fault, and not the end
            return
        value = waitable.wait()
