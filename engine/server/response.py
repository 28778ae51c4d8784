"""An HTTP request's answer: one or more outputs, gathered or streamed, until all have ended or the client is gone."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Container, Sequence
from typing import Any, Protocol

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from engine.request import FAILED, REJECTED
from engine.server.detokenization import Writer
from engine.server.engine_client import BROKEN, EngineClient
from engine.server.openai_format import DONE, CompletionFormat
from engine.server.refused import Refused

_STATUS = {REJECTED: 400, FAILED: 500, BROKEN: 500}  # of an answer that ends so
WIRE = "tandem_wire"  # in a connection's state: a `Wire`, if the server lends one


class Wire(Protocol):
    """A connection with a chunked response on it, written to without waiting: a short cut for most tokens.

    By way of the task that answers the request, a token costs twice as much.
    """

    @property
    def blocked(self) -> bool:
        """Whether a write would be kept, since the client does not read, or is gone."""

    def write(self, body: bytes) -> None:
        """Send a chunk."""


class Output:
    """One choice of an answer. Implements `engine.server.engine_client.TokenSink`.

    Attributes:
        note: what the engine's reason for a rejection lacks, since it knows numbers alone.
    """

    __slots__ = ("_answer", "_opened", "_writer", "finish_reason", "index", "note", "request_id", "text", "tokens")

    def __init__(self, answer: Answer, index: int, writer: Writer) -> None:
        self._answer = answer
        self._writer = writer
        self.index = index
        self.request_id = -1
        self.note = ""
        self.tokens = 0
        self.finish_reason: str | None = None
        self._opened = False
        self.text: list[str] = []  # of each token that was not sent

    def take(self, token: int, last: bool) -> None:
        """Write a token's text; the last one's goes out with the reason for the end."""
        self.tokens += 1
        ends = last and token in self._answer.stop_tokens  # such a token is no text, whatever the tokenizer says
        self.text.append("" if ends else self._writer.take(token))
        if self._writer.stopped:
            self._answer.engine.cancel(self.request_id, "stop")
            self._finish("stop")
        elif not last:
            self._answer.wrote(self)

    def end(self, outcome: str, reason: str | None) -> None:
        """It is complete, or failed."""
        if outcome in ("length", "stop"):
            last = self.text.pop() if self.text else ""
            self.text.append(last + self._writer.rest())
            self._finish(outcome)
        else:
            self.finish_reason = "error"
            note = self.note if outcome == REJECTED else ""
            self._answer.failed(Refused(_STATUS.get(outcome, 503), (reason or outcome) + note))

    def _finish(self, reason: str) -> None:
        self.finish_reason = reason
        self._answer.unfinished -= 1
        self._answer.wrote(self)

    def chunk(self, format: CompletionFormat) -> bytes:
        """The text that was not sent, as chunks: one a token, so that who counts them is right."""
        written = format.text(self.index, self.text.pop(), self.tokens, self.finish_reason)
        if self.text:  # the client is slow
            so_far = enumerate(self.text, self.tokens - len(self.text))
            written = b"".join([format.text(self.index, text, made) for made, text in so_far]) + written
            self.text.clear()
        if self._opened:
            return written
        self._opened = True
        return format.open(self.index) + written

    def choice(self, format: CompletionFormat) -> dict[str, Any]:
        """The whole, not streamed."""
        return format.choice(self.index, "".join(self.text), self.finish_reason)


class Answer(Response):
    """The outputs of one HTTP request, sent as they come, and given up when the client is gone.

    Attributes:
        unfinished: outputs to which something may be added.
        stop_tokens: token ids that end an output.
        refused: why there is no answer, or no more of it.
    """

    def __init__(
        self,
        engine: EngineClient,
        format: CompletionFormat,
        streamed: bool,
        writers: Sequence[Writer],
        stop_tokens: Container[int] = (),
    ) -> None:
        super().__init__()
        self.stop_tokens = stop_tokens
        self.engine = engine
        self.format = format
        self.streamed = streamed
        self.outputs = [Output(self, index, writer) for index, writer in enumerate(writers)]
        self.unfinished = len(self.outputs)
        self.refused: Refused | None = None
        self._wire: Wire | None = None  # once the stream has begun: then text goes there while `_more` is waited for
        self._fresh: dict[Output, None] = {}  # have something that was not sent
        self._wakened: asyncio.Future[None] | None = None  # where somebody waits for more, and so is writing nothing

    def wrote(self, output: Output) -> None:
        """An output has more text, or has ended."""
        if self._wire and self.unfinished and self._wakened and not self._wire.blocked:
            self._wire.write(output.chunk(self.format))
            return
        self._fresh[output] = None
        if self.streamed or not self.unfinished:
            self._wake()

    def failed(self, refused: Refused) -> None:
        """There will be no answer, or no more of it."""
        self.refused = self.refused or refused
        self.abandon(refused.detail)

    def abandon(self, reason: str = "the client is gone") -> None:
        """Nobody wants it any more: outputs that still run are cancelled."""
        self.unfinished = 0
        for output in self.outputs:
            if output.finish_reason is None:
                self.engine.cancel(output.request_id, reason)
        self._wake()

    async def _more(self) -> bytes:
        """Wait for something to send; returns b"" if nothing will come, or nothing is streamed."""
        while self.unfinished and not (self.streamed and self._fresh):
            self._wakened = asyncio.get_running_loop().create_future()
            await self._wakened
        fresh, self._fresh = self._fresh, {}
        return b"".join([each.chunk(self.format) for each in fresh]) if self.streamed else b""

    @property
    def made(self) -> int:
        """Tokens of all outputs."""
        return sum(each.tokens for each in self.outputs)

    def _wake(self) -> None:
        wakened, self._wakened = self._wakened, None
        if wakened and not wakened.done():  # it is, where the task was cancelled
            wakened.set_result(None)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        watcher = asyncio.ensure_future(_until_gone(receive))
        watcher.add_done_callback(lambda done: self.abandon() if not done.cancelled() else None)
        try:
            first = await self._more()
            if self.refused:  # nothing is sent yet, though some may have been made
                await self.refused.response()(scope, receive, send)
            elif self.streamed:
                await self._stream(first, send, scope.get("state", {}).get(WIRE))
            elif all(each.finish_reason for each in self.outputs):  # else the client is gone
                choices = [each.choice(self.format) for each in self.outputs]
                await JSONResponse(self.format.answer(choices, self.made))(scope, receive, send)
        finally:
            watcher.cancel()
            self.abandon()

    async def _stream(self, first: bytes, send: Send, wire: Wire | None) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        chunk = first
        while chunk:
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            self._wire = wire
            chunk = await self._more()
        if self.refused:
            end = f"data: {json.dumps(self.refused.body)}\n\n".encode()
        else:
            end = self.format.usage(self.made) + DONE
        await send({"type": "http.response.body", "body": end})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
