"""Metrics of a run, from its records alone; the same function for a simulated and a real one.

Names and definitions are those of vLLM's serving benchmark, so that results line up with what people have. It
may not know which rider wrote the records. Everything is an array operation: no Python code runs per token.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.records.run_folder import RunRecords
from engine.records.schema import COLUMNS
from engine.request import CANCELLED, LENGTH, REJECTED, STOP
from traces.errors import TandemError

if TYPE_CHECKING:
    import pyarrow as pa

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
_Gaps = tuple[Floats, NDArray[np.unsignedinteger]]  # milliseconds, and how many saw each, in as few bytes as these need

NS_PER_MS = 1e6
NS_PER_S = 1e9
_SPAN_COLUMNS = ("request", "first_step", "last_step")
PART = 50_000  # requests whose tokens are looked at together, for the sake of memory
SORTED = 250_000  # gaps that are sorted together, likewise
SAMPLE = 1000  # gaps that tell where all the others lie
_NUMBER = re.compile(r"\d+")
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
PERCENTILES = (50, 90, 99)

TOTALS = {
    "completed": "requests that ended by length or stop token",
    "rejected": "requests that could never run under the limits, or have tokens that the model lacks",
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
    made = _stretches(run)
    return TokenTimes(np.repeat(made.request, made.end - made.begin), made.time_ns[_ranges(made.begin, made.end)])


@dataclass(frozen=True, slots=True)
class _Stretches:
    """Tokens of one request in a row, sorted by request, then time: `time_ns[begin:end]` of `request`."""

    time_ns: Ints  # of the `decodes` steps that decode, then of each token that a prefill made
    decodes: int
    request: Ints
    begin: Ints
    end: Ints


def _stretches(run: RunRecords, ids: Ints | None = None) -> _Stretches:
    """Of all requests, or those among `ids`."""
    is_prefill, request, first, last = _sampling_spans(run, ids)
    begun, over = (int(first.min()), int(last.max()) + 1) if len(first) else (0, 0)
    steps = _rows(run, begun, over, "completed_ns", "decode_tokens")
    first, last = first - begun, last - begun  # steps count from the first that matters
    completed_ns, decode_steps = column(steps, "completed_ns"), np.flatnonzero(column(steps, "decode_tokens"))
    prefilled = first[is_prefill & (first < len(completed_ns))]
    number = len(decode_steps) + np.cumsum(is_prefill) - 1  # of a prefill's token in `time_ns`
    begin = np.where(is_prefill, number, np.searchsorted(decode_steps, first, "left"))
    end = np.where(is_prefill, number + (first < len(completed_ns)), np.searchsorted(decode_steps, last, "right"))
    order = np.lexsort((first, request))
    request, begin, end = request[order], begin[order], end[order]
    earlier = np.cumsum(end - begin) - (end - begin)  # tokens of all stretches before
    earlier -= earlier[np.searchsorted(request, request)]  # of the same request
    end = np.minimum(end, begin + np.maximum(0, _output_len(run, request) - earlier))
    some = end > begin
    time_ns = completed_ns[np.concatenate([decode_steps, prefilled])]
    return _Stretches(time_ns, len(decode_steps), request[some], begin[some], end[some])


def _rows(run: RunRecords, begin: int, end: int, *columns: str) -> pa.Table:
    """Some of the rows of `steps`, with no more in memory than these."""
    import pyarrow as pa

    pieces: list[pa.Table] = []
    at = 0
    for batch in run.batches("steps", *columns):
        skip = max(0, begin - at)
        piece = batch.slice(skip, max(0, end - at - skip))
        if len(piece) or not pieces:  # the first has the columns, if nothing else
            pieces.append(piece)
        at += len(batch)
    return pa.concat_tables(pieces)


def _sampling_spans(run: RunRecords, ids: Ints | None) -> tuple[NDArray[Any], ...]:
    """Of the spans whose steps make a token: whether they are prefills, request, first and last step, (spans,) each."""
    pieces = [_chosen_spans(batch, ids) for batch in run.batches("spans", *_SPAN_COLUMNS, "kind", "samples")]
    is_prefill, *numbers = (np.concatenate(each) for each in zip(*pieces, strict=True))
    return is_prefill, *numbers


def _chosen_spans(spans: pa.Table, ids: Ints | None) -> tuple[NDArray[Any], ...]:
    chosen = spans["samples"].to_numpy()
    spans = spans.filter(chosen if ids is None else chosen & np.isin(column(spans, "request"), ids))
    return _is_in(spans["kind"], ["prefill"]), *(column(spans, name) for name in _SPAN_COLUMNS)


def column(table: pa.Table, name: str) -> Ints:
    """An integer column without nulls, (rows,)."""
    return np.asarray(table[name].to_numpy(), np.int64)


def _ranges(begin: Ints, end: Ints) -> Ints:
    """Concatenate `arange(begin[i], end[i])` for all i."""
    lengths = end - begin
    starts = np.cumsum(lengths) - lengths
    return np.asarray(np.arange(lengths.sum()) + np.repeat(begin - starts, lengths))


def _output_len(run: RunRecords, ids: Ints) -> Ints:
    known = _by_request(run.select("requests", "request", "output_len"))
    return column(known, "output_len")[np.searchsorted(column(known, "request"), ids)]


def _by_request(table: pa.Table) -> pa.Table:
    """Sorted, and not copied if it is already."""
    ids = column(table, "request")
    return table if (ids[1:] >= ids[:-1]).all() else table.sort_by("request")


def _where(table: pa.Table, chosen: NDArray[np.bool_]) -> pa.Table:
    """The chosen rows, and no copy of the table if these are all."""
    return table if chosen.all() else table.filter(chosen)


def _is_in(column: pa.ChunkedArray, words: Sequence[str]) -> NDArray[np.bool_]:
    """Where a column of strings has one of these, (rows,)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    return np.asarray(pc.is_in(column, pa.array(words)).to_numpy())


