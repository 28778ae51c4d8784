"""Preemption by swap: what a policy sees, what waits for which copy, and that no cache is ever read half-copied."""

from __future__ import annotations

import dataclasses
import random
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shadow import serve, small_profile
from test_scheduling_properties import MS, configs, schedulers, workloads

from engine.backend import Shown
from engine.config import ServingConfig
from engine.copy_order import CopyOrder
from engine.prefix_hash import Content
from engine.records.run_folder import RunRecords
from engine.request import LENGTH
from engine.scheduler import POLICIES
from engine.scheduler.base import Scheduler
from engine.scheduler.policies.chunked_prefill import ChunkedPrefill
from engine.step import Chunk, Copies, Step, StepLoad
from sim.device_timing import ProfiledTiming
from sim.latency_model import LatencyModel
from sim.negative_controls import negative_controls
from sim.profile.format import Profile, read_profile, write_profile
from sim.replay import replay
from traces.errors import TandemError
from traces.request import TraceRequest

REQUESTS = [TraceRequest(i, i, prompt_len=20, output_len=60, max_tokens=60) for i in range(12)]
SCARCE = ServingConfig(num_blocks=20, max_seqs=12, max_batched_tokens=300, num_cpu_blocks=40)


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("depth", [1, 2])
def test_with_room_in_host_memory_victims_are_swapped_and_nothing_is_computed_twice(policy, depth):
    config = dataclasses.replace(SCARCE, scheduler=policy, pipeline_depth=depth, num_cpu_blocks=60)
    recorder, served = serve(REQUESTS, config)
    tables = recorder.tables()
    assert all(request.outcome == LENGTH for request in served)
    assert sum(request.preemptions for request in served) == sum(tables["requests"]["swaps"].to_pylist()) > 0
    assert sum(tables["steps"]["prefill_tokens"].to_pylist()) == sum(each.prompt_len for each in REQUESTS)
    out, back = (sum(tables["steps"][f"swapped_{way}_blocks"].to_pylist()) for way in ("out", "in"))
    assert out == back > 0


def test_what_does_not_fit_into_host_memory_is_recomputed():
    recorder, served = serve(REQUESTS, dataclasses.replace(SCARCE, num_cpu_blocks=6))
    swaps = recorder.tables()["requests"]["swaps"].to_pylist()
    assert 0 < sum(swaps) < sum(request.preemptions for request in served)


class NeverTwice(ChunkedPrefill):
    def swaps(self, request):
        return request.swaps == 0


def test_a_policy_decides_who_is_swapped():
    recorder, served = serve(REQUESTS, SCARCE, scheduler=NeverTwice(SCARCE))
    swaps = recorder.tables()["requests"]["swaps"].to_pylist()
    assert max(swaps) == 1 and any(request.preemptions > 1 for request in served)


@settings(max_examples=100, deadline=None)
@given(workloads(), configs())
def test_a_tier_that_is_not_used_changes_nothing(requests, config):
    """With blocks and rows for all, the digests do not depend on the second tier."""
    budget = max(config.max_batched_tokens, len(requests))
    roomy = dataclasses.replace(config, num_blocks=4000, max_seqs=len(requests), max_batched_tokens=budget)
    with_tier, without = (
        serve(requests, dataclasses.replace(roomy, num_cpu_blocks=count))[0].tables()["steps"]["digest"]
        for count in (50, 0)
    )
    assert with_tier.equals(without)


@settings(max_examples=60, deadline=None)
@given(workloads(), configs())
def test_a_replay_makes_the_same_decisions_swaps_included(requests, config):
    recorder, _ = serve(requests, dataclasses.replace(config, num_cpu_blocks=60))
    run = RunRecords({}, recorder.tables())
    replayed = replay(run, dataclasses.replace(config, num_cpu_blocks=60)).records
    assert replayed.tables["steps"]["digest"].equals(run.tables["steps"]["digest"])


def test_falsified_times_of_a_run_that_swaps_are_noticed():
    recorder, _ = serve(REQUESTS, SCARCE)
    assert set(negative_controls(RunRecords({}, recorder.tables()), SCARCE).values()) == {True}


# -- what waits for what -----------------------------------------------------------------------------------


