"""Earliest deadline first (Liu and Layland, 1973), on the SLOs that each request brings along."""

from __future__ import annotations

from engine.request import Request
from engine.scheduler.keyed import Key, KeyedScheduler

NEVER = 2**63


class EarliestDeadlineFirst(KeyedScheduler):
    """Whoever is due next runs; preempts who is due later, if rows or blocks lack.

    A request is due when its next promise is: its first token, then its last. One without a promise left can wait.
    Where not all deadlines can be met, EDF is known to serve requests whose time is past first, and to miss many; and
    recomputing whom it preempts takes time away from all, so give it `--cpu-blocks`.
    """

    preemptive = True

    def key(self, request: Request) -> Key:
        """When it is due, in nanoseconds; ties in order of arrival."""
        due_ns = request.deadline_ns
        return NEVER if due_ns is None else due_ns, request.id

    def on_decode(self, request: Request) -> None:
        """Its first token is made, so that its next may be due later."""
        self.rekey(request)
