"""Notes down what happens in a serving loop, in time and memory that grow with changes, not with tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from engine.backend import Completion, Launch
from engine.events import Event
from engine.records import tables_from_rows
from engine.request import CANCELLED, REJECTED, Request
from engine.step import Copies, Step

if TYPE_CHECKING:
    import pyarrow as pa


class Observer(Protocol):
    """Whom the serving loop tells what happens. It sees all, and decides nothing."""

    def delivered(self, event: Event, now: int) -> None:
        """An event was handed to the scheduler."""

    def launched(self, step: Step, now: int, launch: Launch) -> None:
        """A step that was planned at `now` is on its way."""

    def completed(self, completion: Completion) -> None:
        """A step's tokens are known."""

    def iteration(
        self, now: int, events: int, step: Step | None, launch: Launch | None, completion: Completion | None
    ) -> None:
        """One turn of the loop is over."""


@dataclass(slots=True)
class _Life:
    """One request's history, in times (ns) and step numbers; None is 'not yet'."""

    request: Request
    delivered_ns: int
    cancel_ns: int | None = None
    cancel_reason: str | None = None
    first_scheduled_ns: int | None = None
    first_token_step: int | None = None
    last_token_step: int | None = None
    output_len: int | None = None
    decodes_from: int = 0
    context: int = 0


class Recorder:
    """Collects one run's rows. The serving loop calls it; `tables` gives them.

    Attributes:
        ended: requests that were served, stopped, cancelled or rejected so far.
    """

    def __init__(self) -> None:
        self.ended = 0
        self._lives: dict[int, _Life] = {}
        self._decoding: dict[int, _Life] = {}
        self._steps: list[tuple[Any, ...]] = []
        self._completions: list[Completion] = []
        self._spans: list[tuple[Any, ...]] = []
        self._iterations: list[tuple[Any, ...]] = []

    def delivered(self, event: Event, now: int) -> None:
        """An event was handed to the scheduler."""
        self.ended += event.request.outcome in (REJECTED, CANCELLED)
        if event.is_cancel:
            life = self._lives[event.request.id]
            life.cancel_ns, life.cancel_reason = event.time_ns, event.reason
        else:
            self._lives[event.request.id] = _Life(event.request, now)

    def launched(self, step: Step, now: int, launch: Launch) -> None:
        """A step that was planned at `now` is on its way."""
        times = (now, launch.planned_ns, launch.launched_ns)
        load = (step.kv_tokens, step.kv_blocks_used, step.running, step.waiting)
        out, back = step.swapped_out, step.swapped_in
        lost = (len(step.preempted) + len(out), _blocks(out) if out else 0, _blocks(back) if back else 0)
        self._steps.append(
            (step.index, step.digest, *times, step.prefill_tokens, len(step.chunks), step.decodes, *load, *lost)
        )
        if not step.is_steady:
            self._track(step, now)

    def _track(self, step: Step, now: int) -> None:
        for request_id in (*step.dropped, *step.preempted, *step.swapped_out):
            self._close_span(request_id, step.index - 1)
        for request_id, context in step.joined.items():
            life = self._decoding[request_id] = self._lives[request_id]
            life.decodes_from, life.context = step.index, context
        for request_id, chunk in step.chunks.items():
            life = self._lives[request_id]
            self._spans.append((request_id, step.index, step.index, "prefill", *chunk))
            if life.first_scheduled_ns is None:
                life.first_scheduled_ns = now
            if chunk.samples and life.first_token_step is None:
                life.first_token_step = step.index
        for request_id in step.finishing:
            self._close_span(request_id, step.index)
            self._lives[request_id].last_token_step = step.index
        self.ended += len(step.finishing)

    def _close_span(self, request_id: int, last_step: int) -> None:
        life = self._decoding.pop(request_id, None)
        if life is not None and last_step >= life.decodes_from:
            self._spans.append((request_id, life.decodes_from, last_step, "decode", life.context, 1, True))

    def completed(self, completion: Completion) -> None:
        """A step's tokens are known."""
        self._completions.append(completion)
        self.ended += len(completion.stops)
        for stop in completion.stops:
            life = self._lives[stop.request_id]
            if life.request.outcome != CANCELLED:  # else nobody asked any more
                life.last_token_step, life.output_len = completion.step, stop.output_len

    def iteration(
        self, now: int, events: int, step: Step | None, launch: Launch | None, completion: Completion | None
    ) -> None:
        """One turn of the loop is over."""
        launched = (step.index, launch.planned_ns, launch.launched_ns) if step and launch else (None, None, None)
        completed = (completion.step, completion.completed_ns) if completion else (None, None)
        self._iterations.append((now, events, *launched, *completed))

    def tables(self) -> dict[str, pa.Table]:
        """The run so far. A run that was interrupted is whole up to its last completed step."""
        for request_id in tuple(self._decoding):
            self._close_span(request_id, len(self._steps) - 1)
        steps = [
            (*step, completion.completed_ns, completion.device_start_ns, completion.device_ns)
            for step, completion in zip(self._steps, self._completions, strict=False)
        ]
        requests = [self._request_row(life) for life in self._lives.values()]
        return tables_from_rows(
            {"requests": requests, "steps": steps, "spans": self._spans, "iterations": self._iterations}
        )

    def _request_row(self, life: _Life) -> tuple[Any, ...]:
        request = life.request
        generated = request.generated
        output_len = generated if life.output_len is None else life.output_len
        reason = life.cancel_reason if request.outcome == CANCELLED else request.reason
        return (
            *(request.id, request.arrival_ns, life.delivered_ns, life.first_scheduled_ns),
            *(self._time_of(life.first_token_step), self._time_of(life.last_token_step)),
            *(request.prompt_len, request.max_tokens, request.predicted_length, life.cancel_ns),
            *(output_len, generated - output_len),
            *(request.preemptions, request.swaps, request.outcome or "unfinished", reason),
            *(request.priority, request.client),
        )

    def _time_of(self, step: int | None) -> int | None:
        known = step is not None and step < len(self._completions)
        return self._completions[step].completed_ns if known and step is not None else None


def _blocks(swaps: Mapping[int, Copies]) -> int:
    return sum(len(copies.source) for copies in swaps.values())
