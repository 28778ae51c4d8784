"""Shortest remaining processing time (Schrage, 1968) by predicted length, as in TRAIL (ICLR '25): SJF that preempts."""

from __future__ import annotations

from engine.request import Request
from engine.scheduler.keyed import Key, KeyedScheduler


class ShortestRemainingFirst(KeyedScheduler):
    """Whoever has the fewest expected output tokens left runs; preempts who has more left, if rows or blocks lack."""

    preemptive = True

    def key(self, request: Request) -> Key:
        """Expected output tokens left (fewer than none, if more came than expected); ties in order of arrival."""
        return (request.predicted_length or request.max_tokens) - request.generated, request.id
