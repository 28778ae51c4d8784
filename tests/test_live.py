"""Events that come from clients: delivered in the order in which they came, which a replay of the run keeps to."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pyarrow as pa
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st
from shadow import serve, small_profile

from engine.config import ServingConfig
from engine.instance import Instance
from engine.live_events import LiveEvents
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords
from engine.request import unknown_token
from engine.scheduler import load_scheduler
from engine.stop_condition import StopCondition
from sim.backend import SimBackend
from sim.device_timing import DeliveredTiming
from sim.replay import replay
from traces.request import TraceRequest

MS = 1_000_000
CONFIG = ServingConfig(num_blocks=20, block_size=4, max_seqs=4, max_batched_tokens=64, max_model_len=64)
VOCABULARY = 50

Arrival, Cancellation = TraceRequest, tuple[int, int]  # a request's number, and when its client gives up


def served(events: Sequence[Arrival | Cancellation], config: ServingConfig = CONFIG) -> tuple[RunRecords, list[int]]:
    """A simulation of what came in this order; returns its records, and the sequence numbers of what was delivered."""
    env, recorder, order = simpy.Environment(initial_time=0), Recorder(), []

    def admit(source: TraceRequest, terms: StopCondition) -> str | None:
        backend.outputs.seen(source)
        return unknown_token(source, VOCABULARY)

    class Listening(Recorder):
        def delivered(self, event, now):
            super().delivered(event, now)
            order.append(event.sequence)

    recorder, live = Listening(), LiveEvents(lambda: int(env.now), admit)
    backend = SimBackend(env, (), DeliveredTiming(small_profile()), live)
    for event in events:
        if isinstance(event, TraceRequest):
            live.arrive(event, StopCondition())
        else:
            live.cancel(*event)
    live.close()
    env.run(until=env.process(Instance(load_scheduler(config), backend, recorder).serve()))
    return RunRecords({}, recorder.tables()), order


def arrival(number: int, at_ns: int, tokens: int = 8, **fields) -> TraceRequest:
    return TraceRequest(number, at_ns, tokens, 6, 9, **fields)


def sequences(events: Sequence[Arrival | Cancellation]) -> list[int]:
    return [2 * each.id if isinstance(each, TraceRequest) else 2 * each[0] + 1 for each in events]


def assert_replay_is_the_same(run: RunRecords, config: ServingConfig = CONFIG) -> None:
    again = replay(run, config).records.tables
    assert all(again[name].equals(run.tables[name]) for name in again)


def test_what_comes_is_delivered_in_the_order_in_which_it_came_not_in_that_of_its_times():
    # While the prompt of request 2 was read, the clients of 1 and 0 gave up, and all of it reached one turn.
    events = [arrival(0, 0), arrival(1, 0), (1, 3 * MS // 2), (0, 3 * MS // 2), arrival(2, MS)]
    run, order = served(events)
    assert order == sequences(events)
    assert len({row["delivered_ns"] for row in run.tables["requests"].to_pylist()}) == 2, "two turns took it all"
    assert_replay_is_the_same(run)


def test_once_nobody_is_left_to_take_it_all_that_runs_or_is_on_its_way_is_cancelled():
    live = LiveEvents(lambda: 0, lambda source, terms: None)
    live.arrive(arrival(0, 0), StopCondition())
    live.arrive(arrival(1, 0), StopCondition())
    running, ended = (event.request for event in live.due(0))
    ended.outcome = "length"
    live.arrive(arrival(2, 0), StopCondition())
    live.cancel_all("nobody is there")
    assert [(event.request.id, event.is_cancel) for event in live.due(0)] == [(2, False), (2, True), (0, True)]
    assert running.id == 0


@st.composite
def what_comes(draw: st.DrawFn) -> list[Arrival | Cancellation]:
    """Arrivals, some beyond the model's vocabulary, and cancellations after them, at times that say little."""
    events: list[Arrival | Cancellation] = []
    for number in range(draw(st.integers(1, 12))):
        ids = draw(st.none() | st.lists(st.integers(0, VOCABULARY), min_size=8, max_size=8))
        events.append(arrival(number, draw(st.integers(0, 20)) * MS, prompt_token_ids=ids))
        if draw(st.booleans()):
            events.append((number, draw(st.integers(0, 20)) * MS))
    for place, event in enumerate(events):
        if not isinstance(event, TraceRequest):  # no sooner than it arrives
            source = next(each for each in events if isinstance(each, TraceRequest) and each.id == event[0])
            events[place] = event[0], max(event[1], source.arrival_ns)
    moves = draw(st.lists(st.integers(0, len(events) - 1), max_size=10))
    for place in moves:
        if not isinstance(events[place], TraceRequest):
            events.append(events.pop(place))
    return events


