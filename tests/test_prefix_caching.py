"""Prefix caching: what is shared, who owns it, what is evicted, and that it changes no token that is made."""

from __future__ import annotations

import dataclasses
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shadow import serve
from test_executor import executor
from test_executor import serve as serve_for_real
from test_replay import digests
from test_scheduling_properties import configs, workloads

from analysis.metrics.summary import metrics
from engine.config import ServingConfig
from engine.executor.executor import Executor
from engine.kv_blocks import PrefixCachingPool
from engine.prefix_hash import Content
from engine.records.run_folder import RunRecords
from engine.scheduler import POLICIES
from engine.scheduler.policies.chunked_prefill import ChunkedPrefill
from sim.replay import recorded_requests, replay
from traces.request import TraceRequest

MS = 1_000_000
ROOMY = ServingConfig(num_blocks=200, block_size=16, max_seqs=8, max_batched_tokens=400, prefix_caching=True)

__all__ = ["executor"]  # a fixture


def alike(count: int, prompt_len: int, shared: int, output_len: int = 5, apart_ns: int = 50 * MS) -> list[TraceRequest]:
    """Requests whose first `shared` tokens are the same, one after the other."""
    return [
        TraceRequest(i, i * apart_ns, prompt_len, output_len, output_len, hash_ids=[7], hash_block_size=shared)
        for i in range(count)
    ]


def spans(recorder, request: int) -> list[tuple[int, int]]:
    """Start and tokens of a request's prefill chunks."""
    rows = recorder.tables()["spans"].to_pylist()
    return [(row["start"], row["tokens"]) for row in rows if row["request"] == request and row["kind"] == "prefill"]


# -- hashes ----------------------------------------------------------------------------------------------------


def hashes(ids: list[int], width: int, prompt_len: int, block_size: int = 4) -> list[int]:
    return list(Content(ids, width).hashes(prompt_len, block_size).ids)


def test_a_blocks_hash_stands_for_its_tokens_and_all_before_them():
    whole = hashes([1, 2, 3, 4, 5, 6, 7, 8, 9], 1, 9)
    assert len(whole) == 2  # the ninth token fills no block
    assert hashes([1, 2, 3, 4, 5, 6, 7, 0], 1, 8)[0] == whole[0] != whole[1]
    assert hashes([1, 2, 3, 4, 5, 6, 7, 0], 1, 8)[1] != whole[1]
    assert hashes([0, 2, 3, 4, 5, 6, 7, 8], 1, 8)[1] != whole[1]  # the same four tokens, after others
    assert len({*hashes([1] * 40, 1, 40)}) == 10


def test_hash_ids_wider_or_narrower_than_blocks_stand_for_the_blocks_that_they_cover():
    assert len(hashes([5, 6], 10, 100)) == 5  # 20 tokens are known
    assert len(hashes([5, 6], 10, 17)) == 4  # the prompt ends within the second id
    one, other = hashes([5, 6], 10, 100), hashes([5, 7], 10, 100)
    assert [a == b for a, b in zip(one, other, strict=True)] == [True, True, False, False, False]
    assert len(hashes([1, 2, 3, 4], 2, 8)) == 2


def test_hashes_are_the_same_whatever_the_hash_seed():
    code = "from engine.prefix_hash import Content; print(list(Content([1, 2, 3, 4], 1).hashes(4, 2).ids))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("0", "77")
    }
    assert printed == {f"{hashes([1, 2, 3, 4], 1, 4, 2)}\n".encode()}


# -- the pool --------------------------------------------------------------------------------------------------


def test_the_least_recently_released_prefix_is_evicted_from_its_end_once_nothing_else_is_free():
    pool = PrefixCachingPool(5, 16)
    old, new = pool.allocate(2), pool.allocate(2)
    for blocks, names in ((old, [10, 11]), (new, [20, 21])):
        for block, name in zip(blocks, names, strict=True):
            pool.publish(block, name)
        pool.release(blocks)
    assert (pool.free, pool.used) == (5, 0)
    left = {}
    for count in range(1, 6):
        blocks = pool.allocate(count)
        left[count] = (len(pool.find([10, 11])), len(pool.find([20, 21])))
        pool.release(blocks)
    assert left == {1: (2, 2), 2: (1, 2), 3: (0, 2), 4: (0, 1), 5: (0, 0)}


