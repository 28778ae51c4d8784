"""An open-loop client: sends a trace's requests when the trace says, whatever comes back.

It speaks to any OpenAI-compatible server, on a connection a request. A client that is slower than the server would
measure itself. So bytes are first taken from all connections, with the time, and parsed once no more are there.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
import urllib.request
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import numpy as np

from engine.server.gc_tuning import hold_back
from traces.errors import TandemError
from traces.request import TraceRequest

WAIT_S = 10  # for the server's list of models
PROGRESS_S = 0.2
PARSED_A_TURN = 64  # pieces, which takes about half a millisecond
MOST_UNPARSED = 4096
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Target:
    """A server, and how to ask it.

    Attributes:
        url: its base, without `/v1`.
        model: the server's name for its model.
        extended: whether it is Tandem's, and knows `output_len` and `predicted_length`.
        stops: `trace`: outputs are as long as the trace's; `model`: the model may end them sooner.
        vocab_size: prompts that the trace has only lengths of are random ids below it.
        api_key: if it asks for one.
    """

    url: str
    model: str
    extended: bool
    stops: str = "trace"
    vocab_size: int = 1000
    api_key: str | None = None

    def encode(self, source: TraceRequest) -> bytes:
        """The request as HTTP."""
        body = json.dumps(self._body(source)).encode()
        parts = urlsplit(self.url)
        lines = [
            f"POST {parts.path}/v1/completions HTTP/1.1",
            f"Host: {parts.netloc}",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
            "Accept: text/event-stream",
            "Connection: close",
            *(f"{name}: {value}" for name, value in self.headers.items()),
        ]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + body

    @property
    def headers(self) -> dict[str, str]:
        """Further headers of every request."""
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}

    def _body(self, source: TraceRequest) -> dict[str, Any]:
        by_trace = self.stops == "trace"
        shorter = source.output_len if by_trace and source.output_len < source.max_tokens else None
        asked = {
            "ignore_eos": by_trace or None,
            "max_tokens": source.max_tokens if self.extended or shorter is None else shorter,
            "output_len": shorter if self.extended else None,
            "predicted_length": source.predicted_length if self.extended else None,
            "priority": source.priority or None,
            "user": source.client,
        }
        known = {name: value for name, value in asked.items() if value is not None}
        stream = {"stream": True, "stream_options": {"include_usage": True}, "temperature": 0}
        return {"model": self.model, "prompt": self._prompt(source)} | known | stream

    def _prompt(self, source: TraceRequest) -> list[int]:
        if source.prompt_token_ids is not None:
            return [int(each) for each in source.prompt_token_ids]
        drawn: list[int] = np.random.default_rng(source.id).integers(self.vocab_size, size=source.prompt_len).tolist()
        return drawn


def find_target(
    url: str, model: str | None = None, stops: str = "trace", vocab_size: int = 1000, api_key: str | None = None
) -> Target:
    """Ask a server for its model; arguments as in `Target`. Raises TandemError if there is none that answers."""
    asked = Target(url.rstrip("/").removesuffix("/v1"), model or "", False, stops, vocab_size, api_key)
    parts = urlsplit(asked.url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise TandemError(f"--url is '{url}': give something like http://127.0.0.1:8000")
    request = urllib.request.Request(f"{asked.url}/v1/models", headers=asked.headers)
    try:
        with urllib.request.urlopen(request, timeout=WAIT_S) as got:
            owners = {each["id"]: each.get("owned_by") for each in json.load(got)["data"]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TandemError(f"{request.full_url}: no answer that could be used ({error}); is a server there?") from None
    name = model or next(iter(owners), "")
    if name not in owners:
        raise TandemError(f"{asked.url} has no model '{name}': it has {', '.join(owners) or 'none'}")
    return replace(asked, model=name, extended=owners[name] == "tandem")


@dataclass(slots=True)
class Reply:
    """A server's answer, and when it came. Times are by `time.perf_counter_ns`.

    Attributes:
        sent_ns: when the request was written; 0 until then.
        chunk_ns: when each chunk with a token came.
        pieces: the chunks' text.
        ends: how often the stream said that it is over.
        finish_reason: `length` or `stop`, or None.
        completion_tokens: as the server counts them, or None.
        response_id: the server's name for it.
        error: what went wrong, or None.
        cancelled_ns: when the client hung up, as its trace says, or None.
    """

    sent_ns: int = 0
    chunk_ns: array[int] = field(default_factory=lambda: array("q"))
    pieces: list[str] = field(default_factory=list)
    ends: int = 0
    finish_reason: str | None = None
    completion_tokens: int | None = None
    response_id: str | None = None
    error: str | None = None
    cancelled_ns: int | None = None


class _Inbox:
    """Bytes that have come on any connection and are not parsed.

    Attributes:
        ended: exchanges that are over.
    """

    def __init__(self) -> None:
        self.ended = 0
        self._pieces: deque[tuple[_Exchange, int, bytes | Exception | None]] = deque()
        self._turn: asyncio.Handle | None = None
        self._left = 0  # at the end of the last turn

    def put(self, exchange: _Exchange, piece: bytes | Exception | None) -> None:
        """Bytes, or the connection's end with its error."""
        self._pieces.append((exchange, time.perf_counter_ns(), piece))
        if self._turn is None:
            self._turn = asyncio.get_running_loop().call_soon(self._take_turn)

    def _take_turn(self) -> None:
        """Parse some, if nothing has come since the last turn. Before the next, the loop reads what has."""
        if not self._left < len(self._pieces) < MOST_UNPARSED:
            for _ in range(min(PARSED_A_TURN, len(self._pieces))):
                exchange, now, piece = self._pieces.popleft()
                exchange.parse(now, piece)
        self._left = len(self._pieces)
        self._turn = asyncio.get_running_loop().call_soon(self._take_turn) if self._pieces else None

    async def emptied(self) -> None:
        """Wait until all that came is parsed."""
        while self._turn is not None:
            await asyncio.sleep(0)


