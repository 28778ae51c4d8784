"""swiftLLM's scheduler, a baseline: strict first come first served, prefill or decode batches, preemption by swap."""

from __future__ import annotations

from itertools import takewhile

from engine.request import Request
from engine.scheduler.base import Scheduler


class SwiftLlm(Scheduler):
    """New requests are prefilled before anything else, but for swapped ones, before which nobody new is served.

    When blocks run out, the request admitted last is swapped out; swapped ones return, oldest first, in the first
    decode step that swaps nobody out. Where swiftLLM would write past its swap space, a request is recomputed here.
    """

    def plan(self, now: int) -> None:
        """A batch of prefills if there can be one; else a batch of decodes, with swaps."""
        if not self.cpu_pool.used:
            for request in self.queue():
                self.prefill(request)
        if self.budget == self.config.max_batched_tokens:
            self.decode()
            for request in self._swapped():
                if not self.prefill(request):
                    break

    def _swapped(self) -> list[Request]:
        preempted = takewhile(lambda request: request.preemptions > 0, self.waiting.values())
        return [request for request in preempted if request.cpu_blocks]
