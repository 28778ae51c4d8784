"""Each policy does what its paper claims, on a workload where it shows and where the baseline does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from shadow import serve

from analysis.metrics.columns import Floats, column
from analysis.metrics.summary import metrics, request_metrics
from analysis.metrics.tokens import token_times
from engine.config import ServingConfig
from engine.records.run_folder import RunRecords
from engine.request import CANCELLED, LENGTH
from engine.scheduler import POLICIES, load_scheduler
from engine.scheduler.lazy_heap import LazyHeap
from engine.scheduler.policies.vtc import VirtualTokenCounter
from engine.scheduler.registry import check_scheduler
from sim.replay import recorded_requests, replay
from traces.arrivals import assign_arrivals
from traces.errors import TandemError
from traces.request import TraceRequest
from traces.request_classes import RequestClass, assign_classes, predict_lengths
from traces.synthetic import synthetic
from traces.trace import Trace

MS = 1_000_000
LIMITS = ServingConfig(num_blocks=400, num_cpu_blocks=4000, max_seqs=16, max_batched_tokens=2048, max_model_len=4096)


def run(trace: Trace, policy: str, **limits: int) -> RunRecords:
    """Serve in checked simulation: a step takes 1 ms + 10 us a token."""
    return RunRecords({}, serve(trace.requests, replace(LIMITS, scheduler=policy, **limits))[0].tables())


def mean_latency(trace: Trace, policy: str, latency: str = "e2el", **limits: int) -> float:
    return metrics(run(trace, policy, **limits))[f"mean_{latency}_ms"]


def of(trace: Trace, run: RunRecords, latency: str, chosen: Callable[[TraceRequest], bool]) -> Floats:
    """A latency, in ms, of the requests that are chosen."""
    per_request = request_metrics(run)
    return np.array(
        [
            value
            for request, value in zip(per_request["request"], per_request[latency], strict=True)
            if chosen(trace.requests[request])
        ]
    )


def heavy_tailed(rate: float, noise: float, seed: int = 1) -> Trace:
    """Lengths spread over two orders of magnitude, near saturation. Clients ask for more than they need."""
    trace = synthetic(300, seed, "lognormal:4.5:1", "lognormal:4.5:1.2")
    trace = predict_lengths(assign_arrivals(trace, "poisson", rate=rate, seed=seed), noise, seed=seed)
    requests = [replace(each, max_tokens=4000 - each.prompt_len) for each in trace.requests]
    return replace(trace, requests=requests)


# -- SJF and SRPT ------------------------------------------------------------------------------------------


def test_with_an_oracle_short_jobs_first_halves_the_wait_and_preemption_halves_it_again():
    trace = heavy_tailed(rate=60, noise=0)
    fcfs, sjf, srpt = (mean_latency(trace, policy, "ttft") for policy in ("chunked_prefill", "sjf", "srpt"))
    assert sjf < fcfs / 4 and srpt < sjf / 2
    fcfs, sjf, srpt = (mean_latency(trace, policy) for policy in ("chunked_prefill", "sjf", "srpt"))
    assert srpt < sjf < fcfs / 2


@pytest.mark.parametrize("policy", ["sjf", "srpt"])
def test_the_worse_the_predictions_the_less_is_won_but_bad_ones_still_win(policy):
    def mean_of_seeds(policy: str, noise: float) -> float:
        return sum(mean_latency(heavy_tailed(60, noise, seed), policy) for seed in (1, 2, 3, 4)) / 4

    means = [mean_of_seeds(policy, noise) for noise in (0, 1, 2)]
    assert means == sorted(means) and means[0] < 0.8 * means[-1]
    assert means[-1] < 0.7 * mean_of_seeds("chunked_prefill", 0)


def test_without_predictions_srpt_goes_by_what_clients_ask_for():
    requests = [TraceRequest(0, 0, 10, 400, 400), TraceRequest(1, 20 * MS, 10, 20, 20)]
    long, short = (run(Trace(requests), policy, max_seqs=1).tables["requests"] for policy in ("sjf", "srpt"))
    assert long["preemptions"].to_pylist() == [0, 0] and short["preemptions"].to_pylist() == [1, 0]
    assert short["last_token_ns"][1].as_py() < long["first_token_ns"][1].as_py()


# -- FastServe ---------------------------------------------------------------------------------------------


def test_feedback_queues_cut_completion_times_without_knowing_lengths():
    trace = heavy_tailed(rate=45, noise=0)
    blind, fcfs = (metrics(run(trace, policy, max_batched_tokens=4096)) for policy in ("fastserve", "fcfs"))
    assert blind["mean_e2el_ms"] < 0.9 * fcfs["mean_e2el_ms"]
    assert blind["mean_ttft_ms"] < fcfs["mean_ttft_ms"] / 10
    assert blind["mean_normalized_latency_ms"] < fcfs["mean_normalized_latency_ms"] / 2


def bursts() -> Trace:
    """Every 150 ms two long prompts, and after them, at the same time, eight short ones; all with short outputs."""
    generator = np.random.Generator(np.random.PCG64(3))
    lengths = [(1500 if place < 2 else 40, int(generator.integers(5, 10))) for _ in range(30) for place in range(10)]
    return Trace(
        [
            TraceRequest(number, number // 10 * 150 * MS, prompt, output, output)
            for number, (prompt, output) in enumerate(lengths)
        ]
    )


def test_skipping_queues_keeps_long_prompts_from_blocking_short_ones():
    trace = bursts()
    no_skipping = "fastserve:prefill_tokens=100000"  # no prefill costs more than an iteration: all join the top
    runs = [run(trace, policy, max_seqs=4) for policy in ("fastserve", no_skipping, "fcfs")]
    skip, join, fcfs = (of(trace, each, "ttft", lambda request: request.prompt_len == 40).mean() for each in runs)
    assert skip < join / 4 and skip < fcfs / 4
    skip, join, fcfs = (metrics(each)["mean_e2el_ms"] for each in runs)
    assert skip < 0.75 * join and skip < 0.75 * fcfs


def test_who_is_preempted_is_swapped_and_computes_nothing_twice():
    trace = bursts()
    swapped, recomputed = (run(trace, "fastserve", max_seqs=4, num_cpu_blocks=blocks) for blocks in (4000, 0))
    prompts = sum(each.prompt_len for each in trace.requests)
    assert metrics(swapped)["preemptions"] > 0
    assert column(swapped.tables["steps"], "prefill_tokens").sum() == prompts
    assert column(recomputed.tables["steps"], "prefill_tokens").sum() > prompts


def test_who_starves_moves_to_the_top():
    short = [TraceRequest(i, i * 4 * MS, 40, 4, 4) for i in range(500)]  # as many as one row can serve, for 2 s
    trace = Trace([TraceRequest(0, 0, 1500, 40, 40), *(replace(each, id=each.id + 1) for each in short)])
    waits = [
        of(trace, run(trace, f"fastserve:starve_ms={limit}", max_seqs=1), "e2el", lambda each: each.id == 0)[0]
        for limit in (0, 100)
    ]
    assert waits[1] < waits[0] / 2


# -- VTC ---------------------------------------------------------------------------------------------------


def test_a_client_that_floods_the_server_does_not_slow_down_one_that_does_not():
    trace = assign_arrivals(synthetic(300, 1, "uniform:20:200", "uniform:20:100"), "poisson", rate=130, seed=1)
    trace = assign_classes(trace, [RequestClass("greedy", 9), RequestClass("modest", 1)], seed=1)
    fair, fcfs, alone = (
        of(trace, each, "e2el", lambda request: request.client == "modest").mean()
        for each in (run(trace, "vtc", max_seqs=8), run(trace, "chunked_prefill", max_seqs=8), run(trace, "vtc"))
    )
    assert fair < fcfs / 4 and fair < 1.5 * alone


def backlogged() -> Trace:
    """Two clients with everything waiting from the start; one asks for eight times longer outputs."""
    lengths = [(50, 200), (50, 25)]
    return Trace(
        [
            TraceRequest(i, 0, *lengths[i % 2], max_tokens=lengths[i % 2][1], client="wordy" if i % 2 == 0 else "terse")
            for i in range(400)
        ]
    )


def largest_gap(trace: Trace, run: RunRecords) -> float:
    """The most that two clients' services (1 a prompt token, 2 an output token) differ while both have some waiting."""
    tokens, rows = token_times(run), run.tables["requests"]
    wordy = np.array([each.client == "wordy" for each in trace.requests])
    prompts = np.array([each.prompt_len for each in trace.requests])
    admitted = column(rows, "first_scheduled_ns")[np.argsort(column(rows, "request"))]
    times = np.concatenate([tokens.time_ns, admitted])
    service = np.concatenate([np.full(len(tokens.time_ns), 2), prompts])
    sign = np.where(np.concatenate([wordy[tokens.request], wordy]), 1, -1)
    order = np.argsort(times, kind="stable")
    until = min(admitted[wordy].max(), admitted[~wordy].max())
    gap = np.cumsum((service * sign)[order])
    return float(np.abs(gap[times[order] <= until]).max())