class _Exchange(asyncio.Protocol):
    """One request on one connection."""

    def __init__(self, request: bytes, reply: Reply, inbox: _Inbox) -> None:
        self._request = request
        self._reply = reply
        self._inbox = inbox
        self._parser = httptools.HttpResponseParser(self)
        self._rest = b""
        self._now = 0
        self._transport: asyncio.Transport
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)
        self._reply.sent_ns = time.perf_counter_ns()

    def data_received(self, data: bytes) -> None:
        self._inbox.put(self, data)

    def connection_lost(self, error: Exception | None) -> None:
        self._inbox.put(self, error)

    def parse(self, now: int, piece: bytes | Exception | None) -> None:
        """Understand what came at `now`."""
        self._now = now
        if isinstance(piece, bytes):
            try:
                self._parser.feed_data(piece)
            except httptools.HttpParserError as error:
                self._fail(f"not HTTP: {error}")
        elif not self.over.done():
            self._fail(f"the connection broke: {piece or 'closed before the end'}")

    def hang_up(self) -> None:
        """The client has had enough."""
        if not self.over.done():
            self._reply.cancelled_ns = time.perf_counter_ns()
            self._finish()

    def on_body(self, body: bytes) -> None:
        """Called by httptools."""
        *events, self._rest = (self._rest + body).split(b"\n\n")
        for event in events:
            if event.startswith(b"data:"):
                self._event(event[5:].strip())

    def on_message_complete(self) -> None:
        """Called by httptools."""
        status = self._parser.get_status_code()
        if status != 200:
            self._fail(f"status {status}: {self._rest.decode(errors='replace'):.300}")
        elif not self._reply.ends and self._reply.error is None:
            self._fail("the stream ended without [DONE]")
        self._finish()

    def _event(self, data: bytes) -> None:
        reply = self._reply
        if data == b"[DONE]":
            reply.ends += 1
            return
        event = json.loads(data)
        if "error" in event:
            self._fail(str(event["error"].get("message", event["error"])))
            return
        reply.response_id = event.get("id")
        if usage := event.get("usage"):
            reply.completion_tokens = usage["completion_tokens"]
        for choice in event.get("choices", ()):
            reply.finish_reason = choice.get("finish_reason") or reply.finish_reason
            reply.chunk_ns.append(self._now)
            reply.pieces.append(choice.get("text", ""))

    def _fail(self, why: str) -> None:
        self._reply.error = self._reply.error or why
        self._finish()

    def _finish(self) -> None:
        if not self.over.done():
            self.over.set_result(None)
        self._transport.close()


