"""Shortest job first without starvation: the longer a request will be, the later it counts as having come."""

from __future__ import annotations

from engine.config import ServingConfig
from engine.request import Request
from engine.scheduler.keyed import Key, KeyedScheduler


class ShortestWithAging(KeyedScheduler):
    """Serves by order of arrival, as if every expected output token had delayed it by `ms_per_token`."""

    def __init__(self, config: ServingConfig, *, ms_per_token: int = 5) -> None:
        super().__init__(config)
        self.ns_per_token = ms_per_token * 1_000_000

    def key(self, request: Request) -> Key:
        """Smallest first; ties by id, which is the order of arrival."""
        expected = request.predicted_length or request.max_tokens
        return request.arrival_ns + expected * self.ns_per_token, request.id
