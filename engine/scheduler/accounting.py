"""The accounting below a policy's verbs: queues, admission, growth, preemption, and the step under construction.

A policy's author need not read it. `engine.scheduler.base` has the verbs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from typing import ClassVar

from engine.backend import Completion
from engine.config import COMPLETED, WHOLE, ServingConfig
from engine.decode_set import DecodeSet
from engine.planner import PolicyError
from engine.request import CANCELLED, LENGTH, REJECTED, STOP, Request
from engine.scheduler.kv_manager import KVManager
from engine.step import GENESIS, Step, StepDraft, StepLoad, is_steady, steady_step


class Accounting(ABC):
    """All that a scheduler keeps account of, and all that the serving loop asks. Attributes are `Scheduler`'s."""

    chunked: ClassVar[bool] = False

    def __init__(self, config: ServingConfig) -> None:
        self.config = config
        self.kv = KVManager(config)
        self.pool, self.cpu_pool = self.kv.pool, self.kv.cpu_pool
        self.waiting: OrderedDict[int, Request] = OrderedDict()
        self.running: dict[int, Request] = {}
        self.prefilling: dict[int, Request] = {}
        self.held: dict[int, Request] = {}
        self.decoding = DecodeSet()
        self._ready: list[Request] = []  # prefilled or swapped in by the last step; they decode from the next
        self._out_of_block: dict[int, Request] = {}  # decoding requests whose next token needs a new block
        self._admissions = 0
        self._step = StepDraft()
        self._index = 0  # of the step under construction
        self._digest = GENESIS
        self._decode_planned = False
        self._closed = False  # blocks ran out while this step was planned: nobody is admitted
        self._preempted_now: set[int] = set()  # nor are these, who have just left
        self._barren_preemptions = 0  # since a request last made a token
        self.wake_ns: int | None = None

    # -- what a policy does ------------------------------------------------------------------------------

    @abstractmethod
    def plan(self, now: int) -> None:
        """Decide what the next step runs. `now` is in nanoseconds since the run's start."""

    @abstractmethod
    def victim(self) -> Request:
        """Who loses its blocks when there are too few."""

    @abstractmethod
    def prefill(self, request: Request) -> bool:
        """Run the request's prefill in this step, if it fits."""

    @abstractmethod
    def preempt(self, request: Request) -> None:
        """Take a running request's blocks."""

    def on_admit(self, request: Request) -> None:  # noqa: B027 (these three may be left empty)
        """A waiting request got blocks on the GPU. For a policy's own accounts, as the two below."""

    def on_decode(self, request: Request) -> None:  # noqa: B027
        """A request that was prefilled or swapped in makes a token in every decode step from now on."""

    def on_leave(self, request: Request) -> None:  # noqa: B027
        """A request gives up its place, waiting or running: it has ended (`outcome` says how), or is preempted. What
        it has made is counted by now."""

    # -- for the serving loop ----------------------------------------------------------------------------

    def arrive(self, request: Request) -> None:
        """Queue a request, or reject it (`outcome`, `reason`) if it was refused, or could never run in these limits."""
        request.reason = request.refused or self._misfit(request)
        if request.reason:
            request.outcome = REJECTED
        else:
            self.waiting[request.id] = request
            self.kv.enter(request)

    def cancel(self, request: Request) -> None:
        """The client gave up. Nothing happens if the request has ended."""
        self._drop(request, CANCELLED)

    def completed(self, completion: Completion) -> None:
        """A step's tokens are known: some end their requests, some fill blocks that others may share."""
        for request_id, own in completion.filled if self.kv.shares_at_once else ():
            self._learn(request_id, own)
        for request_id in self._ended(completion) if self.held else [stop.request_id for stop in completion.stops]:
            self.stopped(request_id)

    def stopped(self, request_id: int) -> None:
        """A request's last token is known. Nothing happens if it has ended, and holds nothing."""
        if request := self._find(request_id):
            self._drop(request, STOP)

    def schedule(self, now: int) -> Step | None:
        """Plan the next step, or None if there is nothing to run."""
        self.wake_ns = None
        self._decode_planned = self._closed = False
        self._preempted_now.clear()
        if self._ready:
            self._start_decoding()
        made: object = self.plan(now)
        if made is not None:
            kind = type(made).__name__
            raise PolicyError(f"returns a {kind} from plan: its calls of prefill, decode and preempt are the plan")
        return self._seal()

    @property
    def idle(self) -> bool:
        """Whether no request is waiting or running."""
        return not self.waiting and not self.running

    def queues(self, request: Request) -> bool:
        """Whether a request waits to be scheduled."""
        return request.id in self.waiting

    def idle_fault(self) -> str:
        """Say why requests are left although nothing can happen any more. It tries the verbs: nothing may follow."""
        stuck, running = len(self.waiting) + len(self.running), len(self.running)
        said = f"plans nothing, but {stuck} requests wait and nothing is in flight"
        if decodes := len(self.decoding):
            return f"{said}: decode() was not called, and {decodes} requests could decode"
        if fit := sum(self.prefill(each) for each in (*self.prefilling.values(), *self.waiting.values())):
            return f"{said}: prefill(request) was not called for {fit} of them that fit"
        room = f"{self.pool.free} of {self.config.num_blocks} KV blocks are free"
        return (
            f"{said}: after what it has preempted, none fits ({room}, {running} of max_seqs {self.config.max_seqs} run)"
        )

    # -- accounting --------------------------------------------------------------------------------------

    def _misfit(self, request: Request) -> str | None:
        config, cached = self.config, request.last_context  # the most that it needs a place for, or recomputes
        if cached + 1 > config.max_model_len:
            return f"prompt + max_tokens is {cached + 1}, max_model_len {config.max_model_len}"
        if self.pool.blocks_for(cached) > config.num_blocks:
            return f"needs {self.pool.blocks_for(cached)} KV blocks, there are {config.num_blocks}"
        if not self.chunked and cached > config.max_batched_tokens:
            limit = f"max_batched_tokens {config.max_batched_tokens}"
            return f"a prefill of up to {cached} tokens exceeds {limit}: raise it, or serve with `chunked = True`"
        return None

    def _can_admit(self, request: Request, hits: Sequence[int], tokens: int) -> bool:
        """Whether a waiting request may run `tokens` tokens beside the others, after those that `hits` hold."""
        if self.config.admit == WHOLE:
            tokens = request.to_prefill
        else:
            tokens += len(hits) * self.config.block_size
        return self._has_room(request, tokens, self.kv.owned(hits))

    def _has_room(self, request: Request, tokens: int, owned: int = 0) -> bool:
        """Whether a waiting request with `tokens` tokens in the cache may run beside the others, who already own
        `owned` of its blocks."""
        rows = len(self.running) + len(self.held)
        full = rows >= self.config.max_seqs or self.pool.blocks_for(tokens) - owned > self.pool.free
        return not full and self._is_admissible(request)

    def _is_admissible(self, request: Request) -> bool:
        """Whether it may be admitted in this step, given room."""
        return request.id in self.waiting and not self._closed and request.id not in self._preempted_now

    def _hits(self, request: Request) -> Sequence[int]:
        """The cached blocks that a waiting request begins with; its last token is always computed, for that samples."""
        return self.kv.hits(request) if request.id in self.waiting else ()

    def _admit(self, request: Request, hits: Sequence[int], tokens: int) -> bool:
        if not self._can_admit(request, hits, tokens):
            return False
        self._start_running(request)
        self.prefilling[request.id] = request
        if hits:
            self.kv.share(request, hits)
            self._step.blocks[request.id] += hits
        self.on_admit(request)
        return True

    def _start_running(self, request: Request) -> None:
        del self.waiting[request.id]
        self.running[request.id] = request
        request.admission = self._admissions
        self._admissions += 1

    def _swap_in(self, request: Request) -> bool:
        if not self._has_room(request, request.computed + 1):  # with its next token's block, lest it be the next victim
            return False
        self._start_running(request)
        self._step.swapped_in[request.id] = self.kv.swap_in(request)
        self._grow(request, 1)
        self._ready.append(request)
        self.on_admit(request)
        return True

    def _undo_swap_in(self, request: Request) -> None:
        """Its copy has not begun: it stays in host memory."""
        request.cpu_blocks = self._step.swapped_in.pop(request.id).source
        self._ready.remove(request)
        self._leave(request)

    def _swap_out(self, request: Request) -> None:
        blocks = request.blocks
        self._leave(request)
        self._step.swapped_out[request.id] = self.kv.swap_out(request, blocks)

    def _grow(self, request: Request, tokens: int) -> bool:
        """Give a running request the blocks for `tokens` more tokens; False if it had to be preempted itself."""
        missing = self.kv.missing(request, tokens)
        return missing <= 0 or self._give(request, missing)

    def _give(self, request: Request, missing: int) -> bool:
        """Give a running request that many blocks more; False if it had to be preempted itself."""
        while missing > self.pool.free:
            victim = self.victim()
            self._closed = True
            if victim.id in self.held:
                self._give_up(victim)
                continue
            self.preempt(victim)
            if victim.id in self.running:
                raise PolicyError(f"keeps request {victim.id} running in its preempt: let that call super().preempt")
            if victim is request:
                return False
        self._step.blocks[request.id] += self.kv.give(request, missing)
        return True

    def _extend(self, due: dict[int, Request]) -> None:
        """Give decoding requests that need one a block for their next token."""
        if len(due) <= self.pool.free:  # as most times: nobody is preempted
            self._step.blocks |= self.kv.give_one_each(due.values())
            for request_id in due:
                self.decoding.wake(request_id, self.config.block_size)
            return
        for request in due.values():
            if request.id in self.decoding and self._give(request, 1):
                self.decoding.wake(request.id, self.config.block_size)

    def _leave(self, request: Request) -> None:
        """Take a request out of every queue and out of the step under construction, and free its GPU blocks."""
        self.on_leave(request)
        for place in (self.waiting, self.running, self.prefilling, self._out_of_block):
            place.pop(request.id, None)
        self.kv.unwatch(request)
        self._withdraw(request)
        self.kv.found.pop(request.id, None)
        self._step.take_out(request.id)
        request.stop_decoding()
        self.kv.release(request)

    def _find(self, request_id: int) -> Request | None:
        places = self.running, self.waiting, self.held
        return next((place[request_id] for place in places if request_id in place), None)

    def _give_up(self, request: Request) -> None:
        """A held request loses its blocks to others: nobody will compute it again, for its last token is under way."""
        self._step.preempted.append(request.id)
        request.preemptions += 1
        self._release(request)

    def _release(self, request: Request) -> None:
        self.kv.release(request)
        self.held.pop(request.id, None)

    def _ended(self, completion: Completion) -> list[int]:
        """Whom a step is known to have ended, in the order of the batch: who stopped, and whose last token is there."""
        ended = {request.id: request for request in self.held.values() if request.last_step <= completion.step}
        for stop in completion.stops:
            if request := self._find(stop.request_id):
                ended[request.id] = request
        return sorted(ended, key=lambda request_id: ended[request_id].admission)

    def _drop(self, request: Request, outcome: str) -> None:
        if request.id in self.held:
            self.kv.publish(request, request.computed)
            self._release(request)
            self._step.dropped.append(request.id)
        if request.outcome is None:
            request.outcome = outcome
            self._leave(request)
            self.kv.release_host(request)
            self._step.dropped.append(request.id)

    def _start_decoding(self) -> None:
        for request in self._ready:
            if request.id in self.running:
                context = self._step.joined[request.id] = request.computed
                request.start_decoding(self.decoding)
                self.decoding.wake(request.id, request.last_context - context)
                if room := len(request.blocks) * self.config.block_size - context:
                    self.decoding.wake(request.id, room)
                else:
                    self._out_of_block[request.id] = request
                self.on_decode(request)
        self._ready = []

    def _seal(self) -> Step | None:
        """Close the step under construction, unless it runs nothing: then it stays open for the next call."""
        draft, decoding = self._step, self.decoding
        decodes = len(decoding) if self._decode_planned else 0
        if not (decodes or draft.chunks or draft.swapped_in or draft.swapped_out):
            return None
        for copies in draft.swapped_in.values():  # not before: what is swapped out in this step is copied first
            self.cpu_pool.release(copies.source)
        tokens, squares = (decoding.kv_tokens, decoding.kv_squares) if decodes else (0, 0)
        running = len(self.running) + len(self.held)
        load = tuple.__new__(StepLoad, (tokens, squares, self.pool.used, running, len(self.waiting)))
        if draft.chunks:
            self._count_chunks(draft)
        if decodes:
            self._count_decodes(draft)
        if is_steady(draft):
            step = steady_step(self._index, decodes, load, self._digest)
        else:
            step, self._step = draft.seal(self._index, decodes, load, self._digest), StepDraft()
        self._digest, self._index = step.digest, self._index + 1
        return step

    def _count_chunks(self, draft: StepDraft) -> None:
        for request_id, chunk in draft.chunks.items():
            request = self.running[request_id]
            if self.config.prefix_caching:  # from now on others find what this step computes of the prompt
                self.kv.count_found(request)
                self.kv.publish(request, request.computed)
            if chunk.samples:
                request.sampled()
                self._barren_preemptions = 0
                self._ready.append(request)
                if request.generated >= request.max_tokens:
                    self._finish(request, draft)

    def _count_decodes(self, draft: StepDraft) -> None:
        self._barren_preemptions = 0
        for request_id, context in self.decoding.advance().items():
            request = self.running[request_id]
            if context >= request.last_context:
                self._finish(request, draft)
            elif context == len(request.blocks) * self.config.block_size:
                self._out_of_block[request_id] = request

    def _learn(self, request_id: int, own: Sequence[int]) -> None:
        """The tokens of a request's next block are known; they are computed by the next decode at the latest."""
        if request := self._find(request_id):
            request.learn(own)
            if request_id in self.running:
                self.kv.watch(request)

    def _withdraw(self, request: Request) -> None:
        """A request will not compute what it was to compute in this step: who was to share that leaves as well."""
        chunk = self._step.chunks.get(request.id)
        unwritten = self.kv.withdraw(request, chunk.start if chunk else request.computed)
        for sharer in [self.running[each] for each in self.kv.found if each != request.id] if unwritten else ():
            if sharer.id in self.running and not unwritten.isdisjoint(sharer.blocks):
                self.preempt(sharer)

    def _finish(self, request: Request, draft: StepDraft) -> None:
        """Its last token, by `max_tokens`, is made in this step."""
        request.outcome = LENGTH
        self.on_leave(request)
        self.kv.unwatch(request)
        request.stop_decoding()
        draft.finishing.append(request.id)
        del self.running[request.id]
        if self.config.release == COMPLETED:
            request.last_step = self._index
            self.held[request.id] = request
        else:
            self._release(request)