@dataclass(frozen=True, slots=True)
class Sent:
    """What was sent and came back.

    Attributes:
        start_ns: the time (`perf_counter_ns`) from which arrivals count.
        replies: in the order of requests; some are not over if it was interrupted.
        interrupted: whether a signal ended it early.
    """

    start_ns: int
    replies: list[Reply]
    interrupted: bool = False


async def send_all(target: Target, requests: Sequence[TraceRequest], progress: Callable[[int], None]) -> Sent:
    """Send each request at its arrival, until all have ended or a signal comes."""
    replies = [Reply() for _ in requests]
    encoded = [target.encode(source) for source in requests]  # beforehand: it takes longer than sending
    hold_back()  # to look for garbage through all that was imported takes 200 ms
    inbox, start_ns = _Inbox(), time.perf_counter_ns() + 10_000_000
    sending = asyncio.create_task(_send(target, [*zip(requests, replies, encoded, strict=True)], inbox, start_ns))
    with _cancelled_by_signals(sending):
        watching = asyncio.create_task(_watch(inbox, len(requests), progress))
        await asyncio.wait([sending])
        watching.cancel()
    progress(inbox.ended)
    await inbox.emptied()
    if not sending.cancelled():
        sending.result()
    return Sent(start_ns, replies, sending.cancelled())


async def _send(
    target: Target, requests: Sequence[tuple[TraceRequest, Reply, bytes]], inbox: _Inbox, start_ns: int
) -> None:
    async with asyncio.TaskGroup() as group:
        for source, reply, request in requests:
            if (ahead := start_ns + source.arrival_ns - time.perf_counter_ns()) > 0:
                await asyncio.sleep(ahead / 1e9)
            cancel_ns = None if source.cancel_ns is None else start_ns + source.cancel_ns
            group.create_task(_exchange(target, request, reply, inbox, cancel_ns))


@contextmanager
def _cancelled_by_signals(task: asyncio.Task[None]) -> Iterator[None]:
    """A signal to end cancels the task, and does nothing else: what came back is worth keeping."""
    loop, handlers = asyncio.get_running_loop(), {number: signal.getsignal(number) for number in ENDING_SIGNALS}
    before = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}
    for number in before:
        loop.add_signal_handler(number, task.cancel)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


async def _watch(inbox: _Inbox, total: int, progress: Callable[[int], None]) -> None:
    """Say how many are over, until all are."""
    while inbox.ended < total:
        progress(inbox.ended)
        await asyncio.sleep(PROGRESS_S)


async def _exchange(target: Target, request: bytes, reply: Reply, inbox: _Inbox, cancel_ns: int | None) -> None:
    parts, loop = urlsplit(target.url), asyncio.get_running_loop()
    secure = parts.scheme == "https"
    port = parts.port or (443 if secure else 80)
    try:
        _, exchange = await loop.create_connection(
            lambda: _Exchange(request, reply, inbox), parts.hostname or "", port, ssl=secure or None
        )
    except OSError as error:
        reply.error = f"no connection: {error}"
    else:
        if cancel_ns is not None:
            loop.call_later(max(0.0, (cancel_ns - time.perf_counter_ns()) / 1e9), exchange.hang_up)
        await exchange.over
    inbox.ended += 1
