"""Sarathi-Serve's scheduler as its published code has it: `chunked_prefill` with other rules of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engine.config import WHOLE, ServingConfig
from engine.request import Request
from engine.scheduler.policies.chunked_prefill import ChunkedPrefill

WATERMARK = 0.01
"""Of all blocks, what an admission must leave free."""


class Sarathi(ChunkedPrefill):
    """A prompt gets all its blocks as it is admitted; a decode runs only while some block is free, needed or not.

    Where none is free, the request that came last is preempted. In what it differs from its model: docs/others.md.

    Args:
        config: the run's limits.
        budget: tokens of a step (`chunk_size`); 0 is `max_batched_tokens`.

    Raises:
        TandemError: `budget` is below `max_seqs`, or above `max_batched_tokens`.
    """

    def __init__(self, config: ServingConfig, *, budget: int = 0) -> None:
        super().__init__(replace(config, admit=WHOLE), budget=budget)
        self._watermark = int(WATERMARK * config.num_blocks)

    def plan(self, now: int) -> None:
        """Decodes first; then continue incomplete prefills, then admit in order of arrival."""
        super().plan(now)
        if self._preempted_now:
            self.wake_at(now + 1)  # the last one running may have preempted itself, and nobody asks again

    def swaps(self, request: Request) -> bool:
        """Not the only one that runs: it would come back to as full a pool, while a prefill makes its next token."""
        return len(self.running) > 1

    def decode(self) -> bool:
        """Run one token for every decoding request, in order of arrival, each while there is a free block."""
        if self.pool.free <= len(self._out_of_block):  # somebody will find none
            due, self._out_of_block = self._out_of_block, {}
            for request in list(self.running.values()):
                if request.id in self.decoding and self._finds_block(request) and request.id in due:
                    self._extend({request.id: request})
        return super().decode()

    def _finds_block(self, request: Request) -> bool:
        """Preempt whoever came last until a block is free; False if that was the request itself."""
        while not self.pool.free:
            victim = self.victim()
            self.preempt(victim)
            if victim is request:
                return False
        return True

    def _misfit(self, request: Request) -> str | None:
        most, blocks = self.config.num_blocks - self._watermark, self.pool.blocks_for(request.last_context)
        if blocks > most:
            return f"needs {blocks} KV blocks, {most} can be had at once: 1 % of {self.config.num_blocks} are kept free"
        return super()._misfit(request)

    def _has_room(self, request: Request, tokens: int, owned: int = 0) -> bool:
        return super()._has_room(request, tokens + self._watermark * self.config.block_size, owned)

    def _admit(self, request: Request, hits: Sequence[int], tokens: int) -> bool:
        return super()._admit(request, hits, tokens) and self._grow(request, request.to_prefill)
