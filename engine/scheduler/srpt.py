"""Shortest remaining processing time (Schrage, 1968) by predicted length, as in TRAIL (ICLR '25): SJF that preempts."""

from __future__ import annotations

from engine.config import ServingConfig
from engine.request import Request
from engine.scheduler.keyed import Key, KeyedScheduler
from traces.errors import TandemError


class ShortestRemainingFirst(KeyedScheduler):
    """Whoever has the fewest expected output tokens left runs; preempts who has more left, if seats or blocks lack.

    Args:
        config: the run's limits.
        spare: requests that have made this share of what is expected are not preempted for others (TRAIL's limit on
            preemption: near their end they hold most memory, and free it soonest). 1 is SRPT.

    Raises:
        TandemError: `spare` is not from 0 to 1.
    """

    preemptive = True

    def __init__(self, config: ServingConfig, *, spare: float = 1.0) -> None:
        super().__init__(config)
        if not 0 <= spare <= 1:
            raise TandemError(f"spare is {spare}: give a share of a request's output, from 0 to 1")
        self.spare = spare

    def key(self, request: Request) -> Key:
        """Expected output tokens left (fewer than none, if more came than expected); ties in order of arrival."""
        expected = request.predicted_length or request.max_tokens
        spared = request.id in self.running and request.generated >= self.spare * expected
        return 0 if spared else 1, expected - request.generated, request.id
