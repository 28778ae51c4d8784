"""A heap whose keys may change while it is not looked at: what a policy needs to find the next of many requests."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heapify, heappop, heappush, heapreplace
from itertools import count
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
_FEW = 64


class LazyHeap(Generic[Item]):
    """Items by key, smallest first. Only those that come to the top are asked for their key again.

    A key may grow unannounced; an item whose key has shrunk must be pushed again. Items that `belongs` no longer knows
    are dropped when they come to the top, or are many: leaving costs nothing.
    """

    def __init__(self, key: Callable[[Item], Any], belongs: Callable[[Item], bool]) -> None:
        self._key = key
        self._belongs = belongs
        self._entries: list[tuple[Any, int, Item]] = []
        self._pushes = count()  # among equal keys, first pushed is first
        self._roomy = _FEW  # entries at which those that no longer belong are looked for

    def push(self, item: Item) -> None:
        """Add an item, or make known that its key has shrunk."""
        if len(self._entries) >= self._roomy:
            self._clean()
        heappush(self._entries, (self._key(item), next(self._pushes), item))

    def first(self) -> Item | None:
        """The item with the smallest key, which stays; None if there is none."""
        while self._entries:
            known, pushed, item = self._entries[0]
            if not self._belongs(item):
                heappop(self._entries)
            elif known != (key := self._key(item)):
                heapreplace(self._entries, (key, pushed, item))
            else:
                return item
        return None

    def _clean(self) -> None:
        members = {item: pushed for _, pushed, item in self._entries if self._belongs(item)}
        self._entries = [(self._key(item), pushed, item) for item, pushed in members.items()]
        heapify(self._entries)
        self._roomy = max(_FEW, 2 * len(self._entries))
