"""Waits for a batch to come together, up to a time limit. An example of a policy that asks for a time."""

from __future__ import annotations

from engine.config import ServingConfig
from engine.scheduler.base import Scheduler


class Gather(Scheduler):
    """Admits requests by `size`, or once the oldest has waited for `patience_ms`."""

    def __init__(self, config: ServingConfig, *, size: int = 4, patience_ms: int = 50) -> None:
        super().__init__(config)
        self.size = size
        self.patience_ns = patience_ms * 1_000_000

    def plan(self, now: int) -> None:
        """Decode first. Admit the waiting requests once they are many enough or old enough."""
        self.decode()
        if not self.waiting:
            return
        due_ns = next(iter(self.waiting.values())).arrival_ns + self.patience_ns
        if len(self.waiting) < self.size and now < due_ns:
            self.wake_at(due_ns)
            return
        for request in self.queue():
            if not self.prefill(request):
                break
