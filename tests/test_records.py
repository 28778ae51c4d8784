"""What a run writes down, to the last value: a faster loop, recorder or latency model may not change a record.

Where a change of behaviour is meant, `python tests/test_records.py` prints what to put into `EXPECTED`.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from dataclasses import replace
from functools import cache
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shadow import serve, small_profile
from test_scheduling_properties import configs, workloads

from analysis.metrics.summary import metrics
from engine.config import ServingConfig
from engine.model.graph_sizes import GraphSizes
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords, RunWriter, StoredTables, read_run
from engine.records.schema import COLUMNS, table_from_rows
from sim.device_timing import ProfiledTiming
from sim.profile.format import Profile, find_profile, read_profile
from sim.simulate import predict, simulate
from traces.arrivals import assign_arrivals
from traces.errors import TandemError
from traces.request import TraceRequest
from traces.trace import read_trace

REQUESTS, RATE = 200, 12.0
POLICIES = ("chunked_prefill", "fcfs", "prefill_first")
CASES = [*product(POLICIES, (1, 2), (0, 200))]  # policy, depth, KV blocks in host memory

SINCE_SCHEMA_3 = (
    "output_ids",
    "refused",
    "cancel_event",
)  # columns, left out so that what was expected before stays comparable
EXPECTED: dict[tuple[str, int, int], str] = {
    ("chunked_prefill", 1, 0): "60f96f3e48771162",
    ("chunked_prefill", 1, 200): "1ac2fcc90391f050",
    ("chunked_prefill", 2, 0): "aa3a6ac49688a0e6",
    ("chunked_prefill", 2, 200): "35db073b7626f3f9",
    ("fcfs", 1, 0): "8fc36931a0f212b3",
    ("fcfs", 1, 200): "8e2a7ca851e9f6e2",
    ("fcfs", 2, 0): "4287f96d0e4b5cd0",
    ("fcfs", 2, 200): "716ec4e18493c7a7",
    ("prefill_first", 1, 0): "47daa6543a234a25",
    ("prefill_first", 1, 200): "a3d234a56c360529",
    ("prefill_first", 2, 0): "541af42996492426",
    ("prefill_first", 2, 200): "ce04d0da9d0b2fda",
}
"""Of runs that admit by first chunk, as all did before there was another rule."""
EXPECTED_OF_WHOLE_PROMPTS = EXPECTED | {
    ("chunked_prefill", 1, 0): "b9562956c6fcb85e",
    ("chunked_prefill", 1, 200): "f7158cb4d8efff6d",
    ("chunked_prefill", 2, 0): "2957b54aacdf225a",
    ("chunked_prefill", 2, 200): "75ba7c6dc0a7180c",
}


@cache
def workload() -> list[TraceRequest]:
    """ShareGPT lengths: of five requests, three stop before their max_tokens; one of eleven is cancelled."""
    trace = read_trace("sharegpt-lengths")
    timed = assign_arrivals(replace(trace, requests=trace.requests[:REQUESTS]), "poisson", rate=RATE, seed=0)
    return [
        replace(
            each,
            max_tokens=each.output_len + each.id % 5 // 2 * 40,
            cancel_ns=each.arrival_ns + 2_000_000_000 if each.id % 11 == 5 else None,
            client=f"client {each.id % 3}",
        )
        for each in timed.requests
    ]


def captured(profile: Profile) -> Profile:
    """The profile of an executor that captures graphs: of steps that attend to nothing, up to half its token budget."""
    sizes = GraphSizes.within(max_seqs=64, max_batched_tokens=512)
    rows = [
        {"kind": kind, "rows": rows, "time_us": 5000.0 + 17.3 * rows, "spread": 0.0}
        for kind in ("decode", "mixed")
        for rows in getattr(sizes, kind)
    ]
    return Profile(replace(profile.meta, graphs=sizes), profile.tables | {"graph": rows})


@cache
def profiles() -> list[Profile]:
    """Two that ship, one of which minds uneven contexts, and a captured one."""
    even, uneven = (read_profile(find_profile(Path(name) / "llama-3-8b")) for name in ("a100-80gb", "rtx4090"))
    return [even, uneven, captured(uneven)]


def record_digest(policy: str, depth: int, cpu_blocks: int, admit: str) -> str:
    """Of all tables of a run on each profile, KV blocks scarce."""
    config = ServingConfig(
        num_blocks=400,
        max_seqs=64,
        max_batched_tokens=1024,
        scheduler=policy,
        pipeline_depth=depth,
        num_cpu_blocks=cpu_blocks,
        admit=admit,
    )
    sha = hashlib.sha256()
    for profile in profiles():
        recorder = Recorder()
        coverage = predict(workload(), config, profile, recorder)
        tables = recorder.tables()
        assert sum(tables["requests"]["preemptions"].to_pylist()) > 20
        tables["requests"] = tables["requests"].drop_columns(SINCE_SCHEMA_3)
        assert bool(cpu_blocks) == (sum(tables["requests"]["swaps"].to_pylist()) > 0)
        outside = {table: of["count"] for table, of in coverage["beyond"].items()}
        told = {"lookups": coverage["lookups"]} | outside
        sha.update(repr((sorted(told.items()), [table.to_pydict() for table in tables.values()])).encode())
    return sha.hexdigest()[:16]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_simulation_records_what_it_always_did(case):
    assert record_digest(*case, admit="first_chunk") == EXPECTED[case]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_whole_prompts_are_admitted_otherwise_only_where_chunks_were(case):
    assert record_digest(*case, admit="whole") == EXPECTED_OF_WHOLE_PROMPTS[case]


@settings(max_examples=100, deadline=None)
@given(workloads(), configs(), st.integers(1, 9))
def test_rows_that_are_written_as_they_come_are_those_of_a_run_held_whole(requests, config, flush):
    whole = serve(requests, config)[0].tables()
    written = defaultdict(list)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.records.recorder.FLUSH", flush)
        recorder = Recorder(lambda table, rows: written[table].append(table_from_rows(table, rows)))
        simulate(requests, config, ProfiledTiming(small_profile()), recorder)
        recorder.close()
    assert all(pa.concat_tables(written[name]).equals(whole[name]) for name in COLUMNS)


def test_what_is_held_grows_with_the_requests_in_flight_not_with_the_trace(monkeypatch):
    monkeypatch.setattr("engine.records.recorder.FLUSH", 20)
    held = []
    recorder = Recorder(lambda table, rows: held.append(len(recorder._lives)))
    requests = (TraceRequest(i, i * 40_000_000, 20, 10, 10) for i in range(1000))  # taken one by one
    simulate(requests, ServingConfig(num_blocks=50), ProfiledTiming(small_profile()), recorder)
    assert recorder.ended == 1000 and max(held) < 20


def test_a_run_is_written_whole_or_not_at_all(tmp_path):
    run = RunRecords({"workload": {}}, serve(workload()[:20], ServingConfig(num_blocks=200))[0].tables(), {"a": 1})
    run.write(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt), RunWriter(tmp_path / "run", overwrite=True) as writer:
        writer.add_table("steps", run.tables["steps"].slice(0, 5))
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    kept = read_run(tmp_path / "run")
    assert all(kept.tables[name].equals(run.tables[name]) for name in COLUMNS) and kept.summary["a"] == 1


def test_a_run_is_replaced_only_by_one_that_may(tmp_path):
    one, other = (RunRecords({}, serve(workload()[:5], ServingConfig(9999))[0].tables(), {"a": n}) for n in (1, 2))
    one.write(tmp_path / "run")
    with pytest.raises(TandemError, match="holds a run: choose another --out, or add --overwrite"):
        other.write(tmp_path / "run")
    assert read_run(tmp_path / "run").summary["a"] == 1
    other.write(tmp_path / "run", overwrite=True)
    assert read_run(tmp_path / "run").summary["a"] == 2


def test_a_run_that_came_while_another_was_made_stays(tmp_path):
    one, other = (RunRecords({}, serve(workload()[:5], ServingConfig(9999))[0].tables(), {"a": n}) for n in (1, 2))
    with pytest.raises(TandemError, match="cannot write"), RunWriter(tmp_path / "run") as writer:
        one.write(tmp_path / "elsewhere")
        (tmp_path / "elsewhere").rename(tmp_path / "run")
        for name, table in other.tables.items():
            writer.add_table(name, table)
        writer.finish(other)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert read_run(tmp_path / "run").summary["a"] == 1


@pytest.mark.parametrize("limit", [1, 2048])
def test_the_metrics_of_a_stored_run_are_those_of_the_run_in_memory(tmp_path, limit):
    run = RunRecords({}, serve(workload(), ServingConfig(num_blocks=200, max_model_len=limit))[0].tables())
    run.write(tmp_path / "run")
    assert metrics(RunRecords({}, StoredTables(tmp_path / "run"))) == metrics(run)
    assert metrics(run)["completed"] == (0 if limit == 1 else 200)


@settings(max_examples=50, deadline=None)
@given(workloads(), configs(), st.integers(1, 30), st.integers(1, 30), st.integers(1, 30))
def test_the_metrics_of_a_run_are_those_that_it_has_when_looked_at_piece_by_piece(requests, config, part, some, rows):
    run = RunRecords({}, serve(requests, config)[0].tables())
    whole = metrics(run)
    with pytest.MonkeyPatch.context() as patch, TemporaryDirectory() as folder:
        run.write(Path(folder) / "run")
        patch.setattr("analysis.metrics.tokens.PART", part)
        patch.setattr("analysis.metrics.tokens.SORTED", some)
        patch.setattr("engine.records.run_folder.BATCH", rows)
        assert metrics(RunRecords({}, StoredTables(Path(folder) / "run"))) == pytest.approx(whole, nan_ok=True)


if __name__ == "__main__":
    for case in CASES:
        for admit in ("first_chunk", "whole"):
            print(f'    {case}: "{record_digest(*case, admit)}",  # {admit}')
