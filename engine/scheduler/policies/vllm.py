"""vLLM's V1 scheduler as of 0.24, decision for decision: chunked prefills first come first served, or by priority.

With one step in flight it decides as `Scheduler`, with two as `AsyncScheduler`, which is vLLM's default. What was
compared, and in what the other policies differ: docs/others.md.
"""

from __future__ import annotations

from dataclasses import replace

from engine.config import COMPLETED, VLLM, ServingConfig
from engine.request import Request
from engine.scheduler.base import Scheduler
from engine.scheduler.policies.chunked_prefill import ChunkedPrefill
from engine.scheduler.policies.priority import StrictPriority


def as_vllm(config: ServingConfig) -> ServingConfig:
    """The run's limits under vLLM's rules of giving blocks back, and of sharing them."""
    return replace(config, release=COMPLETED, prefix_rules=VLLM)


class Vllm(ChunkedPrefill):
    """`chunked_prefill` that keeps a request's row and blocks until its last token is known, and caches outputs."""

    def __init__(self, config: ServingConfig) -> None:
        super().__init__(as_vllm(config))

    def victim(self) -> Request:
        """The request admitted last, be it one whose last token is under way."""
        return max((super().victim(), *self.held.values()), key=lambda request: request.admission)


class VllmPriority(StrictPriority):
    """`--scheduling-policy priority`: started prefills first, then waiting requests; nobody is preempted for these.

    Args:
        config: the run's limits.
        ends_step: whether a request that has to preempt itself ends the step for those admitted after it, as in vLLM.
    """

    preemptive = False

    def __init__(self, config: ServingConfig, *, ends_step: bool = True) -> None:
        super().__init__(as_vllm(config))
        self.ends_step = ends_step
        self._step_ended = False

    def plan(self, now: int) -> None:
        """Decodes first; then continue incomplete prefills, then admit by priority."""
        self._step_ended = False
        self.decode()
        if self._step_ended:
            self.wake_at(now + 1)  # lest nothing runs at all, and nobody asks again
            return
        for request in Scheduler.queue(self):
            if not self.prefill(request):
                break

    def victim(self) -> Request:
        """The request with the largest key, be it one whose last token is under way."""
        return max((*self.running.values(), *self.held.values()), key=self.key)

    def _extend(self, due: dict[int, Request]) -> None:
        """In the order of admission, in which vLLM goes through its batch."""
        for request in sorted(due.values(), key=lambda each: each.admission):
            if request.id not in self.decoding:
                continue
            if self._give(request, 1):
                self.decoding.wake(request.id, self.config.block_size)
            elif self.ends_step:
                return self._end_step(request)

    def _end_step(self, last: Request) -> None:
        self._step_ended = True
        for request in list(self.running.values()):
            if request.admission > last.admission and request.id in self.decoding:
                self.skip(request)
