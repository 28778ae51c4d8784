"""The API's end of the pipe: hands requests to the engine's process, and tokens to the sinks of their requests."""

from __future__ import annotations

import asyncio
import os
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing import get_context
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol

from engine.request import REJECTED
from engine.server.driver import Service
from engine.server.engine_process import run_engine
from engine.server.gc_tuning import collect_now
from engine.server.messages import Arrive, Cancel, Close, Over, Progress, Ready, send_all
from engine.server.prometheus import ServerMetrics
from engine.stop_condition import StopCondition
from traces.errors import TandemError
from traces.request import TraceRequest

BROKEN = "broken"


class TokenSink(Protocol):
    """Who waits for a request's tokens."""

    def take(self, token: int, last: bool) -> None:
        """A token; after the last, `end` follows at once."""

    def end(self, outcome: str, reason: str | None) -> None:
        """The last was taken, or none will come: `length`, `stop`, `rejected`, `failed`, or `broken` by the sink."""


@dataclass(slots=True)
class _Open:
    """A request that has not ended."""

    sink: TokenSink
    arrival_ns: int
    prompt_len: int
    tokens: int = 0
    last_ns: int = 0  # when the last token came


class EngineClient:
    """A running engine. Lives on the API's event loop and never blocks it.

    Attributes:
        ready: the engine's first message.
        metrics: counts since then.
        error: why it is dead, or None.
        draining: whether no request is taken any more.
        without_token: requests that wait for their first token.
    """

    ready: Ready
    metrics: ServerMetrics

    def __init__(self, service: Service) -> None:
        """Start the engine's process, which then loads its model."""
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=run_engine, args=(service, theirs), name="tandem-engine", daemon=True)
        self._process.start()
        theirs.close()
        self._outbox: SimpleQueue[Any] = SimpleQueue()  # None ends the sending thread
        self._open: dict[int, _Open] = {}
        self._submitted = 0
        self._last_arrival_ns = 0
        self.error: str | None = None
        self.draining = False
        self.without_token = 0

    async def start(self) -> None:
        """Wait until it serves. Raises TandemError if it does not come to that."""
        loop = asyncio.get_running_loop()
        self._begun: asyncio.Future[None] = loop.create_future()
        self._over: asyncio.Future[None] = loop.create_future()
        loop.add_reader(self._pipe.fileno(), self._read)
        # uvloop made it non-blocking: a write to a full pipe would fail, and so would a read of half a message.
        os.set_blocking(self._pipe.fileno(), True)
        Thread(target=send_all, args=(self._outbox, self._pipe), name="to-engine", daemon=True).start()
        await self._begun

    def kill(self) -> None:
        """End the engine's process at once."""
        self._process.kill()

    @property
    def open_requests(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    def submit(self, sink: TokenSink, source: TraceRequest, arrived_ns: int, condition: StopCondition) -> int:
        """Give the engine a request that arrived at `arrived_ns` (`perf_counter_ns`); returns its number.

        The number and the arrival of `source` are set here. Requests are numbered in the order of arrival. One that was
        overtaken while its prompt was read counts as arrived with the one that overtook it.
        """
        request_id, self._submitted = self._submitted, self._submitted + 1
        self._last_arrival_ns = max(arrived_ns - self.ready.start_ns, self._last_arrival_ns)
        self._open[request_id] = _Open(sink, arrived_ns, source.prompt_len)
        self.without_token += 1
        self._outbox.put(Arrive(replace(source, id=request_id, arrival_ns=self._last_arrival_ns), condition))
        return request_id

    def cancel(self, request_id: int, reason: str) -> None:
        """Its client wants no more: nothing is handed to the sink from here on. Nothing happens if it has ended."""
        if self._forget(request_id, reason):
            self._outbox.put(Cancel(request_id, time.perf_counter_ns() - self.ready.start_ns, reason))

    def fail_all(self, why: str) -> None:
        """End every open request now, and say why."""
        for request_id, each in list(self._open.items()):
            self.cancel(request_id, why)
            each.sink.end("failed", why)

    async def close(self) -> None:
        """Have the engine serve its requests, write its records, and end; waits for that."""
        self.draining = True
        self._outbox.put(Close())
        await self._over
        await asyncio.to_thread(self._process.join)

    def _read(self) -> None:
        try:
            messages = self._pipe.recv()
        except (EOFError, OSError):
            self._ended("the engine's process died")
            return
        for message in messages:
            match message:
                case Progress():
                    self._progress(message)
                case Ready():
                    self.ready = message
                    self.metrics = ServerMetrics(message.facts["model"], message.config.num_blocks)
                    self._begun.set_result(None)
                case Over(error):
                    self._ended(error)

    def _ended(self, error: str | None) -> None:
        asyncio.get_running_loop().remove_reader(self._pipe.fileno())
        self._over.set_result(None)
        self._outbox.put(None)
        self.error = error
        if not self._begun.done():
            self._begun.set_exception(TandemError(error or "the engine ended before it began"))
        elif self._open:
            self.fail_all(error or "the engine has ended")

    def _progress(self, progress: Progress) -> None:
        self.metrics.load = progress.load
        self._hand_out(progress.ids, progress.tokens, {end.request_id for end in progress.ended})
        for request_id, outcome, reason in progress.ended:
            if ended := self._forget(request_id, outcome):
                try:
                    ended.sink.end(outcome, reason)
                except Exception as error:
                    self._broken(request_id, ended.sink, error)

    def _broken(self, request_id: int, sink: TokenSink, error: Exception) -> None:
        """An error while one request's answer is written ends that request alone."""
        traceback.print_exception(error)
        why = f"its answer cannot be written: {type(error).__name__}: {error}"
        self.cancel(request_id, why)
        sink.end(BROKEN, why)

    def _forget(self, request_id: int, outcome: str) -> _Open | None:
        ended = self._open.pop(request_id, None)
        if ended:
            self.without_token -= not ended.tokens
            if outcome != REJECTED:
                took_ns = time.perf_counter_ns() - ended.arrival_ns
                self.metrics.ended(outcome, ended.prompt_len, ended.tokens, took_ns)
            if not self._open:
                asyncio.get_running_loop().call_soon(collect_now)
        return ended

    def _hand_out(self, ids: Sequence[int], tokens: Sequence[int], ending: set[int]) -> None:
        now = time.perf_counter_ns()
        opened, gaps = self._open, []
        for request_id, token in zip(ids, tokens, strict=True):
            request = opened.get(request_id)
            if request is None:  # cancelled here, and still running there
                continue
            if request.tokens:
                gaps.append(now - request.last_ns)
            else:
                self.without_token -= 1
                self.metrics.first_tokens.add(now - request.arrival_ns)
            request.tokens += 1
            request.last_ns = now
            try:
                request.sink.take(token, request_id in ending)
            except Exception as error:
                self._broken(request_id, request.sink, error)
        for gap, times in Counter(gaps).items():  # when all have their token, and mostly the same
            self.metrics.gaps.add(gap, times)
