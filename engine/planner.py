"""What the serving loop asks of a scheduler, and the error of one that breaks the rules."""

from __future__ import annotations

from typing import Protocol

from engine.backend import Completion
from engine.config import ServingConfig
from engine.request import Request
from engine.step import Step
from traces.errors import TandemError


class PolicyError(TandemError):
    """A policy did what it may not. Raised with a predicate, such as `preempts request 3, which is not running`; the
    instance puts the policy's name, file and line before it."""


class Planner(Protocol):
    """Plans the steps of one instance. `engine.scheduler.base.Scheduler` is the one there is."""

    config: ServingConfig
    wake_ns: int | None

    @property
    def idle(self) -> bool:
        """Whether no request is waiting or running."""

    def queues(self, request: Request) -> bool:
        """Whether a request waits to be scheduled."""

    def arrive(self, request: Request) -> None:
        """Queue a request, or reject it."""

    def cancel(self, request: Request) -> None:
        """The client gave up."""

    def schedule(self, now: int) -> Step | None:
        """Plan the next step, or None if there is nothing to run."""

    def completed(self, completion: Completion) -> None:
        """A step's tokens are known."""

    def idle_fault(self) -> str:
        """Say why requests are left although nothing can happen any more."""
