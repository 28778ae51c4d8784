"""Metrics of a run, from its records alone; the same function for a simulated and a real one.

Names and definitions are those of vLLM's serving benchmark, so that results line up with what people have. It
may not know which rider wrote the records. Everything is an array operation: no Python code runs per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.records import RunRecords
from engine.request import CANCELLED, LENGTH, REJECTED, STOP
from traces.errors import TandemError

if TYPE_CHECKING:
    import pyarrow as pa

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]

NS_PER_MS = 1e6
NS_PER_S = 1e9
P99_REQUESTS = 200  # below this many requests, P99 is the luck of one or two of them

REQUEST_LATENCIES = {
    "ttft": "time to first token: from arrival to the first output token",
    "tpot": "time per output token: (E2E - TTFT) / (output tokens - 1), of requests with 2 or more",
    "e2el": "end-to-end latency: from arrival to the last output token",
    "per_token": "E2E / (prompt tokens + output tokens), as swiftLLM plots it",
    "normalized_latency": "E2E / output tokens (Orca, OSDI '22; vLLM, SOSP '23)",
    "queue": "from arrival to the first step that runs the request",
}
"""Latencies with one value per completed request, in milliseconds."""

LATENCIES = REQUEST_LATENCIES | {"itl": "inter-token latency: every gap between two tokens, pooled over requests"}
"""All latencies: `metrics` gives `mean_ttft_ms`, ..., one key for each latency and each of `STATISTICS`."""

STATISTICS = ("mean", "std", "median", "p50", "p90", "p99")
"""Percentiles interpolate linearly; p99 is None below `P99_REQUESTS` requests."""

TOTALS = {
    "completed": "requests that ended by length or stop token",
    "rejected": "requests that could never run under the limits",
    "cancelled": "requests whose client gave up",
    "unfinished": "requests that were still in the system when the records end",
    "total_input_tokens": "prompt tokens of completed requests",
    "total_output_tokens": "output tokens of completed requests",
    "wasted_tokens": "tokens made after a stop token, before the scheduler knew of it",
    "preemptions": "times a request lost its KV blocks",
    "own_slo_attainment": "of the requests that bring SLOs along, the fraction that met them; a rejected one did not, "
    "a cancelled one is left out",
    "cached_tokens": "prompt tokens found in the prefix cache",
    "prefix_cache_hit_rate": "of the tokens that had to be prefilled, the share found in the prefix cache",
    "duration_s": "from the first arrival to the last token of a completed request",
    "request_throughput": "completed requests per second",
    "output_throughput": "output tokens per second",
    "total_token_throughput": "prompt and output tokens per second",
    "steps_prefill": "steps that ran prefill only",
    "steps_decode": "steps that ran decodes only",
    "steps_mixed": "steps that ran both",
    "mean_batch": "sequences in a step, mean",
    "median_schedule_us": "the policy's own cost: from the clock read to the finished plan, median",
    "median_launch_us": "the host's work to launch a planned step, median",
}
"""The other keys of `metrics`; what cannot be computed (a mean of nothing) is None."""

GOODPUT = {
    "request_goodput": "requests per second that met every SLO",
    "slo_attainment": "fraction of requests that met every SLO (DistServe); a rejected one did not, a cancelled one "
    "is left out",
}
"""The keys that `metrics` adds when it is given SLOs."""


@dataclass(frozen=True, slots=True)
class TokenTimes:
    """Every output token that counts, sorted by request, then time.

    Attributes:
        request: the token's request, (tokens,).
        time_ns: when the host knew the token, in nanoseconds since the run's start, (tokens,).
    """

    request: Ints
    time_ns: Ints


def token_times(run: RunRecords) -> TokenTimes:
    """Derive all tokens' times from spans and steps.

    A prefill span that samples makes a token in its step; a decode span makes one in each of its steps that ran
    decodes. Tokens past a request's `output_len` (made after its stop token) are left out, and so are tokens of
    steps that had not completed when the records end.
    """
    steps = run.tables["steps"]
    completed_ns, decode_steps = column(steps, "completed_ns"), np.flatnonzero(column(steps, "decode_tokens"))
    spans = run.tables["spans"].filter(run.tables["spans"]["samples"])
    prefill = (spans["kind"].to_numpy() == "prefill") & (column(spans, "first_step") < len(completed_ns))
    prefills, decodes = spans.filter(prefill), spans.filter(spans["kind"].to_numpy() == "decode")
    begin = np.searchsorted(decode_steps, column(decodes, "first_step"), "left")
    end = np.searchsorted(decode_steps, column(decodes, "last_step"), "right")
    request = np.concatenate([column(prefills, "request"), np.repeat(column(decodes, "request"), end - begin)])
    step = np.concatenate([column(prefills, "first_step"), decode_steps[_ranges(begin, end)]])
    order = np.lexsort((step, request))
    request, step = request[order], step[order]
    counts = _rank(request) < _output_len(run.tables["requests"], request)
    return TokenTimes(request[counts], completed_ns[step[counts]])


def column(table: pa.Table, name: str) -> Ints:
    """An integer column without nulls, (rows,)."""
    return np.asarray(table[name].to_numpy(), np.int64)


def _ranges(begin: Ints, end: Ints) -> Ints:
    """Concatenate `arange(begin[i], end[i])` for all i."""
    lengths = end - begin
    starts = np.cumsum(lengths) - lengths
    return np.asarray(np.arange(lengths.sum()) + np.repeat(begin - starts, lengths))


def _rank(grouped: Ints) -> Ints:
    """Each element's position among its equals, in an array whose equals are adjacent."""
    _, first, lengths = np.unique(grouped, return_index=True, return_counts=True)
    return np.asarray(np.arange(len(grouped)) - np.repeat(first, lengths))


