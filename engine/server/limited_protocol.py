"""Uvicorn's protocol of a connection over httptools, with a short cut for tokens, and limits for clients.

Uvicorn has no public hook for either, so that this reaches into its class.
"""

from __future__ import annotations

import json
import re
import sys
from asyncio import TimerHandle, Transport
from http import HTTPStatus
from typing import ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from engine.server.half_closed import Prober
from engine.server.refused import Refused
from engine.server.response import WIRE

MAX_HEADER_BYTES = 64 * 1024
SLICE = 16 * 1024  # bytes that are parsed before the limits are looked at
HEAD_S = 5.0  # from the first byte of a head, or from the connection, to its last
BODY_S = 60.0  # without a byte of a body
_UPGRADE = re.compile(rb"\r\nupgrade(?=:)", re.IGNORECASE)  # httptools drops the body of a request that asks for one


class LimitedProtocol(HttpToolsProtocol):
    """Implements `engine.server.response.Wire`, and holds clients to the limits above.

    Attributes:
        most_connections: beyond so many, those without a request make room for others.
        idle: connections without a request, the one that waits longest first.
    """

    most_connections = sys.maxsize
    idle: ClassVar[dict[LimitedProtocol, None]]

    _in_body = False
    _beside_bodies = 0  # bytes since the last of a body: of heads, trailers, and what is between chunks
    _timer: TimerHandle | None = None

    @property
    def blocked(self) -> bool:
        """As in `Wire`."""
        return self.flow.write_paused or self.transport.is_closing()

    def write(self, body: bytes) -> None:
        """As in `Wire`."""
        self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))

    def connection_made(self, transport: Transport) -> None:  # type: ignore[override]
        """A head is expected. If there are too many connections, one without a request makes room."""
        super().connection_made(transport)
        self.idle[self] = None
        self._expect(HEAD_S)
        if len(self.connections) > self.most_connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing is expected."""
        self.idle.pop(self, None)
        self._expect(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes came. They are parsed in slices, so that limits hold however many came at once."""
        if self._timer is None or self._in_body:
            self._expect(BODY_S if self._in_body else HEAD_S)
        if not self._in_body and b"pgrade" in data[:SLICE]:
            data = _UPGRADE.sub(b"\r\nDeclined", data)
        for at in range(0, len(data), SLICE):
            piece = data[at : at + SLICE]
            self._beside_bodies += len(piece)
            super().data_received(piece)
            if self._beside_bodies > MAX_HEADER_BYTES:
                self._refuse(400, f"head, trailers or chunk sizes are longer than {MAX_HEADER_BYTES} bytes")
            if self.transport.is_closing():
                return

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more. If it still waits for an answer, it gets that before the connection ends."""
        waits = self.cycle is not None and not (self.cycle.more_body or self.cycle.response_complete)
        if waits:
            self.cycle.keep_alive = False
            if not (self.cycle.response_started or self.pipeline):
                self.cycle.transport = Prober(self.transport, self.loop)  # type: ignore[assignment]
        return waits

    def on_headers_complete(self) -> None:
        """A body follows."""
        if hasattr(self.flow, "write_paused"):
            self.scope["state"][WIRE] = self
        self._in_body, self._beside_bodies = True, 0
        self.idle.pop(self, None)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A part of it."""
        self._beside_bodies = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Another request may follow."""
        self._in_body, self._beside_bodies = False, 0
        self._expect(None)
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """A head is expected, within uvicorn's time for idle connections."""
        if self.cycle.response_complete:
            self.idle[self] = None
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """In the format of every other error."""
        self._refuse(400, "this is no HTTP request")

    def _make_room(self) -> None:
        if (oldest := next(iter(self.idle))) is self:
            self._refuse(503, "the server has as many connections as it may")
        else:
            oldest.transport.close()

    def _expect(self, seconds: float | None) -> None:
        if self._timer:
            self._timer.cancel()
        self._timer = None if seconds is None else self.loop.call_later(seconds, self._late)

    def _late(self) -> None:
        if self.flow.read_paused:  # it is we who do not read
            self._expect(BODY_S)
        elif self._in_body:
            self._refuse(408, f"nothing of the body came for {BODY_S:g} s")
        elif self._beside_bodies:
            self._refuse(408, f"the head took longer than {HEAD_S:g} s")
        else:
            self.transport.close()

    def _refuse(self, status: int, message: str) -> None:
        """End the connection with an error, or without one, if it has another answer to come, or half of one."""
        if self.transport.is_closing():
            return
        answering = self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete
        if not (answering or self.pipeline):
            self.transport.write(_error(Refused(status, message)))
        self.transport.close()


def _error(refused: Refused) -> bytes:
    body = json.dumps(refused.body).encode()
    status = f"HTTP/1.1 {refused.status_code} {HTTPStatus(refused.status_code).phrase}\r\n"
    head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    return (status + head).encode() + body
