"""Runs the API until it is told to stop: first it takes no more, then everyone is answered, then the engine ends."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from engine.server.app import ServerLimits, build_app
from engine.server.descriptors import most_connections
from engine.server.driver import Service
from engine.server.engine_client import EngineClient
from engine.server.gc_tuning import hold_back
from engine.server.http_protocol import http_protocol
from engine.server.tokenization import Text
from traces.errors import TandemError

GRACE_S = 5  # for slow readers, once nothing runs any more
QUICK_S = 0.3  # for all readers, once a second Ctrl-C came
STOPPING = "the server is shutting down"
BACKLOG = 4096
_OPTIONS: dict[str, Any] = {"ws": "none", "lifespan": "off", "access_log": False, "log_level": "warning"}


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
        service: builds the engine driver, in a process of its own.
        load_text: builds the tokenizer, while the engine driver is being built.
        limits: given the name of the model that was loaded.
        host, port: where to listen; port 0 takes a free one.
        drain_s: how long requests may go on once the server was told to stop; then they fail.
        say: is told the address.

    Raises:
        TandemError: the engine cannot be started, or the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, OverflowError) as error:
        raise TandemError(f"cannot listen on {host}:{port} ({error}): choose another --host or --port") from error
    host, port = listener.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    async def run() -> None:
        engine = EngineClient(service)
        try:
            text, _ = await asyncio.gather(asyncio.to_thread(load_text), engine.start())
        except BaseException:
            engine.kill()  # it takes no signals, nor notice of us before it has loaded, and we would wait for it
            raise
        app = build_app(engine, text, limits(engine.ready.facts["model"]))
        hold_back()
        say(address)
        await _run_server(app, engine, listener, drain_s)
        await engine.close()
        if engine.error:
            raise TandemError(f"the engine ended early: {engine.error}")

    import uvloop

    uvloop.run(run())


class _Server(uvicorn.Server):
    """Leaves signals to us."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Uvicorn's own would end the process."""
        yield


async def _run_server(app: ASGIApp, engine: EngineClient, listener: socket.socket, drain_s: float) -> None:
    """A signal asks for a graceful end, a second Ctrl-C for a quick one; neither ends the process."""
    loop = asyncio.get_running_loop()
    grace_s = int(drain_s) + GRACE_S
    http = http_protocol(most_connections())
    server = _Server(uvicorn.Config(app, http=http, backlog=BACKLOG, timeout_graceful_shutdown=grace_s, **_OPTIONS))

    def stop(number: int) -> None:
        if not server.should_exit:
            server.should_exit = engine.draining = True
            loop.call_later(drain_s, engine.fail_all, STOPPING)
        elif number == signal.SIGINT:
            engine.fail_all(STOPPING)
            loop.call_later(QUICK_S, setattr, server, "force_exit", True)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    await server.serve([listener])