def _output_len(requests: pa.Table, ids: Ints) -> Ints:
    known = requests.sort_by("request")
    return column(known, "output_len")[np.searchsorted(column(known, "request"), ids)]


def completed_requests(run: RunRecords, ids: Ints | None = None) -> pa.Table:
    """The requests that were served to their end, or those among `ids`, by id: what latencies are taken over."""
    table = run.tables["requests"]
    served = np.isin(table["outcome"].to_numpy(), (LENGTH, STOP))
    # In a run that was interrupted, a request's last token may be planned and its step not completed.
    done = table.filter(served & table["last_token_ns"].is_valid().to_numpy()).sort_by("request")
    return done if ids is None else done.filter(np.isin(column(done, "request"), ids))


def request_metrics(run: RunRecords, ids: Ints | None = None) -> dict[str, Any]:
    """Per-request latencies of the completed requests, or those among `ids`.

    Returns:
        `request`: ids, ascending, (completed,) integers; and for each of `REQUEST_LATENCIES` its values in
        milliseconds, (completed,) floats. `tpot` is NaN for a request with a single output token.
    """
    table = completed_requests(run, ids)
    arrival, output = column(table, "arrival_ns"), column(table, "output_len")
    ttft, e2el = (column(table, name) - arrival for name in ("first_token_ns", "last_token_ns"))
    gaps = np.where(output > 1, output - 1, np.nan)
    latencies = {
        "ttft": ttft,
        "tpot": (e2el - ttft) / gaps,
        "e2el": e2el,
        "per_token": e2el / (column(table, "prompt_len") + output),
        "normalized_latency": e2el / output,
        "queue": column(table, "first_scheduled_ns") - arrival,
    }
    return {"request": column(table, "request")} | {name: ns / NS_PER_MS for name, ns in latencies.items()}


def itl(run: RunRecords) -> Floats:
    """All inter-token latencies of the completed requests, pooled, in milliseconds, (gaps,)."""
    return _gaps_ms(run, column(completed_requests(run), "request"))


def _gaps_ms(run: RunRecords, ids: Ints) -> Floats:
    tokens = token_times(run)
    same_request = (tokens.request[1:] == tokens.request[:-1]) & np.isin(tokens.request[1:], ids)
    return np.asarray(np.diff(tokens.time_ns)[same_request] / NS_PER_MS)


def latencies(run: RunRecords, ids: Ints | None = None) -> dict[str, Floats]:
    """The values of each of `LATENCIES`, in milliseconds, over the completed requests, or those among `ids`."""
    values = request_metrics(run, ids)
    kept = values.pop("request")
    return {name: of[~np.isnan(of)] for name, of in values.items()} | {"itl": _gaps_ms(run, kept)}


def latency_statistics(values: Mapping[str, Floats]) -> dict[str, dict[str, float | None]]:
    """`STATISTICS` of each latency that `latencies` returned, in milliseconds."""
    # Gaps are many, but it is the requests they come from that make a tail trustworthy.
    requests = {name: len(values["tpot" if name == "itl" else name]) for name in values}
    return {name: _statistics(of, requests[name]) for name, of in values.items()}


def _statistics(values: Floats, requests: int) -> dict[str, float | None]:
    if not values.size:
        return dict.fromkeys(STATISTICS)
    p50, p90, p99 = (float(value) for value in np.percentile(values, [50, 90, 99]))
    mean, std = float(values.mean()), float(values.std())
    shown_p99 = p99 if requests >= P99_REQUESTS else None
    return {"mean": mean, "std": std, "median": p50, "p50": p50, "p90": p90, "p99": shown_p99}


def step_kinds(steps: pa.Table) -> NDArray[np.str_]:
    """`prefill`, `decode`, `mixed` or `swap` for each step, (steps,)."""
    prefill, decode = column(steps, "prefill_tokens") > 0, column(steps, "decode_tokens") > 0
    return np.select([prefill & decode, prefill, decode], ["mixed", "prefill", "decode"], "swap")


def waits_ns(run: RunRecords) -> Ints:
    """When the serving loop had nothing to do and began to wait for arrivals, (waits,)."""
    iterations = run.tables["iterations"]
    waits = iterations["step"].is_null().to_numpy() & iterations["completed_step"].is_null().to_numpy()
    return column(iterations.filter(waits), "now_ns")


