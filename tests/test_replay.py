"""The claim of the project, without hardware: a recorded run's times lead to the same decisions, and only those."""

from __future__ import annotations

import dataclasses
import random

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shadow import serve, small_profile
from test_scheduling_properties import configs, workloads

from engine.config import ServingConfig
from engine.records.run_folder import RunRecords
from engine.scheduler import POLICIES
from sim.device_timing import ProfiledTiming
from sim.replay import replay
from traces.request import TraceRequest

MS = 1_000_000


class NoisyTiming(ProfiledTiming):
    """A machine whose every time differs a little from its profile, as hardware's do."""

    def __init__(self, seed: int) -> None:
        super().__init__(small_profile())
        self._random = random.Random(seed)

    def launch(self, step, now):
        launch, resume = super().launch(step, now)
        self._device_free_ns += self._jitter()
        return launch, resume + self._jitter()

    def complete(self, now, step, shown):
        completion, resume = super().complete(now, step, shown)
        late = self._jitter()
        return completion._replace(completed_ns=completion.completed_ns + late), resume + late + self._jitter()

    def wake(self, due_ns):
        return super().wake(due_ns) + self._jitter()

    def _jitter(self) -> int:
        return self._random.randrange(MS)


def record(requests: list[TraceRequest], config: ServingConfig, seed: int = 0) -> RunRecords:
    return RunRecords({}, serve(requests, config, NoisyTiming(seed))[0].tables())


def digests(run: RunRecords) -> list[bytes]:
    return run.tables["steps"]["digest"].to_pylist()


def scarce_workload(max_tokens: int) -> tuple[list[TraceRequest], dict[str, int]]:
    generator = random.Random(7)
    requests = [
        TraceRequest(
            i, i * 6 * MS, generator.randint(5, 80), output_len=generator.randint(5, 40), max_tokens=max_tokens
        )
        for i in range(60)
    ]
    return requests, {"num_blocks": 16, "max_seqs": 8, "max_batched_tokens": 130}


@settings(max_examples=150, deadline=None)
@given(workloads(), configs())
def test_replaying_the_times_of_a_run_reproduces_every_decision(requests, config):
    run = record(requests, config)
    again = replay(run, config).records
    assert digests(again) == digests(run)
    assert again.tables["requests"].equals(run.tables["requests"])


@settings(max_examples=100, deadline=None)
@given(workloads(), configs(), st.integers(1, 10))
def test_so_does_replaying_a_run_that_was_cut_off_with_steps_in_flight(requests, config, left):
    run = record(requests, config)
    turns = run.tables["iterations"].to_pylist()[:-left]
    completed = sum(turn["completed_step"] is not None for turn in turns)
    tables = run.tables | {
        "iterations": pa.Table.from_pylist(turns, run.tables["iterations"].schema),
        "steps": run.tables["steps"].slice(0, completed),
    }
    replayed = replay(RunRecords({}, tables, partial=True), config, small_profile()).records if turns else None
    assert replayed is None or digests(replayed) == digests(run)[:completed]


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("depth", [1, 2])
def test_a_replay_reproduces_all_records_of_a_run_with_preemptions_and_stop_tokens(policy, depth):
    requests, limits = scarce_workload(max_tokens=60)
    config = ServingConfig(**limits, scheduler=policy, pipeline_depth=depth)
    run = record(requests, config)
    assert sum(run.tables["requests"]["preemptions"].to_pylist()) > 0
    again = replay(run, config).records.tables
    assert all(again[name].equals(run.tables[name]) for name in again)


def edited(run: RunRecords, table: str, column: str, values: list[int | None]) -> RunRecords:
    old = run.tables[table]
    new = old.set_column(old.column_names.index(column), column, pa.array(values, pa.int64()))
    return dataclasses.replace(run, tables=run.tables | {table: new})


@pytest.fixture
def recorded() -> tuple[RunRecords, ServingConfig]:
    requests, limits = scarce_workload(max_tokens=60)
    config = ServingConfig(**limits)
    return record(requests, config), config


def test_negative_control_an_arrival_moved_across_an_admission_point_is_detected(recorded):
    run, config = recorded
    delivered = run.tables["requests"]["delivered_ns"].to_pylist()
    # The second request was delivered at some clock read; let it come just after.
    moved = edited(run, "requests", "delivered_ns", [delivered[0], delivered[1] + 1, *delivered[2:]])
    assert digests(replay(moved, config).records) != digests(run)


def test_negative_control_a_step_made_longer_is_detected(recorded):
    run, config = recorded
    for column in ("now_ns", "planned_ns", "launched_ns", "completed_ns"):
        times = run.tables["iterations"][column].to_pylist()
        cut = run.tables["iterations"]["now_ns"].to_pylist()[10]
        longer = [time + 50 * MS if time is not None and time > cut else time for time in times]
        run = edited(run, "iterations", column, longer)
    assert digests(replay(run, config).records) != digests(recorded[0])


def test_negative_control_another_policy_is_detected(recorded):
    run, config = recorded
    other = dataclasses.replace(config, scheduler="prefill_first")
    assert digests(replay(run, other).records) != digests(run)


def test_with_a_profile_a_replay_predicts_the_device_time_of_the_recorded_batches():
    requests, limits = scarce_workload(max_tokens=40)
    config = ServingConfig(**limits)
    run = RunRecords({}, serve(requests, config)[0].tables())
    replayed = replay(run, config, small_profile(scale=2.0))
    ratio = replayed.predicted_ns / run.tables["steps"]["device_ns"].to_numpy()
    assert digests(replayed.records) == digests(run)
    assert 1.9 < min(ratio) <= max(ratio) < 2.1
    assert replayed.records.tables["steps"]["device_ns"].equals(run.tables["steps"]["device_ns"])