def test_the_services_of_two_backlogged_clients_differ_by_no_more_than_the_papers_bound():
    trace, limits = backlogged(), {"num_blocks": 64, "num_cpu_blocks": 0}
    bound = 2 * max(50, 2 * 64 * LIMITS.block_size)  # 2 max(w_p longest prompt, w_q tokens in a batch)
    assert largest_gap(trace, run(trace, "vtc", **limits)) <= bound
    assert largest_gap(trace, run(trace, "chunked_prefill", **limits)) > 5 * bound


def test_counters_count_every_token_once_whatever_is_preempted():
    trace = backlogged()
    for cpu_blocks in (0, 100):
        config = replace(
            LIMITS, num_blocks=40, num_cpu_blocks=cpu_blocks, scheduler="vtc:input_weight=3:output_weight=5"
        )
        scheduler = load_scheduler(config)
        assert isinstance(scheduler, VirtualTokenCounter)
        requests = [replace(each, id=i, client=each.client) for i, each in enumerate(trace.requests[:40])]
        _, served = serve(requests, config, scheduler=scheduler)
        assert sum(request.preemptions for request in served) > 0
        assert scheduler.counter("wordy") == 20 * (3 * 50 + 5 * 200)
        assert scheduler.counter("terse") == 20 * (3 * 50 + 5 * 25)  # not lifted: it had some waiting all the time


