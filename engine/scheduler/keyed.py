"""What policies have in common that serve by a key, smallest first, rather than in order of arrival."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from engine.config import WHOLE, ServingConfig
from engine.request import Request
from engine.scheduler.base import Scheduler
from engine.scheduler.lazy_heap import LazyHeap

Key = tuple[int, ...]


class KeyedScheduler(Scheduler):
    """Decodes never stall; prefills run, and waiting requests are admitted, in order of `key`.

    The request with the smallest key is never preempted, so that somebody always progresses.

    Attributes:
        preemptive: whether a waiting request takes the place of running ones with larger keys.
    """

    chunked = True
    preemptive: ClassVar[bool] = False

    def __init__(self, config: ServingConfig) -> None:
        super().__init__(config)
        self._next = LazyHeap(self.key, lambda request: request.id in self.waiting)
        self._last = LazyHeap(self._reversed, lambda request: request.id in self.running)

    @abstractmethod
    def key(self, request: Request) -> Key:
        """What requests are ordered by; no two may have the same. It may change as a running request progresses; if it
        grows then, call `rekey`, and if it shrinks while the request waits."""

    def plan(self, now: int) -> None:
        """Decodes first; then the most urgent prefills."""
        self.decode()
        for request in self.queue():
            self.prefill(request)

    def queue(self) -> Iterator[Request]:
        """Incomplete prefills and waiting requests in order of `key`; none waiting behind one that is not admitted."""
        started = sorted(self.prefilling.values(), key=self.key, reverse=True)
        while (head := self.head()) is not None:
            while started and self.key(started[-1]) < self.key(head):
                yield started.pop()
            if self.preemptive:
                self._make_room(head)
            yield head
            if head.id in self.waiting:
                break
        yield from reversed(started)

    def head(self) -> Request | None:
        """The waiting request with the smallest key."""
        return self._next.first()

    def victim(self) -> Request:
        """The running request with the largest key."""
        victim = self._last.first()
        assert victim is not None, "there is no victim among no running requests"
        return victim

    def rekey(self, request: Request) -> None:
        """A request's key has changed in the direction that is not noticed by itself: see `key`."""
        (self._last if request.id in self.running else self._next).push(request)

    def arrive(self, request: Request) -> None:
        """Queue a request, or reject it."""
        super().arrive(request)
        self._next.push(request)

    def preempt(self, request: Request) -> None:
        """Take a running request's blocks; it waits by its key."""
        super().preempt(request)
        self._next.push(request)

    def on_admit(self, request: Request) -> None:
        """From now on it may be a victim."""
        self._last.push(request)

    def _make_room(self, head: Request) -> None:
        """Preempt running requests with larger keys, largest first, until the head fits; not for want of budget, of
        which a victim would give back a token."""
        if not self.chunked and not head.cpu_blocks and head.to_prefill > self.budget:
            return
        while self.running and self._is_admissible(head) and not self._fits(head):
            victim = self.victim()
            if self.key(victim) < self.key(head):
                break
            self.preempt(victim)

    def _fits(self, head: Request) -> bool:
        if head.cpu_blocks:
            return self._has_room(head, head.computed + 1)
        if self.config.admit == WHOLE:
            return self._can_admit(head, self._hits(head), head.to_prefill)
        # Should the decodes take the whole budget, a victim's token is the head's.
        return self._has_room(head, min(head.to_prefill, max(self.budget, 1)) if self.chunked else head.to_prefill)

    def _reversed(self, request: Request) -> Key:
        return tuple(-part for part in self.key(request))