def completed_requests(
    run: RunRecords, ids: Ints | None = None, columns: Sequence[str] = tuple(COLUMNS["requests"])
) -> pa.Table:
    """The requests that were served to their end, or those among `ids`, by id: what latencies are taken over."""
    table = run.select("requests", *dict.fromkeys((*columns, "request", "outcome", "last_token_ns")))
    served = _is_in(table["outcome"], [LENGTH, STOP])
    # In a run that was interrupted, a request's last token may be planned and its step not completed.
    done = _by_request(_where(table, served & table["last_token_ns"].is_valid().to_numpy()))
    return done if ids is None else done.filter(np.isin(column(done, "request"), ids))


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


def itl(run: RunRecords) -> Floats:
    """All inter-token latencies of the completed requests, pooled, in milliseconds, (gaps,)."""
    return _pooled_gaps_ms(run, _completed_ids(run))


def _completed_ids(run: RunRecords, ids: Ints | None = None) -> Ints:
    return column(completed_requests(run, ids, ("request",)), "request")


def _pooled_gaps_ms(run: RunRecords, ids: Ints) -> Floats:
    tokens = token_times(run)
    same_request = (tokens.request[1:] == tokens.request[:-1]) & np.isin(tokens.request[1:], ids)
    return np.asarray(np.diff(tokens.time_ns)[same_request] / NS_PER_MS)


