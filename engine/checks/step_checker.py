"""The integrity mode: a second account of blocks and tokens. It sees what passes the seam, and checks each step.

It stands between the serving loop and a backend, whichever that is. It keeps its own account of who holds which KV
blocks with which tokens in them, and finds what a data plane could not run, or would run wrongly. It shares no code
with the scheduler's accounting; it knows neither policies nor torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

from engine.backend import Backend
from engine.config import COMPLETED, ServingConfig
from engine.events import Event
from engine.planner import PolicyError
from engine.request import CANCELLED, LENGTH, STOP, Request
from engine.step import Chunk, Copies, Step


class IntegrityError(PolicyError):
    """A step breaks an invariant: which step, whose request, what was expected, what was found."""


class CheckedBackend:
    """A backend whose steps are checked: implements `engine.backend.Backend` on top of another.

    `launch` raises IntegrityError at the first step that breaks an invariant, before that step runs; `close`, when all
    is over, if something was lost.
    """

    def __init__(self, backend: Backend, config: ServingConfig) -> None:
        self._backend = backend
        self.checker = StepChecker(config)

    def now(self) -> int:
        """The backend's clock."""
        return self._backend.now()

    def due(self, now: int) -> Sequence[Event]:
        """Events due by `now`, noted."""
        events = self._backend.due(now)
        self.checker.enter(event.request for event in events)
        return events

    def launch(self, step: Step) -> Any:
        """Checks the step, then launches it."""
        self.checker.check(step)
        return self._backend.launch(step)

    def complete(self) -> Any:
        """Waits for the oldest step in flight."""
        return self._backend.complete()

    def wait(self, until_ns: int | None) -> Any:
        """Waits for the next external event, or until then."""
        return self._backend.wait(until_ns)

    def close(self) -> None:
        """Checks that nothing was lost."""
        self.checker.close()
        self._backend.close()


@dataclass(slots=True, eq=False)
class RequestMirror:
    """One request as the data plane knows it. Of the scheduler's own account, only `request.outcome` is looked at."""

    request: Request
    cached: int = 0
    made: int = 0
    blocks: list[int] = field(default_factory=list)
    cpu_blocks: list[int] = field(default_factory=list)
    arrived_in: int = -1  # the step that swapped it in
    finished: bool = False  # its last token, by `max_tokens`, is under way; it holds its blocks until that is known
    end: str | None = None  # how it left, once it has

    @property
    def known(self) -> int:
        """Its tokens, prompt and output."""
        return self.request.prompt_len + self.made


class _Written(NamedTuple):
    """What a full block holds: the `place`-th of a request's blocks."""

    by: Request
    place: int