def test_a_shared_block_is_free_when_its_last_owner_leaves():
    pool = PrefixCachingPool(3, 16)
    (block,) = pool.allocate(1)
    pool.publish(block, 1)
    pool.share([block])
    pool.release([block])
    assert (pool.used, pool.idle([block])) == (1, 0)
    pool.release([block])
    assert (pool.used, pool.idle([block])) == (0, 1)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6), st.integers(0, 6)), max_size=60))
def test_no_block_is_ever_lost_or_handed_out_twice(turns):
    """Requests come, sharing what they find, and go, in any order."""
    pool, held = PrefixCachingPool(12, 1), []
    for text, length, leaver in turns:
        chain = [100 * text + place for place in range(length)]
        found = pool.find(chain)
        if length - len(found) + pool.idle(found) <= pool.free:
            pool.share(found)
            fresh = pool.allocate(length - len(found))
            assert not {*fresh} & {block for blocks in held for block in blocks}
            for block, name in zip(fresh, chain[len(found) :], strict=True):
                pool.publish(block, name)
            held.append([*found, *fresh])
        elif held:
            pool.release(held.pop(leaver % len(held)))
        assert pool.used == len({block for blocks in held for block in blocks})
    for blocks in held:
        pool.release(blocks)
    assert pool.free == 12


# -- what requests get -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("depth", [1, 2])
def test_a_prefix_is_computed_once_and_only_whole_blocks_of_it_are_shared(policy, depth):
    config = dataclasses.replace(ROOMY, scheduler=policy, pipeline_depth=depth)
    recorder, served = serve(alike(4, prompt_len=100, shared=70), config)
    assert spans(recorder, 0) == [(0, 100)]
    assert [spans(recorder, each) for each in (1, 2, 3)] == [[(64, 36)]] * 3
    assert [request.cached_tokens for request in served] == [0, 64, 64, 64]
    found = metrics(RunRecords({}, recorder.tables()))
    assert (found["cached_tokens"], found["prefix_cache_hit_rate"]) == (192, 0.48)


def test_a_prompt_that_is_cached_to_its_end_still_computes_its_last_block():
    recorder, _ = serve(alike(2, prompt_len=64, shared=64), ROOMY)
    assert spans(recorder, 1) == [(48, 16)]


def test_a_block_can_be_shared_while_the_step_that_computes_it_still_runs():
    two = alike(2, prompt_len=100, shared=96, apart_ns=100_000)  # the first step takes 2 ms
    recorder, served = serve(two, dataclasses.replace(ROOMY, pipeline_depth=2))
    rows = recorder.tables()["steps"].to_pylist()
    assert served[1].cached_tokens == 96
    assert rows[1]["planned_ns"] < rows[0]["completed_ns"]


def test_token_ids_are_hashed_and_equal_ones_shared():
    text = [random.Random(1).randrange(1000) for _ in range(100)]
    requests = [TraceRequest(i, i * 50 * MS, 100, 5, 5, text[:80] + [i] * 20) for i in range(3)]
    _, served = serve(requests, ROOMY)
    assert [request.cached_tokens for request in served] == [0, 80, 80]


def test_without_the_option_or_without_knowing_what_prompts_are_nothing_is_shared_and_decisions_are_as_ever():
    known = alike(4, prompt_len=100, shared=70)
    unknown = [dataclasses.replace(each, hash_ids=None) for each in known]
    off = dataclasses.replace(ROOMY, prefix_caching=False)
    runs = [
        RunRecords({}, serve(requests, config)[0].tables())
        for requests, config in ((known, off), (unknown, off), (unknown, ROOMY))
    ]
    assert digests(runs[0]) == digests(runs[1])
    assert [metrics(run)["cached_tokens"] for run in runs] == [0, 0, 0]


def test_the_digest_tells_apart_runs_that_differ_in_nothing_but_what_they_share():
    """One block of 4 that begins late: the same tokens run as if it were computed, in other blocks."""
    run = {
        text: digests(RunRecords({}, serve(requests, ROOMY)[0].tables()))
        for text, requests in (
            ("same", alike(2, prompt_len=100, shared=70)),
            ("other", [dataclasses.replace(each, hash_ids=[each.id]) for each in alike(2, prompt_len=100, shared=70)]),
        )
    }
    assert run["same"][:5] == run["other"][:5] and run["same"] != run["other"]