def shared_itl(run: RunRecords) -> list[_Gaps]:
    """`itl`, each gap that requests share once: milliseconds, (gaps,), and how many requests saw it, (gaps,), in parts.

    All that decode beside each other wait alike, so that these are as many as the steps, however many the tokens.
    """
    ids = _completed_ids(run)
    return [_shared_gaps(run, part) for part in np.array_split(ids, max(1, len(ids) // PART))]


def _shared_gaps(run: RunRecords, ids: Ints) -> _Gaps:
    made = _stretches(run, ids)
    starts, ends = (np.bincount(each, minlength=made.decodes)[: made.decodes] for each in (made.begin, made.end - 1))
    beside = np.cumsum(starts - ends)  # how many make a token in a decode step, and in the next
    shared = np.flatnonzero(beside)
    across = np.flatnonzero(made.request[1:] == made.request[:-1])
    gaps_ns = (
        made.time_ns[shared + 1] - made.time_ns[shared],
        made.time_ns[made.begin[across + 1]] - made.time_ns[made.end[across] - 1],
    )
    seen = np.concatenate([beside[shared], np.ones_like(across)])
    return np.concatenate(gaps_ns) / NS_PER_MS, seen.astype(np.min_scalar_type(seen.max(initial=0)))


def latencies(run: RunRecords, ids: Ints | None = None) -> dict[str, Floats]:
    """The values of each of `LATENCIES`, in milliseconds, over the completed requests, or those among `ids`."""
    kept = _completed_ids(run, ids)
    return _per_request(run, ids) | {"itl": _pooled_gaps_ms(run, kept)}


def _per_request(run: RunRecords, ids: Ints | None = None) -> dict[str, Floats]:
    values = request_metrics(run, ids)
    return {name: (of := values.pop(name))[~np.isnan(of)] for name in REQUEST_LATENCIES}


def latency_statistics(values: Mapping[str, Floats]) -> dict[str, dict[str, float | None]]:
    """`STATISTICS` of each latency that `latencies` returned, in milliseconds."""
    # Gaps are many, but it is the requests they come from that make a tail trustworthy.
    requests = {name: len(values["tpot" if name == "itl" else name]) for name in values}
    return {name: _statistics(of, requests[name]) for name, of in values.items()}


def _statistics(values: Floats, requests: int) -> dict[str, float | None]:
    if not values.size:
        return dict.fromkeys(STATISTICS)
    return _named(values.mean(), values.std(), np.percentile(values, PERCENTILES), requests)


def _shared_statistics(parts: Sequence[_Gaps], requests: int) -> dict[str, float | None]:
    """As `_statistics` of `np.repeat(*part)` of all parts, without making it."""
    total = sum(int(seen.sum(dtype=np.int64)) for _, seen in parts)
    if not total:
        return dict.fromkeys(STATISTICS)
    mean = sum((values * seen).sum() for values, seen in parts) / total
    std = np.sqrt(sum(((values - mean) ** 2 * seen).sum() for values, seen in parts) / total)
    place = np.asarray(PERCENTILES) / 100 * (total - 1)
    below, above = np.split(_ranked(parts, np.concatenate([np.floor(place), np.ceil(place)])), 2)
    return _named(mean, std, below + (above - below) * (place % 1), requests)


def _ranked(parts: Sequence[_Gaps], ranks: Floats) -> Floats:
    """What lies at these ranks of `np.repeat(*part)` of all parts, with about `SORTED` gaps sorted at a time."""
    sample = np.concatenate([values[:: 1 + len(values) // SAMPLE] for values, _ in parts])
    shares = np.linspace(0, 1, 2 + sum(len(values) for values, _ in parts) // SORTED)[1:-1]
    found, before = np.empty(len(ranks)), 0
    for low, high in pairwise([-np.inf, *np.unique(np.quantile(sample, shares)), np.inf]):
        values, seen = _between(parts, low, high)
        order = np.argsort(values)
        up_to = before + np.cumsum(seen[order], dtype=np.int64)
        after = up_to[-1] if len(up_to) else before
        here = (before <= ranks) & (ranks < after)
        found[here] = values[order[np.searchsorted(up_to, ranks[here], "right")]]
        before = after
    return found


def _between(parts: Sequence[_Gaps], low: float, high: float) -> _Gaps:
    """The gaps from `low` to below `high`."""
    inside = [(low <= values) & (values < high) for values, _ in parts]
    chosen = [(values[those], seen[those]) for (values, seen), those in zip(parts, inside, strict=True)]
    values, seen = (np.concatenate(each) for each in zip(*chosen, strict=True))
    return values, seen


def _named(mean: float, std: float, percentiles: Floats, requests: int) -> dict[str, float | None]:
    p50, p90, p99 = map(float, percentiles)
    shown_p99 = p99 if requests >= P99_REQUESTS else None
    return {"mean": float(mean), "std": float(std), "median": p50, "p50": p50, "p90": p90, "p99": shown_p99}


def step_kinds(steps: pa.Table) -> NDArray[np.str_]:
    """`prefill`, `decode`, `mixed` or `swap` for each step, (steps,)."""
    kinds = _of_kind(steps)
    return np.select([*kinds.values()], [*kinds], "swap")


def _of_kind(steps: pa.Table) -> dict[str, NDArray[np.bool_]]:
    """Which steps are of each kind, (steps,) each; none of these is a swap."""
    prefill, decode = column(steps, "prefill_tokens") > 0, column(steps, "decode_tokens") > 0
    return {"prefill": prefill & ~decode, "decode": decode & ~prefill, "mixed": prefill & decode}


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
    steps, values = _step_totals(run), _per_request(run)
    table, several = latency_statistics(values), len(values.pop("tpot"))
    values.clear()  # gaps take as much memory
    table["itl"] = _shared_statistics(shared_itl(run), several)
    totals = _request_totals(run) | steps
    goodput = {} if slos_ms is None else _goodput(run, slos_ms, totals["duration_s"])
    return totals | goodput | {f"{stat}_{name}_ms": table[name][stat] for name in LATENCIES for stat in STATISTICS}


def summarize(run: RunRecords) -> dict[str, Any]:
    """What a run's summary says: all `metrics`, and `not_completed` of the same name."""
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
    ended = _is_in(table["outcome"], [LENGTH, STOP])
    left = table.filter(~(ended & table["last_token_ns"].is_valid().to_numpy()))
    outcomes = ["unfinished" if each in (LENGTH, STOP) else each for each in left["outcome"].to_pylist()]
    found = Counter(zip(outcomes, left["reason"].to_pylist(), strict=True))
    found["not delivered", None] = asked_for(run) - len(table)
    kinds: dict[tuple[str, str | None], list[tuple[str | None, int]]] = {}
    for (outcome, reason), count in found.items():
        kind = None if reason is None else _NUMBER.sub("#", reason)
        kinds.setdefault((outcome, kind), []).append((reason, count))
    groups = [
        {"outcome": outcome, "requests": sum(count for _, count in of), "reason": max(of, key=_numbers)[0]}
        for (outcome, _), of in kinds.items()
    ]
    return sorted((group for group in groups if group["requests"]), key=lambda group: -group["requests"])


def _numbers(reason: tuple[str | None, int]) -> list[int]:
    return [int(each) for each in _NUMBER.findall(reason[0] or "")]


def _request_totals(run: RunRecords) -> dict[str, Any]:
    table = run.select("requests", "arrival_ns", "outcome", "wasted_tokens", "preemptions")
    done = completed_requests(run, columns=("prompt_len", "output_len"))
    rejected, cancelled = (int(np.count_nonzero(_is_in(table["outcome"], [each]))) for each in (REJECTED, CANCELLED))
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
    kept = _where(table, ~_is_in(table["outcome"], [CANCELLED]))
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


def _duration_s(requests: pa.Table, done: pa.Table) -> float | None:
    if not len(done):
        return None
    return float(column(done, "last_token_ns").max() - column(requests, "arrival_ns").min()) / NS_PER_S


def _per_second(count: int, duration_s: float | None) -> float | None:
    return count / duration_s if duration_s else None


def _step_totals(run: RunRecords) -> dict[str, Any]:
    kinds: Counter[str] = Counter()
    steps = sequences = 0
    for batch in run.batches("steps", "prefill_tokens", "chunks", "decode_tokens"):
        kinds.update({f"steps_{kind}": int(np.count_nonzero(those)) for kind, those in _of_kind(batch).items()})
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
    judged = int(np.count_nonzero(~_is_in(run.tables["requests"]["outcome"], [CANCELLED])))
    return {"request_goodput": _per_second(met, duration_s), "slo_attainment": met / judged if judged else None}
