"""Publishes the tokens of a serving loop to clients, from its steps alone: every backend is published alike."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from engine.backend import Completion, Launch, Observer
from engine.events import Event
from engine.request import CANCELLED, FAILED, LENGTH, REJECTED, STOP
from engine.scheduler import Scheduler
from engine.server.driver import Driver
from engine.server.gc_tuning import collect_now
from engine.server.messages import End, Load, Progress
from engine.step import Step


class Publisher:
    """An `engine.backend.Observer`: sends one `Progress` a turn, and tells the recorder if there is one."""

    def __init__(
        self, send: Callable[[Progress], None], driver: Driver, scheduler: Scheduler, recorder: Observer | None
    ) -> None:
        self._send = send
        self._rider = driver
        self._scheduler = scheduler
        self._recorder = recorder
        self._made: dict[int, int] = {}  # of requests that have not ended, tokens sent
        self._decoding: dict[int, None] = {}
        self._in_flight: deque[tuple[Step, list[int]]] = deque()  # and who gets a token of it, in order
        self._launched = -1
        self._ended: list[End] = []
        self._over: deque[tuple[int, int]] = deque()  # who ended, and the step after which nobody speaks of them
        self._load = Load()

    def delivered(self, event: Event, now: int) -> None:
        """A request is followed from here on, or was rejected, or cancelled."""
        if self._recorder:
            self._recorder.delivered(event, now)
        request = event.request
        if event.is_cancel:
            if request.outcome == CANCELLED and self._made.pop(request.id, None) is not None:
                self._over.append((self._launched, request.id))
            return
        self._made[request.id] = 0
        if request.outcome == REJECTED:
            self._end(End(request.id, REJECTED, request.reason))

    def launched(self, step: Step, now: int, launch: Launch) -> None:
        """Works out who will have a token of it."""
        if self._recorder:
            self._recorder.launched(step, now, launch)
        self._drop(step.leaving)
        self._decoding.update(dict.fromkeys(step.joined))
        samplers = list(self._decoding) if step.decodes else []
        samplers += [each for each, chunk in step.chunks.items() if chunk.samples]
        self._drop(step.finishing)
        self._in_flight.append((step, samplers))
        self._launched = step.index
        if lost := len(step.preempted) + len(step.swapped_out):
            self._load = self._load._replace(preemptions=self._load.preemptions + lost)

    def completed(self, completion: Completion) -> None:
        """Its tokens are known."""
        if self._recorder:
            self._recorder.completed(completion)

    def iteration(
        self, now: int, events: int, step: Step | None, launch: Launch | None, completion: Completion | None
    ) -> None:
        """Sends the turn's tokens and ends, if there are any. While there is no work, garbage is collected."""
        if self._recorder:
            self._recorder.iteration(now, events, step, launch, completion)
        ids, tokens = self._take_tokens(completion) if completion else ([], [])
        idle = step is None and completion is None
        if completion or self._ended or idle:
            self._send(Progress(ids, tokens, self._ended, self._load_now()))
            self._ended = []
        while self._over and (idle or (completion and self._over[0][0] <= completion.step)):
            self._rider.forget(self._over.popleft()[1])
        if idle:
            collect_now()

    def _drop(self, ids: Iterable[int]) -> None:
        for request_id in ids:
            self._decoding.pop(request_id, None)

    def _take_tokens(self, completion: Completion) -> tuple[list[int], list[int]]:
        step, samplers = self._in_flight.popleft()
        made, token = self._made, self._rider.token
        failed = {stop.request_id for stop in completion.stops if stop.fault}
        ids = [each for each in samplers if each in made and each not in failed]  # who has ended gets no more
        tokens = [token(each, made[each]) for each in ids]
        for request_id in ids:
            made[request_id] += 1
        for stop in completion.stops:
            self._end(End(stop.request_id, FAILED if stop.fault else STOP, stop.fault))
        for request_id in step.finishing:
            self._end(End(request_id, LENGTH))
        load, prefill, decode = self._load, step.prefill_tokens, step.decodes
        totals = {"prefill_total": load.prefill_total + prefill, "decode_total": load.decode_total + decode}
        self._load = load._replace(step=step.index, prefill_tokens=prefill, decode_tokens=decode, **totals)
        return ids, tokens

    def _end(self, end: End) -> None:
        if self._made.pop(end.request_id, None) is not None:
            self._ended.append(end)
            self._over.append((self._launched, end.request_id))

    def _load_now(self) -> Load:
        running, waiting = self._scheduler.running, self._scheduler.waiting
        used = self._scheduler.pool.used
        return self._load._replace(running=len(running), waiting=len(waiting), kv_blocks_used=used)
