"""Traces: formats round-trip, bad files are refused with a place, arrivals follow the law they name."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from traces import TandemError, Trace, TraceRequest, read_trace, write_trace
from traces.arrivals import all_at_once, assign_arrivals, gamma, poisson, uniform, with_arrivals
from traces.columns import Reading
from traces.outputs import atomic_file
from traces.request import CompactRequests
from traces.synthetic import synthetic

PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "traces"

both_formats = pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
lengths = st.integers(1, 2**40)


@st.composite
def token_arrays(draw: st.DrawFn) -> array[int]:
    return array("i", draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5)))


@st.composite
def hash_arrays(draw: st.DrawFn) -> array[int]:
    return array("q", draw(st.lists(st.integers(0, 2**63 - 1), max_size=5)))


@st.composite
def requests(draw: st.DrawFn, position: int, arrival_ns: int) -> TraceRequest:
    ids = draw(st.none() | token_arrays())
    hashes = draw(st.none() | hash_arrays()) if ids is None else None
    output_len = draw(lengths)
    return TraceRequest(
        id=position,
        arrival_ns=arrival_ns,
        prompt_len=draw(st.integers(2**12, 2**40)) if ids is None else len(ids),
        output_len=output_len,
        max_tokens=output_len + draw(st.integers(0, 100)),
        prompt_token_ids=ids,
        hash_ids=hashes,
        hash_block_size=512 if hashes is None else draw(st.integers(1, 2**9)),
        predicted_length=draw(st.none() | lengths),
        priority=draw(st.integers(-5, 5)),
        client=draw(st.none() | st.text()),
        cancel_ns=draw(st.none() | st.integers(arrival_ns, 2**63 - 1)),
        ttft_slo_ns=draw(st.none() | lengths),
        e2e_slo_ns=draw(st.none() | lengths),
    )


@st.composite
def traces(draw: st.DrawFn) -> Trace:
    arrivals_ns = sorted(draw(st.lists(st.integers(0, 2**62), min_size=1, max_size=6)))
    meta = draw(st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.text(), max_size=3))
    return Trace([draw(requests(position, arrival_ns)) for position, arrival_ns in enumerate(arrivals_ns)], meta)


@given(traces())
def test_compact_requests_are_the_requests_that_were_added(trace: Trace) -> None:
    compact = CompactRequests()
    for request in trace.requests:
        compact.append(request)
    assert compact == trace.requests and [*compact] == trace.requests and len(compact) == len(trace.requests)
    assert compact[-1] == trace.requests[-1] and compact[1:3] == trace.requests[1:3]
    assert [*compact.arrivals_ns] == [request.arrival_ns for request in trace.requests]


def small_trace(n: int = 3) -> Trace:
    return with_arrivals(synthetic(n, 0, "uniform:1:9", "fixed:5"), uniform(n, 1.0))


def refusal(path: Path) -> str:
    """The one line with which a file is refused."""
    with pytest.raises(TandemError) as caught:
        read_trace(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    return message


# Both formats


@both_formats
@given(trace=traces())
@settings(max_examples=60, deadline=None)
def test_a_trace_survives_writing_and_reading(suffix: str, trace: Trace) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"trace{suffix}"
        write_trace(path, trace)
        read = read_trace(path)
        assert os.listdir(folder) == [path.name]
    assert read == trace
    assert read.digest == trace.digest


@both_formats
def test_a_trace_longer_than_a_batch_survives(suffix: str, tmp_path: Path) -> None:
    trace = small_trace(10_000)
    with_some_ids = [
        replace(request, prompt_token_ids=array("i", range(request.prompt_len))) if request.id % 3 else request
        for request in trace.requests
    ]
    trace = replace(trace, requests=with_some_ids)
    write_trace(tmp_path / f"t{suffix}", trace)
    assert read_trace(tmp_path / f"t{suffix}") == trace


@both_formats
@given(trace=traces(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_file_cut_anywhere_is_refused_or_gives_its_whole_lines(
    suffix: str, trace: Trace, data: st.DataObject
) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / f"trace{suffix}"
        write_trace(path, trace)
        whole = path.read_bytes()
        cut = data.draw(st.integers(0, len(whole) - 2))
        path.write_bytes(whole[:cut])
        lines = [line for line in whole[:cut].split(b"\n")[1:] if line]
        if suffix == ".jsonl" and lines and lines[-1].endswith(b"}") and whole[cut : cut + 1] in (b"\n", b"{"):
            assert read_trace(path).requests == trace.requests[: len(lines)]
        else:
            refusal(path)


@both_formats
def test_a_trace_of_another_schema_version_is_refused(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"t{suffix}"
    header = '{"tandem_trace": 4, "meta": {}}'
    if suffix == ".jsonl":
        path.write_text(header + "\n")
    else:
        table = pa.table({"arrival_ns": [0], "prompt_len": [1], "output_len": [1]})
        pq.write_table(table.replace_schema_metadata({"tandem_trace": header}), path)
    assert "schema version 4: this Tandem reads versions up to 3" in refusal(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_missing_empty_and_foreign_files_are_refused(suffix: str, tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / f"missing{suffix}")
    (tmp_path / f"folder{suffix}").mkdir()
    assert "Is a directory" in refusal(tmp_path / f"folder{suffix}")
    for name, content in (("empty", b""), ("binary", bytes(range(256)))):
        (tmp_path / f"{name}{suffix}").write_bytes(content)
        refusal(tmp_path / f"{name}{suffix}")


def test_an_unknown_suffix_names_the_known(tmp_path: Path) -> None:
    assert "use .jsonl, .parquet, .csv" in refusal(tmp_path / "trace.txt")
    with pytest.raises(TandemError, match=r"unknown suffix '\.csv': use \.jsonl, \.parquet"):
        write_trace(tmp_path / "trace.csv", small_trace())


# What a trace is


def test_the_digest_is_of_the_requests_alone() -> None:
    trace = small_trace()
    assert replace(trace, meta={"other": 1}, notes=["other"]).digest == trace.digest
    for kind in (list, tuple, np.array):
        as_kind = [replace(r, prompt_token_ids=kind(range(r.prompt_len))) for r in trace.requests]
        as_array = [replace(r, prompt_token_ids=array("i", range(r.prompt_len))) for r in trace.requests]
        assert Trace(as_kind).digest == Trace(as_array).digest != trace.digest


@pytest.mark.parametrize(
    "change",
    [
        {"arrival_ns": 8},
        {"prompt_len": 3, "prompt_token_ids": [1, 2, 3]},
        {"prompt_token_ids": [2, 1]},
        {"prompt_token_ids": None},
        {"output_len": 2},
        {"max_tokens": 5},
        {"predicted_length": 1},
        {"predicted_length": None},
        {"priority": 1},
        {"client": ""},
        {"client": None},
        {"cancel_ns": 10},
        {"cancel_ns": None},
    ],
    ids=str,
)
def test_the_digest_sees_every_field(change: dict[str, Any]) -> None:
    request = TraceRequest(0, 7, 2, 3, 4, [1, 2], predicted_length=9, client="a", cancel_ns=9)
    assert Trace([replace(request, **change)]).digest != Trace([request]).digest


def test_the_digest_sees_what_prompts_share() -> None:
    plain = TraceRequest(0, 7, 20, 3, 4)
    variants = [
        {},
        *({"hash_ids": ids} for ids in ([], [1], [2])),
        {"hash_ids": [1], "hash_block_size": 10},
        {"prompt_token_ids": range(20)},
    ]
    assert len({Trace([replace(plain, **each)]).digest for each in variants}) == len(variants)


def test_synthetic_prefixes_are_shared_and_leave_all_else_as_it_was() -> None:
    plain = synthetic(200, 0, "uniform:1:90", "fixed:5").requests
    shared = synthetic(200, 0, "uniform:1:90", "fixed:5", shared_prefixes=3, prefix_len=100).requests
    assert [each.prompt_len for each in shared] == [100 + each.prompt_len for each in plain]
    assert {tuple(each.hash_ids) for each in shared} == {(0,), (1,), (2,)}
    assert {each.hash_block_size for each in shared} == {100}


def test_the_digest_does_not_change_between_releases() -> None:
    request = TraceRequest(0, 7, 2, 3, 4, [1, 2], predicted_length=9, client="a", cancel_ns=9)
    trace = Trace([request, TraceRequest(1, 8, 1, 1, 1)])
    assert trace.digest == "9b92e2e39513a01826662d2eace22959bf0ef945a79025d855214f55f7259910"


def test_a_trace_has_requests_in_order() -> None:
    first, second = TraceRequest(0, 5, 1, 1, 1), TraceRequest(1, 4, 1, 1, 1)
    with pytest.raises(TandemError, match="empty"):
        Trace([])
    with pytest.raises(ValueError, match="arrival"):
        Trace([first, second])
    with pytest.raises(ValueError, match="ids"):
        Trace([second])


def test_reading_traces_loads_no_heavy_library() -> None:
    heavy = ("pyarrow", "ijson", "torch", "transformers", "engine", "sim", "analysis")
    code = "import sys, traces.sharegpt, traces.synthetic, traces.arrivals; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "traces.sharegpt" in loaded
    assert not set(heavy) & set(loaded)


# JSONL


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def row(**changes: Any) -> str:
    fields = {"arrival_ns": 5, "prompt_len": 10, "output_len": 3} | changes
    return json.dumps({name: value for name, value in fields.items() if value is not ...})


@pytest.mark.parametrize(
    ("size", "unit_ns", "whose"),
    [(512, 1_000_000, "milliseconds, as in Mooncake's"), (16, 10**9, "seconds, as in vLLM's")],
)
def test_the_number_of_hash_ids_tells_mooncakes_milliseconds_from_vllms_seconds(
    size: int, unit_ns: int, whose: str, tmp_path: Path
) -> None:
    ids = list(range(-(-1030 // size)))
    lines = [{"timestamp": at, "input_length": 1030, "output_length": 500, "hash_ids": ids} for at in (0, 1.5)]
    trace = read_trace(write_lines(tmp_path / "t.jsonl", *map(json.dumps, lines)))
    assert trace.requests == [
        TraceRequest(position, arrival_ns, 1030, 500, 500, hash_ids=array("q", ids), hash_block_size=size)
        for position, arrival_ns in enumerate((0, round(1.5 * unit_ns)))
    ]
    (note,) = trace.notes
    assert f"timestamp is read in {whose}" in note and f"2 requests in {1.5 * unit_ns / 1e9:g} s" in note


def test_arrivals_in_seconds_are_rounded_to_nanoseconds(tmp_path: Path) -> None:
    seconds = [0, 0.1, 1.0000000004, 1.0000000006, 86400]
    path = write_lines(tmp_path / "t.jsonl", *(row(arrival_ns=..., arrival_s=second) for second in seconds))
    arrivals_ns = [request.arrival_ns for request in read_trace(path).requests]
    assert arrivals_ns == [0, 100_000_000, 1_000_000_000, 1_000_000_001, 86_400_000_000_000]


def test_token_ids_give_the_prompt_length(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", row(prompt_len=..., prompt_token_ids=[7, 8, 9]))
    assert read_trace(path).requests == [TraceRequest(0, 5, 3, 3, 3, array("i", [7, 8, 9]))]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "not a whole JSON object"),
        pytest.param("[" * 100_000, "not a whole JSON object", id="nested"),
        ("[1]", "not a JSON object"),
        ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "not a whole JSON object"),
        (row(prompt_len=...), "no prompt_len: give prompt_len or input_length"),
        (row(output_len=None), "no output_len: give output_len or output_length"),
        (row(arrival_ns=...), "no arrival_ns: give arrival_ns or arrival_s or timestamp"),
        (row(input_length=10), "input_length gives prompt_len a second time"),
        (row(timestamp=1), "timestamp gives arrival_ns a second time"),
        (row(prompt_len=0), "prompt_len is 0: it must be an integer of at least 1"),
        (row(prompt_len=-4), "prompt_len is -4"),
        (row(prompt_len=2.5), "prompt_len is 2.5"),
        (row(prompt_len=True), "prompt_len is True"),
        (row(prompt_len="12"), "prompt_len is '12'"),
        (row(output_len=float("nan")), "output_len is nan"),
        (row(output_len=2**63), "output_len is 9223372036854775808"),
        (row(arrival_ns=-1), "arrival_ns is -1: it must be an integer of at least 0"),
        (row(arrival_ns=0.5), "arrival_ns is 0.5"),
        (row(arrival_ns=..., arrival_s=-0.5), "arrival_s is -0.5: it must be a number from 0 to 9e+09"),
        (row(arrival_ns=..., arrival_s=float("inf")), "arrival_s is inf: it must be a number"),
        (row(arrival_ns=..., arrival_s=float("nan")), "arrival_s is nan"),
        (row(arrival_ns=..., arrival_s="noon"), "arrival_s is 'noon'"),
        (row(arrival_ns=..., timestamp=True), "timestamp is True"),
        (row(arrival_ns=..., arrival_s=1e300), "arrival_s is 1e+300"),
        (row(max_tokens=2), "output_len is 3, more than max_tokens, 2"),
        (row(prompt_token_ids=[1, 2]), "prompt_len is 10, but there are 2 token ids"),
        (row(prompt_len=..., prompt_token_ids=[]), "prompt_len is 0"),
        (row(prompt_len=..., prompt_token_ids=[1, -2]), "prompt_token_ids must be a list of integers from 0"),
        (row(prompt_len=..., prompt_token_ids=[1, 2.0]), "prompt_token_ids must be"),
        (row(prompt_len=..., prompt_token_ids=[True]), "prompt_token_ids must be"),
        (row(prompt_len=..., prompt_token_ids=[2**31]), "prompt_token_ids must be"),
        (row(prompt_len=..., prompt_token_ids="abc"), "prompt_token_ids must be"),
        (row(predicted_length=0), "predicted_length is 0"),
        (row(hash_ids=[1, -2]), "hash_ids must be a list of integers from 0"),
        (row(hash_ids=[2**63]), "hash_ids must be"),
        (row(hash_ids=7), "hash_ids must be"),
        (row(hash_ids=[1], hash_block_size=0), "hash_block_size is 0"),
        (
            row(hash_ids=[1, 2, 3], hash_block_size=5),
            "there are 3 hash_ids, but a prompt of 10 tokens has 2 blocks of 5",
        ),
        (row(prompt_token_ids=[1] * 10, hash_ids=[1]), "there are both prompt_token_ids and hash_ids"),
        (row(priority="high"), "priority is 'high'"),
        (row(client=5), "client is 5: it must be a string"),
        (row(cancel_ns=4), "cancel_ns is 4: it must be an integer of at least 5"),
    ],
)
def test_a_bad_line_is_named(line: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(f"{row()}\n\n{line}\n{row()}\n".encode("latin-1"))
    assert f"{path}:3: {complaint}" in refusal(path)


def test_a_header_with_foreign_meta_is_refused(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "t.jsonl", '{"tandem_trace": 1, "meta": [1]}', row())
    assert f"{path}:1: meta is [1]" in refusal(path)


def test_a_header_alone_is_an_empty_trace(tmp_path: Path) -> None:
    assert "empty" in refusal(write_lines(tmp_path / "t.jsonl", '{"tandem_trace": 1, "meta": {}}'))


def test_arrivals_out_of_order_are_sorted_with_a_note(tmp_path: Path) -> None:
    arrivals_and_prompts = [(3, 1), (1, 2), (3, 3), (2, 4), (9, 5)]
    lines = [row(arrival_ns=arrival, prompt_len=prompt) for arrival, prompt in arrivals_and_prompts]
    trace = read_trace(write_lines(tmp_path / "t.jsonl", *lines))
    assert [request.prompt_len for request in trace.requests] == [2, 4, 1, 3, 5]
    assert [request.id for request in trace.requests] == [0, 1, 2, 3, 4]
    assert trace.notes == ["2 of 5 arrivals were out of order: sorted"]


# Parquet


@pytest.mark.parametrize("kind", [pa.list_(pa.int64()), pa.large_list(pa.int32()), pa.list_(pa.uint16(), 2)], ids=str)
def test_parquet_of_other_tools_is_read(kind: pa.DataType, tmp_path: Path) -> None:
    columns = {
        "timestamp": pa.array([0.0, 2.5]),
        "output_length": pa.array([3, 4], pa.int16()),
        "prompt_token_ids": pa.array([[5, 6], [7, 8]], kind),
        "client": pa.nulls(2),
        "model": pa.array(["a", "b"]),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    trace = read_trace(tmp_path / "t.parquet", Reading(time_unit="ms"))
    assert trace.requests == [
        TraceRequest(0, 0, 2, 3, 3, array("i", [5, 6])),
        TraceRequest(1, 2_500_000, 2, 4, 4, array("i", [7, 8])),
    ]
    said = "timestamp is read in milliseconds, as --time-unit says: 2 requests in 0.0025 s, 400 a second"
    assert trace.meta == {}
    assert trace.notes == ["ignored unknown columns: model", f"{said}; if that is wrong, give --time-unit"]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"prompt_len": [9, -1]}, "row 2: prompt_len is -1"),
        ({"prompt_len": [9, 1.5]}, "row 1: prompt_len is 9.0"),
        ({"prompt_len": [9, None]}, "row 2: no prompt_len"),
        ({"arrival_ns": ["noon", "one"]}, "row 1: arrival_ns is 'noon'"),
        ({"prompt_token_ids": [[1] * 9, [1] * 8]}, "row 2: prompt_len is 9, but there are 8 token ids"),
        ({"prompt_token_ids": [[1] * 9, [-1] * 9]}, "row 2: prompt_token_ids must be"),
        ({"prompt_token_ids": [[1] * 9, [None] * 9]}, "prompt_token_ids has a null"),
        ({"prompt_token_ids": [[2**40] * 9, None]}, "after row 0 (Integer value 1099511627776 not in range"),
        ({"prompt_token_ids": [7, 8]}, "after row 0 ("),
    ],
    ids=str,
)
def test_a_bad_parquet_row_is_named(changes: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    columns = {"arrival_ns": [0, 1], "prompt_len": [9, 9], "output_len": [1, 1]} | changes
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert complaint in refusal(tmp_path / "t.parquet")


def test_a_damaged_parquet_page_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    write_trace(path, small_trace(5000))
    damaged = bytearray(path.read_bytes())
    damaged[4:64] = bytes(60)
    path.write_bytes(damaged)
    refusal(path)


# Writing


@contextmanager
def no_file_over_4_kb() -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@both_formats
def test_a_full_disk_leaves_what_was_there(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"t{suffix}"
    write_trace(path, small_trace())
    complaint = r"cannot write .*: File too large; nothing was written"
    with no_file_over_4_kb(), pytest.raises(TandemError, match=complaint):
        write_trace(path, synthetic(5000, 0, "uniform:1:1000", "uniform:1:1000"))
    assert read_trace(path) == small_trace()
    assert os.listdir(tmp_path) == [path.name]


def test_an_interrupt_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_file(tmp_path / "a") as file:
        file.write(b"new")
        raise KeyboardInterrupt
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("a", b"old")]


def test_writing_into_no_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(TandemError, match=r"cannot write .*none/t\.jsonl: No such file or directory"):
        write_trace(tmp_path / "none" / "t.jsonl", small_trace())


# CSV

AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


def test_azure_dates_count_from_the_first(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(
        AZURE
        + "2023-11-16 23:59:59.9799600,4808,10\r\n"
        + "2023-11-17 00:00:00.0319600,3180,8\r\n"
        + "2023-11-17 00:00:01.979960+00:00,110,27"
    )
    assert read_trace(path).requests == [
        TraceRequest(0, 0, 4808, 10, 10),
        TraceRequest(1, 52_000_000, 3180, 8, 8),
        TraceRequest(2, 2_000_000_000, 110, 27, 27),
    ]


def test_azure_rows_out_of_order_count_from_the_earliest(tmp_path: Path) -> None:
    path = tmp_path / "azure.csv"
    path.write_text(AZURE + "2023-11-16 00:00:02,1,1\n2023-11-16 00:00:01,2,2\n")
    trace = read_trace(path)
    assert [(request.arrival_ns, request.prompt_len) for request in trace.requests] == [(0, 2), (1_000_000_000, 1)]
    assert trace.notes == ["1 of 2 arrivals were out of order: sorted"]


def test_burstgpt_failures_are_dropped_with_a_note(tmp_path: Path) -> None:
    path = tmp_path / "burst.csv"
    path.write_text(BURSTGPT + "5,ChatGPT,472,18,490,API log\n6,GPT-4,30,0,30,API log\n45.5,GPT-4,87,230,317,API log\n")
    trace = read_trace(path)
    assert trace.requests == [
        TraceRequest(0, 5_000_000_000, 472, 18, 18),
        TraceRequest(1, 45_500_000_000, 87, 230, 230),
    ]
    said = "Timestamp is read in seconds, as in BurstGPT's traces: 2 requests in 40.5 s, 0.0247 a second"
    assert trace.notes == [
        "1 requests without output tokens were dropped",
        "ignored unknown columns: Log Type, Model, Total tokens",
        f"{said}; if that is wrong, give --time-unit",
    ]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("a,b\n1,2\n", "not a known CSV trace"),
        (AZURE, "empty"),
        (AZURE + "2023-11-16 00:00:00,5,7\nyesterday,5,7\n", "3: not a row of TIMESTAMP,ContextTokens"),
        (AZURE + "2023-11-16 00:00:00,5,7\n,5,7\n", "3: no TIMESTAMP"),
        (AZURE + "2023-11-16 00:00:00,5,7\n2023-11-16 00:00:01,5\n", "3: not a row of"),
        (AZURE + "2023-11-16 00:00:00,5.5,7\n", "2: not a row of"),
        (AZURE + "2023-11-16 00:00:00,0,7\n", "2: prompt_len is 0"),
        (BURSTGPT + "5,ChatGPT,472,18,490,x\nnan,ChatGPT,472,18,490,x\n", "3: Timestamp is nan"),
        (BURSTGPT + "5,ChatGPT,-472,18,490,x\n", "2: prompt_len is -472"),
    ],
)
def test_a_bad_csv_row_is_named(content: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(content)
    assert complaint in refusal(path)


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"the published traces are not at {PUBLISHED}")
@pytest.mark.parametrize(
    ("name", "count", "last_s"),
    [
        ("AzureLLMInferenceTrace_code.csv", 8_819, 3435.948056),
        ("AzureLLMInferenceTrace_conv.csv", 19_366, 3501.721937),
        ("mooncake_conversation_trace.jsonl", 12_031, 3536.999),
    ],
)
def test_published_traces_are_read_whole(name: str, count: int, last_s: float) -> None:
    trace = read_trace(PUBLISHED / name)
    assert len(trace.requests) == count
    assert trace.requests[0].arrival_ns == 0
    assert trace.requests[-1].arrival_ns == round(last_s * 1e9)


# Arrivals


@pytest.mark.parametrize("burstiness", [0.3, 1.0, 4.0])
def test_delays_follow_the_gamma_law_of_vllms_benchmark(burstiness: float) -> None:
    rate = 5.0
    delays_s = np.diff(gamma(4000, rate, burstiness, seed=1), prepend=0) / 1e9

    def p_value(shape: float) -> float:
        return float(stats.kstest(delays_s, stats.gamma(shape, scale=1 / (rate * shape)).cdf).pvalue)

    assert p_value(burstiness) > 0.01
    assert p_value(burstiness * 1.5) < 1e-6


@given(n=st.integers(1, 200), rate=st.floats(0.01, 1e4), burstiness=st.floats(0.05, 50), seed=st.integers(0, 2**32))
def test_arrivals_ascend_and_the_last_lands_at_n_over_rate(n: int, rate: float, burstiness: float, seed: int) -> None:
    for arrivals_ns in (gamma(n, rate, burstiness, seed), poisson(n, rate, seed), uniform(n, rate)):
        assert arrivals_ns.shape == (n,)
        assert arrivals_ns.dtype == np.int64
        assert arrivals_ns[0] >= 0
        assert (np.diff(arrivals_ns) >= 0).all()
        assert arrivals_ns[-1] == round(n / rate * 1e9)


def test_arrivals_are_seeded() -> None:
    assert (poisson(50, 3.0, seed=7) == poisson(50, 3.0, seed=7)).all()
    assert (poisson(50, 3.0, seed=7) != poisson(50, 3.0, seed=8)).any()
    assert (poisson(50, 3.0, seed=7) == gamma(50, 3.0, 1.0, seed=7)).all()


def test_uniform_arrivals_are_evenly_spaced() -> None:
    assert uniform(4, 8.0).tolist() == [125_000_000, 250_000_000, 375_000_000, 500_000_000]


def test_new_arrivals_leave_all_else_and_carry_cancellations_along() -> None:
    requests = [TraceRequest(0, 10, 5, 6, 7, cancel_ns=14), TraceRequest(1, 20, 8, 9, 9)]
    moved = with_arrivals(Trace(requests, {"source": "x"}, ["note"]), np.array([100, 300]))
    assert moved.requests == [replace(requests[0], arrival_ns=100, cancel_ns=104), replace(requests[1], arrival_ns=300)]
    assert (moved.meta, moved.notes) == ({"source": "x"}, ["note"])


def test_as_many_arrivals_as_requests_in_order() -> None:
    with pytest.raises(ValueError, match="shorter"):
        with_arrivals(small_trace(3), all_at_once(2))
    with pytest.raises(ValueError, match="order of arrival"):
        with_arrivals(small_trace(3), np.array([1, 3, 2]))


@pytest.mark.parametrize(
    ("process", "expected", "recorded"),
    [
        ("poisson", poisson(3, 2.0, 4), {"rate": 2.0, "seed": 4}),
        ("gamma", gamma(3, 2.0, 0.5, 4), {"rate": 2.0, "burstiness": 0.5, "seed": 4}),
        ("uniform", uniform(3, 2.0), {"rate": 2.0}),
        ("all_at_once", all_at_once(3), {}),
    ],
)
def test_a_process_is_assigned_by_name(process: str, expected: np.ndarray, recorded: dict[str, Any]) -> None:
    trace = assign_arrivals(small_trace(3), process, rate=2.0, seed=4, burstiness=0.5)
    assert [request.arrival_ns for request in trace.requests] == expected.tolist()
    assert trace.meta["arrivals"] == {"process": process} | recorded


@pytest.mark.parametrize(
    ("process", "parameters", "complaint"),
    [
        ("poison", {}, "unknown arrival process 'poison': use poisson, gamma, uniform, all_at_once"),
        ("poisson", {"rate": 0.0}, "rate is 0.0: it must be a positive number"),
        ("uniform", {"rate": -1.0}, "rate is -1.0"),
        ("poisson", {"rate": float("nan")}, "rate is nan"),
        ("poisson", {"rate": float("inf")}, "rate is inf"),
        ("uniform", {"rate": 1e-12}, "would take more than"),
        ("gamma", {"burstiness": 0.0}, "burstiness is 0.0: it must be a positive number"),
        ("gamma", {"burstiness": 1e-9}, "every delay is 0"),
    ],
)
def test_bad_arrivals_are_refused(process: str, parameters: dict[str, float], complaint: str) -> None:
    with pytest.raises(TandemError, match=complaint):
        assign_arrivals(small_trace(3), process, **parameters)


# Synthetic lengths


def lengths_of(trace: Trace) -> tuple[list[int], list[int]]:
    return [request.prompt_len for request in trace.requests], [request.output_len for request in trace.requests]


def test_lengths_follow_the_named_distributions() -> None:
    prompt_lens, output_lens = lengths_of(synthetic(4000, 0, "lognormal:5:0.5", "uniform:16:19"))
    assert np.mean(np.log(prompt_lens)) == pytest.approx(5, abs=0.03)
    assert np.std(np.log(prompt_lens)) == pytest.approx(0.5, abs=0.03)
    assert stats.chisquare(np.unique(output_lens, return_counts=True)[1]).pvalue > 0.01
    assert set(output_lens) == {16, 17, 18, 19}
    assert lengths_of(synthetic(2, 0, "fixed:128", "lognormal:-9:1")) == ([128, 128], [1, 1])


def test_one_distribution_leaves_the_others_lengths_alone() -> None:
    drawn = lengths_of(synthetic(50, 3, "uniform:1:999", "uniform:1:999"))
    assert lengths_of(synthetic(50, 3, "uniform:1:999", "fixed:1"))[0] == drawn[0]
    assert lengths_of(synthetic(50, 3, "lognormal:5:1", "uniform:1:999"))[1] == drawn[1]
    assert drawn[0] != drawn[1]
    assert drawn != lengths_of(synthetic(50, 4, "uniform:1:999", "uniform:1:999"))


@pytest.mark.parametrize(
    "spec",
    [
        *("", "128", "zipf:2", "fixed", "fixed:0", "fixed:1.5", "fixed:9999999999999999999999", "fixed:1:2"),
        *("uniform:9:5", "uniform:0:5", "uniform:5", "lognormal:5:-1", "lognormal:500:1", "lognormal:nan:1"),
    ],
)
def test_a_misspelt_distribution_says_how_to_spell_it(spec: str) -> None:
    with pytest.raises(TandemError, match=r"write fixed:LENGTH, uniform:LOW:HIGH or lognormal:MU:SIGMA") as caught:
        synthetic(5, 0, spec, "fixed:1")
    assert repr(spec) in str(caught.value)
