"""A client's view, written down as a run: the same tables, in so far as a client can know their content.

- `requests`: arrival is the trace's, delivery is when the request was sent; first and last token are when chunks came.
  Its life inside the server (first scheduled, preemptions, swaps, wasted and cached tokens) is not known: it stands as
  the delivery, or 0. A request that got an error is `rejected`, and says why.
- `steps`: a step is one reading of the clock at which chunks came in; `decode_tokens` counts them. The rest is 0.
- `spans`: one for each chunk, of the step that brought it. A chunk is taken for a token: where a server puts several in
  one, gaps are between chunks, as they are in vLLM's benchmark, and lengths are still the server's count.
- `iterations`: empty. A client sees no serving loop, and its run cannot be replayed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, product
from typing import Any

import numpy as np
import uvloop

from analysis.client.load_client import Reply, Target, send_all
from analysis.jobs.progress import Progress
from analysis.metrics.columns import Ints, completed_requests
from analysis.metrics.names import LATENCIES, latency_label
from analysis.metrics.summary import asked_for, latencies, latency_statistics, summarize
from analysis.report.caveats import p99_sentence
from analysis.report.tables import TextTable, number
from engine.records import manifest
from engine.records.run_folder import RunRecords
from engine.records.schema import COLUMNS, Row, tables_from_rows
from engine.request import CANCELLED, LENGTH, REJECTED, STOP
from traces.request import TraceRequest
from traces.trace import Trace

UNKNOWN = (
    *("steps_", "mean_batch", "median_schedule_us", "median_launch_us"),
    *("preemptions", "wasted_tokens", "cached_tokens", "prefix_cache_hit_rate"),
)
UNKNOWN_LATENCY = "queue"
STATISTICS = ("mean", "p50", "p90", "p99")
OF_TRACE = (
    *("arrival_ns", "prompt_len", "max_tokens", "predicted_length"),
    *("priority", "client", "ttft_slo_ns", "e2e_slo_ns"),
)
LATE_MS = 5.0  # sending later than this, at P99, is the client's fault and in its latencies


def load_run(trace: Trace, target: Target, progress: Progress) -> RunRecords:
    """Send a trace to a server, with a progress bar. Returns the client's records, marked partial if interrupted."""
    with progress.bar("load", len(trace.requests)) as show:
        all_sent = uvloop.run(send_all(target, trace.requests, show))
    start_ns, replies = all_sent.start_ns, all_sent.replies
    times = [np.asarray(reply.chunk_ns, np.int64) - start_ns for reply in replies]
    clock, steps, tokens = np.unique(np.concatenate(times), return_inverse=True, return_counts=True)
    of_request = np.split(steps, np.cumsum([len(each) for each in times])[:-1])
    sent = list(zip(trace.requests, replies, strict=True))
    rows = {
        "requests": [_request(*pair, each, start_ns) for pair, each in zip(sent, times, strict=True)],
        "steps": [_step(*step) for step in enumerate(zip(clock.tolist(), tokens.tolist(), strict=True))],
        "spans": list(chain.from_iterable(map(_spans, trace.requests, of_request))),
        "iterations": [],
    }
    known: dict[str, Any] = {"trace": trace, "model": target.model, "stop_rule": target.stops, "device": target.url}
    parts = manifest.compose(**known, backend="client", start_perf_ns=start_ns)
    run = RunRecords(parts, tables_from_rows(rows), partial=all_sent.interrupted)
    late_ms = [(reply.sent_ns - start_ns - source.arrival_ns) / 1e6 for source, reply in sent if reply.sent_ns]
    summary = summarize(run).items()
    shown = {name: of for name, of in summary if not name.startswith(UNKNOWN) and UNKNOWN_LATENCY not in name}
    run.summary = shown | {"p99_send_lag_ms": float(np.percentile(late_ms, 99)) if late_ms else None}
    return run


def _row(table: str, default: int | None, known: Mapping[str, Any]) -> Row:
    return tuple({**dict.fromkeys(COLUMNS[table], default), **known}.values())


def _request(source: TraceRequest, reply: Reply, times: Ints, start_ns: int) -> Row:
    sent = max(reply.sent_ns - start_ns, source.arrival_ns)
    known: dict[str, Any] = dict.fromkeys(("wasted_tokens", "preemptions", "swaps", "cached_tokens"), 0)
    known |= {name: getattr(source, name) for name in OF_TRACE}
    known |= {
        "request": source.id,
        "delivered_ns": sent,
        "first_scheduled_ns": sent,
        "first_token_ns": int(times[0]) if len(times) else None,
        "last_token_ns": int(times[-1]) if len(times) else None,
        "cancel_ns": None if reply.cancelled_ns is None else reply.cancelled_ns - start_ns,
        "output_len": len(times) if reply.completion_tokens is None else reply.completion_tokens,
        "outcome": _outcome(reply),
        "reason": reply.error,
        "refused": False,
    }
    return _row("requests", None, known)


def _outcome(reply: Reply) -> str:
    if reply.cancelled_ns is not None:
        return CANCELLED
    if reply.error is None and not reply.ends:
        return "unfinished"
    if reply.error is not None or not len(reply.chunk_ns):
        return REJECTED
    return STOP if reply.finish_reason == "stop" else LENGTH


def _step(step: int, came: tuple[int, int]) -> Row:
    now, tokens = came
    times = dict.fromkeys(("scheduled_ns", "planned_ns", "launched_ns", "completed_ns", "device_start_ns"), now)
    return _row("steps", 0, {"step": step, "digest": b"", "decode_tokens": tokens} | times)


def _spans(source: TraceRequest, steps: Ints) -> Iterator[Row]:
    """One of each chunk: the first ends the prefill."""
    for place, step in enumerate(steps.tolist()):
        start, tokens = (source.prompt_len + place - 1, 1) if place else (0, source.prompt_len)
        yield source.id, step, step, "decode" if place else "prefill", start, tokens, True


def side_by_side(client: RunRecords, other: RunRecords) -> TextTable:
    """The latencies that a client saw beside those of another run of the trace: the server's own, or in process."""
    columns = [latency_statistics(latencies(run)) for run in (client, other)]
    rows = []
    for name, statistic in product([name for name in LATENCIES if name != UNKNOWN_LATENCY], STATISTICS):
        one, two = (each[name][statistic] for each in columns)
        if (one, two) != (None, None):
            difference = None if one is None or two is None else one - two
            rows.append((latency_label(statistic, name), *map(number, (one, two, difference))))
    counts = [(len(completed_requests(run, columns=("request",))), asked_for(run)) for run in (client, other)]
    heads, note = ["client", "other"], p99_sentence(min(done for done, _ in counts))
    if any(done < asked for done, asked in counts):
        heads = [f"{head} ({done:,} of {asked:,})" for head, (done, asked) in zip(heads, counts, strict=True)]
        note = f"Each column is of the requests that completed there, which need not be the same ones. {note}".rstrip()
    return TextTable("Latencies, ms", note, ["", *heads, "difference"], rows)
