"""The engine driver behind a server: the executor, or the simulator paced by the wall clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from engine.backend import Observer
from engine.config import ServingConfig
from engine.live_events import LiveEvents
from engine.records.recorder import Recorder
from engine.scheduler import Scheduler


class Driver(Protocol):
    """Serves on live time, in the engine's process.

    Attributes:
        config: the run's limits and policy.
        facts: as in `engine.server.messages.Ready`.
    """

    config: ServingConfig
    facts: dict[str, Any]

    def token(self, request_id: int, position: int) -> int:
        """A token that the request has made, by its position in the output."""

    def forget(self, request_id: int) -> None:
        """The request has ended, and no step in flight speaks of it."""

    def serve(self, scheduler: Scheduler, observer: Observer, begun: Callable[[LiveEvents, int], None]) -> None:
        """Run the serving loop until the events are closed and all is served.

        Args:
            begun: called as the run begins, with where to put events, and when that is (`perf_counter_ns`).
        """


class Service(Protocol):
    """Builds an engine driver, and takes its records. Can be pickled."""

    @property
    def records(self) -> bool:
        """Whether the run is recorded."""

    def open(self) -> Driver:
        """Build the driver: in the engine's process, since it may take seconds and own a GPU."""

    def keep(self, recorder: Recorder, start_ns: int, partial: bool) -> None:
        """The run is over, or was broken off."""
