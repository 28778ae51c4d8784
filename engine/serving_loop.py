"""The serving loop: the only one. Under SimPy it is a process; on hardware `engine.backend.drive` runs it.

It may not know which: everything that differs is behind `Backend`.
"""

from __future__ import annotations

import inspect
from collections.abc import Generator
from typing import Any
from weakref import WeakValueDictionary

from engine.backend import Backend, Completion, Launch
from engine.recorder import Observer
from engine.request import Request
from engine.scheduler.base import Scheduler


class StarvationError(Exception):
    """A policy left requests waiting with nothing in flight and nothing to come."""


def serving_loop(backend: Backend, scheduler: Scheduler, recorder: Observer) -> Generator[Any, Any, None]:
    """Serve until no request is left and none will come.

    An iteration reads the clock once, delivers the events due by then, plans, launches, and then, if as many
    steps are in flight as `pipeline_depth` allows or none could be planned, waits for the oldest to complete.

    Yields:
        What `backend` hands out to wait on.

    Raises:
        StarvationError: the policy plans nothing, although requests wait and nothing else can happen.
    """
    depth, in_flight = scheduler.config.pipeline_depth, 0
    requests: WeakValueDictionary[int, Request] = WeakValueDictionary()  # those that somebody still holds
    while True:
        now = backend.now()
        events = backend.due(now)
        for event in events:
            requests[event.request.id] = event.request
            (scheduler.cancel if event.is_cancel else scheduler.arrive)(event.request)
            recorder.delivered(event, now)
        launch: Launch | None = None
        completion: Completion | None = None
        step = scheduler.schedule(now)
        if step is not None:
            launch = yield backend.launch(step)
            in_flight += 1
            recorder.launched(step, now, launch)
        if in_flight and (step is None or in_flight == depth):
            completion = yield backend.complete()
            in_flight -= 1
            recorder.completed(completion)
            for stop in completion.stops:
                if request := requests.get(stop.request_id):  # else it has ended otherwise, and is forgotten
                    scheduler.stopped(request)
        recorder.iteration(now, len(events), step, launch, completion)
        if step is None and completion is None:
            arrival = backend.wait()
            if arrival is None:
                break
            yield arrival
    if not scheduler.idle:
        raise StarvationError(_blame(scheduler))


def _blame(scheduler: Scheduler) -> str:
    policy = type(scheduler)
    where = f"{inspect.getsourcefile(policy)}:{inspect.getsourcelines(policy)[1]}"
    stuck = len(scheduler.waiting) + len(scheduler.running)
    return f"{policy.__name__} ({where}) plans nothing, but {stuck} requests wait and nothing is in flight"
