"""What the metrics of a run are: small runs worked out by hand, and a slow oracle for large ones."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shadow import serve, small_profile
from test_scheduling_properties import configs, schedulers, workloads

from analysis.metrics.names import GOODPUT, LATENCIES, P99_REQUESTS, STATISTICS, TOTALS
from analysis.metrics.summary import latencies, latency_statistics, metrics, request_metrics
from analysis.metrics.tokens import itl, token_times
from engine.config import ServingConfig
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords
from engine.records.schema import COLUMNS, tables_from_rows
from engine.step import Step
from sim.device_timing import ProfiledTiming
from sim.simulate import simulate
from traces.errors import TandemError
from traces.request import TraceRequest

MS = 1_000_000
ZEROS = {"int64": 0, "int64[]": None, "string": None, "bool": False, "binary": b""}


def records(**rows: Sequence[dict[str, Any]]) -> RunRecords:
    """Records of the given rows; columns that a row does not name are 0."""
    tables = {
        name: [tuple(row.get(column, ZEROS[kind]) for column, kind in columns.items()) for row in rows.get(name, ())]
        for name, columns in COLUMNS.items()
    }
    return RunRecords({}, tables_from_rows(tables))


def step(completed_ms: float, **columns: int) -> dict[str, Any]:
    return {"completed_ns": int(completed_ms * MS)} | columns


def span(request: int, kind: str, first_step: int, last_step: int, samples: bool = True) -> dict[str, Any]:
    return {"request": request, "kind": kind, "first_step": first_step, "last_step": last_step, "samples": samples}


def request(number: int, arrival_ms: int, first_ms: int, last_ms: int, **columns: Any) -> dict[str, Any]:
    times = {"arrival_ns": arrival_ms * MS, "first_token_ns": first_ms * MS, "last_token_ns": last_ms * MS}
    return {"request": number, "outcome": "length"} | times | columns


@pytest.fixture
def worked_example() -> RunRecords:
    """Request 0 stops with its 4th token, one step before the scheduler hears of it. Request 1 arrives at 5 ms, is
    prefilled in two chunks, of which the second makes the decodes pause, is preempted after its 2nd token, and
    prefilled again."""
    return records(
        requests=[
            request(0, 0, 10, 70, prompt_len=6, output_len=4, outcome="stop", wasted_tokens=1),
            request(1, 5, 50, 100, prompt_len=12, output_len=4, preemptions=1, first_scheduled_ns=15 * MS),
        ],
        steps=[
            step(10, prefill_tokens=6, chunks=1),
            step(20, prefill_tokens=8, chunks=1, decode_tokens=1),
            step(50, prefill_tokens=4, chunks=1),
            step(60, decode_tokens=2),
            step(70, decode_tokens=1),
            step(90, prefill_tokens=14, chunks=1, decode_tokens=1),
            step(100, decode_tokens=1),
        ],
        spans=[
            span(0, "prefill", 0, 0),
            span(1, "prefill", 1, 1, samples=False),
            span(1, "prefill", 2, 2),
            span(1, "decode", 3, 3),
            span(1, "prefill", 5, 5),
            span(0, "decode", 1, 5),
            span(1, "decode", 6, 6),
        ],
    )


def test_token_times_follow_pauses_preemptions_and_stops(worked_example):
    tokens = token_times(worked_example)
    assert tokens.request.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert (tokens.time_ns / MS).tolist() == [10, 20, 60, 70, 50, 60, 90, 100]


def test_per_request_latencies_count_from_arrival(worked_example):
    per_request = request_metrics(worked_example)
    assert per_request["ttft"].tolist() == [10, 45]
    assert per_request["e2el"].tolist() == [70, 95]
    assert per_request["tpot"] == pytest.approx([60 / 3, 50 / 3])
    assert per_request["per_token"] == pytest.approx([70 / 10, 95 / 16])
    assert per_request["normalized_latency"] == pytest.approx([70 / 4, 95 / 4])
    assert per_request["queue"].tolist() == [0, 10]


def test_inter_token_latencies_are_all_gaps_of_all_requests(worked_example):
    assert sorted(itl(worked_example).tolist()) == sorted([10, 40, 10, 10, 30, 10])


def test_totals_of_the_worked_example(worked_example):
    found = metrics(worked_example)
    expected = {
        "completed": 2,
        "total_input_tokens": 18,
        "total_output_tokens": 8,
        "wasted_tokens": 1,
        "preemptions": 1,
        "duration_s": 0.1,
        "request_throughput": 20,
        "output_throughput": 80,
        "total_token_throughput": 260,
        "steps_prefill": 2,
        "steps_decode": 3,
        "steps_mixed": 2,
        "mean_batch": 10 / 7,
        "mean_ttft_ms": 27.5,
        "std_ttft_ms": 17.5,
        "p90_ttft_ms": 41.5,
        "median_itl_ms": 10,
        "mean_itl_ms": 110 / 6,
        "p99_e2el_ms": None,
    }
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_every_key_is_documented(worked_example):
    found = metrics(worked_example, {"ttft": 20})
    latency_keys = {f"{statistic}_{name}_ms" for name in LATENCIES for statistic in STATISTICS}
    assert set(found) == {*TOTALS, *GOODPUT, *latency_keys}


def test_host_time_is_the_policys_and_the_launchs():
    clock_reads = [0, 100_000, 200_000]
    steps = [
        step(1, scheduled_ns=now, planned_ns=now + plan_ns, launched_ns=now + plan_ns + 7_000)
        for now, plan_ns in zip(clock_reads, (20_000, 30_000, 90_000), strict=True)
    ]
    found = metrics(records(steps=steps))
    assert (found["median_schedule_us"], found["median_launch_us"]) == (30, 7)


def test_a_single_token_has_no_tpot_and_no_gap():
    run = records(
        requests=[request(0, 0, 10, 10, prompt_len=3, output_len=1)],
        steps=[step(10, prefill_tokens=3, chunks=1)],
        spans=[span(0, "prefill", 0, 0)],
    )
    assert np.isnan(request_metrics(run)["tpot"]).tolist() == [True]
    found = metrics(run, {"tpot": 0.001})
    assert (found["mean_tpot_ms"], found["mean_itl_ms"], found["mean_ttft_ms"]) == (None, None, 10)
    assert found["slo_attainment"] == 1


@pytest.mark.parametrize("outcomes", [[], ["rejected", "rejected"], ["rejected", "cancelled", "unfinished"]])
def test_a_run_that_completed_nothing_has_counts_and_no_latencies(outcomes):
    rows = [{"request": number, "outcome": outcome, "last_token_ns": None} for number, outcome in enumerate(outcomes)]
    found = metrics(records(requests=rows), {"ttft": 100})
    assert {outcome: found[outcome] for outcome in outcomes} == {each: outcomes.count(each) for each in outcomes}
    assert found["completed"] == 0
    assert [found[name] for name in ("duration_s", "request_throughput", "mean_ttft_ms", "mean_batch")] == [None] * 4
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_goodput_counts_requests_that_meet_every_slo():
    # TTFT 10, 20, 30, 40 ms, E2E 100, 80, 60, 40 ms: the 2nd and 3rd meet both limits.
    served = [request(i, 0, 10 * (i + 1), 100 - 20 * i, prompt_len=1, output_len=2) for i in range(4)]
    others = [{"request": 4 + i, "outcome": outcome} for i, outcome in enumerate(("rejected", "cancelled"))]
    found = metrics(records(requests=served + others), {"ttft": 30, "e2el": 80})
    assert found["request_goodput"] == pytest.approx(2 / 0.1)
    assert found["slo_attainment"] == pytest.approx(2 / 5)  # of 4 completed and 1 rejected


def test_an_slo_on_something_unknown_is_refused_with_the_choices(worked_example):
    with pytest.raises(TandemError, match=r"no SLO on 'itl': choose from ttft, tpot, e2el"):
        metrics(worked_example, {"itl": 10})


@pytest.mark.parametrize(("count", "shown"), [(P99_REQUESTS - 1, False), (P99_REQUESTS, True)])
def test_p99_is_shown_from_200_requests_up_however_many_gaps_there_are(count, shown):
    run = records(
        requests=[request(i, 0, i + 1, 4000 + i, prompt_len=1, output_len=4) for i in range(count)],
        steps=[step(1000 * (i + 1), decode_tokens=count) for i in range(4)],
        spans=[span(i, "decode", 0, 3) for i in range(count)],
    )
    values = latencies(run)
    assert len(values["itl"]) == 3 * count
    table = latency_statistics(values)
    assert [table[name]["p99"] is not None for name in ("ttft", "tpot", "itl", "e2el")] == [shown] * 4
    if shown:
        assert table["ttft"]["p99"] == pytest.approx(np.percentile(np.arange(1, count + 1), 99))


class TokenWatch(ProfiledTiming):
    """Notes which requests make a token in each step, from the steps themselves, one by one."""

    def __init__(self) -> None:
        super().__init__(small_profile())
        self.decoding: set[int] = set()
        self.makers: list[list[int]] = []

    def launch(self, step: Step, now: int):
        self.decoding -= set(step.leaving)
        self.decoding |= set(step.joined)
        sampled = [request_id for request_id, chunk in step.chunks.items() if chunk.samples]
        self.makers.append(sampled + (sorted(self.decoding) if step.decodes else []))
        self.decoding -= set(step.finishing)
        return super().launch(step, now)


@settings(max_examples=150, deadline=None)
@given(workloads(), configs(), st.data())
def test_token_times_equal_those_of_a_loop_over_steps_and_requests(requests, config, data):
    watch = TokenWatch()
    run = RunRecords({}, serve(requests, config, watch, data.draw(schedulers(config)))[0].tables())
    rows = {row["request"]: row for row in run.tables["requests"].to_pylist()}
    made: dict[int, list[int]] = defaultdict(list)
    for makers, row in zip(watch.makers, run.tables["steps"].to_pylist(), strict=True):
        for request_id in makers:
            if len(made[request_id]) < rows[request_id]["output_len"]:
                made[request_id].append(row["completed_ns"])

    tokens = token_times(run)
    expected = [(request_id, time_ns) for request_id in sorted(made) for time_ns in made[request_id]]
    assert list(zip(tokens.request.tolist(), tokens.time_ns.tolist(), strict=True)) == expected

    per_request = request_metrics(run)
    for position, request_id in enumerate(per_request["request"].tolist()):
        times, arrival_ns = made[request_id], rows[request_id]["arrival_ns"]
        assert len(times) == rows[request_id]["output_len"]
        assert per_request["ttft"][position] == pytest.approx((times[0] - arrival_ns) / MS)
        assert per_request["e2el"][position] == pytest.approx((times[-1] - arrival_ns) / MS)
    assert len(itl(run)) == sum(len(made[each]) - 1 for each in per_request["request"].tolist())
    tokens = token_times(run)
    gaps = np.diff(tokens.time_ns)[np.isin(tokens.request, per_request["request"])[1:] & (np.diff(tokens.request) == 0)]
    assert np.sort(itl(run)).tolist() == np.sort(gaps / MS).tolist()
    summary, pooled = metrics(run), latency_statistics(latencies(run))["itl"]
    assert {stat: summary[f"{stat}_itl_ms"] for stat in pooled} == pytest.approx(pooled, nan_ok=True)


class Interrupted(ProfiledTiming):
    """Ctrl-C while a step is in flight."""

    def __init__(self, after_steps: int) -> None:
        super().__init__(small_profile())
        self.left = after_steps

    def launch(self, step: Step, now: int):
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return super().launch(step, now)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("after_steps", [0, 1, 5, 40])
def test_an_interrupted_run_has_the_tokens_of_its_completed_steps(depth, after_steps):
    requests = [TraceRequest(i, i * MS, prompt_len=20, output_len=9 + i, max_tokens=9 + i) for i in range(20)]
    config = ServingConfig(num_blocks=30, max_seqs=8, pipeline_depth=depth)
    whole, recorder = RunRecords({}, serve(requests, config)[0].tables()), Recorder()
    with pytest.raises(KeyboardInterrupt):
        simulate(requests, config, Interrupted(after_steps), recorder)
    partial = RunRecords({}, recorder.tables(), partial=True)

    completed = len(partial.tables["steps"])
    assert completed in (after_steps, max(after_steps - 1, 0))
    end_ns = max(partial.tables["steps"]["completed_ns"].to_pylist(), default=-1)
    expected = token_times(whole)
    known = expected.time_ns <= end_ns
    assert token_times(partial).time_ns.tolist() == expected.time_ns[known].tolist()
    found = metrics(partial)
    assert found["completed"] == sum(end_ns >= row for row in whole.tables["requests"]["last_token_ns"].to_pylist())
    assert found["completed"] + found["unfinished"] == len(partial.tables["requests"])


def test_metrics_of_2000_requests_with_400000_tokens_take_under_300_ms():
    firsts = [14 * number for number in range(2000)]
    run = records(
        requests=[request(i, first, first + 1, first + 200, output_len=200) for i, first in enumerate(firsts)],
        steps=[step(number, chunks=1, prefill_tokens=1, decode_tokens=14) for number in range(29_000)],
        spans=[
            row
            for i, first in enumerate(firsts)
            for row in (span(i, "prefill", first, first), span(i, "decode", first + 1, first + 199))
        ],
    )
    assert len(token_times(run).request) == 400_000
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        metrics(run)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.3
