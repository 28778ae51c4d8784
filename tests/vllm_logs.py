"""Decision logs of vLLM's scheduler, and Tandem's serving loop on their logical clock: a tick is a turn of the loop."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.backend import Completion, Launch, drive
from engine.checks.step_checker import CheckedBackend
from engine.config import ServingConfig
from engine.events import Event
from engine.instance import Instance
from engine.records.recorder import Recorder
from engine.request import Request
from engine.scheduler import load_scheduler
from engine.step import Step
from sim.backend import OutputTracker
from traces.request import TraceRequest

FOLDER = Path(__file__).parent / "oracle"
LISTS = [
    (path.stem, case, mode)
    for path in sorted(FOLDER.glob("*.json"))
    for case, each in enumerate(json.loads(path.read_text())["cases"])
    for mode in each["vllm"]
]
FIELDS = ("tick", "decodes", "chunks", "preempted", "finished", "free")


def read_case(stem: str, case: int) -> dict[str, Any]:
    return json.loads((FOLDER / f"{stem}.json").read_text())["cases"][case]


def config_of(case: dict[str, Any], scheduler: str, depth: int, admit: str) -> ServingConfig:
    limits = case["config"]
    return ServingConfig(
        num_blocks=limits["num_blocks"],
        block_size=limits["block_size"],
        max_seqs=limits["max_num_seqs"],
        max_batched_tokens=limits["max_num_batched_tokens"],
        max_model_len=limits["max_model_len"],
        scheduler=scheduler,
        pipeline_depth=depth,
        prefix_caching=limits["enable_prefix_caching"],
        admit=admit,
    )


def requests_of(case: dict[str, Any]) -> list[TraceRequest]:
    return [_request(each) for each in case["requests"]]


def _request(row: dict[str, Any]) -> TraceRequest:
    ids = {
        name: [first + each for first, count in row[logged] for each in range(count)]
        for name, logged in (("prompt_token_ids", "prompt_ids"), ("output_ids", "output_ids"))
        if logged in row
    }
    return TraceRequest(
        id=row["id"],
        arrival_ns=row["step"],
        prompt_len=row["prompt_len"],
        output_len=row.get("output_len", row["max_tokens"]),
        max_tokens=row["max_tokens"],
        priority=row.get("priority", 0),
        cancel_ns=row.get("cancel"),
        **ids,
    )


class Waited:
    """Something that has happened already."""

    def __init__(self, value: Any = None) -> None:
        self._value = value

    def wait(self) -> Any:
        return self._value


class TickBackend:
    """A backend whose clock counts the turns of the loop, and whose steps take none of its time."""

    def __init__(self, requests: list[TraceRequest], config: ServingConfig) -> None:
        self._outputs = OutputTracker(config.block_size if config.prefix_caching else 0)
        events = list(_events([self._outputs.seen(each) for each in requests]))
        self._events = deque(sorted(events, key=lambda event: (event.time_ns, event.is_cancel, event.sequence)))
        self._flight: deque[Completion] = deque()
        self._tick = -1

    def now(self) -> int:
        self._tick += 1
        return self._tick

    def due(self, now: int) -> list[Event]:
        due = []
        while self._events and self._events[0].time_ns <= now:
            due.append(self._events.popleft())
        return due

    def launch(self, step: Step) -> Waited:
        self._flight.append(Completion(step.index, self._tick, self._tick, 0, *self._outputs.shown_by(step)))
        return Waited(Launch(self._tick, self._tick))

    def complete(self) -> Waited:
        return Waited(self._flight.popleft())

    def wait(self, until_ns: int | None) -> Waited | None:
        return Waited() if self._events or until_ns is not None else None

    def close(self) -> None:
        assert not self._flight and not self._events


def _events(requests: list[TraceRequest]) -> Iterator[Event]:
    for source in requests:
        request = Request.from_trace(source)
        yield Event(source.arrival_ns, 2 * source.id, request, is_last=source.cancel_ns is None)
        if source.cancel_ns is not None:
            yield Event(source.cancel_ns, 2 * source.id + 1, request, is_cancel=True)


@dataclass
class Log(Recorder):
    """What each tick decided, as the logs have it; who decodes follows from the deltas."""

    free: dict[int, int]
    steps: dict[int, dict[str, Any]] = field(default_factory=dict)
    decoding: dict[int, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def launched(self, step: Step, now: int, launch: Launch) -> None:
        super().launched(step, now, launch)
        for request_id in step.leaving:
            self.decoding.pop(request_id, None)
        self.decoding |= dict.fromkeys(step.joined)
        self.steps[step.index] = {
            "tick": now,
            "decodes": list(self.decoding) if step.decodes else [],
            "chunks": [[request_id, chunk.start, chunk.tokens] for request_id, chunk in step.chunks.items()],
            "preempted": list(step.preempted),
            "finished": list(step.finishing),
            "free": self.free[now],
        }
        for request_id in step.finishing:
            self.decoding.pop(request_id, None)

    def completed(self, completion: Completion) -> None:
        super().completed(completion)
        stopped = {stop.request_id for stop in completion.stops}
        for index, step in self.steps.items():  # a later step may have been planned to finish it
            if index > completion.step:
                step["finished"] = [each for each in step["finished"] if each not in stopped]
        step = self.steps[completion.step]
        step["finished"] = sorted({*step["finished"], *stopped})


def decisions(case: dict[str, Any], config: ServingConfig) -> list[dict[str, Any]]:
    """What Tandem decides on a log's workload, step by step, every step checked."""
    scheduler, free = load_scheduler(config), {}
    plan = scheduler.schedule

    def schedule(now: int) -> Step | None:
        free[now] = scheduler.pool.free
        return plan(now)

    scheduler.schedule = schedule
    log = Log(free)
    backend = CheckedBackend(TickBackend(requests_of(case), config), scheduler.config)
    drive(Instance(scheduler, backend, log).serve())
    return list(log.steps.values())


def logged(case: dict[str, Any], mode: str) -> list[dict[str, Any]]:
    """What vLLM decided."""
    return [dict(zip(FIELDS, step, strict=True)) for step in case["vllm"][mode]["steps"]]


def merged(steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Steps that run tokens; whom one preempts that runs none is told with the next, as Tandem tells it."""
    kept, carried = [], []
    for step in steps:
        carried = carried + step["preempted"]
        if step["decodes"] or step["chunks"]:
            kept.append(step | {"preempted": carried})
            carried = []
    return kept
