"""Orca's scheduling (OSDI '22): iteration-level, first come first served, whole prefills join the decodes."""

from __future__ import annotations

from engine.scheduler.base import Scheduler


class Fcfs(Scheduler):
    """Every iteration runs all decodes and, beside them, as many whole waiting prefills as fit."""

    def plan(self, now: int) -> None:
        """Decodes first, so that they hold their share of the budget; then admit in order of arrival."""
        self.decode()
        for request in self.queue():
            if not self.prefill(request):
                break
