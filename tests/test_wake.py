"""A policy that asks for a time is called then: in simulation, at the wall clock's pace, for real, and in a replay."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from threading import Thread

import pytest
import simpy
from shadow import serve, small_profile
from test_executor import executor
from test_executor import serve as serve_for_real

from engine.config import ServingConfig
from engine.live_events import LiveEvents
from engine.planner import PolicyError
from engine.records.run_folder import RunRecords
from engine.scheduler.base import Scheduler
from sim.backend import SimBackend
from sim.device_timing import ProfiledTiming
from sim.replay import replay
from traces.request import TraceRequest

__all__ = ["executor"]  # a fixture

MS = 1_000_000
PATIENCE = 50 * MS  # of docs/examples/gather.py
EXAMPLES = Path(__file__).parents[1] / "docs/examples"
ROOMY = ServingConfig(num_blocks=100, max_batched_tokens=512, scheduler=f"{EXAMPLES}/gather.py:Gather")


class Late(Scheduler):
    def plan(self, now: int) -> None:
        self.wake_at(now)


def apart(count: int, gap_ns: int) -> list[TraceRequest]:
    return [TraceRequest(number, number * gap_ns, 20, 3, 3) for number in range(count)]


def waits_ms(run: RunRecords) -> list[float]:
    rows = run.tables["requests"].to_pylist()
    return [(row["first_scheduled_ns"] - row["arrival_ns"]) / MS for row in rows]


@pytest.mark.parametrize("depth", [1, 2])
def test_one_request_a_second_waits_for_fifty_milliseconds_and_no_more(depth):
    config = dataclasses.replace(ROOMY, pipeline_depth=depth)
    run = RunRecords({}, serve(apart(5, 1000 * MS), config)[0].tables())
    assert all(50 <= waited < 50.1 for waited in waits_ms(run))
    assert replay(run, config).records.tables["steps"].equals(run.tables["steps"])


def test_four_that_are_there_do_not_wait():
    run = RunRecords({}, serve(apart(4, MS), ROOMY)[0].tables())
    assert waits_ms(run)[-1] < 0.1


def test_one_request_alone_is_served_and_its_replay_has_the_turn_that_woke_for_it():
    run = RunRecords({}, serve(apart(1, MS), ROOMY)[0].tables())
    (woken,) = [
        turn for turn in run.tables["iterations"].to_pylist() if turn["now_ns"] >= PATIENCE and turn["step"] == 0
    ]
    assert woken["events"] == 0
    again = replay(run, ROOMY).records
    assert again.tables["iterations"].equals(run.tables["iterations"])


def test_a_time_that_is_past_is_refused_in_a_line():
    with pytest.raises(PolicyError, match=r"Late \(.*\) asks to be woken at \d+ ns, which is not after now"):
        serve(apart(1, MS), ROOMY, scheduler=Late(ROOMY))


def test_on_hardware_the_policy_is_woken_too_and_the_simulator_decides_the_same(executor):
    config = dataclasses.replace(ROOMY, num_blocks=24, block_size=8, max_seqs=6, max_model_len=120)
    run, _ = serve_for_real(executor, apart(3, 120 * MS), config)
    assert all(waited >= 50 for waited in waits_ms(run))
    assert replay(run, config).records.tables["steps"]["digest"].equals(run.tables["steps"]["digest"])


def test_events_that_come_live_end_the_wait_and_without_any_it_ends_in_time():
    begun = time.perf_counter_ns()
    events = LiveEvents(lambda: time.perf_counter_ns() - begun, lambda source, terms: None)
    assert events.next_ns(20 * MS) == 20 * MS <= time.perf_counter_ns() - begun
    Thread(target=lambda: events.cancel(7, 0)).start()
    assert events.next_ns(3600 * 1000 * MS) < 3600 * 1000 * MS
    assert events.due(10**18) == []
    events.close()
    assert events.next_ns(30 * MS) == 30 * MS and events.next_ns() is None


def waits(backend: SimBackend, until_ns: int) -> int:
    """How long the backend waits from time 0."""
    env = simpy.Environment()
    backend._env = env
    env.run(until=backend.wait(until_ns))
    return env.now


def test_the_simulator_waits_until_the_earlier_of_an_arrival_and_a_time():
    backend = SimBackend(simpy.Environment(), apart(2, 30 * MS), ProfiledTiming(small_profile()))
    backend.due(0)
    assert waits(backend, 10 * MS) == pytest.approx(10 * MS, rel=0.01)
    assert waits(backend, 40 * MS) == pytest.approx(30 * MS, rel=0.01)
    backend.due(30 * MS)
    assert backend.wait(None) is None and backend.wait(50 * MS) is not None