class StepChecker:
    """Applies deltas and checks each, blocks owned in plan order. All methods but `enter` raise IntegrityError.

    Attributes:
        states: the requests that have arrived, by id.
    """

    def __init__(self, config: ServingConfig) -> None:
        self._config = config
        self._steps = 0
        self.states: dict[int, RequestMirror] = {}
        self._decoding: dict[int, RequestMirror] = {}
        self._resident: dict[int, RequestMirror] = {}  # who holds GPU blocks
        self._swapped: dict[int, RequestMirror] = {}  # who holds CPU blocks
        self._owners: dict[int, set[int]] = {}  # GPU block -> the requests that hold it
        self._cpu_owner: dict[int, int] = {}
        self._sharers: dict[
            int, set[int]
        ] = {}  # GPU block -> who shares it from this step on, and reads it after its writer
        self._contents: dict[int, _Written] = {}  # of full blocks, until they are handed out anew

    # -- what passes the seam -----------------------------------------------------------------------------

    def enter(self, requests: Iterable[Request]) -> None:
        """Requests arrive, or are cancelled."""
        for request in requests:
            self.states.setdefault(request.id, RequestMirror(request))

    def check(self, step: Step) -> None:
        """Apply a step."""
        self._expect(None, "the number of the step", self._steps, step.index)
        self._sharers.clear()
        self._leave(step)
        for request_id, copies in step.swapped_out.items():
            self._swap_out(self._live(request_id), copies)
        for request_id in step.skipped:
            state = self._live(request_id)
            self._expect(state, "whether a request that is skipped decodes", True, request_id in self._decoding)
            del self._decoding[request_id]
        for request_id, copies in step.swapped_in.items():
            self._swap_in(self._live(request_id), copies)
        self._check_copies(step)
        for request_id in step.blocks.keys() - step.chunks.keys():
            self._own(self._live(request_id), step.blocks[request_id])
        for request_id, context in step.joined.items():
            self._join(self._live(request_id), context)
        for state in self._decoding.values() if step.decodes else ():
            self._note_contents(state, state.cached, state.cached + 1)
        for request_id, chunk in step.chunks.items():  # one may share what decodes and those before it compute
            self._append(self._live(request_id), step.blocks.get(request_id, ()), chunk)
        self._check_totals(step)
        for request_id, chunk in step.chunks.items():
            self._prefill(self._live(request_id), chunk)
        self._decode(step)
        for request_id in step.finishing:
            state = self._live(request_id)
            self._expect(state, "output tokens of a request that finishes", state.request.max_tokens, state.made)
            self._finish(state, step)
        self._steps += 1

    def close(self) -> None:
        """No step will come."""
        outcomes = {state.request.id: state.request.outcome for state in self.states.values()}
        lost = [each for each, outcome in outcomes.items() if outcome is None]
        if lost:
            raise IntegrityError(f"leaves {len(lost)} requests unserved, and nothing is in flight or to come: {lost}")
        # Those that stopped or were cancelled after the last step have not been dropped by any.
        unfinished = [
            each
            for each, state in self.states.items()
            if outcomes[each] == LENGTH and not (state.end or state.finished)
        ]
        self._expect(None, "requests said to have finished that no step finished", [], unfinished)

    # -- the parts of a step, in their order of effect ----------------------------------------------------

    def _leave(self, step: Step) -> None:
        for request_id in step.dropped:
            state = self._live(request_id)
            ended = state.finished or state.request.outcome in (STOP, CANCELLED)
            self._expect(state, "whether a dropped request has ended", True, ended)
            self._end(state, f"it was dropped in step {step.index} ({state.request.outcome})")
        for request_id in step.preempted:
            state = self._live(request_id)
            self._free(state)
            state.cached = 0
            if state.finished:
                self._end(state, f"it gave up its blocks in step {step.index}, its last token being under way")
        holders = (self._resident | self._swapped).items()
        kept = [request_id for request_id, each in holders if each.request.outcome in (STOP, CANCELLED)]
        self._expect(None, "requests that have stopped or were cancelled, and still hold blocks", [], kept)

    def _swap_out(self, state: RequestMirror, copies: Copies) -> None:
        """Exactly the blocks of its cache leave, and all but its newest token are in it: no half prefill is kept."""
        self._expect(state, "tokens in the cache of a request that is swapped out", state.known - 1, state.cached)
        leaving = state.blocks[: self._blocks_for(state.cached)]
        self._expect(state, "blocks that are swapped out", leaving, copies.source)
        self._expect(state, "CPU blocks that they are copied to", len(copies.source), len(copies.target))
        self._free(state)
        for block in copies.target:
            self._expect(state, f"whether there is a CPU block {block}", True, 0 <= block < self._config.num_cpu_blocks)
            self._expect(state, f"owner of CPU block {block}, which it is given", None, self._cpu_owner.get(block))
            self._cpu_owner[block] = state.request.id
        state.cpu_blocks = [*copies.target]
        self._swapped[state.request.id] = state

    def _swap_in(self, state: RequestMirror, copies: Copies) -> None:
        self._expect(state, "CPU blocks that are swapped in", state.cpu_blocks, copies.source)
        self._expect(state, "blocks that they are copied to", len(copies.source), len(copies.target))
        self._free_cpu(state)
        state.arrived_in = self._steps
        self._own(state, copies.target)

    def _check_copies(self, step: Step) -> None:
        """Copies of one step may run in any order between requests, but that all that leave do so first."""
        out = {block for copies in step.swapped_out.values() for block in copies.target}
        back = {block for copies in step.swapped_in.values() for block in copies.source}
        self._expect(None, "CPU blocks that are both read and written", [], sorted(out & back))

    def _append(self, state: RequestMirror, blocks: Sequence[int], chunk: Chunk) -> None:
        """Where the first chunk of a request without blocks starts late, the prefix cache has the blocks before it."""
        shared = 0
        if self._config.prefix_caching and not state.blocks:
            shared, rest = divmod(chunk.start, self._config.block_size)
            self._expect(state, "tokens by which its first chunk misses the start of a block", 0, rest)
            state.cached = chunk.start
        for place, block in enumerate(blocks[:shared]):
            self._share(state, place, block)
        self._own(state, blocks[shared:])
        self._note_contents(state, chunk.start, chunk.start + chunk.tokens)

    def _share(self, state: RequestMirror, place: int, block: int) -> None:
        written, tokens = self._contents.get(block), (place + 1) * self._config.block_size
        self._expect(state, f"whether block {block}, which it shares, is full", True, written is not None)
        assert written is not None
        self._expect(state, f"place in the prompt of block {block}, which it shares", place, written.place)
        same = _begin_alike(state.request, written.by, tokens)
        what = f"whether its first {tokens} tokens are request {written.by.id}'s, who wrote block {block}"
        self._expect(state, what, True, same)
        self._give(state, block)
        self._sharers.setdefault(block, set()).add(state.request.id)

    def _own(self, state: RequestMirror, blocks: Sequence[int]) -> None:
        for block in blocks:
            self._expect(state, f"whether there is a block {block}", True, 0 <= block < self._config.num_blocks)
            self._expect(state, f"owners of block {block}, which it is given", [], sorted(self._owners.get(block, ())))
            self._contents.pop(block, None)
            self._give(state, block)

    def _give(self, state: RequestMirror, block: int) -> None:
        self._owners.setdefault(block, set()).add(state.request.id)
        state.blocks.append(block)
        self._resident[state.request.id] = state

    def _join(self, state: RequestMirror, context: int) -> None:
        self._expect(state, "context of a request that joins", state.cached, context)
        self._expect(state, "tokens in the cache of a request that joins", state.known - 1, state.cached)
        self._expect(state, "whether a request that joins decodes already", False, state.request.id in self._decoding)
        self._at_most(state, "step that swapped in a request that joins", self._steps - 1, state.arrived_in)
        self._decoding[state.request.id] = state

    def _check_totals(self, step: Step) -> None:
        config = self._config
        works = bool(step.chunks or step.decodes or step.swapped_in or step.swapped_out)
        self._expect(None, "whether the step runs anything", True, works)
        self._at_most(None, "tokens", config.max_batched_tokens, step.prefill_tokens + step.decodes)
        self._expect(None, "requests that hold blocks", len(self._resident), step.load.running)
        self._at_most(None, "requests that hold blocks", config.max_seqs, len(self._resident))
        self._expect(None, "blocks in use", len(self._owners), step.load.kv_blocks_used)

    def _prefill(self, state: RequestMirror, chunk: Chunk) -> None:
        self._expect(state, "whether a request with a chunk decodes", False, state.request.id in self._decoding)
        self._expect(state, "start of its chunk, which is where its cache ends", state.cached, chunk.start)
        end = chunk.start + chunk.tokens
        self._at_most(state, "end of its chunk", state.known, end)
        self._at_most(state, "start of its chunk, lest it be empty", end - 1, chunk.start)
        self._expect(state, "whether its chunk samples", end == state.known, chunk.samples)
        self._cache(state, chunk.tokens, makes=chunk.samples)

    def _note_contents(self, state: RequestMirror, start: int, end: int) -> None:
        """What the blocks hold that a request's tokens from `start` to `end` fill."""
        size = self._config.block_size
        for place in range(start // size, min(end // size, len(state.blocks))):
            self._contents[state.blocks[place]] = _Written(state.request, place)

    def _decode(self, step: Step) -> None:
        if not step.decodes:
            return
        self._expect(None, "requests that decode", len(self._decoding), step.decodes)
        contexts = [state.cached for state in self._decoding.values()]
        self._expect(None, "sum of the decodes' contexts", sum(contexts), step.load.kv_tokens)
        self._expect(None, "sum of their squares", sum(context**2 for context in contexts), step.load.kv_squares)
        for state in self._decoding.values():
            self._cache(state, 1, makes=True)

    def _cache(self, state: RequestMirror, tokens: int, makes: bool) -> None:
        first, last = state.cached // self._config.block_size, self._blocks_for(state.cached + tokens)
        self._at_most(state, "blocks that its tokens take up", len(state.blocks), last)
        for block in state.blocks[first:last]:
            alone = self._owners[block] - self._sharers.get(block, set())
            self._expect(state, f"owners of block {block}, which it writes", [state.request.id], sorted(alone))
        state.cached += tokens
        state.made += makes
        self._at_most(state, "output tokens", state.request.max_tokens, state.made)

    # -- accounts -----------------------------------------------------------------------------------------

    def _live(self, request_id: int) -> RequestMirror:
        state = self.states.get(request_id)
        if state is None:
            self._fail(f"the step names request {request_id}", "a request that has arrived", "none of that number")
        if state.end:
            self._fail(f"the step names request {request_id}", "a request that has not ended", state.end)
        return state

    def _finish(self, state: RequestMirror, step: Step) -> None:
        if self._config.release == COMPLETED:
            state.finished = True
            self._decoding.pop(state.request.id, None)
        else:
            self._end(state, f"it finished in step {step.index}")

    def _end(self, state: RequestMirror, how: str) -> None:
        self._free(state)
        state.end = how

    def _free(self, state: RequestMirror) -> None:
        for block in state.blocks:
            owners = self._owners[block]
            owners.discard(state.request.id)
            if not owners:
                del self._owners[block]
        state.blocks = []
        self._resident.pop(state.request.id, None)
        self._free_cpu(state)
        self._decoding.pop(state.request.id, None)

    def _free_cpu(self, state: RequestMirror) -> None:
        for block in state.cpu_blocks:
            del self._cpu_owner[block]
        state.cpu_blocks = []
        self._swapped.pop(state.request.id, None)

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._config.block_size)

    # -- complaints ---------------------------------------------------------------------------------------

    def _expect(self, state: RequestMirror | None, what: str, expected: object, found: object) -> None:
        if expected != found:
            self._fail(what if state is None else f"request {state.request.id}: {what}", expected, found)

    def _at_most(self, state: RequestMirror | None, what: str, limit: int, found: int) -> None:
        if found > limit:
            self._fail(what if state is None else f"request {state.request.id}: {what}", f"at most {limit}", found)

    def _fail(self, what: str, expected: object, found: object) -> NoReturn:
        raise IntegrityError(
            f"breaks an invariant in step {self._steps}: {what}\n  expected  {expected}\n  found     {found}"
        )


def _begin_alike(one: Request, other: Request, tokens: int) -> bool:
    """Whether two requests begin with the same tokens: by what the workload says of prompts, by hash of outputs."""
    first, second = one.content, other.content
    if tokens > min(one.prompt_len, other.prompt_len):
        first, second = one.block_hashes, other.block_hashes
    if first is None or second is None or first.width != second.width:
        return False
    ids = -(-tokens // first.width)
    return len(first.ids) >= ids and list(first.ids[:ids]) == list(second.ids[:ids])
