"""Policies side by side: what is compared with what, and what a reader is shown."""

from __future__ import annotations

from dataclasses import replace

import pytest
from shadow import serve

from analysis.metrics import latencies, metrics
from analysis.policies import compare_policies, policy_tables, write_policy_page
from engine.config import ServingConfig
from engine.records import RunRecords
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
    latency, totals, by_client = policy_tables(comparison)
    values = comparison["latencies"]["ttft"]["mean"]
    rows = {row[1]: row for row in latency.rows[:3]}
    assert rows["fcfs"][0] == "TTFT" and rows["fcfs"][3] == ""
    assert rows["sjf"][3] == f"{values['sjf'] / values['fcfs'] - 1:+z.1%}"
    assert "P99 is shown from 200 requests up" in latency.note and rows["sjf"][-2:] == ("–", "")
    assert "rejected" in totals.columns and "cancelled" not in totals.columns, (
        "a total that is 0 everywhere says nothing"
    )
    assert len(by_client.rows) == 6


def test_the_page_is_whole_and_needs_no_network(runs, tmp_path):
    write_policy_page(compare_policies(runs), runs, tmp_path / "page.html", "Three <policies>")
    page = (tmp_path / "page.html").read_text()
    assert "Three &lt;policies&gt;" in page and "40 requests completed under all of fcfs, chunked_prefill, sjf" in page
    assert page.count("figure-cdf") and page.count("figure-bar") and "<script src=" not in page
    assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]
