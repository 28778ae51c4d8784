"""Shortest job first by predicted length, which learning to rank approximates (Fu et al., NeurIPS '24)."""

from __future__ import annotations

from engine.request import Request
from engine.scheduler.keyed import Key, KeyedScheduler


class ShortestJobFirst(KeyedScheduler):
    """Admits the request with the fewest output tokens to come; whoever runs, runs on.

    What is expected is `predicted_length`, or `max_tokens` where the trace predicts nothing.
    """

    def key(self, request: Request) -> Key:
        """The expected output, in tokens; ties in order of arrival."""
        return request.predicted_length or request.max_tokens, request.id
