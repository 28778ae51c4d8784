"""Runs Steps on a LLaMA model: keeps the running batch that the deltas describe, and turns it into forward passes.

The data plane's half of the seam. It alone holds token values; the scheduler never sees one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from engine.backend import Stop
from engine.executor.batch import ForwardBatch, KVCache
from engine.executor.model import Llama, Mark
from engine.step import Step
from traces.request import TraceRequest


class Rows(NamedTuple):
    """What one request contributes to a batch: its tokens from `start` on, and the blocks that hold its cache."""

    token_ids: Sequence[int]
    start: int
    blocks: Sequence[int]
    samples: bool


@dataclass(slots=True)
class _Sequence:
    """One request's tokens and blocks."""

    source: TraceRequest
    tokens: list[int]
    blocks: list[int] = field(default_factory=list)


class Runner:
    """Implements `engine.executor.backend.DataPlane`.

    Attributes:
        outputs: the tokens that each request made, in order; those past a stop token included.
    """

    def __init__(
        self,
        model: Llama,
        cache: KVCache,
        requests: Sequence[TraceRequest],
        stop_tokens: Sequence[int] | None,
        threads: int,
    ) -> None:
        """`stop_tokens` None: requests stop at their trace's `output_len`, whatever the model says."""
        self.outputs: dict[int, list[int]] = {}
        self._model = model
        self._cache = cache
        self._sources = {source.id: source for source in requests}
        self._stop_tokens = None if stop_tokens is None else frozenset(stop_tokens)
        self._threads = threads
        self._sequences: dict[int, _Sequence] = {}
        self._decoding: dict[int, _Sequence] = {}

    def prepare_thread(self) -> None:
        """Torch counts threads per calling thread."""
        torch.set_num_threads(self._threads)

    def run(self, step: Step, mark: Mark | None = None) -> list[Stop]:
        """Apply the delta and run one forward pass."""
        self._enter(step)
        chunks = [(self._sequences[each], chunk) for each, chunk in step.chunks.items()]
        decodes = list(self._decoding.values()) if step.decodes else []
        rows = [
            Rows(one.tokens[chunk.start : chunk.start + chunk.tokens], chunk.start, one.blocks, chunk.samples)
            for one, chunk in chunks
        ]
        rows += [Rows(one.tokens[-1:], len(one.tokens) - 1, one.blocks, True) for one in decodes]
        batch = build_batch(rows, step.decodes, self._cache.block_size)
        tokens = self._model.forward(batch, self._cache, mark).tolist()
        sampled = [one for one, chunk in chunks if chunk.samples] + decodes
        stops = [stop for one, token in zip(sampled, tokens, strict=True) if (stop := self._append(one, token))]
        self._leave(step)
        return stops

    def _enter(self, step: Step) -> None:
        for request_id in step.dropped:
            self._forget(request_id)
        for request_id in step.preempted:
            self._decoding.pop(request_id, None)
            self._sequences[request_id].blocks = []
        for request_id, blocks in step.blocks.items():
            if request_id not in self._sequences:
                source = self._sources[request_id]
                self._sequences[request_id] = _Sequence(source, self._prompt(source))
            self._sequences[request_id].blocks += blocks
        for request_id in step.joined:
            self._decoding[request_id] = self._sequences[request_id]

    def _leave(self, step: Step) -> None:
        for request_id in step.finishing:
            self._forget(request_id)

    def _forget(self, request_id: int) -> None:
        self._decoding.pop(request_id, None)
        if sequence := self._sequences.pop(request_id, None):
            self.outputs[request_id] = sequence.tokens[sequence.source.prompt_len :]

    def _prompt(self, source: TraceRequest) -> list[int]:
        """The trace's token ids; where it has only lengths, ids drawn with the request's number as seed."""
        if source.prompt_token_ids is not None:
            return list(source.prompt_token_ids)
        generator = torch.Generator().manual_seed(source.id)
        vocab = self._model.config.vocab_size
        return list(torch.randint(vocab, (source.prompt_len,), generator=generator).tolist())

    def _append(self, sequence: _Sequence, token: int) -> Stop | None:
        sequence.tokens.append(token)
        source, made = sequence.source, len(sequence.tokens) - sequence.source.prompt_len
        ends = made == source.output_len if self._stop_tokens is None else token in self._stop_tokens
        return Stop(source.id, made) if ends and made < source.max_tokens else None


def build_batch(rows: Sequence[Rows], num_decodes: int, block_size: int) -> ForwardBatch:
    """Flatten requests, prefills first, into the tensors of one forward pass."""
    lengths = [len(row.token_ids) for row in rows]
    query_start = [0]
    for length in lengths:
        query_start.append(query_start[-1] + length)
    widest = max(len(row.blocks) for row in rows)
    tables = torch.tensor([[*row.blocks, *[0] * (widest - len(row.blocks))] for row in rows], dtype=torch.int32)
    starts = torch.tensor([row.start for row in rows])
    owner = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(lengths))
    positions = torch.arange(query_start[-1]) - torch.tensor(query_start)[owner] + starts[owner]
    blocks = tables[owner, positions // block_size].long()
    return ForwardBatch(
        token_ids=torch.tensor([token for row in rows for token in row.token_ids]),
        positions=positions,
        slots=blocks * block_size + positions % block_size,
        query_start=query_start,
        context_lens=[row.start + length for row, length in zip(rows, lengths, strict=True)],
        block_tables=tables,
        sample_rows=torch.tensor(
            [query_start[i + 1] - 1 for i, row in enumerate(rows) if row.samples], dtype=torch.int64
        ),
        num_decodes=num_decodes,
    )
