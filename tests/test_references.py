"""Tandem's policies decide as the schedulers that they are named after, but for the rules that docs/others.md lists.

A reference, written from the published rules, with all of those exchanged decides as Tandem on every workload: there
are no more. With one of them left it does not, in the smallest way that was found.
"""

from __future__ import annotations

import random
from collections import defaultdict
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
from reader import ROOT
from references import LISTS, Job, Reference, Sarathi, SwiftLlm
from vllm_logs import Log, TickBackend

from engine.backend import Launch, drive
from engine.checks.step_checker import CheckedBackend
from engine.config import ServingConfig
from engine.instance import Instance
from engine.scheduler import load_scheduler
from engine.step import Step
from traces.request import TraceRequest


class FullLog(Log):
    """Swaps, too."""

    def launched(self, step: Step, now: int, launch: Launch) -> None:
        super().launched(step, now, launch)
        self.steps[step.index] |= {"swapped_out": list(step.swapped_out), "swapped_in": list(step.swapped_in)}


def tandem(config: ServingConfig, jobs: list[Job]) -> list[dict[str, Any]]:
    """What Tandem's policy decides, every step checked."""
    scheduler, log = load_scheduler(config), FullLog(defaultdict(int))
    requests = [
        TraceRequest(
            id=job.id,
            arrival_ns=job.arrival,
            prompt_len=job.prompt_len,
            output_len=job.output_len,
            max_tokens=job.max_tokens,
        )
        for job in jobs
    ]
    drive(Instance(scheduler, CheckedBackend(TickBackend(requests, config), scheduler.config), log).serve())
    steps = [{name: step[name] for name in ("tick", *LISTS)} for step in log.steps.values()]
    return [step | {name: sorted(step[name]) for name in ("decodes", "finished")} for step in steps]


