"""The accounting that every policy needs: queues, blocks, budgets, preemption, the step under construction.

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

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import ClassVar

from engine.backend import Completion
from engine.config import COMPLETED, VLLM, WHOLE, ServingConfig
from engine.decode_set import DecodeSet
from engine.kv_blocks import BlockPool, PrefixCachingPool
from engine.request import CANCELLED, LENGTH, REJECTED, STOP, Request
from engine.scheduler.policy_error import PolicyError
from engine.step import GENESIS, Chunk, Copies, Step, chain_digest

PATIENCE = 1000
"""Preemptions for each of `max_seqs` that may pass without a token. A run without an end has no end of them: without
preemptions, requests that are admitted get prefilled, and make one."""


class Scheduler(ABC):
    """Base class of all policies.

    Attributes:
        chunked: whether `prefill` may split a prefill over several steps.
        config: the run's limits.
        waiting: requests without blocks on the GPU, in the order in which `queue` offers them.
        running: requests that hold blocks, oldest admission first.
        prefilling: the running requests whose prefill is not complete, oldest first.
        decoding: the running requests whose prefill is complete, as a set that advances as one.
        held: requests whose last token is planned, and which keep their blocks until it is known (`release`).
        wake_ns: when the next step is to be planned at the latest, if the last `plan` asked for a time.
    """

    chunked: ClassVar[bool] = False

    def __init__(self, config: ServingConfig) -> None:
        self.config = config
        sizes = config.num_blocks, config.block_size
        self._shares_at_once = config.prefix_rules == VLLM
        self._cache = PrefixCachingPool(*sizes, keeps_equal=self._shares_at_once) if config.prefix_caching else None
        self.pool = self._cache or BlockPool(*sizes)
        self.cpu_pool = BlockPool(config.num_cpu_blocks, config.block_size)
        self.waiting: OrderedDict[int, Request] = OrderedDict()
        self.running: dict[int, Request] = {}
        self.prefilling: dict[int, Request] = {}
        self.held: dict[int, Request] = {}
        self.decoding = DecodeSet()
        self._ready: list[Request] = []  # prefilled or swapped in by the last step; they decode from the next
        self._found: dict[int, int] = {}  # tokens that a request admitted by this step found in the prefix cache
        self._out_of_block: dict[int, Request] = {}  # decoding requests whose next token needs a new block
        self._filled: dict[int, Request] = {}  # running requests with a block of known tokens that nobody may share yet
        self._admissions = 0
        self._step = Step(0)
        self._digest = GENESIS
        self._decode_planned = False
        self._closed = False  # blocks ran out while this step was planned: nobody is admitted
        self._preempted_now: set[int] = set()  # nor are these, who have just left
        self._barren_preemptions = 0  # since a request last made a token
        self.wake_ns: int | None = None

    # -- for policies ------------------------------------------------------------------------------------

    @abstractmethod
    def plan(self, now: int) -> None:
        """Decide what the next step runs. `now` is in nanoseconds since the run's start."""

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

    def on_admit(self, request: Request) -> None:  # noqa: B027 (these three may be left empty)
        """A waiting request got blocks on the GPU. For a policy's own accounts, as the two below."""

    def on_decode(self, request: Request) -> None:  # noqa: B027
        """A request that was prefilled or swapped in makes a token in every decode step from now on."""

    def on_leave(self, request: Request) -> None:  # noqa: B027
        """A request gives up its place, waiting or running: it has ended (`outcome` says how), or is preempted. What
        it has made is counted by now."""

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
        if self._cache and self._shares_at_once:
            self._publish(self._cache, request, request.computed)
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
        if self._cache and self._shares_at_once:
            self._publish_filled(self._cache)
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
        published = request._published
        self._withdraw(request)
        if request._published < published:
            self._filled[request.id] = request
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
        elif request.id in self.decoding and self._fits_cpu(request) and self.swaps(request):
            self._swap_out(request)
        else:
            self._leave(request)
            request.forget_cache()
            self._step.preempted.append(request.id)
        self.waiting[request.id] = request
        self.waiting.move_to_end(request.id, last=False)
        self._preempted_now.add(request.id)

    # -- for the serving loop ----------------------------------------------------------------------------

    def arrive(self, request: Request) -> None:
        """Queue a request, or reject it (`outcome`, `reason`) if it was refused, or could never run in these limits."""
        request.reason = request.refused or self._misfit(request)
        if request.reason:
            request.outcome = REJECTED
        else:
            self.waiting[request.id] = request
            if self._cache and request.content:
                size = self.config.block_size
                request.block_hashes = request.content.hashes(request.prompt_len, size)
                # Of outputs hashes are known; of one run all must be hashes then, for a replay to find what it found.
                request._records_hashes = (
                    request.content.width != size if self._shares_at_once else request.content.width == 1
                )

    def cancel(self, request: Request) -> None:
        """The client gave up. Nothing happens if the request has ended."""
        self._drop(request, CANCELLED)

    def completed(self, completion: Completion) -> None:
        """A step's tokens are known: some end their requests, some fill blocks that others may share."""
        for request_id, own in completion.filled if self._shares_at_once else ():
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
        owned = len(hits) - self._cache.idle(hits) if self._cache else 0
        return self._has_room(request, tokens, owned)

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
        hashes = request.block_hashes
        if self._cache is None or hashes is None or request.id not in self.waiting:
            return ()
        return self._cache.find(hashes.ids[: (request.to_prefill - 1) // self.config.block_size])

    def _admit(self, request: Request, hits: Sequence[int], tokens: int) -> bool:
        if not self._can_admit(request, hits, tokens):
            return False
        self._start_running(request)
        self.prefilling[request.id] = request
        if self._cache and hits:
            self._cache.share(hits)
            request.blocks = [*hits]
            self._step.blocks[request.id] = [*hits]
            self._found[request.id] = len(hits) * self.config.block_size
            request.prefilled(self._found[request.id])
            request._published = len(hits)
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
        request.blocks = self.pool.allocate(len(request.cpu_blocks))
        request._published = len(request.blocks)
        self._step.swapped_in[request.id] = Copies(request.cpu_blocks, list(request.blocks))
        request.cpu_blocks = []
        self._grow(request, 1)
        self._ready.append(request)
        self.on_admit(request)
        return True

    def _undo_swap_in(self, request: Request) -> None:
        """Its copy has not begun: it stays in host memory."""
        request.cpu_blocks = self._step.swapped_in.pop(request.id).source
        self._ready.remove(request)
        self._leave(request)

    def _fits_cpu(self, request: Request) -> bool:
        return self.pool.blocks_for(request.computed) <= self.cpu_pool.free

    def _swap_out(self, request: Request) -> None:
        # Not all its blocks: the last may be for a token that it now will not make in this step.
        source = request.blocks[: self.pool.blocks_for(request.computed)]
        self._leave(request)
        request.cpu_blocks = self.cpu_pool.allocate(len(source))
        self._step.swapped_out[request.id] = Copies(source, request.cpu_blocks)
        request.preemptions += 1
        request.swaps += 1

    def _grow(self, request: Request, tokens: int) -> bool:
        """Give a running request the blocks for `tokens` more tokens; False if it had to be preempted itself."""
        missing = self.pool.blocks_for(request.computed + tokens) - len(request.blocks)
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
        blocks = self.pool.allocate(missing)
        request.blocks += blocks
        if (given := self._step.blocks.setdefault(request.id, blocks)) is not blocks:
            given += blocks
        return True

    def _extend(self, due: dict[int, Request]) -> None:
        """Give decoding requests that need one a block for their next token."""
        for request in due.values():
            if request.id in self.decoding and self._give(request, 1):
                self.decoding.wake(request.id, self.config.block_size)

    def _leave(self, request: Request) -> None:
        """Take a request out of every queue and out of the step under construction, and free its GPU blocks."""
        self.on_leave(request)
        for place in (self.waiting, self.running, self.prefilling, self._filled, self._out_of_block):
            place.pop(request.id, None)
        self._withdraw(request)
        if request.id in self._step.skipped:
            self._step.skipped.remove(request.id)
        for part in (self._step.chunks, self._step.blocks, self._step.joined, self._found):
            part.pop(request.id, None)
        request.stop_decoding()
        self.pool.release(request.blocks)
        request.blocks = []

    def _find(self, request_id: int) -> Request | None:
        places = self.running, self.waiting, self.held
        return next((place[request_id] for place in places if request_id in place), None)

    def _give_up(self, request: Request) -> None:
        """A held request loses its blocks to others: nobody will compute it again, for its last token is under way."""
        self._step.preempted.append(request.id)
        request.preemptions += 1
        self._release(request)

    def _release(self, request: Request) -> None:
        self.pool.release(request.blocks)
        request.blocks = []
        self.held.pop(request.id, None)

    def _ended(self, completion: Completion) -> list[int]:
        """Whom a step is known to have ended, in the order of the batch: who stopped, and whose last token is there."""
        ended = {request.id: request for request in self.held.values() if request._last_step <= completion.step}
        for request_id, _ in completion.stops:
            if request := self._find(request_id):
                ended[request_id] = request
        return sorted(ended, key=lambda request_id: ended[request_id].admission)

    def _drop(self, request: Request, outcome: str) -> None:
        if request.id in self.held:
            if self._cache:
                self._publish(self._cache, request, request.computed)
            self._release(request)
            self._step.dropped.append(request.id)
        if request.outcome is None:
            request.outcome = outcome
            self._leave(request)
            self.cpu_pool.release(request.cpu_blocks)
            request.cpu_blocks = []
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
        step, decoding = self._step, self.decoding
        step.decodes = len(decoding) if self._decode_planned else 0
        if not (step.decodes or step.chunks or step.swapped_in or step.swapped_out):
            return None
        for copies in step.swapped_in.values():  # not before: what is swapped out in this step is copied first
            self.cpu_pool.release(copies.source)
        if step.decodes:
            self._barren_preemptions = 0
            step.kv_tokens, step.kv_squares = decoding.kv_tokens, decoding.kv_squares
        step.kv_blocks_used, step.waiting = self.pool.used, len(self.waiting)
        step.running = len(self.running) + len(self.held)
        self._count_progress(step)
        step.digest = self._digest = chain_digest(self._digest, step)
        self._step = Step(step.index + 1)
        return step

    def _count_progress(self, step: Step) -> None:
        if self._cache:
            self._count_found(self._cache, step)
        for request_id, chunk in step.chunks.items():
            if chunk.samples:
                request = self.running[request_id]
                request.sampled()
                self._barren_preemptions = 0
                self._ready.append(request)
                if request.generated >= request.max_tokens:
                    self._finish(request, step)
        ringing = self.decoding.advance() if step.decodes else {}
        for request_id, context in ringing.items():
            request = self.running[request_id]
            if context >= request.last_context:
                self._finish(request, step)
            elif context == len(request.blocks) * self.config.block_size:
                self._out_of_block[request_id] = request

    def _count_found(self, cache: PrefixCachingPool, step: Step) -> None:
        """Count what requests found in the cache; from now on others find what this step computes of their prompts."""
        for request_id in step.chunks:
            request = self.running[request_id]
            request.cached_tokens += self._found.pop(request_id, 0)
            self._publish(cache, request, request.computed)

    def _publish(self, cache: PrefixCachingPool, request: Request, tokens: int) -> None:
        """Let others share the blocks that a request's first `tokens` tokens fill, as far as these are known."""
        if hashes := request.block_hashes:
            last = min(tokens // hashes.width, len(hashes.ids))
            for place in range(request._published, last):
                cache.publish(request.blocks[place], hashes.ids[place])
            request._published = max(request._published, last)

    def _learn(self, request_id: int, own: Sequence[int]) -> None:
        """The tokens of a request's next block are known; they are computed by the next decode at the latest."""
        if request := self._find(request_id):
            request.learn(own)
            if request_id in self.running:
                self._filled[request_id] = request

    def _publish_filled(self, cache: PrefixCachingPool) -> None:
        """Let others share the known blocks that this step's decodes fill, or earlier ones did."""
        for request in [each for each in self._filled.values() if each.id in self.decoding]:
            self._publish(cache, request, request.computed + 1)
            if request.block_hashes and request._published == len(request.block_hashes.ids):
                del self._filled[request.id]

    def _withdraw(self, request: Request) -> None:
        """A request will not compute what it was to compute in this step: who was to share that leaves as well."""
        if not self._cache or not self._shares_at_once:
            return
        chunk = self._step.chunks.get(request.id)
        written = (chunk.start if chunk else request.computed) // self.config.block_size
        unwritten = set(request.blocks[written : request._published])
        request._published = min(request._published, written)
        for block in unwritten:
            self._cache.withdraw(block)
        for sharer in [self.running[each] for each in self._found if each != request.id] if unwritten else ():
            if sharer.id in self.running and not unwritten.isdisjoint(sharer.blocks):
                self.preempt(sharer)

    def _finish(self, request: Request, step: Step) -> None:
        """Its last token, by `max_tokens`, is made in this step."""
        request.outcome = LENGTH
        self.on_leave(request)
        self._filled.pop(request.id, None)
        request.stop_decoding()
        step.finishing.append(request.id)
        del self.running[request.id]
        if self.config.release == COMPLETED:
            request._last_step = step.index
            self.held[request.id] = request
        else:
            self._release(request)