def metrics(run: RunRecords, slos_ms: Mapping[str, float] | None = None) -> dict[str, int | float | None]:
    """All metrics of a run under vLLM's benchmark's names: `TOTALS`, `LATENCIES` x `STATISTICS`, `GOODPUT`.

    Args:
        run: the records, of either rider; they may be partial.
        slos_ms: service-level objectives, such as `{"ttft": 500, "tpot": 50}`, by name of `REQUEST_LATENCIES`.

    Raises:
        TandemError: an SLO is on something unknown.
    """
    totals = _request_totals(run) | _step_totals(run)
    goodput = {} if slos_ms is None else _goodput(run, slos_ms, totals["duration_s"])
    table = latency_statistics(latencies(run))
    return totals | goodput | {f"{stat}_{name}_ms": table[name][stat] for name in LATENCIES for stat in STATISTICS}


def _request_totals(run: RunRecords) -> dict[str, Any]:
    table, done = run.tables["requests"], completed_requests(run)
    outcomes = table["outcome"].to_pylist()
    rejected, cancelled = outcomes.count(REJECTED), outcomes.count(CANCELLED)
    inputs, outputs = int(column(done, "prompt_len").sum()), int(column(done, "output_len").sum())
    duration_s = _duration_s(table, done)
    return {
        "completed": len(done),
        "rejected": rejected,
        "cancelled": cancelled,
        "unfinished": len(table) - len(done) - rejected - cancelled,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "wasted_tokens": int(column(table, "wasted_tokens").sum()),
        "preemptions": int(column(table, "preemptions").sum()),
        "own_slo_attainment": _own_slo_attainment(table),
        **_prefix_cache(run),
        "duration_s": duration_s,
        "request_throughput": _per_second(len(done), duration_s),
        "output_throughput": _per_second(outputs, duration_s),
        "total_token_throughput": _per_second(inputs + outputs, duration_s),
    }


def _own_slo_attainment(requests: pa.Table) -> float | None:
    kept = requests.filter(np.array(requests["outcome"].to_pylist()) != CANCELLED)
    arrival, *times = (
        kept[name].to_numpy().astype(np.float64)  # NaN where there is none
        for name in ("arrival_ns", "first_token_ns", "ttft_slo_ns", "last_token_ns", "e2e_slo_ns")
    )
    promised, broken = np.zeros(len(kept), bool), np.zeros(len(kept), bool)
    for token, slo in zip(times[::2], times[1::2], strict=True):
        promised |= ~np.isnan(slo)
        broken |= ~np.isnan(slo) & ~(token - arrival <= slo)
    return float(1 - broken.sum() / promised.sum()) if promised.any() else None


def _prefix_cache(run: RunRecords) -> dict[str, Any]:
    cached = int(column(run.tables["requests"], "cached_tokens").sum())
    prefilled = cached + int(column(run.tables["steps"], "prefill_tokens").sum())
    return {"cached_tokens": cached, "prefix_cache_hit_rate": cached / prefilled if prefilled else None}


def _duration_s(requests: pa.Table, done: pa.Table) -> float | None:
    if not len(done):
        return None
    return float(column(done, "last_token_ns").max() - column(requests, "arrival_ns").min()) / NS_PER_S


def _per_second(count: int, duration_s: float | None) -> float | None:
    return count / duration_s if duration_s else None


def _step_totals(run: RunRecords) -> dict[str, Any]:
    steps = run.tables["steps"]
    kinds = step_kinds(steps)
    scheduled, planned, launched = (column(steps, f"{name}_ns") for name in ("scheduled", "planned", "launched"))
    some = len(steps) > 0
    return {f"steps_{kind}": int(np.count_nonzero(kinds == kind)) for kind in ("prefill", "decode", "mixed")} | {
        "mean_batch": float((column(steps, "chunks") + column(steps, "decode_tokens")).mean()) if some else None,
        "median_schedule_us": float(np.median(planned - scheduled)) / 1e3 if some else None,
        "median_launch_us": float(np.median(launched - planned)) / 1e3 if some else None,
    }


def _goodput(run: RunRecords, slos_ms: Mapping[str, float], duration_s: float | None) -> dict[str, float | None]:
    if unknown := sorted(set(slos_ms) - set(REQUEST_LATENCIES)):
        raise TandemError(f"no SLO on {unknown[0]!r}: choose from {', '.join(REQUEST_LATENCIES)}")
    per_request = request_metrics(run)
    missed = np.zeros(len(per_request["request"]), bool)
    for name, limit_ms in slos_ms.items():
        missed |= per_request[name] > limit_ms  # false for a NaN: an output of one token meets any TPOT
    met = int(np.count_nonzero(~missed))
    judged = sum(outcome != CANCELLED for outcome in run.tables["requests"]["outcome"].to_pylist())
    return {"request_goodput": _per_second(met, duration_s), "slo_attainment": met / judged if judged else None}