def test_a_client_cannot_save_up_service_while_it_is_away():
    early = [TraceRequest(i, 0, 50, 50, 50, client="early") for i in range(150)]
    late = [TraceRequest(150 + i, 1000 * MS, 50, 50, 50, client="late") for i in range(60)]
    rows = run(Trace(early + late), "vtc", max_seqs=4).tables["requests"].to_pylist()
    starts = sorted((row["first_scheduled_ns"], row["client"]) for row in rows)
    served = [client for start_ns, client in starts if start_ns >= 1000 * MS][:30]
    assert 12 <= served.count("late") <= 18, "they take turns: without the lift, `late` would be given all it missed"


# -- deadlines and priorities ------------------------------------------------------------------------------


def test_earliest_deadline_first_meets_deadlines_that_first_come_first_served_misses():
    trace = assign_arrivals(synthetic(300, 1, "uniform:20:200", "uniform:20:100"), "poisson", rate=100, seed=1)
    classes = [RequestClass("chat", ttft_slo_ms=100, e2e_slo_ms=400), RequestClass("batch", e2e_slo_ms=5000)]
    trace = assign_classes(trace, classes, seed=1)
    edf, fcfs = (metrics(run(trace, policy, max_seqs=8)) for policy in ("edf", "chunked_prefill"))
    assert edf["own_slo_attainment"] == 1.0 and fcfs["own_slo_attainment"] < 0.8


def test_who_has_kept_its_promise_makes_room_for_who_has_not():
    requests = [
        TraceRequest(0, 0, 10, 200, 200, ttft_slo_ns=50 * MS),
        TraceRequest(1, 0, 10, 200, 200, e2e_slo_ns=1000 * MS),
        TraceRequest(2, 100 * MS, 10, 20, 20, e2e_slo_ns=500 * MS),
    ]
    table = run(Trace(requests), "edf", max_seqs=2).tables["requests"]
    assert table["preemptions"].to_pylist() == [1, 0, 0]


def test_a_more_urgent_class_is_served_as_if_it_were_alone():
    trace = assign_arrivals(synthetic(300, 1, "uniform:20:200", "uniform:20:100"), "poisson", rate=130, seed=1)
    trace = assign_classes(trace, [RequestClass("urgent", 1, priority=-1), RequestClass("other", 3)], seed=1)
    urgent, fcfs = (
        of(trace, run(trace, policy, max_seqs=8), "e2el", lambda request: request.priority == -1).mean()
        for policy in ("priority", "chunked_prefill")
    )
    assert urgent < fcfs / 4