# -- with everything else that may befall a request ---------------------------------------------------------------


def busy_workload() -> list[TraceRequest]:
    """Requests of three families that stop early or are cancelled, faster than they are served."""
    generator = random.Random(5)
    requests = []
    for number in range(60):
        output, arrival_ns = generator.randint(5, 50), number * 2 * MS
        requests.append(
            TraceRequest(
                number,
                arrival_ns,
                prompt_len=generator.randint(40, 70),
                output_len=output,
                max_tokens=60,
                hash_ids=[generator.randrange(3)],
                hash_block_size=40,
                cancel_ns=arrival_ns + generator.randint(0, 300 * MS) if number % 7 == 0 else None,
            )
        )
    return requests


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("depth", [1, 2])
def test_sharers_are_preempted_swapped_cancelled_and_stopped_and_a_replay_from_the_records_alone_is_identical(
    policy, depth
):
    config = ServingConfig(
        num_blocks=40,
        block_size=8,
        max_seqs=8,
        max_batched_tokens=140,
        num_cpu_blocks=12,
        prefix_caching=True,
        scheduler=policy,
        pipeline_depth=depth,
    )
    recorder, served = serve(busy_workload(), config)
    assert {request.outcome for request in served} == {"stop", "cancelled"}
    swaps, preemptions = (sum(getattr(each, name) for each in served) for name in ("swaps", "preemptions"))
    assert 0 < swaps < preemptions
    assert sum(request.cached_tokens > 0 for request in served if request.preemptions) > 3
    run = RunRecords({}, recorder.tables())
    again = replay(run, config).records.tables
    assert all(again[name].equals(run.tables[name]) for name in again)
    blind = dataclasses.replace(config, prefix_caching=False)
    assert digests(replay(run, blind).records) != digests(run)


def test_a_request_that_lost_its_blocks_finds_those_of_its_prompt_again():
    requests = [TraceRequest(i, i, 64, 60, 60, hash_ids=[i], hash_block_size=64) for i in range(4)]
    config = dataclasses.replace(ROOMY, num_blocks=21)
    recorder, served = serve(requests, config)
    (victim, *_) = [request for request in served if request.preemptions]
    assert victim.cached_tokens > 0
    assert spans(recorder, victim.id)[1][0] > 0


def test_a_request_waits_for_room_beside_a_prefix_that_it_must_take_out_of_the_free_blocks():
    """Of 10 blocks one request holds 5; 4 more are cached, nobody's, and part of the 7 that the next one needs."""
    first, last = alike(2, prompt_len=64, shared=64, apart_ns=52 * MS)
    last = dataclasses.replace(last, id=2, prompt_len=112)
    between = TraceRequest(1, 50 * MS, 64, 16, 16)
    recorder, served = serve([first, between, last], dataclasses.replace(ROOMY, num_blocks=10))
    assert [request.preemptions for request in served] == [0, 0, 0]
    rows = recorder.tables()["requests"].to_pylist()
    assert rows[2]["first_scheduled_ns"] >= rows[1]["last_token_ns"]


class Rash(ChunkedPrefill):
    """Admits the second request twice, for it takes the first time back within the plan."""

    def plan(self, now: int) -> None:
        super().plan(now)
        second = self.running.get(1)
        if second and not second.preemptions:
            self.preempt(second)


class Undecided(ChunkedPrefill):
    """Takes the first request's decode back as it is about to fill a block, after or before it admits the others."""

    def __init__(self, config: ServingConfig, *, verb: str = "skip", late: bool = False) -> None:
        super().__init__(config)
        self.verb, self.late, self.done = verb, late, False

    def plan(self, now: int) -> None:
        self.decode()
        first = self.running.get(0)
        if first and not self.done:
            if first.computed < 31:
                return
            self.done = True
            if self.late:
                self.admit()
            getattr(self, self.verb)(first)
            self.wake_at(now + 1)  # for this may leave nothing to run
        self.admit()

    def admit(self) -> None:
        for request in self.queue():
            if not self.prefill(request):
                break


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("verb", ["skip", "preempt"])
def test_nobody_shares_a_block_whose_last_token_is_taken_back(verb, late):
    """The others' prompts are the first's and its output."""
    whole = list(range(1000, 1064))
    first = TraceRequest(0, 0, 20, 44, 44, whole[:20], output_ids=whole[20:])
    others = [TraceRequest(i, MS, 60, 2, 2, whole[:60]) for i in (1, 2)]
    config = dataclasses.replace(ROOMY, prefix_rules="vllm")
    _, served = serve([first, *others], config, scheduler=Undecided(config, verb=verb, late=late))
    assert {request.outcome for request in served} == {"length"}
    assert all(request.cached_tokens >= 16 for request in served[1:])


