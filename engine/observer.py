"""Who is told of what happens in a serving loop."""

from __future__ import annotations

from typing import Protocol

from engine.backend import Completion, Launch
from engine.events import Event
from engine.step import Step


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
