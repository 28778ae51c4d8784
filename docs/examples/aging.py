"""Shortest job first without starvation. The expected length of a request delays its place in the queue."""

from __future__ import annotations

from engine.config import ServingConfig
from engine.request import Request
from engine.scheduler.keyed import Key, KeyedScheduler


class ShortestWithAging(KeyedScheduler):
    """Serves in order of arrival. Every expected output token delays the arrival by `ms_per_token`."""

    def __init__(self, config: ServingConfig, *, ms_per_token: int = 5) -> None:
        super().__init__(config)
        self.ns_per_token = ms_per_token * 1_000_000

    def key(self, request: Request) -> Key:
        """Delayed arrival, in ns. The smallest is first. Ties go by id, the order of arrival."""
        expected = request.predicted_length or request.max_tokens
        return request.arrival_ns + expected * self.ns_per_token, request.id
