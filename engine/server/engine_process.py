"""The engine's process: a serving loop, fed by and feeding a pipe through threads of their own, so that it never waits
for a client, nor for the API."""

from __future__ import annotations

import signal
import sys
import traceback
from multiprocessing.connection import Connection
from queue import SimpleQueue
from threading import Thread
from typing import Any

from engine.live_events import LiveEvents
from engine.records.recorder import Recorder
from engine.scheduler import load_scheduler
from engine.server.driver import Driver, Service
from engine.server.gc_tuning import hold_back
from engine.server.messages import Arrive, Cancel, Close, Over, Ready, send_all
from engine.server.output_publisher import Publisher
from traces.errors import TandemError

SWITCH_S = 0.0005  # a thread that wants to run gets to within this, where Python's default is 5 ms


def run_engine(service: Service, pipe: Connection) -> None:
    """Serve until the API says close, or is gone. The process's main function."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes: the API decides
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.setswitchinterval(SWITCH_S)
    outbox: SimpleQueue[Any] = SimpleQueue()
    sender = Thread(target=send_all, args=(outbox, pipe), name="to-api")
    sender.start()
    error = None
    try:
        _serve(service, service.open(), pipe, outbox)
    except TandemError as mistake:
        error = str(mistake)
    except BaseException as failure:
        traceback.print_exc()
        error = f"{type(failure).__name__}: {failure}"
    outbox.put(Over(error))
    outbox.put(None)
    sender.join()


def _serve(service: Service, driver: Driver, pipe: Connection, outbox: SimpleQueue[Any]) -> None:
    recorder = Recorder() if service.records else None
    scheduler = load_scheduler(driver.config)
    publisher = Publisher(outbox.put, driver, scheduler, recorder)
    start_ns = 0

    def begun(events: LiveEvents, begun_ns: int) -> None:
        nonlocal start_ns
        start_ns = begun_ns
        Thread(target=_receive_all, args=(pipe, events), name="from-api", daemon=True).start()
        outbox.put(Ready(begun_ns, driver.config, driver.facts))

    whole = False
    hold_back()
    try:
        driver.serve(scheduler, publisher, begun)
        whole = True
    finally:
        if recorder:
            service.keep(recorder, start_ns, not whole)


def _receive_all(pipe: Connection, events: LiveEvents) -> None:
    while True:
        try:
            messages = pipe.recv()
        except (EOFError, OSError):
            events.cancel_all("the API process is gone")
            messages = [Close()]
        for message in messages:
            match message:
                case Arrive():
                    events.arrive(*message)
                case Cancel():
                    events.cancel(*message)
                case Close():
                    events.close()
                    return