def test_what_an_admission_found_that_was_taken_back_is_not_counted():
    _, served = serve(alike(2, prompt_len=100, shared=70, apart_ns=MS), ROOMY, scheduler=Rash(ROOMY))
    assert (served[1].preemptions, served[1].cached_tokens) == (1, 64)


@settings(max_examples=100, deadline=None)
@given(workloads(), configs())
def test_a_run_records_what_a_replay_needs_and_nothing_when_nothing_is_shared(requests, config):
    run = RunRecords({}, serve(requests, config)[0].tables())
    recorded = {each.id: each for each in recorded_requests(run)}
    for source in requests:
        kept, rejected = recorded[source.id], run.tables["requests"].to_pylist()[source.id]["outcome"] == "rejected"
        shares_outputs = config.prefix_rules == "vllm" or config.scheduler.startswith("vllm")
        if kept.hash_ids is not None and shares_outputs and source.hash_block_size != config.block_size:
            assert kept.hash_block_size == config.block_size  # blocks' hashes, of all requests alike
            assert len(kept.hash_ids) <= source.prompt_len // config.block_size
        else:
            assert kept.hash_ids == (source.hash_ids if config.prefix_caching and not rejected else None)


# -- on the real data plane ------------------------------------------------------------------------------------


def texts(number: int, family: int, generator: random.Random) -> TraceRequest:
    """A prompt that begins with one of three texts, in token ids. All come at once, however fast the machine is."""
    text = random.Random(family)
    prompt = [text.randrange(3, 101) for _ in range(40)] + [generator.randrange(3, 101) for _ in range(8)]
    output = generator.randint(2, 40)
    return TraceRequest(number, 0, len(prompt), output, output + 10 * (number % 2), prompt)


@pytest.mark.parametrize(("depth", "cpu_blocks"), [(1, 0), (2, 40)])
@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_real_run_makes_the_same_tokens_from_shared_blocks_and_the_simulator_its_decisions(
    executor: Executor, policy: str, depth: int, cpu_blocks: int
):
    generator = random.Random(2)
    requests = [texts(number, generator.randrange(3), generator) for number in range(24)]
    config = ServingConfig(
        num_blocks=24,
        block_size=8,
        max_seqs=6,
        max_batched_tokens=130,
        max_model_len=120,
        num_cpu_blocks=cpu_blocks,
        scheduler=policy,
        pipeline_depth=depth,
    )
    _, expected = serve_for_real(executor, requests, dataclasses.replace(config, num_blocks=200))
    caching = dataclasses.replace(config, prefix_caching=True)
    run, outputs = serve_for_real(executor, requests, caching, check=True)
    until = {each.id: each.output_len for each in requests}
    assert {each: made[: until[each]] for each, made in outputs.items()} == {
        each: made[: until[each]] for each, made in expected.items()
    }
    found = metrics(run)
    assert found["cached_tokens"] > 300 and found["preemptions"] > 0
    assert any(run.tables["requests"]["swaps"].to_pylist()) == (cpu_blocks > 0)
    assert replay(run, caching).records.tables["steps"]["digest"].equals(run.tables["steps"]["digest"])


def test_prompts_with_equal_hash_ids_are_given_equal_tokens(executor: Executor):
    requests = alike(6, prompt_len=60, shared=40, output_len=20, apart_ns=MS)
    config = ServingConfig(num_blocks=60, block_size=8, max_seqs=6, max_batched_tokens=130, max_model_len=120)
    _, expected = serve_for_real(executor, requests, config)
    run, outputs = serve_for_real(executor, requests, dataclasses.replace(config, prefix_caching=True))
    assert outputs == expected and len({tuple(output) for output in outputs.values()}) > 1
    assert metrics(run)["cached_tokens"] >= 40
