"""The real backend on small models: it overlaps steps, decides as the simulator does, and makes the right tokens."""

from __future__ import annotations

import dataclasses
import itertools
import random

import pytest
from tiny_models import tiny_model

from engine.config import ServingConfig
from engine.executor.executor import Executor
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords
from engine.scheduler import POLICIES
from sim.negative_controls import negative_controls
from sim.replay import replay
from traces.errors import TandemError
from traces.request import TraceRequest
from traces.request_classes import RequestClass, assign_classes, predict_lengths
from traces.trace import Trace

MS = 1_000_000
LIMITS = ServingConfig(num_blocks=24, block_size=8, max_seqs=6, max_batched_tokens=130, max_model_len=120)


@pytest.fixture(scope="module")
def executor(tmp_path_factory) -> Executor:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return Executor(str(folder), threads=1)


def workload(count: int = 20, hidden_stops: bool = False) -> list[TraceRequest]:
    generator = random.Random(3)
    requests = []
    for number in range(count):
        prompt = [generator.randrange(3, 101) for _ in range(generator.randint(3, 60))]
        output = generator.randint(2, 40)
        limit = output + 15 if hidden_stops else output
        requests.append(TraceRequest(number, number * 2 * MS, len(prompt), output, limit, prompt))
    return requests


def serve(executor: Executor, requests, config: ServingConfig, stop_rule: str = "trace", check: bool = False):
    recorder = Recorder()
    runner = executor.serve(requests, config, recorder, stop_rule, check)
    return RunRecords({}, recorder.tables()), runner.outputs


@pytest.fixture(scope="module")
def expected(executor) -> dict[int, list[int]]:
    """Every request served alone, whole prompt at once, with room for all."""
    config = ServingConfig(num_blocks=100, block_size=16, max_seqs=1, max_batched_tokens=256, scheduler="fcfs")
    return serve(executor, workload(), config)[1]


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("depth", [1, 2])
def test_batched_chunked_and_preempted_requests_get_the_tokens_they_get_alone(executor, expected, policy, depth):
    config = dataclasses.replace(LIMITS, scheduler=policy, pipeline_depth=depth)
    run, outputs = serve(executor, workload(), config)
    assert sum(run.tables["requests"]["preemptions"].to_pylist()) > 0
    assert outputs == expected


@pytest.mark.parametrize("policy", ["edf", "fastserve:quantum=2", "priority", "srpt", "swiftllm", "vtc"])
def test_requests_that_are_preempted_by_choice_and_swapped_get_the_tokens_they_get_alone(executor, expected, policy):
    """Blocks that somebody leaves in a step may be somebody else's in that same step."""
    classes = [RequestClass("a", 1, -1, ttft_slo_ms=20), RequestClass("b", 2, e2e_slo_ms=500)]
    trace = predict_lengths(assign_classes(Trace(workload()), classes, seed=1), 0.5)
    config = dataclasses.replace(LIMITS, scheduler=policy, pipeline_depth=2, num_cpu_blocks=40)
    run, outputs = serve(executor, trace.requests, config)
    assert sum(run.tables["requests"]["swaps"].to_pylist()) > 0
    assert outputs == expected
    assert replay(run, config).records.tables["steps"]["digest"].equals(run.tables["steps"]["digest"])


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("hidden_stops", [False, True], ids=["length", "stops"])
def test_the_simulator_makes_the_decisions_of_a_real_run(executor, policy, depth, hidden_stops):
    config = dataclasses.replace(LIMITS, scheduler=policy, pipeline_depth=depth)
    run, _ = serve(executor, workload(hidden_stops=hidden_stops), config)
    replayed = replay(run, config).records
    assert replayed.tables["steps"]["digest"].equals(run.tables["steps"]["digest"])
    assert negative_controls(run, config) == {"arrival_moved": True, "step_longer": True}
    outcomes = set(run.tables["requests"]["outcome"].to_pylist())
    assert outcomes == ({"stop"} if hidden_stops else {"length"})
    wasted = sum(run.tables["requests"]["wasted_tokens"].to_pylist())
    assert (wasted > 0) == (hidden_stops and depth == 2)