def test_a_run_is_replayed_from_its_records_alone_deadlines_clients_and_predictions_included():
    trace = assign_arrivals(synthetic(60, 1, "uniform:20:200", "uniform:20:100"), "poisson", rate=130, seed=1)
    classes = [RequestClass("a", 1, -1, ttft_slo_ms=30), RequestClass("b", 1, 3, e2e_slo_ms=200, patience_ms=900)]
    trace = predict_lengths(assign_classes(trace, classes, seed=1), 0.5)
    for policy in POLICIES:
        config = replace(LIMITS, max_seqs=4, num_blocks=60, scheduler=policy)
        recorded = RunRecords({}, serve(trace.requests, config)[0].tables())
        told = [replace(each, output_len=each.max_tokens) for each in recorded_requests(recorded)]
        assert sorted(told, key=lambda each: each.id) == trace.requests
        assert replay(recorded, config).records.tables["steps"]["digest"].equals(recorded.tables["steps"]["digest"])


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_clients_may_give_up_while_waiting_prefilling_decoding_or_swapped_out(policy):
    requests = [
        TraceRequest(i, i, 40, 60, 60, client=str(i % 3), cancel_ns=None if i % 4 == 0 else i + i * 5 * MS)
        for i in range(24)
    ]
    config = replace(LIMITS, num_blocks=24, num_cpu_blocks=60, max_batched_tokens=100, scheduler=policy)
    recorder, served = serve(requests, config)  # which checks every step, and that no block is lost
    outcomes = [request.outcome for request in served]
    assert set(outcomes[::4]) == {LENGTH} and outcomes.count(CANCELLED) >= 12
    swapped = [row["swaps"] for row in recorder.tables()["requests"].to_pylist() if row["outcome"] == CANCELLED]
    assert sum(swapped) > 0


# -- SARATHI -----------------------------------------------------------------------------------------------


def long_prompts() -> Trace:
    return assign_arrivals(synthetic(200, 1, "uniform:200:2000", "uniform:20:40"), "poisson", rate=15, seed=1)


def test_the_token_budget_trades_time_between_tokens_for_time_to_the_first():
    budgets = (64, 128, 256, 512, 1024, 2048)
    found = [metrics(run(long_prompts(), f"chunked_prefill:budget={budget}", num_blocks=4000)) for budget in budgets]
    between = [each["p99_itl_ms"] for each in found]
    first = [each["mean_ttft_ms"] for each in found]
    assert between == sorted(between) and between[-1] > 4 * between[0]
    assert first == sorted(first, reverse=True) and first[0] > 3 * first[-1]


def test_no_decode_stalls_for_a_prefill_and_no_step_exceeds_the_budget():
    chunked, stalling = (
        run(long_prompts(), policy, num_blocks=4000).tables["steps"]
        for policy in ("chunked_prefill:budget=256", "prefill_first")
    )
    for steps, stalls in ((chunked, False), (stalling, True)):
        alone = column(steps, "decode_tokens") == 0
        holders = column(steps, "running") - column(steps, "chunks")
        assert bool((holders[alone] > 0).any()) == stalls, "decoding requests in a step that decodes nothing"
    assert (column(chunked, "decode_tokens") + column(chunked, "prefill_tokens")).max() == 256


# -- swiftLLM ----------------------------------------------------------------------------------------------


def test_swiftllm_serves_strictly_in_order_and_nobody_new_while_somebody_is_swapped_out():
    trace = assign_arrivals(synthetic(120, 1, "uniform:20:200", "uniform:20:300"), "poisson", rate=100, seed=1)
    tables = run(trace, "swiftllm", num_blocks=80).tables
    first = [
        row["first_scheduled_ns"] for row in sorted(tables["requests"].to_pylist(), key=lambda row: row["request"])
    ]
    assert first == sorted(first)
    steps = tables["steps"]
    outside = np.cumsum(column(steps, "swapped_out_blocks") - column(steps, "swapped_in_blocks"))
    assert outside.max() > 0 and outside[-1] == 0
    assert not column(steps, "chunks")[1:][outside[:-1] > 0].any()
    assert not (column(steps, "chunks") * column(steps, "decode_tokens")).any(), "a step prefills or decodes"
    assert column(steps, "prefill_tokens").sum() == sum(each.prompt_len for each in trace.requests)
    early = run(trace, "prefill_first", num_blocks=80).tables["steps"]
    outside = np.cumsum(column(early, "swapped_out_blocks") - column(early, "swapped_in_blocks"))
    assert column(early, "chunks")[1:][outside[:-1] > 0].any(), "the baseline's baseline admits beside them"


