"""When tokens came, from spans and steps, and the gaps between them (ITL). No Python code runs per token."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from analysis.metrics.columns import NS_PER_MS, Floats, Ints, by_request, column, completed_ids, is_among, step_rows
from engine.records.run_folder import RunRecords

_SPAN_COLUMNS = ("request", "first_step", "last_step")
PART = 50_000  # requests whose tokens are looked at together, for the sake of memory
SORTED = 250_000  # gaps that are sorted together, likewise
SAMPLE = 1000  # gaps that tell where all the others lie


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


class Gaps(NamedTuple):
    """Inter-token latencies, each that requests share once.

    All requests that decode in the same two steps wait alike. So there are about as many gaps as steps.

    Attributes:
        ms: milliseconds, (gaps,).
        seen: how many requests saw each, (gaps,), in as few bytes as these need.
    """

    ms: Floats
    seen: NDArray[np.unsignedinteger]


def token_gaps(run: RunRecords, ids: Ints | None = None) -> list[Gaps]:
    """The ITLs of the completed requests, or those among `ids`, in parts of `PART` requests."""
    known = completed_ids(run, ids)
    return [_gaps(run, part) for part in np.array_split(known, max(1, len(known) // PART))]


def itl(run: RunRecords, ids: Ints | None = None) -> Floats:
    """As `token_gaps`, one value for each request and gap, in milliseconds, (gaps,), in no order."""
    return np.concatenate([np.repeat(*part) for part in token_gaps(run, ids)])


# -- where a request's tokens are ------------------------------------------------------------------------------


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
    steps = step_rows(run, begun, over, "completed_ns", "decode_tokens")
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
    requests = by_request(run.select("requests", "request", "output_len"))
    output_len = column(requests, "output_len")[np.searchsorted(column(requests, "request"), request)]
    end = np.minimum(end, begin + np.maximum(0, output_len - earlier))
    some = end > begin
    time_ns = completed_ns[np.concatenate([decode_steps, prefilled])]
    return _Stretches(time_ns, len(decode_steps), request[some], begin[some], end[some])


def _sampling_spans(run: RunRecords, ids: Ints | None) -> tuple[NDArray[Any], ...]:
    """Of the spans whose steps make a token: whether they are prefills, request, first and last step, (spans,) each."""
    pieces: list[tuple[NDArray[Any], ...]] = []
    for batch in run.batches("spans", *_SPAN_COLUMNS, "kind", "samples"):
        chosen = batch["samples"].to_numpy()
        spans = batch.filter(chosen if ids is None else chosen & np.isin(column(batch, "request"), ids))
        pieces.append((is_among(spans["kind"], ["prefill"]), *(column(spans, name) for name in _SPAN_COLUMNS)))
    return tuple(np.concatenate(each) for each in zip(*pieces, strict=True))


def _ranges(begin: Ints, end: Ints) -> Ints:
    """Concatenate `arange(begin[i], end[i])` for all i."""
    lengths = end - begin
    starts = np.cumsum(lengths) - lengths
    return np.asarray(np.arange(lengths.sum()) + np.repeat(begin - starts, lengths))


# -- gaps ------------------------------------------------------------------------------------------------------


def _gaps(run: RunRecords, ids: Ints) -> Gaps:
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
    return Gaps(np.concatenate(gaps_ns) / NS_PER_MS, seen.astype(np.min_scalar_type(seen.max(initial=0))))


def gaps_at_ranks(parts: list[Gaps], ranks: Floats) -> Floats:
    """What lies at these ranks of `np.repeat(*part)` of all parts, with about `SORTED` gaps sorted at a time."""
    sample = np.concatenate([part.ms[:: 1 + len(part.ms) // SAMPLE] for part in parts])
    shares = np.linspace(0, 1, 2 + sum(len(part.ms) for part in parts) // SORTED)[1:-1]
    found, before = np.empty(len(ranks)), 0
    for low, high in pairwise([-np.inf, *np.unique(np.quantile(sample, shares)), np.inf]):
        inside = _between(parts, low, high)
        order = np.argsort(inside.ms)
        up_to = before + np.cumsum(inside.seen[order], dtype=np.int64)
        after = up_to[-1] if len(up_to) else before
        here = (before <= ranks) & (ranks < after)
        found[here] = inside.ms[order[np.searchsorted(up_to, ranks[here], "right")]]
        before = after
    return found


def _between(parts: list[Gaps], low: float, high: float) -> Gaps:
    """The gaps from `low` to below `high`."""
    inside = [(low <= part.ms) & (part.ms < high) for part in parts]
    chosen = [(part.ms[those], part.seen[those]) for part, those in zip(parts, inside, strict=True)]
    return Gaps(*(np.concatenate(each) for each in zip(*chosen, strict=True)))
