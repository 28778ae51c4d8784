"""SARATHI's scheduling (Sarathi-Serve, OSDI '24, algorithm 3): decodes never stall, prefill chunks take the rest."""

from __future__ import annotations

from dataclasses import replace

from engine.config import ServingConfig
from engine.scheduler.base import Scheduler
from traces.errors import TandemError


class ChunkedPrefill(Scheduler):
    """Every iteration runs all decodes and fills up to a token budget with prefill chunks.

    The budget bounds how long a step takes, and so the time between tokens; a small one makes prefills slow, and so the
    time to the first.

    Args:
        config: the run's limits.
        budget: tokens of a step; 0 is `max_batched_tokens`.

    Raises:
        TandemError: `budget` is below `max_seqs`, or above `max_batched_tokens`.
    """

    chunked = True

    def __init__(self, config: ServingConfig, *, budget: int = 0) -> None:
        if not 0 <= budget <= config.max_batched_tokens:
            raise TandemError(f"budget is {budget}: give 1 to max_batched_tokens ({config.max_batched_tokens}), or 0")
        super().__init__(replace(config, max_batched_tokens=budget or config.max_batched_tokens))

    def plan(self, now: int) -> None:
        """Decodes first; then continue incomplete prefills, then admit in order of arrival."""
        self.decode()
        for request in self.queue():
            if not self.prefill(request):
                break
