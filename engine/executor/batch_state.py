"""The running batch that Steps describe, on the data plane's side of the seam: who runs, with which tokens and blocks.

It alone holds token values; the scheduler never sees one. It knows no model and no device. It tells the data plane the
work of each step, and notes the tokens that come back, possibly a step later.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from engine.backend import Filled, Shown, Stop
from engine.config import ServingConfig
from engine.executor.batch import Decodes, Ints, Prefill
from engine.prefix_hash import tells_blocks
from engine.step import Step
from engine.stop_condition import StopCondition
from traces.request import TraceRequest

NOT_NUMBERS = "the model's logits are not numbers (NaN): are its weights whole, and is --dtype wide enough?"


@dataclass(slots=True, eq=False)
class _Sequence:
    """One request: its tokens as far as the host knows them, and the row of the tables that is its own for now."""

    source: TraceRequest
    condition: StopCondition
    prompt: list[int]
    made: list[int]
    table_row: int = -1
    blocks: int = 0  # in its row
    stopped: bool = False


class StepWork(NamedTuple):
    """The work of a step. It samples every decode, then the prefills that are complete with it."""

    decodes: Decodes
    prefills: list[Prefill]
    samplers: list[_Sequence]  # whom the tokens belong to, in order


class RunningBatch:
    """Follows the deltas of a run.

    A running request has a table row. In that row are its blocks, and on the device its newest token, so that the next
    step can be fed before the host has seen that token.

    Attributes:
        outputs: the tokens that each request made, in order; those past a stop token included.
        table_rows: the number of rows.
    """

    def __init__(
        self,
        requests: Sequence[TraceRequest],
        stop_tokens: Iterable[int] | None,
        vocab_size: int,
        config: ServingConfig,
    ) -> None:
        """`stop_tokens` None: requests stop at their trace's `output_len`, whatever the model says."""
        self.outputs: dict[int, list[int]] = {}
        self._sources: dict[int, tuple[TraceRequest, StopCondition]] = {}
        self._may_stop = False
        self._vocab_size = vocab_size
        self._block_size = config.block_size if config.prefix_caching else 0
        self._sequences: dict[int, _Sequence] = {}
        self._decoding: dict[int, _Sequence] = {}
        self._newcomers: dict[int, _Sequence] = {}  # joined, and have not decoded since
        self._order: Ints | None = None  # (decodes,) table rows of the decoding requests
        self.table_rows = config.max_seqs
        self._free_rows = list(range(config.max_seqs - 1, -1, -1))
        self._tables = np.zeros((config.max_seqs, table_width(config)), np.int32)
        self._contexts = np.zeros(config.max_seqs, np.int32)
        self._stop_tokens = frozenset(stop_tokens or ())
        for source in requests:
            self.add(source, StopCondition(output_len=source.output_len if stop_tokens is None else None))

    def add(self, source: TraceRequest, condition: StopCondition) -> None:
        """Learn of a request, before its first step."""
        self._sources[source.id] = source, condition
        told = condition.output_len is not None and condition.output_len < source.max_tokens
        self._may_stop = self._may_stop or told or bool(self._stop_tokens and not condition.ignore_eos)

    def forget(self, request_id: int) -> None:
        """The request has ended, and all its steps have completed: nobody will ask for its tokens any more."""
        self._sources.pop(request_id, None)
        self.outputs.pop(request_id, None)

    def apply(self, step: Step) -> StepWork:
        """Apply a step's delta; returns its work."""
        self._enter(step)
        prefills = [self._prefill(self._sequences[each], *chunk) for each, chunk in step.chunks.items()]
        samplers = [self._sequences[each] for each, chunk in step.chunks.items() if chunk.samples]
        decodes = self._decodes(step)
        if step.decodes:
            samplers = [*self._decoding.values(), *samplers]
        for request_id in step.finishing:
            self._leave(request_id)
        return StepWork(decodes, prefills, samplers)

    def note(self, work: StepWork, tokens: list[int]) -> Shown:
        """Note the tokens of a step, the oldest not yet noted; returns whom they end, and the blocks they fill.

        A token below 0 ends its request alone, as failed.
        """
        for sequence, token in zip(work.samplers, tokens, strict=True):
            sequence.made.append(token)
        looks = self._may_stop or min(tokens, default=0) < 0
        stops = [self._stop(each) for each in work.samplers if self._ends(each)] if looks else []
        filled = [self._fill(each) for each in work.samplers if self._fills(each)] if self._block_size else []
        return Shown(stops, filled)

    def _ends(self, sequence: _Sequence) -> bool:
        if sequence.stopped:
            return False  # the token after a stop may be a stop token as well
        if sequence.made[-1] < 0:
            return True
        if len(sequence.made) >= sequence.source.max_tokens:
            return False
        return sequence.condition.ends(sequence.made, self._stop_tokens)

    def _fills(self, sequence: _Sequence) -> bool:
        """Whether its newest token, not computed yet, is the last of a block that others may look for."""
        known = len(sequence.prompt) + len(sequence.made)
        return (
            known % self._block_size == 0 and not sequence.stopped and tells_blocks(sequence.source, self._block_size)
        )

    def _fill(self, sequence: _Sequence) -> Filled:
        start = len(sequence.prompt) + len(sequence.made) - self._block_size
        own = sequence.prompt[start:] + sequence.made[max(start - len(sequence.prompt), 0) :]
        return Filled(sequence.source.id, own)

    def _stop(self, sequence: _Sequence) -> Stop:
        sequence.stopped = True
        return Stop(sequence.source.id, len(sequence.made), NOT_NUMBERS if sequence.made[-1] < 0 else None)

    def _enter(self, step: Step) -> None:
        for request_id in step.dropped:
            self._leave(request_id)
        for request_id in (*step.preempted, *step.swapped_out):
            if sequence := self._sequences.get(request_id):  # None: admitted and preempted by one plan, it never ran
                self._release_row(sequence)
        for request_id in step.skipped:
            self._decoding.pop(request_id, None)
            self._newcomers.pop(request_id, None)
            self._order = None
        for request_id, copies in step.swapped_in.items():
            self._append_blocks(self._sequences[request_id], copies.target)
        for request_id, blocks in step.blocks.items():
            if request_id not in self._sequences:
                source, condition = self._sources[request_id]
                made = self.outputs[request_id] = []
                self._sequences[request_id] = _Sequence(source, condition, self._prompt(source), made)
            self._append_blocks(self._sequences[request_id], blocks)
        for request_id, context in step.joined.items():
            sequence = self._decoding[request_id] = self._newcomers[request_id] = self._sequences[request_id]
            self._contexts[sequence.table_row] = context
            self._order = None

    def _append_blocks(self, sequence: _Sequence, blocks: Sequence[int]) -> None:
        if sequence.table_row < 0:
            sequence.table_row = self._free_rows.pop()
        self._tables[sequence.table_row, sequence.blocks : sequence.blocks + len(blocks)] = blocks
        sequence.blocks += len(blocks)

    def _release_row(self, sequence: _Sequence) -> None:
        """Launched steps may still use the row, since the steps of its next owner come after them."""
        if self._decoding.pop(sequence.source.id, None):
            self._order = None
        self._newcomers.pop(sequence.source.id, None)
        if sequence.table_row >= 0:
            self._free_rows.append(sequence.table_row)
        sequence.table_row, sequence.blocks = -1, 0

    def _leave(self, request_id: int) -> None:
        if sequence := self._sequences.pop(request_id, None):
            self._release_row(sequence)

    def _prompt(self, source: TraceRequest) -> list[int]:
        """The trace's token ids; where it has none, ids drawn with its hash ids as seeds, then with its number."""
        if source.prompt_token_ids is not None:
            return list(source.prompt_token_ids)
        drawn = [self._draw((each, 1), source.hash_block_size) for each in source.hash_ids or ()]
        shared = [token for block in drawn for token in block][: source.prompt_len]
        return shared + self._draw(source.id, source.prompt_len - len(shared))

    def _draw(self, seed: int | tuple[int, ...], count: int) -> list[int]:
        drawn: list[int] = np.random.default_rng(seed).integers(self._vocab_size, size=count).tolist()
        return drawn

    def _prefill(self, sequence: _Sequence, start: int, tokens: int, samples: bool) -> Prefill:
        known = sequence.prompt if not sequence.made else sequence.prompt + sequence.made
        table = self._tables[sequence.table_row, : sequence.blocks]
        return Prefill(known[start : start + tokens], start, table, samples, sequence.table_row)

    def _decodes(self, step: Step) -> Decodes:
        """The newest token of each request is on the device, in its table row.

        The host knows those of requests that were swapped in, and tells them.

        A request need not decode in the step that it joins.
        """
        if not step.decodes:
            return Decodes.none()
        if self._order is None:
            self._order = np.fromiter(
                (each.table_row for each in self._decoding.values()), np.int32, len(self._decoding)
            )
        order = self._order
        contexts = self._contexts[order]
        self._contexts[order] += 1
        widest = max(each.blocks for each in self._decoding.values())
        token_ids = -1 - order
        if self._newcomers:
            places = {request_id: place for place, request_id in enumerate(self._decoding)}
            for request_id, sequence in self._newcomers.items():
                place = places[request_id]
                if len(sequence.prompt) + len(sequence.made) == contexts[place] + 1:
                    token_ids[place] = (sequence.made or sequence.prompt)[-1]
            self._newcomers.clear()
        return Decodes(token_ids, contexts, self._tables[order, :widest], order)


def table_width(config: ServingConfig) -> int:
    """Blocks of the longest request."""
    return -(-config.max_model_len // config.block_size)
