"""Metrics of a run, from its records alone; the same function for a simulated and a real one.

Names and definitions are those of vLLM's serving benchmark, so that results line up with those of others. It may not
know which backend made the records. Everything is an array operation: no Python code runs per token.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np

from analysis.metrics.columns import (
    NS_PER_MS,
    NS_PER_S,
    Floats,
    Ints,
    column,
    completed_requests,
    is_among,
    is_completed,
    rows_where,
    steps_of_kind,
)
from analysis.metrics.names import LATENCIES, P99_REQUESTS, PERCENTILES, REQUEST_LATENCIES, STATISTICS, latency_key
from analysis.metrics.tokens import Gaps, gaps_at_ranks, itl, token_gaps
from engine.records.run_folder import RunRecords
from engine.request import CANCELLED, LENGTH, REJECTED, STOP
from traces.errors import TandemError

_NUMBER = re.compile(r"\d+")


def request_metrics(run: RunRecords, ids: Ints | None = None) -> dict[str, Any]:
    """Per-request latencies of the completed requests, or those among `ids`.

    Returns:
        `request`: ids, ascending, (completed,) integers; and for each of `REQUEST_LATENCIES` its values in
        milliseconds, (completed,) floats. `tpot` is NaN for a request with a single output token.
    """
    times = ("arrival_ns", "first_scheduled_ns", "first_token_ns", "last_token_ns")
    table = completed_requests(run, ids, (*times, "prompt_len", "output_len"))
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


def latencies(run: RunRecords, ids: Ints | None = None) -> dict[str, Floats]:
    """The values of each of `LATENCIES`, in milliseconds, over the completed requests, or those among `ids`."""
    return _per_request(run, ids) | {"itl": itl(run, ids)}


def _per_request(run: RunRecords, ids: Ints | None = None) -> dict[str, Floats]:
    values = request_metrics(run, ids)
    return {name: (of := values.pop(name))[~np.isnan(of)] for name in REQUEST_LATENCIES}


Statistics = dict[str, float | None]
"""A value for each of `STATISTICS`."""


def latency_statistics(values: Mapping[str, Floats]) -> dict[str, Statistics]:
    """`STATISTICS` of each latency that `latencies` returned, in milliseconds."""
    # Gaps are many, but it is the requests they come from that make a tail trustworthy.
    return {name: _statistics(of, len(values["tpot" if name == "itl" else name])) for name, of in values.items()}


def _statistics(values: Floats, requests: int) -> Statistics:
    if not values.size:
        return dict.fromkeys(STATISTICS)
    return _named(values.mean(), values.std(), np.percentile(values, PERCENTILES), requests)


def _gap_statistics(parts: list[Gaps], requests: int) -> Statistics:
    """As `_statistics` of `np.repeat(*part)` of all parts, without making it."""
    total = sum(int(part.seen.sum(dtype=np.int64)) for part in parts)
    if not total:
        return dict.fromkeys(STATISTICS)
    mean = sum((part.ms * part.seen).sum() for part in parts) / total
    std = np.sqrt(sum(((part.ms - mean) ** 2 * part.seen).sum() for part in parts) / total)
    place = np.asarray(PERCENTILES) / 100 * (total - 1)
    below, above = np.split(gaps_at_ranks(parts, np.concatenate([np.floor(place), np.ceil(place)])), 2)
    return _named(mean, std, below + (above - below) * (place % 1), requests)


def _named(mean: float, std: float, percentiles: Floats, requests: int) -> Statistics:
    p50, p90, p99 = map(float, percentiles)
    shown_p99 = p99 if requests >= P99_REQUESTS else None
    return {"mean": float(mean), "std": float(std), "median": p50, "p50": p50, "p90": p90, "p99": shown_p99}


def metrics(run: RunRecords, slos_ms: Mapping[str, float] | None = None) -> dict[str, int | float | None]:
    """All metrics of a run under vLLM's benchmark's names: `TOTALS`, `LATENCIES` x `STATISTICS`, `GOODPUT`.

    Args:
        run: the records, of either backend; they may be partial.
        slos_ms: service-level objectives, such as `{"ttft": 500, "tpot": 50}`, by name of `REQUEST_LATENCIES`.

    Raises:
        TandemError: an SLO is on something unknown.
    """
    steps, values = _step_totals(run), _per_request(run)
    table, several = latency_statistics(values), len(values.pop("tpot"))
    values.clear()  # gaps take as much memory
    table["itl"] = _gap_statistics(token_gaps(run), several)
    totals = _request_totals(run) | steps
    goodput = {} if slos_ms is None else _goodput(run, slos_ms, totals["duration_s"])
    return totals | goodput | {latency_key(stat, name): table[name][stat] for name in LATENCIES for stat in STATISTICS}


def summarize(run: RunRecords) -> dict[str, Any]:
    """The content of a run's summary: all `metrics`, and `not_completed` of the same name."""
    return metrics(run) | {"not_completed": not_completed(run)}


def asked_for(run: RunRecords) -> int:
    """Requests that were to be served: those of the trace, which a run that was interrupted need not have seen all."""
    seen = len(run.select("requests", "request"))
    return max(seen, int(run.manifest.get("workload", {}).get("requests", seen)))


