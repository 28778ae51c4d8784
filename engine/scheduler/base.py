"""The base class of all policies: three verbs, and what a policy may decide. `accounting` is what lies below.

A scheduler is a deterministic function of its state, the events it was given and `now`. It may not know
which backend runs its steps, nor where a request will stop: only `max_tokens`, and `predicted_length` where
the workload has one. A policy is a subclass with a `plan`, written with three verbs:

- `self.prefill(request)` runs (a chunk of) a request's prefill in this step, admitting it if need be;
- `self.decode()` runs one token for every decoding request;
- `self.preempt(request)` takes a running request's blocks away; it will be swapped back in, or recomputed.

Two more are seldom needed: `self.skip(request)` lets a decoding request make no token in this step, and
`self.wake_at(ns)` has the next step planned at that time, should nothing happen before.

A policy that serves in another order than that of arrival says who is next (`head`, or `KeyedScheduler`); one that
keeps accounts of its own is told when a request gets blocks, starts to decode, and gives its blocks up (`on_admit`,
`on_decode`, `on_leave`). Its parameters are keyword arguments of its `__init__`, with defaults:
`--scheduler NAME:KEY=VALUE`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from engine.planner import PolicyError
from engine.request import Request
from engine.scheduler.accounting import Accounting
from engine.step import Chunk

PATIENCE = 1000
"""Preemptions for each of `max_seqs` that may pass without a token. A run without an end has no end of them: without
preemptions, requests that are admitted get prefilled, and make one."""


class Scheduler(Accounting):
    """Base class of all policies. A policy writes `plan`, with the verbs below.

    Attributes:
        chunked: whether `prefill` may split a prefill over several steps.
        config: the run's limits.
        kv: the KV blocks of all requests.
        waiting: requests without blocks on the GPU, in the order in which `queue` offers them.
        running: requests that hold blocks, oldest admission first.
        prefilling: the running requests whose prefill is not complete, oldest first.
        decoding: the running requests whose prefill is complete, as a set that advances as one.
        held: requests whose last token is planned, and which keep their blocks until it is known (`release`).
        wake_ns: when the next step is to be planned at the latest, if the last `plan` asked for a time.
    """

    def victim(self) -> Request:
        """Who loses its blocks when there are too few: the request admitted last, so the oldest always progresses."""
        return next(reversed(self.running.values()))

    def swaps(self, request: Request) -> bool:
        """Whether a victim goes to host memory, there being room, rather than be recomputed."""
        return True

    def head(self) -> Request | None:
        """Who of `waiting` is to be admitted next: the first, unless a policy has another order."""
        return next(iter(self.waiting.values()), None)

    def queue(self) -> Iterable[Request]:
        """Candidates for prefill: incomplete prefills, then the `head` for as long as the head is admitted."""
        return self._candidates() if self.waiting or self.prefilling else ()

    def _candidates(self) -> Iterator[Request]:
        yield from tuple(self.prefilling.values())
        while (head := self.head()) is not None:
            yield head
            if head.id in self.waiting:
                return

    @property
    def budget(self) -> int:
        """Tokens that this step can still take."""
        decodes = len(self.decoding) if self._decode_planned else 0
        return self.config.max_batched_tokens - decodes - self._step.prefill_tokens

    def cached_tokens(self, request: Request) -> int:
        """Prompt tokens of a waiting request that are in the prefix cache: its prefill would begin after them."""
        return len(self._hits(request)) * self.config.block_size

    def prefill(self, request: Request) -> bool:
        """Run the request's prefill in this step: all that is left of it or, if `chunked`, what the budget takes.

        A request that is already running may preempt others for its blocks; a waiting one is admitted only into
        free blocks, not in a step in which blocks ran out, nor in the step that preempted it. One that was swapped out
        needs no prefill: it is swapped in beside what this step computes, and decodes from the next on.

        Returns:
            False if it does not fit, in which case the step is unchanged (but for preemptions).

        Raises:
            PolicyError: the request has ended, or decodes.
        """
        if request.outcome is not None:
            raise PolicyError(f"schedules request {request.id}, which has ended ({request.outcome})")
        if request.id in self.decoding:
            raise PolicyError(f"prefills request {request.id}, whose prefill is complete: decode() runs it")
        if request.cpu_blocks:
            return self._swap_in(request)
        hits = self._hits(request)
        left, budget = request.to_prefill - len(hits) * self.config.block_size, self.budget
        tokens = min(left, budget) if self.chunked else left
        if not 0 < tokens <= budget or request.id in self._step.chunks:
            return False
        if request.id not in self.prefilling and not self._admit(request, hits, tokens):
            return False
        if not self._grow(request, tokens):
            return False
        self._step.chunks[request.id] = Chunk(request.computed, tokens, tokens == request.to_prefill)
        request.prefilled(tokens)
        if self.kv.shares_at_once:
            self.kv.publish(request, request.computed)
        if not request.to_prefill:
            del self.prefilling[request.id]
        return True

    def decode(self) -> bool:
        """Run one token for every decoding request, preempting by `victim` where blocks have run out.

        Returns:
            False, changing nothing, if the prefill already in this step leaves too little budget.
        """
        # Without chunks there is room: `max_batched_tokens` is at least `max_seqs`.
        if self._step.chunks and not self._decode_planned and len(self.decoding) > self.budget:
            return False
        self._decode_planned = True
        if self._out_of_block:
            due, self._out_of_block = self._out_of_block, {}
            self._extend(due)
        if self.kv.shares_at_once:
            self.kv.publish_filled(self.decoding)
        return True

    def skip(self, request: Request) -> None:
        """Let a decoding request make no token in this step. It keeps its blocks, and decodes on from the next.

        `on_decode` is called again then.

        Raises:
            PolicyError: the request is not decoding.
        """
        if request.id not in self.decoding:
            raise PolicyError(f"skips request {request.id}, which is not decoding")
        if self._step.joined.pop(request.id, None) is None:
            self._step.skipped.append(request.id)
        self._out_of_block.pop(request.id, None)
        published = request.published
        self._withdraw(request)
        if request.published < published:
            self.kv.watch(request)
        request.stop_decoding()
        self._ready.append(request)

    def wake_at(self, ns: int) -> None:
        """Have `plan` called at that time on the run's clock, should nothing happen before: no arrival, no step's end.

        It is asked for anew in each `plan`; of several times the first counts. Like an arrival, it waits for the step
        in flight.
        """
        self.wake_ns = ns if self.wake_ns is None else min(self.wake_ns, ns)

    def preempt(self, request: Request) -> None:
        """Take a running request's blocks and put it at the head of `waiting`.

        Its cache is kept in host memory if it was decoding, there is room, and `swaps` says so; else it is lost.

        Raises:
            PolicyError: the request is not running.
        """
        if request.id not in self.running:
            state = f"has ended ({request.outcome})" if request.outcome else "is not running"
            raise PolicyError(f"preempts request {request.id}, which {state}")
        self._barren_preemptions += 1
        if self._barren_preemptions > PATIENCE * self.config.max_seqs:
            raise PolicyError(
                f"starves everyone: it has preempted {self._barren_preemptions} times since a request last made a token"
            )
        if request.id in self._step.swapped_in:
            self._undo_swap_in(request)
        elif request.id in self.decoding and self.kv.can_swap_out(request) and self.swaps(request):
            self._swap_out(request)
        else:
            self._leave(request)
            request.forget_cache()
            self._step.preempted.append(request.id)
        self.waiting[request.id] = request
        self.waiting.move_to_end(request.id, last=False)
        self._preempted_now.add(request.id)
