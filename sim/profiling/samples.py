"""Times of the points of tables, and the rows that are made of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean, median, quantiles
from typing import Any, NamedTuple

from sim.profile.format import KEYS, Row

OUTLIER = 2.0


class Sample(NamedTuple):
    """One time of one point of a table, in microseconds."""

    table: str
    key: tuple[Any, ...]
    time_us: float


def rows_of_samples(samples: Iterable[Sample]) -> dict[str, list[Row]]:
    """The rows of each table, sorted by their keys; a GPU profiler takes `attended` away from `graph`."""
    times: defaultdict[str, defaultdict[tuple[Any, ...], list[float]]] = defaultdict(lambda: defaultdict(list))
    for table, key, time_us in samples:
        times[table][tuple(key)].append(time_us)
    return {
        table: [row_of_repeats(KEYS.get(table, KEYS["graph"]), key, of_key) for key, of_key in sorted(points.items())]
        for table, points in times.items()
    }


def row_of_repeats(columns: Sequence[str], key: Sequence[Any], times: Sequence[float]) -> Row:
    """A row of a table, from the repeats of its point."""
    return dict(zip(columns, key, strict=True)) | {"time_us": typical(times), "spread": spread(times)}


def typical(times: Sequence[float]) -> float:
    """The mean of repeats, outliers clipped. Means add up where medians do not: a step is a sum of many groups."""
    ceiling = OUTLIER * median(times)
    return fmean(min(time, ceiling) for time in times)


def spread(times: Sequence[float]) -> float:
    """Interquartile range over median; 0 for a single time."""
    if len(times) < 2 or not median(times):
        return 0.0
    low, _, high = quantiles(times, n=4)
    return (high - low) / median(times)
