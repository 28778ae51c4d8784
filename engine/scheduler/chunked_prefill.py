"""SARATHI's scheduling (Sarathi-Serve, OSDI '24): decodes never stall, prefill chunks take the rest of the budget."""

from __future__ import annotations

from engine.scheduler.base import Scheduler


class ChunkedPrefill(Scheduler):
    """Every iteration runs all decodes and fills up to `max_batched_tokens` with prefill chunks."""

    chunked = True

    def plan(self, now: int) -> None:
        """Decodes first; then continue incomplete prefills, then admit in order of arrival."""
        self.decode()
        for request in self.queue():
            if not self.prefill(request):
                break
