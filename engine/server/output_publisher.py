"""Publishes the tokens of a serving loop to clients, from its steps alone: every backend is published alike."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from engine.backend import Completion, Launch, Observer
from engine.events import Event
from engine.request import CANCELLED, LENGTH, REJECTED, STOP
from engine.scheduler import Scheduler
from engine.server.driver import Driver
from engine.server.gc_tuning import collect_now
from engine.server.messages import End, Load, Progress
from engine.step import Step


class _Launched(NamedTuple):
    """A step in flight: who gets a token of it, in order, and whose last it is."""

    number: int
    samplers: Sequence[int]
    finishing: Sequence[int]
    prefill_tokens: int
    decode_tokens: int


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
        self._order: list[int] | None = None  # the decoding ones, until they change
        self._in_flight: deque[_Launched] = deque()
        self._launched = -1
        self._ended: list[End] = []
        self._over: deque[tuple[int, int]] = deque()  # who ended, and the step after which nobody speaks of them
        self._load = Load()
        self._preemptions = 0

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
        if not step.is_steady:
            self._enter(step)
        if self._order is None:
            self._order = list(self._decoding)
        samplers = self._order if step.decodes else []
        samplers = samplers + [each for each, chunk in step.chunks.items() if chunk.samples]
        self._in_flight.append(_Launched(step.index, samplers, step.finishing, step.prefill_tokens, step.decodes))
        self._launched = step.index
        for request_id in step.finishing:
            self._leave(request_id)

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

    def _enter(self, step: Step) -> None:
        self._preemptions += len(step.preempted) + len(step.swapped_out)
        for request_id in step.leaving:
            self._leave(request_id)
        if step.joined:
            self._decoding.update(dict.fromkeys(step.joined))
            self._order = None

    def _leave(self, request_id: int) -> None:
        if request_id in self._decoding:
            del self._decoding[request_id]
            self._order = None

    def _take_tokens(self, completion: Completion) -> tuple[list[int], list[int]]:
        launched = self._in_flight.popleft()
        made, token = self._made, self._rider.token
        ids = [each for each in launched.samplers if each in made]  # who has ended gets no more
        tokens = [token(each, made[each]) for each in ids]
        for request_id in ids:
            made[request_id] += 1
        for stop in completion.stops:
            self._end(End(stop.request_id, STOP))
        for request_id in launched.finishing:
            self._end(End(request_id, LENGTH))
        self._load = self._load._replace(
            step=launched.number,
            prefill_tokens=launched.prefill_tokens,
            decode_tokens=launched.decode_tokens,
            prefill_total=self._load.prefill_total + launched.prefill_tokens,
            decode_total=self._load.decode_total + launched.decode_tokens,
        )
        return ids, tokens

    def _end(self, end: End) -> None:
        if self._made.pop(end.request_id, None) is not None:
            self._ended.append(end)
            self._over.append((self._launched, end.request_id))

    def _load_now(self) -> Load:
        scheduler = self._scheduler
        return self._load._replace(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            kv_blocks_used=scheduler.pool.used,
            preemptions=self._preemptions,
        )