def workload(seed: int, scheduler: str, scarce: bool, least_blocks: int = 0) -> tuple[ServingConfig, list[Job]]:
    """A dozen requests, one in three of which stops early, and limits under which each can be served."""
    draw = random.Random(seed)
    arrivals = sorted(draw.randrange(draw.choice([1, 30])) for _ in range(draw.randint(3, 14)))
    longest = 100 if least_blocks else 30
    jobs = []
    for number, arrival in enumerate(arrivals):
        most = draw.randint(1, 30)
        made = draw.randint(1, most) if draw.random() < 1 / 3 else most
        jobs.append(Job(number, arrival, draw.randint(1, longest), most, made))
    size = draw.choice([1, 2] if least_blocks else [1, 2, 4])
    need = max(-(-(job.prompt_len + job.max_tokens) // size) for job in jobs) + 2
    blocks = max(need + draw.randrange(need), least_blocks) if scarce else 4000
    seqs = draw.randint(1, 8)
    tokens = max(seqs, draw.randint(1, 40))
    if scheduler == "swiftllm":
        tokens = max(tokens, *(job.prompt_len + job.max_tokens for job in jobs))
    cpu_blocks = draw.choice([0, 10, 1000]) if scheduler == "swiftllm" else 0
    return ServingConfig(
        num_blocks=blocks,
        block_size=size,
        max_seqs=seqs,
        max_batched_tokens=tokens,
        scheduler=scheduler,
        num_cpu_blocks=cpu_blocks,
    ), jobs


def preemptions(steps: list[dict[str, Any]]) -> int:
    return sum(len(step["preempted"]) + len(step["swapped_out"]) for step in steps)


def agree(
    scheduler: str, reference: type[Reference], ours: set[str], scarce: bool, least_blocks: int = 0, count: int = 100
) -> int:
    """Assert that they decide alike on that many workloads; of these decisions, how many were to preempt."""
    preempted = 0
    for seed in range(count):
        config, jobs = workload(seed, scheduler, scarce, least_blocks)
        decided = tandem(config, jobs)
        assert decided == reference(config, deepcopy(jobs), frozenset(ours)).decisions(), seed
        preempted += preemptions(decided)
    return preempted


def test_with_memory_to_spare_chunked_prefill_and_sarathi_are_sarathi_serve():
    for policy in ("chunked_prefill", "sarathi"):
        assert agree(policy, Sarathi, set(), scarce=False, count=50) == 0


def test_where_memory_is_scarce_sarathi_is_sarathi_serve_but_for_the_output_tokens_that_it_forgot_to_count():
    assert agree("sarathi", Sarathi, {"restart"}, scarce=True, least_blocks=100) > 50


def test_with_fewer_than_a_hundred_blocks_sarathi_differs_in_who_is_admitted_again_at_once():
    assert agree("sarathi", Sarathi, {"restart", "readmit"}, scarce=True) > 100


def test_chunked_prefill_is_sarathi_serve_but_for_the_rules_that_the_page_lists():
    assert agree("chunked_prefill", Sarathi, set(Sarathi.rules), scarce=True) > 100


def test_swiftllm_is_swiftllm_but_for_the_rules_that_the_page_lists():
    assert agree("swiftllm", SwiftLlm, set(SwiftLlm.rules), scarce=True) > 100


def test_with_memory_and_batch_size_to_spare_swiftllm_is_swiftllm():
    for seed in range(50):
        config, jobs = workload(seed, "swiftllm", scarce=False)
        roomy = replace(config, max_seqs=len(jobs), max_batched_tokens=max(config.max_batched_tokens, len(jobs)))
        assert tandem(roomy, jobs) == SwiftLlm(roomy, deepcopy(jobs)).decisions()


MEMORY = frozenset({"idle_block", "reserve", "watermark"})
EXAMPLES = {  # rule -> policy; blocks, block size, requests and tokens a step; prompts and outputs; what differs first
    # Its third token has a place in its last block, but no block is free: theirs computes all three again.
    "idle_block": ("chunked_prefill", (2, 2, 1, 1), [(3, 2)], "decodes", [0], []),
    # The long prompt holds three blocks from the start, so that the other's second token costs it its place.
    "reserve": ("chunked_prefill", (4, 2, 3, 3), [(2, 2), (6, 1)], "preempted", [], [1]),
    "watermark": ("chunked_prefill", (100, 1, 3, 6), [(2, 1), (98, 1)], "chunks", [[0, 0, 2], [1, 0, 4]], [[0, 0, 2]]),
    # Its first token was made before it was preempted: it has made both.
    "restart": ("chunked_prefill", (3, 1, 3, 3), [(1, 2), (1, 2)], "finished", [1], []),
    # One of its two tokens was left when it was preempted, and one is run.
    "readmit": ("sarathi", (2, 4, 3, 3), [(2, 2), (2, 1)], "chunks", [], [[1, 0, 1]]),
    # The block of the first is free, but counts until a step has tried to decode: theirs loses a turn.
    "stale": ("swiftllm", (2, 1, 1, 3), [(1, 1), (2, 1)], "tick", 1, 2),
    "batch_size": ("swiftllm", (2, 1, 1, 3), [(1, 2), (1, 1)], "chunks", [], [[1, 0, 1]]),
    "newest_first": ("swiftllm", (5, 2, 4, 8), [(6, 2), (2, 3), (1, 2)], "swapped_in", [1, 2], [2, 1]),
    "run_at_once": ("swiftllm", (2, 1, 2, 3), [(1, 2), (1, 2)], "decodes", [], [1]),
    # There are no blocks in host memory at all.
    "cpu": ("swiftllm", (2, 1, 2, 3), [(1, 2), (1, 2)], "swapped_out", [], [1]),
}


def limits(scheduler: str, blocks: int, size: int, seqs: int, tokens: int, cpu_blocks: int = 9) -> ServingConfig:
    return ServingConfig(
        num_blocks=blocks,
        block_size=size,
        max_seqs=seqs,
        max_batched_tokens=tokens,
        scheduler=scheduler,
        num_cpu_blocks=cpu_blocks,
    )


@pytest.mark.parametrize("rule", EXAMPLES)
def test_each_rule_of_theirs_that_is_not_ours_makes_a_difference(rule):
    scheduler, numbers, lengths, field, ours_there, theirs_there = EXAMPLES[rule]
    swaps = scheduler == "swiftllm" and rule != "cpu"
    config = limits(scheduler, *numbers, cpu_blocks=9 if swaps else 0)
    jobs = [Job(number, 0, prompt, output, output) for number, (prompt, output) in enumerate(lengths)]
    reference = SwiftLlm if scheduler == "swiftllm" else Sarathi
    exchanged = reference.rules - MEMORY if scheduler == "sarathi" else reference.rules
    ours = tandem(config, jobs)
    assert ours == reference(config, deepcopy(jobs), exchanged).decisions()
    theirs = reference(config, deepcopy(jobs), exchanged - {rule}).decisions()
    first, other = next((a, b) for a, b in zip(ours, theirs, strict=False) if a != b)
    assert (first[field], other[field]) == (ours_there, theirs_there)


def test_there_is_an_example_of_every_rule_and_each_is_on_the_page():
    page = (ROOT / "docs/others.md").read_text()
    assert set(EXAMPLES) == Sarathi.rules | SwiftLlm.rules
    assert all(f"(`{rule}`)" in page for rule in EXAMPLES)


def test_where_all_blocks_are_taken_sarathi_serve_preempts_for_nothing():
    config = limits("sarathi", 100, 2, 2, 200, cpu_blocks=0)
    jobs = [Job(0, 0, 100, 3, 3), Job(1, 0, 97, 2, 2)]  # the second token of the one takes the last block
    ours = replace(config, scheduler="chunked_prefill")
    assert (preemptions(tandem(config, jobs)), preemptions(tandem(ours, jobs))) == (1, 0)


def test_who_runs_alone_and_owns_all_blocks_is_computed_again_for_each_token():
    config, jobs = limits("sarathi", 2, 2, 1, 4, cpu_blocks=0), [Job(0, 0, 3, 2, 2)]
    steps = tandem(config, jobs)
    assert steps == Sarathi(config, deepcopy(jobs), frozenset({"restart"})).decisions()
    assert [step["tick"] for step in steps] == [0, 2]  # in between it preempts itself, and nothing runs


def test_whom_sarathi_serve_never_admits_is_rejected():
    config, job = limits("sarathi", 100, 1, 1, 100, cpu_blocks=0), Job(0, 0, 100, 1, 1)
    with pytest.raises(AssertionError, match="does not come to an end"):
        Sarathi(config, [deepcopy(job)]).decisions(most_ticks=100)
    assert tandem(config, [job]) == []
    assert len(tandem(replace(config, scheduler="chunked_prefill"), [job])) == 1


def test_who_would_wait_for_ever_once_preempted_is_rejected_though_sarathi_serve_may_be_lucky():
    config, job = limits("sarathi", 100, 1, 1, 100, cpu_blocks=0), Job(0, 0, 90, 11, 11)
    assert len(Sarathi(config, [deepcopy(job)]).decisions()) == 11
    assert tandem(config, [job]) == []


def test_whose_tokens_could_not_be_computed_again_in_one_step_is_rejected_though_swiftllm_serves_it():
    config, job = limits("swiftllm", 100, 1, 1, 10), Job(0, 0, 10, 2, 2)
    assert len(SwiftLlm(config, [deepcopy(job)]).decisions()) == 2
    assert tandem(config, [job]) == []


def test_a_reference_that_is_changed_is_not_equal():
    config, jobs = workload(0, "sarathi", scarce=True, least_blocks=100)
    assert tandem(config, jobs) != Sarathi(replace(config, block_size=4), deepcopy(jobs)).decisions()
