"""Traces as others publish them: columns, units, blocks, dates and containers; and large ones, in little memory."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import traces.spill
from traces import TandemError, Trace, TraceRequest, read_trace, write_trace
from traces.columns import Reading
from traces.dates import read_date
from traces.request import CompactRequests
from traces.trace import LONGEST_WAIT_NS, from_first_arrival

PUBLISHED = Path(__file__).parents[2] / "shared" / "data" / "traces"
needs_published = pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"the published traces are not at {PUBLISHED}")

S = 10**9
FORMATS: dict[str, tuple[dict[str, Any], int]] = {  # a row, whose arrival is written 2.5 in its unit, and that unit
    "azure": ({"TIMESTAMP": "1970-01-01 00:00:02.5000000", "ContextTokens": 20, "GeneratedTokens": 3}, S),
    "burstgpt": ({"Timestamp": 2.5, "Request tokens": 20, "Response tokens": 3}, S),
    "vidur": ({"arrived_at": 2.5, "num_prefill_tokens": 20, "num_decode_tokens": 3}, S),
    "splitwise": ({"arrival_timestamp": 2.5, "prompt_size": 20, "token_size": 3}, S),
    "servegen": ({"timestamp": 2.5, "input_tokens": 20, "output_tokens": 3}, S),
    "llmservingsim": ({"arrival_time_ns": 2_500_000_000, "input_toks": 20, "output_toks": 3}, S),
    "ours": ({"arrival_s": 2.5, "prompt_len": 20, "output_len": 3}, S),
    "bailian": ({"chat_id": 1, "timestamp": 2.5, "input_length": 20, "output_length": 3, "hash_ids": [4, 5]}, S),
    "timed_trace": ({"timestamp": 2.5, "input_length": 20, "output_length": 3, "hash_ids": [4, 5]}, S),
    "mooncake": ({"timestamp": 2.5, "input_length": 20, "output_length": 3, "hash_ids": [4]}, 10**6),
}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows in the container that the suffix names."""
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    if name.endswith((".csv", ".tsv")):
        text = pd.DataFrame(rows).to_csv(index=False, sep="\t" if name.endswith("tsv") else ",")
    elif name.endswith(".json"):
        text = json.dumps(rows)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet", ".jsonl.gz", ".csv.gz", ".json.gz"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_read_alike_in_every_container(name: str, suffix: str, tmp_path: Path) -> None:
    row, unit_ns = FORMATS[name]
    early = row | ({"TIMESTAMP": "1970-01-01 00:00:00"} if name == "azure" else {next(iter(row)): 0})
    early = row | {"timestamp": 0} if "timestamp" in row else early
    trace = read_trace(write(tmp_path / f"t{suffix}", [early, row]))
    last = trace.requests[1]
    assert (last.arrival_ns, last.prompt_len, last.output_len) == (round(2.5 * unit_ns), 20, 3)
    if "hash_ids" in row:
        assert (list(last.hash_ids), last.hash_block_size) == (row["hash_ids"], 512 if name == "mooncake" else 16)
    says = name in ("azure", "ours", "llmservingsim")  # in a name, or by dates
    assert any("is read in" in note for note in trace.notes) is not says


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("column", ["timestamp", "Timestamp", "arrived_at", "arrival_timestamp"])
def test_a_unit_that_no_name_says_can_be_said(column: str, unit: str, tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", [{column: at, "prompt_len": 1, "output_len": 1} for at in (0, 4000)])
    trace = read_trace(path, Reading(time_unit=unit))
    assert trace.requests[1].arrival_ns == 4000 * {"s": S, "ms": 10**6, "us": 10**3, "ns": 1}[unit]
    assert "as --time-unit says: 2 requests in" in trace.notes[0]


def test_fractions_without_a_unit_are_refused_and_whole_numbers_are_read_with_a_note(tmp_path: Path) -> None:
    rows = [{"timestamp": at, "input_length": 5, "output_length": 5} for at in (0, 7)]
    assert (
        "milliseconds, as in Mooncake's traces (the file does not say): 2 requests in 0.007 s"
        in (read_trace(write(tmp_path / "t.jsonl", rows)).notes[0])
    )
    for suffix in (".jsonl", ".csv"):
        with pytest.raises(
            TandemError, match=r"timestamp is 7.5, and the file does not say in which unit: give --time-u"
        ):
            read_trace(write(tmp_path / f"t{suffix}", [*rows, rows[0] | {"timestamp": 7.5}]))


def test_a_block_size_can_be_said_and_not_contradicted(tmp_path: Path) -> None:
    row = {"arrival_s": 0, "prompt_len": 100, "output_len": 1, "hash_ids": [1]}
    said = Reading(hash_block_size=64)
    assert read_trace(write(tmp_path / "t.jsonl", [row]), said).requests[0].hash_block_size == 64
    with pytest.raises(TandemError, match=r"hash_block_size is 100, and --hash-block-size 64: leave the option out"):
        read_trace(write(tmp_path / "t.jsonl", [row | {"hash_block_size": 100}]), said)


@given(
    st.datetimes(pd.Timestamp("1970-01-02"), pd.Timestamp("2261-01-01")),
    st.sampled_from(["", "Z", "+00:00", "+02:00", "-05:30", " +0900", "+01", " UTC"]),
    st.sampled_from(" T"),
)
def test_dates_are_those_of_pandas(moment: Any, zone: str, between: str) -> None:
    text = f"{moment.isoformat(between)}{zone}"
    expected = pd.Timestamp(text.replace("+01", "+01:00") if zone == "+01" else text)
    assert read_date(text) == (expected if expected.tz else expected.tz_localize("UTC")).as_unit("ns").value


@pytest.mark.parametrize(
    "text", ["now", "2024", "NaT", "2024-02-30", "2024-01-01 24:61", "1960-01-01", "9999-01-01", "x"]
)
def test_what_is_no_date_is_refused(text: str) -> None:
    with pytest.raises(TandemError, match="is no date"):
        read_date(text)


def test_dates_of_two_zones_are_one_time(tmp_path: Path) -> None:
    times = ["2024-05-10 02:00:00+02:00", "2024-05-10 00:00:01+00:00", "2024-05-10T00:00:02Z"]
    rows = [{"TIMESTAMP": at, "ContextTokens": 1, "GeneratedTokens": 1} for at in times]
    for suffix in (".csv", ".jsonl"):
        trace = read_trace(write(tmp_path / f"t{suffix}", rows))
        assert [each.arrival_ns for each in trace.requests] == [0, S, 2 * S]
    instants = pd.to_datetime(pd.Series(times), utc=True, format="ISO8601")
    pd.DataFrame(rows).assign(TIMESTAMP=instants).to_parquet(tmp_path / "t.parquet")
    assert [each.arrival_ns for each in read_trace(tmp_path / "t.parquet").requests] == [0, S, 2 * S]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_request_of_zero_length_is_treated_alike(name: str, suffix: str, tmp_path: Path) -> None:
    row, _ = FORMATS[name]
    prompt, output = [*row][-2:] if "hash_ids" not in row else [*row][-3:-1]
    row = {key: value for key, value in row.items() if key != "hash_ids"}
    said = Reading(time_unit="s" if "timestamp" in row else None)
    trace = read_trace(write(tmp_path / f"t{suffix}", [row, row | {output: 0}]), said)
    assert len(trace.requests) == 1 and "1 requests without output tokens were dropped" in trace.notes
    with pytest.raises(TandemError, match=r"prompt_len is 0: it must be an integer of at least 1"):
        read_trace(write(tmp_path / f"t{suffix}", [row, row | {prompt: 0}]), said)


def test_a_byte_order_mark_and_lengths_without_arrivals_are_read(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('\ufeff{"arrival_s": 0, "prompt_len": 1, "output_len": 1}\n')
    (tmp_path / "t.json").write_text('\ufeff[{"arrival_s": 0, "prompt_len": 1, "output_len": 1}]')
    (tmp_path / "t.csv").write_text("\ufeffnum_prefill_tokens,num_decode_tokens,pd_ratio\n3,4,0.75\n")
    assert len(read_trace(tmp_path / "t.jsonl").requests) == len(read_trace(tmp_path / "t.json").requests) == 1
    trace = read_trace(tmp_path / "t.csv")
    assert trace.requests == [TraceRequest(0, 0, 3, 4, 4)]
    assert "ignored unknown columns: pd_ratio" in trace.notes and "the file has no arrivals" in trace.notes[1]


# Parts of a file


def numbered(path: Path, count: int = 40_000) -> Path:
    """A request a second from second 1000 on, of as many prompt tokens as its place, from 1."""
    lines = (f"{1000 + place}.0,{place + 1},5\n" for place in range(count))
    path.write_text("Timestamp,Request tokens,Response tokens\n" + "".join(lines))
    return path


def test_the_first_requests_are_read_without_the_rest(tmp_path: Path) -> None:
    path = numbered(tmp_path / "t.csv")
    path.write_text(path.read_text() + "damaged\n")
    for count in (1, 100, 8192, 8193, 20_000):
        requests = read_trace(path, Reading(requests=count)).requests
        assert [each.prompt_len for each in requests] == list(range(1, count + 1))
    with pytest.raises(TandemError, match=r"t\.csv:40002: not a row of"):
        read_trace(path)


@pytest.mark.parametrize(("start", "end"), [(0, 5), (None, 5), (10, 12.5), (9000, 30_000), (39_990, None)])
def test_a_window_counts_from_the_first_request_and_is_the_new_start(start: Any, end: Any, tmp_path: Path) -> None:
    requests = read_trace(numbered(tmp_path / "t.csv"), Reading(from_s=start, to_s=end)).requests
    places = [place for place in range(40_000) if (start or 0) <= place < (end or 40_000)]
    assert [each.prompt_len for each in requests] == [place + 1 for place in places]
    assert [each.arrival_ns for each in requests] == [(place - (start or 0)) * S for place in places]


def test_an_empty_window_says_so(tmp_path: Path) -> None:
    with pytest.raises(TandemError, match="no request arrives from 50000 to 60000 s"):
        read_trace(numbered(tmp_path / "t.csv"), Reading(from_s=50_000, to_s=60_000))
    with pytest.raises(TandemError, match="the earlier one first"):
        Reading(from_s=5, to_s=2)


def test_nobody_waits_for_a_first_request_that_comes_late() -> None:
    late = Trace(
        [TraceRequest(0, LONGEST_WAIT_NS + 1, 1, 1, 1), TraceRequest(1, 10**15, 1, 1, 1, cancel_ns=2 * 10**15)]
    )
    moved = from_first_arrival(late)
    assert [each.arrival_ns for each in moved.requests] == [0, 10**15 - LONGEST_WAIT_NS - 1]
    assert moved.requests[1].cancel_ns == 2 * 10**15 - LONGEST_WAIT_NS - 1
    assert "the first request arrives after 10 s" in moved.notes[0]
    soon = Trace([TraceRequest(0, LONGEST_WAIT_NS, 1, 1, 1)])
    assert from_first_arrival(soon) is soon


# Large files


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.booleans())
def test_requests_in_files_and_late_ones_are_sorted_as_in_memory(arrivals: list[int], hashed: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("traces.spill.IN_MEMORY", 4), ("traces.arrival_order.IN_MEMORY", 3)):
            patch.setattr(name, value)
        from traces.arrival_order import ArrivalSorter

        part = ArrivalSorter()
        for place, arrival in enumerate(arrivals):
            extra: dict[str, Any] = {"hash_ids": [place]} if hashed and place % 3 == 0 else {}
            part.add(TraceRequest(part.next_id, arrival, place + 1, 1, 1, **extra))
        ordered = [(each.id, each.arrival_ns, each.prompt_len - 1) for each in part.in_order()]
    wanted = sorted(enumerate(arrivals), key=lambda each: each[1])
    assert ordered == [(place, arrival, came) for place, (came, arrival) in enumerate(wanted)]
    assert len(part.late) == sum(arrival < max(arrivals[:place], default=0) for place, arrival in enumerate(arrivals))


def test_requests_in_a_file_are_the_requests_that_were_added(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(traces.spill, "IN_MEMORY", 10)
    compact = CompactRequests()
    requests = [TraceRequest(place, place, 1 + place % 7, 2, 2 + place % 2) for place in range(1234)]
    for request in requests:
        compact.append(request)
    assert compact == requests and compact[1233] == requests[1233] and compact[5:7] == requests[5:7]
    assert Trace(compact).digest == Trace(requests).digest
    for suffix in (".jsonl", ".parquet"):
        write_trace(tmp_path / f"t{suffix}", Trace(compact))
        assert read_trace(tmp_path / f"t{suffix}").requests == requests


def test_a_large_file_with_a_late_row_is_read_in_little_memory(tmp_path: Path) -> None:
    rows = 600_000
    at = np.arange(rows) * 10
    at[rows // 2] = 0
    text = pd.DataFrame({"arrival_ns": at, "prompt_len": 5, "output_len": 6}).to_csv(index=False)
    (tmp_path / "t.csv").write_text(text)
    code = (
        "import sys; from traces import read_trace; trace = read_trace(sys.argv[1]); trace.digest;"
        "peak = next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM'));"
        "print(len(trace.requests), int(peak) // 1024, *trace.notes)"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "t.csv"], capture_output=True, text=True, check=True)
    count, peak_mb, note = done.stdout.split(" ", 2)
    assert int(count) == rows and int(peak_mb) < 120, peak_mb
    assert "1 of 600000 arrivals were out of order" in note


@needs_published
@pytest.mark.parametrize("name", ["AzureLLMInferenceTrace_code.csv", "AzureLLMInferenceTrace_conv.csv"])
def test_azures_counts_totals_and_times_are_those_of_pandas(name: str) -> None:
    table = pd.read_csv(PUBLISHED / name, parse_dates=["TIMESTAMP"])
    requests = read_trace(PUBLISHED / name).requests
    assert len(requests) == len(table)
    assert sum(each.prompt_len for each in requests) == table["ContextTokens"].sum()
    assert sum(each.output_len for each in requests) == table["GeneratedTokens"].sum()
    since = (table["TIMESTAMP"] - table["TIMESTAMP"].min()).astype("timedelta64[ns]").astype("int64")
    assert [each.arrival_ns for each in requests] == sorted(since)
