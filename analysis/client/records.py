"""What a client saw, written down as a run: the same tables, in so far as a client can know what is in them.

- `requests`: arrival is the trace's, delivery is when the request was sent; first and last token are when chunks came.
  What happened to it inside the server (first scheduled, preemptions, swaps, wasted and cached tokens) is not known: it
  stands as the delivery, or 0. A request that got an error is `rejected`, and says why.
- `steps`: a step is one reading of the clock at which chunks came in; `decode_tokens` counts them. The rest is 0.
- `spans`: one for each chunk, of the step that brought it. A chunk is taken for a token: where a server puts several in
  one, gaps are between chunks, as they are in vLLM's benchmark, and lengths are still the server's count.
- `iterations`: empty. A client sees no serving loop, and its run cannot be replayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from analysis.client.load_client import Reply, Target
from analysis.metrics.columns import completed_requests
from analysis.metrics.names import LATENCIES
from analysis.metrics.summary import asked_for, latencies, latency_statistics, summarize
from analysis.report.caveats import p99_sentence
from analysis.report.tables import TextTable
from engine.records import manifest
from engine.records.run_folder import RunRecords, tables_from_rows
from engine.request import CANCELLED, LENGTH, REJECTED, STOP
from traces.request import TraceRequest
from traces.trace import Trace

UNKNOWN = (
    *("steps_", "mean_batch", "median_schedule_us", "median_launch_us"),
    *("preemptions", "wasted_tokens", "cached_tokens", "prefix_cache_hit_rate"),
)
UNKNOWN_LATENCY = "queue"
LATE_MS = 5.0  # sending later than this, at P99, is the client's fault and in its latencies


def client_run(trace: Trace, target: Target, start_ns: int, replies: Sequence[Reply]) -> RunRecords:
    """The records of a replay."""
    times = [np.asarray(reply.chunk_ns, np.int64) - start_ns for reply in replies]
    clock = np.unique(np.concatenate(times)) if times else np.empty(0, np.int64)
    steps = [np.searchsorted(clock, each) for each in times]
    parts = {
        "workload": {
            "trace": trace.digest,
            "requests": len(trace.requests),
            "model": target.model,
            "stop_rule": target.stops,
        },
        "system": {"device": target.url},
        "provenance": manifest.provenance(backend="client", start_perf_ns=start_ns),
    }
    rows = {
        "requests": [
            _request_row(source, reply, each, start_ns)
            for source, reply, each in zip(trace.requests, replies, times, strict=True)
        ],
        "steps": _step_rows(clock, steps),
        "spans": [row for source, each in zip(trace.requests, steps, strict=True) for row in _spans(source, each)],
        "iterations": [],
    }
    run = RunRecords(parts, tables_from_rows(rows))
    run.summary = _summary(run, replies, start_ns, trace.requests)
    return run


def _request_row(source: TraceRequest, reply: Reply, times: Any, start_ns: int) -> tuple[Any, ...]:
    sent = max(reply.sent_ns - start_ns, source.arrival_ns)
    first, last = (int(times[0]), int(times[-1])) if len(times) else (None, None)
    outcome = _outcome(reply)
    made = len(times) if reply.completion_tokens is None else reply.completion_tokens
    cancel_ns = None if reply.cancelled_ns is None else reply.cancelled_ns - start_ns
    return (
        *(source.id, source.arrival_ns, sent, sent, first, last),
        *(source.prompt_len, source.max_tokens, source.predicted_length, cancel_ns),
        *(made, 0, 0, 0, outcome, reply.error, source.priority, source.client),
        *(source.ttft_slo_ns, source.e2e_slo_ns, 0, None, None, None, False, None),
    )


def _outcome(reply: Reply) -> str:
    if reply.cancelled_ns is not None:
        return CANCELLED
    if reply.error is not None or not len(reply.chunk_ns):
        return REJECTED
    return STOP if reply.finish_reason == "stop" else LENGTH


def _step_rows(clock: Any, steps: Sequence[Any]) -> list[tuple[Any, ...]]:
    tokens = np.bincount(np.concatenate(steps), minlength=len(clock)) if len(clock) else clock
    return [
        (step, b"", now, now, now, 0, 0, count, 0, 0, 0, 0, 0, 0, 0, now, now, 0)
        for step, (now, count) in enumerate(zip(clock.tolist(), tokens.tolist(), strict=True))
    ]


def _spans(source: TraceRequest, steps: Any) -> list[tuple[Any, ...]]:
    known = source.prompt_len
    return [
        (
            source.id,
            step,
            step,
            "decode" if place else "prefill",
            known + place - 1 if place else 0,
            1 if place else known,
            True,
        )
        for place, step in enumerate(steps.tolist())
    ]


def _summary(
    run: RunRecords, replies: Sequence[Reply], start_ns: int, requests: Sequence[TraceRequest]
) -> dict[str, Any]:
    known = {
        name: value
        for name, value in summarize(run).items()
        if not name.startswith(UNKNOWN) and UNKNOWN_LATENCY not in name
    }
    late = [
        (reply.sent_ns - start_ns - source.arrival_ns) / 1e6
        for source, reply in zip(requests, replies, strict=True)
        if reply.sent_ns
    ]
    return known | {"p99_send_lag_ms": float(np.percentile(late, 99)) if late else None}


def side_by_side(client: RunRecords, other: RunRecords) -> TextTable:
    """The latencies that a client saw beside those of another run of the trace: the server's own, or in process."""
    columns = [latency_statistics(latencies(run)) for run in (client, other)]
    rows = [
        [f"{name.upper()} {stat}", *(_ms(value) for value in values), _ms(_difference(*values))]
        for name in LATENCIES
        if name != UNKNOWN_LATENCY
        for stat in ("mean", "p50", "p90", "p99")
        if (values := [each[name][stat] for each in columns]) != [None, None]
    ]
    counts = [(len(completed_requests(run, columns=("request",))), asked_for(run)) for run in (client, other)]
    heads, note = ["client", "other"], p99_sentence(min(done for done, _ in counts))
    if any(done < asked for done, asked in counts):
        heads = [f"{head} ({done:,} of {asked:,})" for head, (done, asked) in zip(heads, counts, strict=True)]
        note = f"Each column is of the requests that completed there, which need not be the same ones. {note}".rstrip()
    return TextTable("Latencies, ms", note, ["", *heads, "difference"], rows)


def _difference(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one - other


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:,.2f}"
