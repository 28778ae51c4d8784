"""The HTTP protocol of a connection: uvicorn's over httptools, with a short cut for tokens and a limit on headers.

Uvicorn has no public hook for either, so that the protocol reaches into its class. Without the names that it needs,
uvicorn's own protocol over h11 serves: it limits headers too, and tokens take the long way.
"""

from __future__ import annotations

from asyncio import Protocol
from typing import Literal

from engine.server.response import WIRE

MAX_HEADER_BYTES = 64 * 1024
_NEEDED = ("data_received", "on_headers_complete", "on_message_complete", "send_400_response")


def http_protocol() -> type[Protocol] | Literal["h11"]:
    """The protocol for uvicorn's `http`."""
    try:
        from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
    except ImportError:
        return "h11"
    if not all(hasattr(HttpToolsProtocol, name) for name in _NEEDED):
        return "h11"

    class WireProtocol(HttpToolsProtocol):
        """Implements `engine.server.response.Wire`. Headers end, which httptools gathers as long as some are sent."""

        _in_head = True
        _head_bytes = 0  # of data that brought a head, and no end of it

        @property
        def blocked(self) -> bool:
            """As in `Wire`."""
            return self.flow.write_paused or self.transport.is_closing()

        def write(self, body: bytes) -> None:
            """As in `Wire`."""
            self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))

        def data_received(self, data: bytes) -> None:
            """Bytes came; if the bytes of a head are too many, the connection ends."""
            if self._in_head:
                self._head_bytes += len(data)
            super().data_received(data)
            if self._in_head and self._head_bytes > MAX_HEADER_BYTES and not self.transport.is_closing():
                self.send_400_response("Request header fields too large.")

        def on_headers_complete(self) -> None:
            """A body follows."""
            if hasattr(self.flow, "write_paused"):
                self.scope["state"][WIRE] = self
            self._in_head, self._head_bytes = False, 0
            super().on_headers_complete()

        def on_message_complete(self) -> None:
            """Another request may follow."""
            self._in_head = True
            super().on_message_complete()

    return WireProtocol
