"""Messages between the API process and the engine process, in lists. They share a clock, `time.perf_counter_ns`."""

from __future__ import annotations

from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, NamedTuple

from engine.config import ServingConfig
from engine.stop_condition import StopCondition
from traces.request import TraceRequest


class Arrive(NamedTuple):
    """To the engine: a request. Its `arrival_ns` counts from the run's start."""

    source: TraceRequest
    condition: StopCondition


class Cancel(NamedTuple):
    """To the engine: the client wants no more."""

    request_id: int
    time_ns: int
    reason: str


class Close(NamedTuple):
    """To the engine: serve the requests that came, write the records, and end."""


class Ready(NamedTuple):
    """To the API: the run has begun.

    Attributes:
        start_ns: when.
        config: its limits.
        facts: `backend`, `device`, `model`, `vocab_size`, `stop_tokens`.
    """

    start_ns: int
    config: ServingConfig
    facts: dict[str, Any]


class Load(NamedTuple):
    """The engine's load: queue lengths and blocks now, the composition of the last step, and sums so far."""

    running: int = 0
    waiting: int = 0
    kv_blocks_used: int = 0
    step: int = -1
    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefill_total: int = 0
    decode_total: int = 0
    preemptions: int = 0


class End(NamedTuple):
    """A request ended: `length`, `stop` or `rejected`, and why it was rejected."""

    request_id: int
    outcome: str
    reason: str | None = None


class Progress(NamedTuple):
    """To the API, once a turn of the loop: the tokens of the step that completed, one for each id, and who ended."""

    ids: list[int]
    tokens: list[int]
    ended: list[End]
    load: Load


class Over(NamedTuple):
    """To the API: the last message. What went wrong, or None."""

    error: str | None


def send_all(outbox: SimpleQueue[Any], pipe: Connection) -> None:
    """Send messages until there is None; where the pipe is slower than they come, several in one write."""
    last = False
    while not last:
        batch = [outbox.get()]
        while not outbox.empty():
            batch.append(outbox.get())
        last = batch[-1] is None
        try:
            pipe.send([message for message in batch if message is not None])
        except OSError:
            return  # nobody reads any more
