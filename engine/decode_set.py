"""The requests that make one token in every decode step, kept so that a steady step costs O(1).

Both sides of the seam hold one: the scheduler to know who needs a block or is done, the simulator to know
how many KV tokens a step reads. Members are not touched as they advance; a member's context is its context
at joining plus the ticks since, and alarms bring up the few members that need attention.
"""

from __future__ import annotations

from collections import defaultdict


class DecodeSet:
    """An ordered set of request ids with contexts that all grow by one token a tick.

    Attributes:
        ticks: how often its members have advanced.
        kv_tokens: the sum of the members' contexts, in tokens.
        kv_squares: the sum of the squares of the members' contexts.
    """

    __slots__ = ("_alarms", "_base", "kv_squares", "kv_tokens", "ticks")

    def __init__(self) -> None:
        self.ticks = self.kv_tokens = self.kv_squares = 0
        self._base: dict[int, int] = {}  # request id -> context minus the tick at which it joined
        self._alarms: defaultdict[int, list[int]] = defaultdict(list)

    def __len__(self) -> int:
        return len(self._base)

    def __contains__(self, request_id: object) -> bool:
        return request_id in self._base

    def context(self, request_id: int) -> int:
        """Tokens of the member whose keys and values are in the cache. Raises KeyError for a non-member."""
        return self._base[request_id] + self.ticks

    def add(self, request_id: int, context: int) -> None:
        """Let a request with `context` cached tokens join."""
        self._base[request_id] = context - self.ticks
        self.kv_tokens += context
        self.kv_squares += context * context

    def discard(self, request_id: int) -> None:
        """Let a request leave, if it is a member. Should it join again, its old alarms may still ring."""
        base = self._base.pop(request_id, None)
        if base is not None:
            context = base + self.ticks
            self.kv_tokens -= context
            self.kv_squares -= context * context

    def wake(self, request_id: int, ticks: int) -> None:
        """Ask for `request_id` to be among those that ring in `ticks` ticks (at least 1)."""
        self._alarms[self.ticks + ticks].append(request_id)

    def advance(self) -> dict[int, int]:
        """Every member makes one token. Returns the contexts of those whose alarm rings."""
        base, now = self._base, self.ticks + 1
        self.kv_squares += 2 * self.kv_tokens + len(base)
        self.kv_tokens += len(base)
        self.ticks = now
        if not (ringing := self._alarms.pop(now, None)):
            return {}
        return {each: base[each] + now for each in ringing if each in base}
