"""Notes down what happens in a serving loop, in time and memory that grow with changes, not with tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, takewhile
from typing import TYPE_CHECKING, Any

from engine.backend import Completion, Launch, Stop
from engine.events import Event
from engine.records.schema import COLUMNS, NULL, Row, Rows, packer, tables_from_rows
from engine.request import CANCELLED, FAILED, LENGTH, REJECTED, STOP, Request
from engine.step import Copies, Step

if TYPE_CHECKING:
    import pyarrow as pa

FLUSH = 65536  # turns of the loop whose rows are held before they are written
_NOTHING = NULL, NULL  # launched, or completed
_pack_step, _pack_iteration = packer("steps"), packer("iterations")


@dataclass(slots=True)
class _Life:
    """One request's history; None is 'not yet'."""

    request: Request
    delivered_ns: int
    more_events: bool
    cancel_ns: int | None = None
    cancel_event: int | None = None
    cancel_reason: str | None = None
    first_scheduled_ns: int | None = None
    first_token_ns: int | None = None
    last_token_ns: int | None = None
    output_len: int | None = None
    fault: str | None = None
    decodes_from: int = 0
    context: int = 0

    @property
    def outcome(self) -> str | None:
        """How it ended: by its stop token even where that was found after the step that finishes it was planned."""
        if self.fault:
            return FAILED
        return STOP if self.request.outcome == LENGTH and self.output_len is not None else self.request.outcome

    @property
    def over(self) -> bool:
        """Whether nothing but the steps in flight can add to it."""
        return self.request.outcome is not None and not self.more_events


