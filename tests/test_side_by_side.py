"""Policies side by side: what is compared with what, and what a reader is shown."""

from __future__ import annotations

from dataclasses import replace

import pytest
from shadow import serve

from analysis.comparison.policies import compare_policies
from analysis.metrics.summary import latencies, metrics
from analysis.report.policy_page import policy_tables, write_policy_page
from engine.config import ServingConfig
from engine.records.run_folder import RunRecords
from traces.request import TraceRequest

LIMITS = ServingConfig(num_blocks=400, max_seqs=4, max_batched_tokens=300, max_model_len=1000)
REQUESTS = [TraceRequest(i, i * 10**6, 20, 10 + i % 9, 10 + i % 9, client="ab"[i % 2]) for i in range(40)]
HUGE = TraceRequest(40, 40 * 10**6, 500, 20, 20, client="a")  # beyond a step's budget: only chunks can run it


@pytest.fixture(scope="module")
def runs() -> dict[str, RunRecords]:
    policies = ("fcfs", "chunked_prefill", "sjf")
    return {
        policy: RunRecords({}, serve([*REQUESTS, HUGE], replace(LIMITS, scheduler=policy))[0].tables())
        for policy in policies
    }


def test_latencies_are_of_the_requests_that_completed_everywhere(runs):
    comparison = compare_policies(runs)
    assert comparison["requests"] == 40
    assert comparison["totals"]["completed"] == {"fcfs": 40, "chunked_prefill": 41, "sjf": 41}
    assert comparison["totals"]["rejected"] == {"fcfs": 1, "chunked_prefill": 0, "sjf": 0}
    shared = latencies(runs["sjf"], list(range(40)))["e2el"].mean()
    assert comparison["latencies"]["e2el"]["mean"]["sjf"] == shared != metrics(runs["sjf"])["mean_e2el_ms"]
    assert comparison["latencies"]["e2el"]["p99"] == dict.fromkeys(runs), "40 requests have no P99"


def test_clients_are_compared_if_there_are_several(runs):
    clients = compare_policies(runs)["clients"]
    assert {name: of["requests"] for name, of in clients.items()} == {"a": 20, "b": 20}
    odd = latencies(runs["sjf"], list(range(1, 40, 2)))["ttft"].mean()
    assert clients["b"]["ttft"]["sjf"] == odd
    alone = [replace(each, client=None) for each in REQUESTS]
    run = RunRecords({}, serve(alone, replace(LIMITS, scheduler="fcfs"))[0].tables())
    assert compare_policies({"fcfs": run})["clients"] == {}


def test_each_row_gives_the_difference_to_the_first_policy(runs):
    comparison = compare_policies(runs)
    _, latency, totals, by_client = policy_tables(comparison)
    values = comparison["latencies"]["ttft"]["mean"]
    rows = {row[1]: row for row in latency.rows[:3]}
    assert rows["fcfs"][0] == "TTFT" and rows["fcfs"][4] == ""
    assert rows["sjf"][4] == f"{values['sjf'] / values['fcfs'] - 1:+z.1%}"
    assert "P99 is shown from 200 requests up" in latency.note and "p99" not in latency.columns
    assert "rejected" in totals.columns and "cancelled" not in totals.columns, (
        "a total that is 0 everywhere says nothing"
    )
    assert len(by_client.rows) == 6


def test_policies_that_completed_different_requests_say_so_before_and_beside_every_number(runs, tmp_path):
    comparison = compare_policies(runs)
    before, *tables = policy_tables(comparison)
    assert before.note.startswith("fcfs: 1 of 41 requests was rejected: a prefill above --max-batched-tokens (300)")
    assert "They did not complete the same requests: latencies are of the 40 that all did." in before.note
    counts = {"fcfs": "40 of 41", "chunked_prefill": "41 of 41", "sjf": "41 of 41"}
    for table in tables:
        policy, completed = table.columns.index("completed") - 1, table.columns.index("completed")
        assert table.rows and all(row[completed] == counts[row[policy]] for row in table.rows)
    write_policy_page(comparison, runs, tmp_path / "page.html", "")
    page = (tmp_path / "page.html").read_text()
    assert page.index("fcfs: 1 of 41 requests was rejected") < page.index("<table>") and '"fcfs (40 of 41)"' in page


def test_policies_that_completed_as_many_but_others_are_not_the_same(runs):
    rows = runs["fcfs"].tables["requests"].to_pylist()
    other = [row | {"outcome": "cancelled"} if row["request"] == 0 else row for row in rows]
    other = [runs["sjf"].tables["requests"].to_pylist()[40] if row["request"] == 40 else row for row in other]
    table = type(runs["fcfs"].tables["requests"]).from_pylist(other, runs["fcfs"].tables["requests"].schema)
    comparison = compare_policies(
        {"a": runs["fcfs"], "b": replace(runs["fcfs"], tables={**runs["sjf"].tables, "requests": table})}
    )
    assert comparison["totals"]["completed"] == {"a": 40, "b": 40}
    assert (comparison["requests"], comparison["same"]) == (39, False)


def test_policies_that_completed_the_same_requests_are_not_marked(runs):
    same = {policy: runs[policy] for policy in ("chunked_prefill", "sjf")}
    latency, totals, by_client = policy_tables(compare_policies(same))
    assert "completed" in totals.columns and "completed" not in (*latency.columns, *by_client.columns)


def test_policies_that_completed_nothing_have_no_table_of_latencies():
    huge = [replace(HUGE, id=i) for i in range(3)]
    none = {name: RunRecords({}, serve(huge, replace(LIMITS, scheduler="fcfs"))[0].tables()) for name in "ab"}
    before, latency, *_ = policy_tables(compare_policies(none))
    assert before.note.startswith("a, b: 3 of 3 requests were rejected") and "no latencies" in before.note
    assert latency.rows == []


def test_the_page_is_whole_and_needs_no_network(runs, tmp_path):
    write_policy_page(compare_policies(runs), runs, tmp_path / "page.html", "Three <policies>")
    page = (tmp_path / "page.html").read_text()
    assert "Three &lt;policies&gt;" in page and "40 requests completed under all of fcfs, chunked_prefill, sjf" in page
    assert page.count("figure-cdf") and page.count("figure-bar") and "<script src=" not in page
    assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]
    write_policy_page(compare_policies(runs), runs, tmp_path / "page.html", "Three <policies>")
    assert (tmp_path / "page.html").read_text() == page, "the same comparison gives the same page"