def out(index: int, **changes) -> Step:
    return Step(index, swapped_out={1: Copies([5, 6], [0, 1])}, decodes=1, **changes)


def test_compute_waits_for_its_own_steps_copies_only_where_it_writes_their_blocks():
    assert CopyOrder().needs(out(3, blocks={2: [7]})) is None
    assert CopyOrder().needs(out(3, blocks={2: [6]})) == 3


def test_a_later_step_waits_for_what_it_writes_and_only_once():
    order = CopyOrder()
    assert order.needs(out(3)) is None
    assert order.needs(Step(4, decodes=1)) is None
    assert order.needs(Step(5, decodes=1, blocks={2: [5]})) == 3
    assert order.needs(Step(6, decodes=1, blocks={2: [6]})) is None


def test_a_request_that_joins_waits_for_its_cache_and_the_step_that_fetches_it_does_not():
    order = CopyOrder()
    fetch = Step(1, swapped_in={1: Copies([0, 1], [8, 9])}, blocks={1: [4]}, decodes=1)
    assert order.needs(fetch) is None
    assert order.needs(Step(2, joined={1: 30}, decodes=2)) == 1


def test_blocks_of_a_request_that_is_gone_are_not_written_while_they_arrive():
    order = CopyOrder()
    order.needs(Step(1, swapped_in={1: Copies([0], [8])}, decodes=1))
    assert order.needs(Step(2, dropped=[1], blocks={2: [8]}, decodes=1)) == 1


# -- that this suffices: no cache is read half-copied ---------------------------------------------------------


class Held(NamedTuple):
    """What a block holds: the first `tokens` tokens of the `place`-th block of a request's cache, or of all caches that
    begin with the same prompt."""

    whose: int | tuple[str, int]
    place: int
    tokens: int


class Access(NamedTuple):
    """A request's part in a step's compute: reads the cache of tokens before `start`, writes from there to `end`."""

    request: int
    table: tuple[int, ...]
    start: int
    end: int
    hashes: Sequence[int] = ()  # of its full prompt blocks

    def cache(self, tokens: int, block_size: int) -> dict[int, Held]:
        """What the request's blocks hold when its first `tokens` tokens are cached."""
        starts = range(0, tokens, block_size)
        return {
            block: self._held(place, min(block_size, tokens - start), block_size)
            for place, (block, start) in enumerate(zip(self.table, starts, strict=False))
        }

    def _held(self, place: int, tokens: int, block_size: int) -> Held:
        common = tokens == block_size and place < len(self.hashes)
        return Held(("prompt", self.hashes[place]) if common else self.request, place, tokens)


class Tables:
    """Block tables and contexts as a data plane keeps them, from the Steps alone."""

    def __init__(self, hashes: dict[int, Sequence[int]]) -> None:
        self.hashes = hashes
        self.tables: dict[int, list[int]] = {}
        self.decoding: dict[int, int] = {}  # request -> context

    def apply(self, step: Step) -> list[Access]:
        self._leave(*step.dropped, *step.preempted, *step.swapped_out)
        for request_id in step.skipped:
            self.decoding.pop(request_id, None)
        for request_id, copies in step.swapped_in.items():
            self.tables[request_id] = [*copies.target]
        # Beside a swap-in too: such a block belongs to the request from here on, though it is written once it decodes.
        for request_id, blocks in step.blocks.items():
            self.tables.setdefault(request_id, []).extend(blocks)
        self.decoding |= step.joined
        spans = {each: (chunk.start, chunk.start + chunk.tokens) for each, chunk in step.chunks.items()}
        if step.decodes:
            spans |= {each: (context, context + 1) for each, context in self.decoding.items()}
            self.decoding = {each: context + 1 for each, context in self.decoding.items()}
        accesses = [
            Access(each, tuple(self.tables[each]), *span, self.hashes.get(each, ())) for each, span in spans.items()
        ]
        self._leave(*step.finishing)
        return accesses

    def _leave(self, *gone: int) -> None:
        for request_id in gone:
            self.tables.pop(request_id, None)
            self.decoding.pop(request_id, None)