# -- parameters --------------------------------------------------------------------------------------------


def test_parameters_follow_the_name_and_take_the_type_of_their_default():
    scheduler = load_scheduler(replace(LIMITS, scheduler="vtc:output_weight=4"))
    assert isinstance(scheduler, VirtualTokenCounter)
    assert (scheduler.input_weight, scheduler.output_weight) == (1.0, 4.0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("vtc:outputs=4", "no parameter 'outputs': it has input_weight=1.0, output_weight=2.0"),
        ("fcfs:budget=4", "no parameter 'budget': it has none"),
        ("fastserve:quantum=long", "quantum is 'long', not of type int"),
        ("fastserve:quantum=0", "'fastserve:quantum=0': levels, quantum"),
        ("chunked_prefill:budget=4096", "max_batched_tokens"),
        ("chunked_prefill:budget=8", "below max_seqs"),
        ("vtc:output_weight=-1", "0 or more"),
        ("lifo:depth=2", "unknown scheduler 'lifo'"),
    ],
)
def test_a_wrong_parameter_is_refused_by_name(name, words):
    for check in (check_scheduler, load_scheduler):
        with pytest.raises(TandemError, match=words):
            check(replace(LIMITS, scheduler=name))


# -- the heap ----------------------------------------------------------------------------------------------


class Thing:
    def __init__(self, key: int) -> None:
        self.key = key


@given(st.lists(st.tuples(st.sampled_from(["push", "grow", "shrink", "leave", "first"]), st.integers(0, 100))))
def test_a_lazy_heap_knows_the_smallest_of_those_that_belong_whatever_became_of_their_keys(operations):
    things: dict[Thing, None] = {}
    heap = LazyHeap(lambda thing: thing.key, lambda thing: thing in things)
    for operation, number in [*operations, ("first", 0)] * 3:
        some = list(things)[number % len(things)] if things else None
        if operation == "push":
            thing = Thing(number)
            things[thing] = None
            heap.push(thing)
        elif operation == "first":
            first = heap.first()
            assert (first.key if first else None) == min((thing.key for thing in things), default=None)
        elif some and operation == "grow":
            some.key += number
        elif some and operation == "shrink":
            some.key -= number
            heap.push(some)
        elif some:
            del things[some]


def test_a_lazy_heap_forgets_those_that_left():
    member = [Thing(-1)]
    heap = LazyHeap(lambda thing: thing.key, lambda thing: thing in member)
    heap.push(member[0])
    for key in range(10_000):
        heap.push(Thing(key))
    assert heap.first() is member[0] and len(heap._entries) < 200


def test_steps_of_a_policy_by_key_do_not_slow_down_with_the_queue():
    """Keys asked for in a step do not grow with the number of requests that wait."""
    asked = []
    for waiting in (100, 1000):
        config = replace(LIMITS, scheduler="srpt", max_seqs=8)
        scheduler = load_scheduler(config)
        calls, key = [0], type(scheduler).key

        def counted(request, calls=calls, key=key, scheduler=scheduler):
            calls[0] += 1
            return key(scheduler, request)

        scheduler._next._key = scheduler.key = counted
        requests = [TraceRequest(i, 0, 20, 50, 50, predicted_length=50 + i % 7) for i in range(waiting)]
        recorder, _ = serve(requests, config, scheduler=scheduler)
        asked.append(calls[0] / len(recorder.tables()["steps"]))
    assert asked[1] < 2 * asked[0]


def test_sarathi_serves_a_request_that_fills_all_blocks_although_it_could_be_swapped_out():
    config = ServingConfig(3, max_seqs=1, max_batched_tokens=1, max_model_len=35, scheduler="sarathi", num_cpu_blocks=5)
    recorder, _ = serve([TraceRequest(0, 0, 33, 2, 2)], config)
    (row,) = recorder.tables()["requests"].to_pylist()
    assert (row["outcome"], row["output_len"], row["swaps"]) == ("length", 2, 0)
