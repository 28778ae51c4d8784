"""What a trace says of its requests beside lengths: shares, promises, and predictions as wrong as one asks for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.request import Request
from traces import TandemError, Trace, TraceRequest, read_trace, write_trace
from traces.arrivals import assign_arrivals
from traces.request_classes import RequestClass, assign_classes, predict_lengths, read_class
from traces.synthetic import synthetic

MS = 1_000_000
TRACE = assign_arrivals(synthetic(2000, 1, "uniform:5:50", "lognormal:4:1"), "poisson", rate=10, seed=1)
CLASSES = [RequestClass("chat", 3, -1, ttft_slo_ms=200, patience_ms=1500), RequestClass("batch", 1, e2e_slo_ms=9000)]


def test_classes_take_their_shares_and_bring_their_promises():
    trace = assign_classes(TRACE, CLASSES, seed=4)
    chat = [request for request in trace.requests if request.client == "chat"]
    assert len(chat) / len(trace.requests) == pytest.approx(0.75, abs=0.03)
    assert {(each.priority, each.ttft_slo_ns, each.e2e_slo_ns) for each in chat} == {(-1, 200 * MS, None)}
    assert all(each.cancel_ns == each.arrival_ns + 1500 * MS for each in chat)
    batch = [request for request in trace.requests if request.client == "batch"]
    assert {(each.priority, each.ttft_slo_ns, each.e2e_slo_ns, each.cancel_ns) for each in batch} == {
        (0, None, 9000 * MS, None)
    }
    assert [each.output_len for each in trace.requests] == [each.output_len for each in TRACE.requests]


def test_an_oracle_predicts_exactly_and_noise_is_as_large_as_was_asked_for():
    oracle = predict_lengths(TRACE, 0)
    assert all(request.predicted_length == request.output_len for request in oracle.requests)
    noisy = predict_lengths(TRACE, 0.5, seed=2)
    errors = np.log([each.predicted_length / each.output_len for each in noisy.requests if each.output_len > 20])
    assert abs(np.median(errors)) < 0.04 and errors.std() == pytest.approx(0.5, abs=0.03)


def test_the_same_seed_makes_the_same_trace_and_another_another():
    for make in (lambda seed: assign_classes(TRACE, CLASSES, seed), lambda seed: predict_lengths(TRACE, 0.5, seed)):
        assert make(1).digest == make(1).digest != make(2).digest


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_it_all_survives_a_file(suffix, tmp_path):
    trace = predict_lengths(assign_classes(TRACE, CLASSES), 0.5)
    write_trace(tmp_path / f"t{suffix}", trace)
    assert read_trace(tmp_path / f"t{suffix}") == trace


def test_slos_may_be_given_in_milliseconds(tmp_path):
    line = '{"arrival_s": 0, "prompt_len": 5, "output_len": 5, "ttft_slo_ms": 1.5, "e2e_slo_ms": 20}\n'
    (tmp_path / "t.jsonl").write_text(line)
    (request,) = read_trace(tmp_path / "t.jsonl").requests
    assert (request.ttft_slo_ns, request.e2e_slo_ns) == (1_500_000, 20 * MS)


def test_a_trace_of_the_first_version_is_read_and_keeps_its_digest(tmp_path):
    header, line = '{"tandem_trace": 1, "meta": {}}', '{"arrival_ns": 7, "prompt_len": 5, "output_len": 5}'
    (tmp_path / "t.jsonl").write_text(f"{header}\n{line}\n")
    trace = read_trace(tmp_path / "t.jsonl")
    assert trace.digest == Trace([TraceRequest(0, 7, 5, 5, 5)]).digest
    assert trace.digest != Trace([TraceRequest(0, 7, 5, 5, 5, e2e_slo_ns=1)]).digest


@given(st.none() | st.integers(1, 100), st.none() | st.integers(1, 100), st.booleans())
def test_a_request_is_due_when_the_next_of_its_promises_is(ttft, e2e, has_first_token):
    request = Request(0, 1000, 5, 5, ttft_slo_ns=ttft, e2e_slo_ns=e2e)
    if has_first_token:
        request.sampled()
    promises = [slo for slo in ([] if has_first_token else [ttft]) + [e2e] if slo is not None]
    assert request.deadline_ns == (1000 + min(promises) if promises else None)


def test_a_class_is_written_as_its_client_and_what_is_special_about_it():
    assert read_class("a") == RequestClass("a")
    assert read_class("a:share=3:priority=-1:e2e_slo_ms=9") == RequestClass("a", 3.0, -1, e2e_slo_ms=9.0)
    for text, words in (
        ("a:colour=red", "'colour'"),
        ("a:share=0", "share is 0"),
        ("a:priority=1.5", "priority is '1.5'"),
    ):
        with pytest.raises(TandemError, match=words):
            read_class(text)