def not_completed(run: RunRecords) -> list[dict[str, Any]]:
    """Requests that were not served to their end, by outcome and kind of reason, most first.

    Returns:
        [{outcome, requests, reason}]: the outcome is that of the records, or `not delivered` of requests of the trace
        that an interrupted run never saw; of reasons that differ in numbers alone, the one with the largest stands for
        all; None where the records give none.
    """
    table = run.select("requests", "outcome", "reason", "last_token_ns")
    left = table.filter(~is_completed(table))
    outcomes = ["unfinished" if each in (LENGTH, STOP) else each for each in left["outcome"].to_pylist()]
    found = Counter(zip(outcomes, left["reason"].to_pylist(), strict=True))
    found["not delivered", None] = asked_for(run) - len(table)
    counts: Counter[tuple[str, str]] = Counter()
    largest: dict[tuple[str, str], str | None] = {}
    for (outcome, reason), count in found.items():
        kind = outcome, _NUMBER.sub("#", reason or "")
        counts[kind] += count
        largest[kind] = max(largest.get(kind, reason), reason, key=_numbers)
    known = [(kind, count) for kind, count in counts.most_common() if count]
    return [{"outcome": kind[0], "requests": count, "reason": largest[kind]} for kind, count in known]


def _numbers(reason: str | None) -> list[int]:
    return [int(each) for each in _NUMBER.findall(reason or "")]


def _request_totals(run: RunRecords) -> dict[str, Any]:
    table = run.select("requests", "arrival_ns", "outcome", "wasted_tokens", "preemptions")
    done = completed_requests(run, columns=("prompt_len", "output_len"))
    rejected, cancelled = (int(np.count_nonzero(is_among(table["outcome"], [each]))) for each in (REJECTED, CANCELLED))
    inputs, outputs = int(column(done, "prompt_len").sum()), int(column(done, "output_len").sum())
    duration_s = None
    if len(done):
        duration_s = float(column(done, "last_token_ns").max() - column(table, "arrival_ns").min()) / NS_PER_S
    return {
        "completed": len(done),
        "rejected": rejected,
        "cancelled": cancelled,
        "unfinished": len(table) - len(done) - rejected - cancelled,
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        **{name: int(column(table, name).sum()) for name in ("wasted_tokens", "preemptions")},
        "own_slo_attainment": _own_slo_attainment(run),
        **_prefix_cache(run),
        "duration_s": duration_s,
        "request_throughput": _per_second(len(done), duration_s),
        "output_throughput": _per_second(outputs, duration_s),
        "total_token_throughput": _per_second(inputs + outputs, duration_s),
    }


def _own_slo_attainment(run: RunRecords) -> float | None:
    names = ("arrival_ns", "first_token_ns", "ttft_slo_ns", "last_token_ns", "e2e_slo_ns")
    table = run.select("requests", "outcome", *names)
    kept = rows_where(table, ~is_among(table["outcome"], [CANCELLED]))
    arrival, *times = (kept[name].to_numpy().astype(np.float64) for name in names)  # NaN where there is none
    promised, broken = np.zeros(len(kept), bool), np.zeros(len(kept), bool)
    for token, slo in zip(times[::2], times[1::2], strict=True):
        promised |= ~np.isnan(slo)
        broken |= ~np.isnan(slo) & ~(token - arrival <= slo)
    return float(1 - broken.sum() / promised.sum()) if promised.any() else None


def _prefix_cache(run: RunRecords) -> dict[str, Any]:
    cached = int(column(run.select("requests", "cached_tokens"), "cached_tokens").sum())
    batches = run.batches("steps", "prefill_tokens")
    prefilled = cached + sum(int(column(steps, "prefill_tokens").sum()) for steps in batches)
    return {"cached_tokens": cached, "prefix_cache_hit_rate": cached / prefilled if prefilled else None}


def _per_second(count: int, duration_s: float | None) -> float | None:
    return count / duration_s if duration_s else None


def _step_totals(run: RunRecords) -> dict[str, Any]:
    kinds: Counter[str] = Counter()
    steps = sequences = 0
    for batch in run.batches("steps", "prefill_tokens", "chunks", "decode_tokens"):
        kinds.update({f"steps_{kind}": int(np.count_nonzero(those)) for kind, those in steps_of_kind(batch).items()})
        steps += len(batch)
        sequences += int(column(batch, "chunks").sum() + column(batch, "decode_tokens").sum())
    return dict(kinds) | {
        "mean_batch": sequences / steps if steps else None,
        "median_schedule_us": _median_us(run, steps, "scheduled_ns", "planned_ns"),
        "median_launch_us": _median_us(run, steps, "planned_ns", "launched_ns"),
    }


def _median_us(run: RunRecords, steps: int, begin: str, end: str) -> float | None:
    """Of the time that so many steps, all of the run, took from one column to another."""
    took, at = np.empty(steps, np.int64), 0
    for batch in run.batches("steps", begin, end):
        np.subtract(column(batch, end), column(batch, begin), out=took[at : at + len(batch)])
        at += len(batch)
    return float(np.median(took, overwrite_input=True)) / 1e3 if steps else None


def _goodput(run: RunRecords, slos_ms: Mapping[str, float], duration_s: float | None) -> dict[str, float | None]:
    if unknown := sorted(set(slos_ms) - set(REQUEST_LATENCIES)):
        raise TandemError(f"no SLO on {unknown[0]!r}: choose from {', '.join(REQUEST_LATENCIES)}")
    per_request = request_metrics(run)
    missed = np.zeros(len(per_request["request"]), bool)
    for name, limit_ms in slos_ms.items():
        missed |= per_request[name] > limit_ms  # false for a NaN: an output of one token meets any TPOT
    met = int(np.count_nonzero(~missed))
    judged = int(np.count_nonzero(~is_among(run.tables["requests"]["outcome"], [CANCELLED])))
    return {"request_goodput": _per_second(met, duration_s), "slo_attainment": met / judged if judged else None}
