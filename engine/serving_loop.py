"""The serving loop: the only one. Under SimPy it is a process; on hardware `engine.backend.drive` runs it.

It may not know which: everything that differs is behind `Backend`.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from engine.backend import Backend, Completion, Launch, Observer
from engine.events import Event
from engine.planner import Planner, PolicyError
from engine.step import Step


def serving_loop(backend: Backend, scheduler: Planner, observer: Observer) -> Generator[Any, Any, None]:
    """Serve until no request is left and none will come.

    An iteration reads the clock once, delivers the events due by then, plans, launches, and then, if as many
    steps are in flight as `pipeline_depth` allows or none could be planned, waits for the oldest to complete.

    Yields:
        What `backend` hands out to wait on.

    Raises:
        PolicyError: the policy breaks a rule, or it plans nothing although requests wait, nothing else can happen and
            it has asked for no time.
    """
    depth, in_flight = scheduler.config.pipeline_depth, 0
    while True:
        now = backend.now()
        events = backend.due(now)
        for event in events:
            _deliver(event, scheduler)
            observer.delivered(event, now)
        launch: Launch | None = None
        completion: Completion | None = None
        step = scheduler.schedule(now)
        if step is not None:
            if step.chunks:
                _check_budget(step, scheduler)
            launch = yield backend.launch(step)
            in_flight += 1
            observer.launched(step, now, launch)
        if in_flight and (step is None or in_flight == depth):
            completion = yield backend.complete()
            in_flight -= 1
            observer.completed(completion)
            scheduler.completed(completion)
        observer.iteration(now, len(events), step, launch, completion)
        if step is None and completion is None:
            if scheduler.wake_ns is not None and scheduler.wake_ns <= now:
                raise PolicyError(f"asks to be woken at {scheduler.wake_ns} ns, which is not after now, {now} ns")
            event = backend.wait(scheduler.wake_ns)
            if event is None:
                break
            yield event
    if not scheduler.idle:
        raise PolicyError(scheduler.idle_fault())
    backend.close()


def _deliver(event: Event, scheduler: Planner) -> None:
    """Hand over an event; a policy that does not pass it on to the base class is found out here."""
    request = event.request
    if event.is_cancel:
        scheduler.cancel(request)
        if request.outcome is None:
            raise PolicyError(f"goes on with request {request.id}, which is cancelled: let its cancel call super()'s")
    else:
        scheduler.arrive(request)
        if request.outcome is None and not scheduler.queues(request):
            raise PolicyError(f"loses request {request.id} as it arrives: let its arrive call super().arrive(request)")


def _check_budget(step: Step, scheduler: Planner) -> None:
    """The verbs keep to the budget; a policy that makes a Step by other means is found out here."""
    tokens, most = step.prefill_tokens + step.decodes, scheduler.config.max_batched_tokens
    if tokens > most:
        raise PolicyError(f"plans {tokens} tokens in step {step.index}: max_batched_tokens is {most}")
