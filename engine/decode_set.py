"""The requests that make one token in every decode step, kept so that a steady step costs O(1).

Both sides of the seam hold one: the scheduler to know who needs a block or is done, the simulator to know
how many KV tokens a step reads. Members are not touched as they advance; a member's context is its context
at joining plus the ticks since, and alarms bring up the few members that need attention.
"""

from __future__ import annotations

from collections import defaultdict


class DecodeSet:
    """An ordered set of request ids with contexts that all grow by one token a tick."""

    __slots__ = ("_alarms", "_base", "_squares", "_sum", "_tick")

    def __init__(self) -> None:
        self._tick = 0
        self._base: dict[int, int] = {}  # request id -> context minus the tick at which it joined
        self._alarms: defaultdict[int, list[int]] = defaultdict(list)
        self._sum = self._squares = 0  # of the bases, and of their squares

    @property
    def ticks(self) -> int:
        """How often its members have advanced."""
        return self._tick

    @property
    def kv_tokens(self) -> int:
        """The sum of the members' contexts, in tokens."""
        return self._sum + len(self._base) * self._tick

    @property
    def kv_squares(self) -> int:
        """The sum of the squares of the members' contexts."""
        return self._squares + self._tick * (2 * self._sum + len(self._base) * self._tick)

    def __len__(self) -> int:
        return len(self._base)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._base

    def context(self, request_id: int) -> int:
        """Tokens of the member whose keys and values are in the cache. Raises KeyError for a non-member."""
        return self._base[request_id] + self._tick

    def add(self, request_id: int, context: int) -> None:
        """Let a request with `context` cached tokens join."""
        base = self._base[request_id] = context - self._tick
        self._sum += base
        self._squares += base * base

    def discard(self, request_id: int) -> None:
        """Let a request leave, if it is a member. Should it join again, its old alarms may still ring."""
        base = self._base.pop(request_id, None)
        if base is not None:
            self._sum -= base
            self._squares -= base * base

    def wake(self, request_id: int, ticks: int) -> None:
        """Ask for `request_id` to be among those that ring in `ticks` ticks (at least 1)."""
        self._alarms[self._tick + ticks].append(request_id)

    def advance(self) -> dict[int, int]:
        """Every member makes one token. Returns the contexts of those whose alarm rings."""
        tick = self._tick = self._tick + 1
        if not (ringing := self._alarms.pop(tick, None)):
            return {}
        base = self._base
        return {each: base[each] + tick for each in ringing if each in base}
