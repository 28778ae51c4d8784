"""swiftLLM's and early vLLM's scheduling: a step is either a prefill batch or a decode batch, prefills first."""

from __future__ import annotations

from engine.scheduler.base import Scheduler


class PrefillFirst(Scheduler):
    """Strict first come first served; decodes wait while any prefill can be admitted."""

    def plan(self, now: int) -> None:
        """Batch what can be admitted; if nothing can, decode."""
        for request in self.queue():
            self.prefill(request)
        if self.budget == self.config.max_batched_tokens:
            self.decode()
