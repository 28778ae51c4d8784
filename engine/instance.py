"""One serving instance: a scheduler, the backend that runs its steps, and who is told, around one serving loop.

Whoever serves drives it: `engine.backend.drive` on a machine's own time, SimPy as a process in simulated time.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from engine.backend import Backend, Observer
from engine.checks.step_checker import CheckedBackend
from engine.config import ServingConfig
from engine.scheduler.base import Scheduler
from engine.scheduler.policy_error import blame
from engine.scheduler.registry import load_scheduler
from engine.serving_loop import serving_loop


@dataclass(frozen=True, slots=True)
class Instance:
    """A scheduler and its backend.

    Attributes:
        scheduler: plans the steps.
        backend: runs them.
        observer: is told of all of it.
    """

    scheduler: Scheduler
    backend: Backend
    observer: Observer

    @classmethod
    def assemble(cls, config: ServingConfig, backend: Backend, observer: Observer, check: bool = False) -> Instance:
        """Build the scheduler that `config` names, and the step checker before the backend if `check` is set.

        Raises:
            TandemError: there is no such policy, or it refuses the config.
        """
        scheduler = load_scheduler(config)
        return cls(scheduler, CheckedBackend(backend, scheduler.config) if check else backend, observer)

    def serve(self) -> Generator[Any, Any, None]:
        """The serving loop.

        Raises:
            IntegrityError: a step is checked, and breaks an invariant.
            PolicyError: the policy fails, breaks a rule, or plans nothing for requests that wait. The message names the
                policy, with file and line.
        """
        try:
            yield from serving_loop(self.backend, self.scheduler, self.observer)
        except Exception as error:
            if fault := blame(type(self.scheduler), error):
                raise fault from error
            raise
