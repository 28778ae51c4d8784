"""Runs the API until it is told to stop: first it takes no more, then everyone is answered, then the engine ends."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from engine.server.app import ServerLimits, build_app
from engine.server.driver import Service
from engine.server.engine_client import EngineClient
from engine.server.gc_tuning import hold_back
from engine.server.response import WIRE
from engine.server.tokenization import Text
from traces.errors import TandemError

MAX_HEADER_BYTES = 64 * 1024
GRACE_S = 5  # for slow readers, once nothing runs any more


class TandemProtocol(HttpToolsProtocol):
    """HTTP that lends itself as a wire, and whose headers end: httptools would gather them as long as some are sent.

    Implements `engine.server.response.Wire`.
    """

    _in_head = True
    _head_bytes = 0  # of data that brought a head, and no end of it
    _ended_head = False

    @property
    def blocked(self) -> bool:
        """As in `Wire`."""
        return self.flow.write_paused or self.transport.is_closing()

    def write(self, body: bytes) -> None:
        """As in `Wire`."""
        self.transport.write(b"%x\r\n%b\r\n" % (len(body), body))

    def data_received(self, data: bytes) -> None:
        """Bytes came; if what has come of a head is too long, the connection ends."""
        in_head, self._ended_head = self._in_head, False
        super().data_received(data)
        if in_head and not self._ended_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEADER_BYTES:
                self.send_400_response("Request header fields too large.")

    def on_headers_complete(self) -> None:
        """A body follows."""
        self.scope["state"][WIRE] = self
        self._in_head, self._ended_head, self._head_bytes = False, True, 0
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Another request may follow."""
        self._in_head = True
        super().on_message_complete()


class _Server(uvicorn.Server):
    """Uvicorn, which tells us that it is about to shut down, and does not end the process after that."""

    def __init__(self, config: uvicorn.Config, on_shutdown: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_shutdown = on_shutdown

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """A signal asks for a graceful end, a second Ctrl-C for a quick one."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.handle_exit, number, None)
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Open connections are waited for."""
        self._on_shutdown()
        await super().shutdown(sockets)


def serve(
    service: Service,
    load_text: Callable[[], Text],
    limits: Callable[[str], ServerLimits],
    host: str,
    port: int,
    drain_s: float,
    say: Callable[[str], None],
) -> None:
    """Serve until SIGINT or SIGTERM.

    Args:
        service: builds the driver, in a process of its own.
        load_text: builds what reads prompts, while the driver is being built.
        limits: given the name of the model that was loaded.
        host, port: where to listen; port 0 takes a free one.
        drain_s: how long requests may go on once the server was told to stop; then they fail.
        say: is told the address.

    Raises:
        TandemError: the engine cannot be started, or the address cannot be had.
    """
    listener = _listen(host, port)
    import uvloop

    uvloop.run(_serve(service, load_text, limits, listener, drain_s, say))


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(4096)
    except (OSError, OverflowError) as error:
        raise TandemError(f"cannot listen on {host}:{port} ({error}): choose another --host or --port") from error
    return listener


async def _serve(
    service: Service,
    load_text: Callable[[], Text],
    limits: Callable[[str], ServerLimits],
    listener: socket.socket,
    drain_s: float,
    say: Callable[[str], None],
) -> None:
    engine = EngineClient(service)
    try:
        text, _ = await asyncio.gather(asyncio.to_thread(load_text), engine.start())
    except BaseException:
        engine.kill()  # it takes no signals, nor notice of us before it has loaded, and we would wait for it
        raise
    app = build_app(engine, text, limits(engine.ready.facts["model"]))
    hold_back()
    host, port = listener.getsockname()[:2]
    say(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    await _run(app, engine, listener, drain_s)
    await engine.close()
    if engine.error:
        raise TandemError(f"the engine ended early: {engine.error}")


async def _run(app: ASGIApp, engine: EngineClient, listener: socket.socket, drain_s: float) -> None:
    def drain() -> None:
        engine.draining = True
        asyncio.get_running_loop().call_later(drain_s, engine.fail_all, "the server is shutting down")

    config = uvicorn.Config(
        app,
        http=TandemProtocol,
        ws="none",
        lifespan="off",
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=int(drain_s) + GRACE_S,
        backlog=4096,
    )
    await _Server(config, drain).serve([listener])