class Machine:
    """Two tiers of blocks, and two streams that work through a run in any order that the fences allow.

    The host waits for neither, so that one may be any number of steps ahead of the other: what CUDA promises, and no
    more. `stale` counts how often a request reads blocks that do not hold its own cache, complete and in order.
    """

    def __init__(
        self, config: ServingConfig, steps: list[Step], requests=(), compute_waits=True, copies_wait=True
    ) -> None:
        self.block_size = config.block_size
        self.gpu: dict[int, Held | None] = {}
        self.cpu: dict[int, Held | None] = {}
        contents = {each.id: (Content.of(each), each.prompt_len) for each in requests}
        hashes = {each: what.hashes(length, config.block_size).ids for each, (what, length) in contents.items() if what}
        order, tables = CopyOrder(), Tables(hashes)
        self.compute = deque((step.index, order.needs(step), tables.apply(step)) for step in steps)
        self.copies = deque(step for step in steps if step.swapped_out or step.swapped_in)
        self.compute_waits, self.copies_wait = compute_waits, copies_wait
        self.computed = self.copied = -1  # the last step whose compute, and whose copies, are done
        self.stale = 0

    def run(self, generator: random.Random, haste: float) -> int:
        """Where both streams could go on, it is compute's turn with probability `haste`; returns `stale`."""
        while self.compute or self.copies:
            if self._compute_may_run() and not (self._copies_may_run() and generator.random() >= haste):
                self._run_compute(*self.compute.popleft())
            else:
                self._run_copies(self.copies.popleft())
        return self.stale

    def _compute_may_run(self) -> bool:
        if not self.compute:
            return False
        _, needed, _ = self.compute[0]
        return needed is None or self.copied >= needed or not self.compute_waits

    def _copies_may_run(self) -> bool:
        return bool(self.copies) and (self.computed >= self.copies[0].index - 1 or not self.copies_wait)

    def _run_compute(self, index: int, _: int | None, accesses: list[Access]) -> None:
        for access in accesses:
            read, left = (access.cache(tokens, self.block_size) for tokens in (access.start, access.end))
            self.stale += not read.items() <= self.gpu.items()
            self.gpu |= dict(left.items() - read.items())
        self.computed = index

    def _run_copies(self, step: Step) -> None:
        for swaps, source, target in ((step.swapped_out, self.gpu, self.cpu), (step.swapped_in, self.cpu, self.gpu)):
            for copies in swaps.values():
                target.update({b: source.get(a) for a, b in zip(*copies, strict=True)})
        self.copied = step.index


class KeepsSteps(ProfiledTiming):
    """Keeps every step that is launched."""

    def __init__(self) -> None:
        super().__init__(small_profile())
        self.steps: list[Step] = []

    def launch(self, step: Step, now: int):
        self.steps.append(step)
        return super().launch(step, now)


def steps_of(requests: list[TraceRequest], config: ServingConfig, scheduler: Scheduler | None = None) -> list[Step]:
    timing = KeepsSteps()
    serve(requests, config, timing, scheduler)
    return timing.steps


@st.composite
def crowds(draw: st.DrawFn) -> list[TraceRequest]:
    """Requests that arrive faster than they are served, some of which begin alike, stop or are cancelled."""
    return [
        TraceRequest(
            id=number,
            arrival_ns=number * MS,
            prompt_len=draw(st.integers(32, 40)) if (prefix := draw(st.integers(0, 2))) else draw(st.integers(1, 40)),
            hash_ids=[prefix] if prefix else None,
            hash_block_size=32,
            output_len=draw(st.one_of(st.just(60), st.integers(1, 60))),
            max_tokens=60,
            cancel_ns=draw(st.one_of(st.none(), st.integers(number * MS, 300 * MS))),
        )
        for number in range(12)
    ]


@st.composite
def scarce_configs(draw: st.DrawFn) -> ServingConfig:
    return dataclasses.replace(
        SCARCE,
        num_blocks=draw(st.integers(8, 30)),
        num_cpu_blocks=draw(st.integers(4, 40)),
        scheduler=draw(st.sampled_from(sorted(POLICIES))),
        pipeline_depth=draw(st.sampled_from([1, 2])),
        prefix_caching=draw(st.booleans()),
    )


