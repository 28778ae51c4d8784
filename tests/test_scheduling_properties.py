"""What must hold for every policy, at both depths, whatever the workload: searched for counterexamples."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shadow import serve

from engine.config import RULES, ServingConfig
from engine.request import CANCELLED, LENGTH, REJECTED, STOP, Request
from engine.scheduler import POLICIES, load_scheduler
from engine.scheduler.base import Scheduler
from traces.request import TraceRequest

MS = 1_000_000
WITH_PARAMETERS = (
    "fastserve:levels=3:quantum=1:prefill_tokens=8:starve_ms=20",
    "vtc:input_weight=0:output_weight=3",
)


def policy_of(config: ServingConfig) -> type[Scheduler]:
    return POLICIES[config.scheduler.partition(":")[0]]


@st.composite
def hash_ids(draw: st.DrawFn, number: int, most: int) -> list[int]:
    """What a prompt of up to `most` blocks begins with: one of two texts, which some prompts leave at some point."""
    text, common, own = draw(st.integers(0, 1)), draw(st.integers(0, most)), draw(st.booleans())
    return [(1 + text) * 1000 + place for place in range(common)] + [number] * (own and common < most)


@st.composite
def workloads(draw: st.DrawFn) -> list[TraceRequest]:
    """Requests some of which stop early, are cancelled, or begin as others do."""
    arrivals = sorted(draw(st.lists(st.integers(0, 60 * MS), min_size=1, max_size=25)))
    width = draw(st.sampled_from([3, 8, 32]))
    requests = []
    for number, arrival_ns in enumerate(arrivals):
        max_tokens = draw(st.integers(1, 40))
        cancelled = draw(st.integers(0, 9)) == 0
        prompt_len = draw(st.integers(1, 90))
        prompt = draw(st.none() | hash_ids(number, -(-prompt_len // width)))
        told = None if prompt is None else draw(st.none() | hash_ids(number, 1 + max_tokens // width))
        requests.append(
            TraceRequest(
                id=number,
                arrival_ns=arrival_ns,
                prompt_len=prompt_len,
                hash_ids=prompt,
                hash_block_size=width,
                output_ids=told,
                output_len=draw(st.one_of(st.just(max_tokens), st.integers(1, max_tokens))),
                max_tokens=max_tokens,
                predicted_length=draw(st.none() | st.integers(1, 60)),
                priority=draw(st.integers(-1, 1)),
                client=draw(st.sampled_from([None, "a", "b"])),
                cancel_ns=arrival_ns + draw(st.integers(0, 40 * MS)) if cancelled else None,
                ttft_slo_ns=draw(st.none() | st.integers(1, 50 * MS)),
                e2e_slo_ns=draw(st.none() | st.integers(1, 200 * MS)),
            )
        )
    return requests


@st.composite
def configs(draw: st.DrawFn) -> ServingConfig:
    max_seqs = draw(st.integers(1, 12))
    return ServingConfig(
        num_blocks=draw(st.integers(2, 60)),
        block_size=draw(st.sampled_from([1, 4, 16])),
        max_seqs=max_seqs,
        max_batched_tokens=draw(st.integers(max_seqs, 160)),
        max_model_len=draw(st.integers(16, 160)),
        scheduler=draw(st.sampled_from([*sorted(POLICIES), *WITH_PARAMETERS])),
        pipeline_depth=draw(st.sampled_from([1, 2])),
        num_cpu_blocks=draw(st.sampled_from([0, 0, 5, 60])),
        prefix_caching=draw(st.booleans()),
        **{option: draw(st.sampled_from(rules)) for option, rules in RULES.items()},
    )


class Whimsical(Scheduler):
    """Uses its verbs in any order, and preempts whom it likes but the oldest: a policy that somebody may yet write."""

    chunked = True

    def __init__(self, config: ServingConfig, seed: int) -> None:
        super().__init__(config)
        self.whims = random.Random(seed)

    def plan(self, now: int) -> None:
        if len(self.running) > 1 and self.whims.random() < 0.1:
            self.preempt(self.victim())
        decoding = [each for each in self.running.values() if each.id in self.decoding]
        if len(decoding) > 1 and self.whims.random() < 0.2:
            self.skip(self.whims.choice(decoding))
            self.wake_at(now + 1)  # for this may leave nothing to run
        for verb in self.whims.sample([self.decode, self.fill], 2):
            verb()

    def fill(self) -> None:
        for request in self.queue():
            if not self.prefill(request):
                break

    def victim(self) -> Request:
        oldest, *others = self.running.values()
        return self.whims.choice(others) if others else oldest

    def swaps(self, request: Request) -> bool:
        return self.whims.random() < 0.8


@st.composite
def schedulers(draw: st.DrawFn, config: ServingConfig) -> Scheduler:
    """The config's own policy, or a whimsical one."""
    seed = draw(st.none() | st.integers(0, 10**6))
    return load_scheduler(config) if seed is None else Whimsical(config, seed)