@settings(max_examples=150, deadline=None)
@given(what_comes(), st.sampled_from([1, 2]), st.sampled_from(["fcfs", "chunked_prefill", "sjf"]), st.booleans())
def test_a_replay_of_what_came_is_the_same_to_the_last_record(events, depth, policy, prefix_caching):
    config = dataclasses.replace(CONFIG, pipeline_depth=depth, scheduler=policy, prefix_caching=prefix_caching)
    run, order = served(events, config)
    assert order == sequences(events)
    assert_replay_is_the_same(run, config)


def test_a_run_of_an_older_schema_is_replayed_in_the_order_of_its_times():
    run, _ = served([arrival(0, 0), arrival(1, 0), (0, MS), (1, MS + 1), arrival(2, 2 * MS)])
    requests = run.tables["requests"]
    old = requests.set_column(
        requests.column_names.index("cancel_event"), "cancel_event", pa.nulls(len(requests), pa.int64())
    )
    again = replay(RunRecords({}, {**run.tables, "requests": old}), CONFIG).records.tables
    assert all(again[name].equals(run.tables[name]) for name in again)


def test_a_request_that_the_backend_cannot_take_is_rejected_and_the_others_are_served():
    events = [arrival(0, 0, prompt_token_ids=[1] * 8), arrival(1, 0, prompt_token_ids=[1] * 7 + [VOCABULARY])]
    run, _ = served([*events, arrival(2, 0, prompt_token_ids=[0] * 8)])
    rows = run.tables["requests"].to_pylist()
    assert [row["outcome"] for row in rows] == ["stop", "rejected", "stop"]
    assert [row["refused"] for row in rows] == [False, True, False]
    assert rows[1]["reason"] == "token id 50 is not in the model's vocabulary, which has 50"
    assert_replay_is_the_same(run)


def test_what_the_limits_reject_is_not_refused_by_the_backend():
    run, _ = served([arrival(0, 0, tokens=60)])
    (row,) = run.tables["requests"].to_pylist()
    assert (row["outcome"], row["refused"]) == ("rejected", False)


@pytest.mark.parametrize(
    ("condition", "made", "ends"),
    [
        (StopCondition(output_len=3), [5, 5], False),
        (StopCondition(output_len=3), [5, 5, 5], True),
        (StopCondition(), [5, 9], True),
        (StopCondition(), [9, 5], False),
        (StopCondition(ignore_eos=True), [5, 9], False),
        (StopCondition(min_tokens=3), [5, 9], False),
        (StopCondition(min_tokens=2), [5, 9], True),
        (StopCondition(ignore_eos=True, output_len=2), [5, 9], True),
    ],
    ids=str,
)
def test_an_output_ends_with_the_token_that_its_condition_names(condition, made, ends):
    assert condition.ends(made, stop_tokens={9}) is ends


@pytest.mark.parametrize(("depth", "wasted"), [(1, 0), (2, 1)])
@pytest.mark.parametrize("unsaid", [1, 2, 9], ids="{} tokens before the limit".format)
def test_a_stop_is_known_once_its_step_completes_and_wastes_the_tokens_in_flight(depth, wasted, unsaid):
    config = ServingConfig(num_blocks=100, pipeline_depth=depth)
    rows = serve([TraceRequest(0, 0, 10, 5, 5 + unsaid)], config)[0].tables()["requests"].to_pylist()
    assert [(row["outcome"], row["output_len"], row["wasted_tokens"]) for row in rows] == [("stop", 5, wasted)]


def test_an_output_as_long_as_its_limit_ends_by_the_limit():
    for depth in (1, 2):
        config = ServingConfig(num_blocks=100, pipeline_depth=depth)
        (row,) = serve([TraceRequest(0, 0, 10, 5, 5)], config)[0].tables()["requests"].to_pylist()
        assert (row["outcome"], row["output_len"], row["wasted_tokens"]) == ("length", 5, 0)
