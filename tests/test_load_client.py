"""`tandem load --url`: an open-loop client whose records stand beside those of any run."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import time
from dataclasses import replace

import numpy as np
import pytest
from served import PROFILE, TANDEM, eventually, serving, sim, tokenizer

from analysis.client.load_client import Reply, Target, send_all
from analysis.client.records import side_by_side
from analysis.metrics.summary import latencies, metrics, request_metrics
from analysis.metrics.tokens import token_times
from engine.records.run_folder import read_run
from traces.request import TraceRequest
from traces.trace import Trace, write_trace

MS = 1_000_000


@pytest.fixture(scope="module")
def workload() -> Trace:
    """40 requests, 20 ms apart, some shorter than their clients allow, one that is given up."""
    requests = [
        TraceRequest(
            i,
            i * 20 * MS,
            20 + i,
            output_len=10 + i % 7,
            max_tokens=10 + i % 7 + 5 * (i % 2),
            priority=i % 3,
            client="me",
        )
        for i in range(40)
    ]
    requests[4] = replace(requests[4], output_len=500, max_tokens=500, cancel_ns=requests[4].arrival_ns + 300 * MS)
    return Trace(requests)


@pytest.fixture(scope="module")
def loaded(workload, tmp_path_factory):
    """The folder with the client's run, the server's, and an in-process simulation of the trace."""
    folder = tmp_path_factory.mktemp("load")
    write_trace(folder / "t.parquet", workload)
    run_tandem("simulate", "--trace", "t.parquet", "--profile", PROFILE, "--out", "sim", cwd=folder)
    with serving(*sim(), "--out", folder / "served") as server:
        options = ("--trace", "t.parquet", "--out", "client", "--against", "sim")
        (folder / "said").write_text(run_tandem("load", "--url", server.url, *options, cwd=folder).stdout)
        eventually(lambda: server.status()["open"] == 0)
        assert server.stop() == 0
    return folder


def run_tandem(*args: object, cwd, status: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([TANDEM, *map(str, args)], cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == status, done.stderr
    return done


def test_the_client_has_every_token_of_every_request_where_the_trace_said_that_it_ends(loaded, workload):
    run = read_run(loaded / "client")
    rows = run.tables["requests"].to_pylist()
    assert [row["output_len"] for row in rows if row["outcome"] != "cancelled"] == [
        source.output_len for source in workload.requests if source.cancel_ns is None
    ]
    assert [row["outcome"] for row in rows].count("cancelled") == 1 and rows[4]["outcome"] == "cancelled"
    assert rows[1]["outcome"] == "stop" and rows[0]["outcome"] == "length"
    assert len(token_times(run).request) == sum(row["output_len"] for row in rows)


def test_the_server_was_told_what_the_trace_says(loaded, workload):
    served = read_run(loaded / "served").tables["requests"].to_pylist()
    for row, source in zip(served, workload.requests, strict=True):
        asked = (row["prompt_len"], row["max_tokens"], row["priority"], row["client"])
        assert asked == (source.prompt_len, source.max_tokens, source.priority, "me")
    assert served[4]["outcome"] == "cancelled"


def test_the_server_counts_the_same_tokens_and_the_client_has_each_a_little_later(loaded):
    client, served = read_run(loaded / "client"), read_run(loaded / "served")
    theirs, ours = token_times(client), token_times(served)
    whole = np.array([row["outcome"] != "cancelled" for row in served.tables["requests"].to_pylist()])
    offset = client.manifest["provenance"]["start_perf_ns"] - served.manifest["provenance"]["start_perf_ns"]
    got = theirs.time_ns[whole[theirs.request]] + offset
    made = ours.time_ns[whole[ours.request]]
    added = (got - made) / MS
    assert len(added) > 400 and added.min() > 0 and np.median(added) < 10


def test_its_latencies_are_those_of_the_simulation_in_process_and_what_the_path_adds(loaded):
    client, sim = read_run(loaded / "client"), read_run(loaded / "sim")
    assert client.manifest["workload"]["trace"] == sim.manifest["workload"]["trace"]
    for name in ("tpot", "itl"):
        assert np.median(latencies(client)[name]) == pytest.approx(np.median(latencies(sim)[name]), rel=0.2)
    said = (loaded / "said").read_text()
    assert "mean TTFT" in said and "p90 ITL" in said and "difference" in said


def test_what_a_client_cannot_know_is_not_claimed(loaded):
    run = read_run(loaded / "client")
    assert run.summary.keys() < metrics(run).keys() | {"p99_send_lag_ms", "partial", "not_completed"}
    assert not any(name.startswith(("steps_", "mean_batch")) or "queue" in name for name in run.summary)
    assert len(run.tables["iterations"]) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_client_that_is_told_to_end_keeps_what_came(number, tmp_path):
    write_trace(tmp_path / "t.jsonl", Trace([TraceRequest(i, i * 100 * MS, 8, 4, 4) for i in range(600)]))
    with serving(*sim()) as server:
        command = [TANDEM, "load", "--url", server.url, "--trace", "t.jsonl", "--out", "client"]
        with subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as client:
            eventually(lambda: server.status()["generated"] > 20)
            client.send_signal(number)
            said = client.communicate(timeout=60)[1]
    assert client.returncode == 130 and "marked partial" in said
    run = read_run(tmp_path / "client")
    outcomes = [row["outcome"] for row in run.tables["requests"].to_pylist()]
    assert run.partial and run.summary["completed"] == outcomes.count("length") >= 5
    assert {"length", "unfinished"} == set(outcomes) and len(outcomes) == 600


def test_it_is_an_open_loop_requests_are_sent_on_time_however_slow_the_server_is(workload, tmp_path):
    burst = [TraceRequest(i, i * 10 * MS, 8, 25, 25) for i in range(12)]
    write_trace(tmp_path / "t.parquet", Trace(burst))
    with serving(*sim(), "--max-seqs", 1) as server:
        begin = time.perf_counter()
        run_tandem("load", "--url", server.url, "--trace", "t.parquet", "--out", "client", cwd=tmp_path)
        assert time.perf_counter() - begin > 3, "one after the other"
    rows = read_run(tmp_path / "client").tables["requests"].to_pylist()
    assert max(row["delivered_ns"] - row["arrival_ns"] for row in rows) < 100 * MS


def test_how_slowly_a_client_parses_changes_nothing_about_when_it_says_that_chunks_came(monkeypatch):
    clients, parse_s = 30, 0.005
    event = b'data: {"id": "c-1", "choices": [{"text": "x", "finish_reason": null}]}\n\ndata: [DONE]\n\n'
    answer = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b" % (len(event), event)
    loads = json.loads
    monkeypatch.setattr("analysis.client.load_client.json.loads", lambda data: time.sleep(parse_s) or loads(data))

    async def replies() -> list[Reply]:
        waiting = asyncio.Barrier(clients)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            await waiting.wait()  # all are answered at once
            writer.write(answer)
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            target = Target(f"http://127.0.0.1:{port}", "m", extended=False)
            requests = [TraceRequest(i, 0, 8, 1, 1) for i in range(clients)]
            return (await send_all(target, requests, lambda _: None)).replies

    got = asyncio.run(replies())
    assert all(reply.pieces == ["x"] and reply.ends == 1 and reply.error is None for reply in got)
    came = [reply.chunk_ns[0] for reply in got]
    assert max(came) - min(came) < clients * parse_s * 1e9 / 2


def test_requests_that_are_turned_away_are_recorded_with_the_reason(workload, tmp_path):
    write_trace(tmp_path / "t.parquet", Trace([TraceRequest(0, 0, 8, 2, 2), TraceRequest(1, 0, 9000, 2, 2)]))
    with serving(*sim()) as server:
        done = run_tandem(
            "load", "--url", server.url, "--trace", "t.parquet", "--out", "client", "--json", cwd=tmp_path
        )
    assert json.loads(done.stdout)["rejected"] == 1
    _, refused = read_run(tmp_path / "client").tables["requests"].to_pylist()
    assert (
        refused["outcome"] == "rejected"
        and "status 400" in refused["reason"]
        and "the longest here" in refused["reason"]
    )


def test_where_all_are_turned_away_the_client_says_why_has_no_latencies_and_exits_with_1(tmp_path):
    write_trace(tmp_path / "t.parquet", Trace([TraceRequest(0, 0, 9000, 2, 2), TraceRequest(1, 0, 9000, 2, 2)]))
    with serving(*sim()) as server:
        options = ("--trace", "t.parquet", "--out", "client")
        said = run_tandem("load", "--url", server.url, *options, cwd=tmp_path, status=1).stdout
    assert said.startswith("2 of 2 requests were rejected: ") and "the longest here" in said
    assert "No request completed: there are no latencies." in said and "ttft" not in said


def test_latencies_of_runs_that_completed_different_requests_are_labelled(loaded):
    client, other = read_run(loaded / "client"), read_run(loaded / "sim")
    counts = [len(request_metrics(run)["request"]) for run in (client, other)]
    assert counts == [39, 39]  # and one was given up
    table = side_by_side(client, other)
    assert list(table.columns) == ["", "client (39 of 40)", "other (39 of 40)", "difference"]
    assert "need not be the same ones" in table.note and not any("P99" in row[0] for row in table.rows)


@pytest.mark.parametrize(
    ("url", "says"),
    [("localhost:8000", "give something like http://"), ("http://127.0.0.1:9", "is a server there?")],
)
def test_a_url_without_a_server_is_one_clear_line(tmp_path, workload, url, says):
    write_trace(tmp_path / "t.parquet", workload)
    done = run_tandem("load", "--url", url, "--trace", "t.parquet", "--out", "o", cwd=tmp_path, status=2)
    assert says in done.stderr and done.stderr.count("\n") == 1 and not (tmp_path / "o").exists()


def test_the_bench_accounts_for_every_token(tmp_path):
    done = run_tandem(
        "bench", "serve", "--model", tokenizer(), "--loads", "40x20", "--seconds", 2, "--json", cwd=tmp_path
    )
    (row,) = json.loads(done.stdout)["rows"]
    assert (row["complete"], row["tokens"], row["chunks"]) == (40, 1600, 1600)
    assert 0 < row["added_p50_ms"] < row["added_p99_ms"] < 1000
