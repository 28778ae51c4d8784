"""Strict priorities given by the trace, preemptive."""

from __future__ import annotations

from engine.request import Request
from engine.scheduler.keyed import Key, KeyedScheduler


class StrictPriority(KeyedScheduler):
    """A request runs before all of a larger `priority`; those of one priority in order of arrival."""

    preemptive = True

    def key(self, request: Request) -> Key:
        """`priority`, smaller is more urgent; then order of arrival."""
        return request.priority, request.id