@settings(max_examples=400, deadline=None)
@given(workloads(), configs(), st.data())
def test_every_request_ends_with_exactly_its_tokens_and_no_step_breaks_an_invariant(requests, config, data):
    # `serve` checks every step: budgets, blocks owned once in plan order, contexts, what is lost.
    recorder, served = serve(requests, config, scheduler=data.draw(schedulers(config)))
    rows = recorder.tables()["requests"].to_pylist()
    assert len(rows) == len(requests) == len(served) == recorder.ended
    for source, row in zip(requests, sorted(rows, key=lambda row: row["request"]), strict=True):
        if row["outcome"] == CANCELLED:
            assert source.cancel_ns is not None
        elif row["outcome"] == REJECTED:
            assert row["reason"] and row["first_scheduled_ns"] is None
        else:
            assert row["outcome"] == (LENGTH if source.output_len == source.max_tokens else STOP)
            assert row["output_len"] == source.output_len
            assert source.arrival_ns <= row["delivered_ns"] <= row["first_scheduled_ns"]
            assert row["first_scheduled_ns"] < row["first_token_ns"] <= row["last_token_ns"]
        assert 0 <= row["wasted_tokens"] <= config.pipeline_depth - 1 or row["outcome"] == CANCELLED


@settings(max_examples=60, deadline=None)
@given(workloads(), configs())
def test_a_repeated_run_has_identical_records(requests, config):
    first, second = (serve(requests, config)[0].tables() for _ in range(2))
    assert all(first[name].equals(second[name]) for name in first)


@settings(max_examples=100, deadline=None)
@given(workloads(), configs())
def test_a_request_is_rejected_only_if_it_could_never_run(requests, config):
    _, served = serve(requests, config)
    for request in served:
        total = request.prompt_len + request.max_tokens
        too_long = total > config.max_model_len
        too_big = -(-(total - 1) // config.block_size) > config.num_blocks
        unsplittable = not policy_of(config).chunked and total - 1 > config.max_batched_tokens
        if request.outcome != CANCELLED or request.reason:
            assert (request.outcome == REJECTED) == (too_long or too_big or unsplittable)


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"fastserve"}))  # which has everybody take turns
@pytest.mark.parametrize("depth", [1, 2])
def test_when_blocks_are_scarce_requests_are_preempted_and_the_oldest_is_not(policy, depth):
    requests = [TraceRequest(i, i, prompt_len=20, output_len=60, max_tokens=60) for i in range(12)]
    config = ServingConfig(num_blocks=20, max_seqs=12, scheduler=policy, pipeline_depth=depth, max_batched_tokens=300)
    _, served = serve(requests, config)
    assert sum(request.preemptions for request in served) > 0
    assert served[0].preemptions == 0
    assert all(request.outcome == LENGTH for request in served)