def test_the_models_own_stop_token_ends_a_request(executor):
    requests = [dataclasses.replace(each, max_tokens=60, output_len=60) for each in workload()]
    config = dataclasses.replace(LIMITS, num_blocks=100, pipeline_depth=2)
    run, outputs = serve(executor, requests, config, stop_rule="model")
    rows = run.tables["requests"].to_pylist()
    stopped = [row for row in rows if row["outcome"] == "stop"]
    assert stopped, "no request met the stop token: the test needs another seed"
    for row in stopped:
        made = outputs[row["request"]]
        assert made.index(2) == row["output_len"] - 1
        assert len(made) == row["output_len"] + row["wasted_tokens"]
    assert replay(run, config).records.tables["steps"]["digest"].equals(run.tables["steps"]["digest"])


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("short", [1, 2])
def test_a_request_that_stops_just_before_max_tokens_is_recorded_as_stopped(executor, depth, short):
    """At depth 2 the step that makes its last token by `max_tokens` is planned before the stop is known."""
    requests = [dataclasses.replace(each, max_tokens=each.output_len + short) for each in workload()]
    config = dataclasses.replace(LIMITS, num_blocks=100, pipeline_depth=depth)
    run, outputs = serve(executor, requests, config)
    for row in run.tables["requests"].to_pylist():
        wasted = min(short, depth - 1)
        assert (row["outcome"], row["output_len"]) == ("stop", requests[row["request"]].output_len)
        assert row["wasted_tokens"] == wasted == len(outputs[row["request"]]) - row["output_len"]
    again = replay(run, config).records.tables
    assert all(again[name].equals(run.tables[name]) for name in again)


def test_at_depth_2_step_n_plus_1_is_planned_while_step_n_runs(executor):
    config = dataclasses.replace(LIMITS, num_blocks=100, pipeline_depth=2)
    steps = serve(executor, workload(), config)[0].tables["steps"].to_pylist()
    overlapped = [
        earlier["device_start_ns"] < later["planned_ns"] < earlier["device_start_ns"] + earlier["device_ns"]
        for earlier, later in itertools.pairwise(steps)
    ]
    assert sum(overlapped) > len(overlapped) / 4


def test_at_depth_1_it_is_not(executor):
    steps = serve(executor, workload(), dataclasses.replace(LIMITS, num_blocks=100))[0].tables["steps"].to_pylist()
    assert all(a["completed_ns"] < b["planned_ns"] for a, b in itertools.pairwise(steps))


def test_a_failing_data_plane_ends_the_run_with_its_own_error(executor, monkeypatch):
    def fail(*_: object) -> None:
        raise TandemError("the processor is on fire")

    monkeypatch.setattr(executor.llama, "forward", fail)
    with pytest.raises(TandemError, match="the processor is on fire"):
        serve(executor, workload(1), LIMITS)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("token", [101, 100_000, -1])
def test_a_prompt_with_a_token_that_the_model_lacks_is_rejected_and_the_others_get_their_tokens(
    executor, expected, depth, token
):
    config = dataclasses.replace(LIMITS, pipeline_depth=depth)
    requests = workload()
    bad = {3: [token], 4: [5, 6, token, 7], 19: [7] * 40 + [token]}
    for each, ids in bad.items():
        requests[each] = dataclasses.replace(requests[each], prompt_len=len(ids), prompt_token_ids=ids)
    run, outputs = serve(executor, requests, config, check=True)
    assert outputs == {each: made for each, made in expected.items() if each not in bad}
    rows = run.tables["requests"].to_pylist()
    assert {row["request"] for row in rows if row["outcome"] == "rejected" and row["refused"]} == set(bad)
    assert {row["reason"] for row in rows} == {
        None,
        f"token id {token} is not in the model's vocabulary, which has 101",
    }
    again = replay(run, config).records.tables
    assert all(again[name].equals(run.tables[name]) for name in again)


def test_a_trace_without_token_ids_is_served_with_seeded_ones(executor):
    requests = [TraceRequest(each, 0, 20, 5, 5) for each in range(4)]
    first, second = (serve(executor, requests, LIMITS)[1] for _ in range(2))
    assert first == second and len({tuple(output) for output in first.values()}) > 1
