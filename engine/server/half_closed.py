"""A client that sends no more waits for its answer, or is gone: only what is sent to it brings that to light."""

from __future__ import annotations

from asyncio import AbstractEventLoop, Transport

FIRST_S = 0.02  # until the next probe, then twice as long each time
ANY_ANSWER = b"HTTP/1.1 "  # begins every answer


class Prober:
    """Stands between an answer and the transport until the answer begins, and sends its first bytes one by one.

    A client that is gone resets the connection, and the next byte fails: the transport then ends the connection.
    """

    def __init__(self, transport: Transport, loop: AbstractEventLoop) -> None:
        """Send the first byte."""
        self._transport = transport
        self._loop = loop
        self._sent = 0
        self._probe(FIRST_S)

    def _probe(self, wait_s: float) -> None:
        if self._sent < len(ANY_ANSWER) and not self._transport.is_closing():
            self._transport.write(ANY_ANSWER[self._sent : self._sent + 1])
            self._sent += 1
            self._loop.call_later(wait_s, self._probe, 2 * wait_s)

    def write(self, data: bytes) -> None:
        """The answer, whose first bytes were sent."""
        self._transport.write(data[self._sent :])
        self._sent = len(ANY_ANSWER)
        self.write = self._transport.write  # type: ignore[method-assign]

    def close(self) -> None:
        """As in `Transport`."""
        self._transport.close()

    def is_closing(self) -> bool:
        """As in `Transport`."""
        return self._transport.is_closing()