class Recorder:
    """Collects one run's rows. The serving loop calls it; `tables` gives them, or `write` gets them as they come.

    Attributes:
        ended: requests that were served, stopped, cancelled or rejected so far.
    """

    def __init__(self, write: Callable[[str, Rows], object] | None = None) -> None:
        """`write` takes a table's name and its next rows, every `FLUSH` turns of the loop and at `close`.

        Then no more is held than requests that have not ended. Without it all is held for `tables`.
        """
        self.ended = 0
        self._write = write
        self._events = 0
        self._lives: dict[int, _Life] = {}  # in order of delivery
        self._over = 0  # how many of the first of them had ended at the last flush
        self._decoding: dict[int, _Life] = {}
        self._in_flight: deque[tuple[Step, int, Launch]] = deque()
        self._last_step = -1
        self._requests: list[Row] = []
        self._spans: list[Row] = []
        self._steps, self._iterations = bytearray(), bytearray()  # rows, packed
        self._turns = 0  # whose rows these are

    def delivered(self, event: Event, now: int) -> None:
        """An event was handed to the scheduler."""
        self.ended += event.request.outcome == (CANCELLED if event.is_cancel else REJECTED)
        if event.is_cancel:
            life = self._lives[event.request.id]
            life.cancel_ns, life.cancel_reason, life.more_events = event.time_ns, event.reason, not event.is_last
            life.cancel_event = self._events
        else:
            self._lives[event.request.id] = _Life(event.request, now, not event.is_last)
        self._events += 1

    def launched(self, step: Step, now: int, launch: Launch) -> None:
        """A step that was planned at `now` is on its way."""
        self._in_flight.append((step, now, launch))
        self._last_step = step.index
        leaves = step.dropped or step.preempted or step.swapped_out or step.skipped
        if leaves or step.chunks or step.joined or step.finishing:
            self._track(step, now)

    def _track(self, step: Step, now: int) -> None:
        for request_id in step.leaving:
            self._close_span(request_id, step.index - 1)
        for request_id, context in step.joined.items():
            life = self._decoding[request_id] = self._lives[request_id]
            life.decodes_from, life.context = step.index, context
        for request_id, chunk in step.chunks.items():
            life = self._lives[request_id]
            self._spans.append((request_id, step.index, step.index, "prefill", *chunk))
            if life.first_scheduled_ns is None:
                life.first_scheduled_ns = now
        for request_id in step.finishing:
            self._close_span(request_id, step.index)
        self.ended += len(step.finishing)

    def _close_span(self, request_id: int, last_step: int) -> None:
        life = self._decoding.pop(request_id, None)
        if life is not None and last_step >= life.decodes_from:
            self._spans.append((request_id, life.decodes_from, last_step, "decode", life.context, 1, True))

    def completed(self, completion: Completion) -> None:
        """A step's tokens are known."""
        step, now, (planned_ns, launched_ns) = self._in_flight.popleft()
        _, completed_ns, start_ns, device_ns, stops, _ = completion
        (kv_tokens, _, blocks_used, running, waiting), chunks = step.load, step.chunks
        out, back = step.swapped_out, step.swapped_in
        self._steps += _pack_step(
            step.index, step.digest, now, planned_ns, launched_ns,
            step.prefill_tokens if chunks else 0, len(chunks), step.decodes,
            kv_tokens, blocks_used, running, waiting,
            len(step.preempted) + len(out), _blocks(out) if out else 0, _blocks(back) if back else 0,
            completed_ns, start_ns, device_ns,
        )  # fmt: skip
        if chunks or step.finishing or stops:
            self._note_tokens(step, completed_ns, stops)

    def _note_tokens(self, step: Step, completed_ns: int, stops: Sequence[Stop]) -> None:
        """Note whose first and last tokens the step made."""
        for request_id, chunk in step.chunks.items():
            life = self._lives[request_id]
            if chunk.samples and life.first_token_ns is None:
                life.first_token_ns = completed_ns
        for request_id in step.finishing:
            life = self._lives[request_id]
            if life.output_len is None:  # else an earlier step has shown that it had stopped
                life.last_token_ns = completed_ns
        for stop in stops:
            life = self._lives[stop.request_id]
            if life.request.outcome != CANCELLED:  # else nobody asked any more
                life.last_token_ns, life.output_len = completed_ns, stop.output_len
                life.fault = stop.fault
            self.ended += life.request.outcome is None  # else it was counted as it was cancelled, or finishing

    def iteration(
        self, now: int, events: int, step: Step | None, launch: Launch | None, completion: Completion | None
    ) -> None:
        """One turn of the loop is over."""
        planned_ns, launched_ns = launch or _NOTHING
        completed, completed_ns = completion[:2] if completion else _NOTHING
        index = step.index if step else NULL
        self._iterations += _pack_iteration(now, events, index, planned_ns, launched_ns, completed, completed_ns)
        self._turns += 1
        if self._write and self._turns == FLUSH:
            self._flush(self._over)
            self._over = sum(1 for _ in takewhile(lambda life: life.over, self._lives.values()))

    def _flush(self, requests: int) -> None:
        """Write down what there is, and so many of the requests: no step in flight may be theirs."""
        first = list(islice(self._lives.values(), requests))
        self._requests += map(self._request_row, first)
        for life in first:
            del self._lives[life.request.id]
        for name, rows in self._rows().items():
            if self._write:
                self._write(name, rows)
                rows.clear()
                self._turns = 0

    def _rows(self) -> dict[str, list[Row] | bytearray]:
        return dict(zip(COLUMNS, (self._requests, self._steps, self._spans, self._iterations), strict=True))

    def close(self) -> None:
        """Write down the rest. A run that was interrupted is whole up to its last completed step."""
        for request_id in tuple(self._decoding):
            self._close_span(request_id, self._last_step)
        self._flush(len(self._lives))

    def tables(self) -> dict[str, pa.Table]:
        """The run, if `write` was not to get it."""
        self.close()
        return tables_from_rows(self._rows())

    @staticmethod
    def _request_row(life: _Life) -> tuple[Any, ...]:
        request = life.request
        generated = request.generated
        output_len = generated if life.output_len is None else life.output_len
        reason = life.cancel_reason if request.outcome == CANCELLED else life.fault or request.reason
        return (
            *(request.id, request.arrival_ns, life.delivered_ns, life.first_scheduled_ns),
            *(life.first_token_ns, life.last_token_ns),
            *(request.prompt_len, request.max_tokens, request.predicted_length, life.cancel_ns),
            *(output_len, generated - output_len),
            *(request.preemptions, request.swaps, life.outcome or "unfinished", reason),
            *(request.priority, request.client, request.ttft_slo_ns, request.e2e_slo_ns),
            *(request.cached_tokens, *_recorded(request)),
            *(request.refused is not None, life.cancel_event),
        )


def _recorded(request: Request) -> tuple[Sequence[int] | None, int | None, Sequence[int] | None]:
    """What a replay needs to share what this run shared: a trace's own hash ids, or hashes in place of token ids."""
    if request.block_hashes is None or request.content is None:
        return None, None, None
    told = request.output_ids or None
    if not request.records_hashes:
        return *request.content, told
    hashes, size = request.block_hashes
    return hashes[: request.prompt_len // size], size, told


def _blocks(swaps: Mapping[int, Copies]) -> int:
    return sum(len(copies.source) for copies in swaps.values())