@settings(max_examples=150, deadline=None)
@given(crowds(), scarce_configs(), st.data())
def test_whatever_the_streams_do_within_their_fences_every_request_reads_its_own_cache(crowd, config, data):
    steps = steps_of(crowd, config, data.draw(schedulers(config)))
    generator = random.Random(data.draw(st.integers(0, 10**6)))
    assert [Machine(config, steps, crowd).run(generator, haste) for haste in (0.05, 0.5, 0.95)] == [0, 0, 0]


@pytest.mark.parametrize("missing", ["compute_waits", "copies_wait"])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_without_either_fence_somebody_reads_what_is_not_its_cache(policy, missing):
    config = dataclasses.replace(SCARCE, scheduler=policy, pipeline_depth=2)
    steps = steps_of(REQUESTS, config)
    assert any(Machine(config, steps, **{missing: False}).run(random.Random(seed), 0.5) for seed in range(20))


# -- simulated time ----------------------------------------------------------------------------------------


def chunk_step(index: int, **changes) -> Step:
    return Step(index, chunks={0: Chunk(0, 10, True)}, **changes)


def test_compute_that_depends_on_a_copy_starts_when_it_ends_and_other_compute_beside_it():
    timing = ProfiledTiming(small_profile())
    compute, copy = timing.latency.device_ns(chunk_step(0)), 8 * 50_000  # 50 us a block
    eight = Copies(list(range(8)), list(range(8)))
    steps = [
        chunk_step(0, swapped_out={1: eight}),  # beside its copies
        chunk_step(1, swapped_out={2: eight}, blocks={0: [3]}),  # writes a block that is on its way out
        Step(2, swapped_in={1: eight}),  # nothing but copies
    ]
    for step in steps:
        timing.launch(step, 0)
    launched = timing.launch(chunk_step(3), 0)[0].launched_ns
    done = [timing.complete(0, index, Shown())[0] for index in range(4)]
    starts, device_ns = [each.device_start_ns for each in done], [each.device_ns for each in done]
    assert starts[0] == launched
    assert starts[1] == launched + compute + copy
    assert starts[2] == launched + 2 * compute + copy
    assert device_ns[2] == copy
    assert starts[3] == launched + 2 * compute + copy


def test_compute_waits_for_the_copies_of_a_request_that_joined_in_a_step_without_compute():
    timing = ProfiledTiming(small_profile())
    eight = Copies(list(range(8)), list(range(8)))
    timing.launch(Step(0, swapped_in={1: eight}), 0)
    timing.launch(Step(1, swapped_in={2: eight}, joined={1: 100}), 0)
    timing.launch(Step(2, decodes=1, load=StepLoad(kv_tokens=100)), 0)
    done = [timing.complete(0, index, Shown())[0] for index in range(3)]
    starts, device_ns = [each.device_start_ns for each in done], [each.device_ns for each in done]
    assert starts[2] == starts[0] + device_ns[0]


@pytest.mark.parametrize(
    "step",
    [
        Step(0, swapped_out={1: Copies([0], [0])}),
        Step(0, swapped_in={1: Copies([0], [0])}),
        chunk_step(0, swapped_out={1: Copies([0], [0])}),
    ],
    ids=["only out", "only in", "beside compute"],
)
def test_the_copies_of_a_step_are_looked_up_once(step):
    timing = ProfiledTiming(small_profile())
    timing.launch(step, 0)
    assert timing.latency._coverage.asked["swap"] == 1


def test_a_profile_without_swap_times_serves_until_somebody_swaps(tmp_path):
    whole = small_profile()
    tables = {name: rows for name, rows in whole.tables.items() if name != "swap"}
    write_profile(Profile(whole.meta, tables), tmp_path / "p")
    latency = LatencyModel(read_profile(tmp_path / "p"))
    assert latency.device_ns(chunk_step(0)) > 0
    with pytest.raises(TandemError, match=r"no table swap.*--cpu-blocks"):
        latency.copies_ns(out(0))


def test_a_negative_tier_is_refused():
    with pytest.raises(TandemError, match="num_cpu_blocks is -1"):
        ServingConfig(num_blocks=5, num_cpu_blocks=-1)
