"""What the profilers of all devices have in common.

A device profiler has work to do, item by item, each item as often as it is to be repeated, in random order. It gives
samples, times of points in tables. Everything runs as it does when serving: on the thread that serves, or in the graphs
that serve.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Sequence
from statistics import fmean, median, quantiles
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from engine.config import ServingConfig
from sim.profile.format import KEYS, Row
from sim.profile.meta import ProfileMeta
from sim.profiling.batches import BatchShape

if TYPE_CHECKING:
    from engine.executor.executor import Executor


OUTLIER = 2.0
Key = tuple[Any, ...]


class Sample(NamedTuple):
    """One time of one point of a table, in microseconds."""

    table: str
    key: Key
    time_us: float


class Point(NamedTuple):
    """Something to measure for a table: by its key, or by what says more to the profiler; and a batch if one is run."""

    table: str
    key: Key = ()
    shape: BatchShape | None = None


class DeviceProfiler(ABC):
    """Measures one machine. Used as a context manager, but for `work` and `held_out`, which cost nothing.

    Attributes:
        work: points, each as often as it is to be measured, in the order to measure them in.
        held_out: random batches that are in no table.
    """

    work: Sequence[Point]
    held_out: Sequence[BatchShape]

    def __init__(self, executor: Executor, config: ServingConfig) -> None:
        self._executor = executor
        self._config = config

    @abstractmethod
    def __enter__(self) -> Self:
        """Get ready, which may take seconds."""

    @abstractmethod
    def __exit__(self, *_: object) -> None:
        """Give everything back."""

    @abstractmethod
    def measure(self, point: Point) -> list[Sample]:
        """Time a point of the work; other tables may get samples too."""

    @abstractmethod
    def batch_us(self, shape: BatchShape) -> float:
        """Mean time of a held-out batch."""

    @abstractmethod
    def describe(self, meta: ProfileMeta) -> ProfileMeta:
        """With what a profile should say of the machine, and of how it was measured."""

    def state(self, when: str = "before") -> dict[str, Any]:
        """The machine's own account of its state. Raises TandemError if it is in no state to be measured."""
        return {}

    def tables(self, samples: Sequence[Sample]) -> dict[str, list[Row]]:
        """The profile's tables, made of samples, the rows sorted by their keys."""
        times: defaultdict[str, defaultdict[Key, list[float]]] = defaultdict(lambda: defaultdict(list))
        for table, key, time_us in samples:
            times[table][key].append(time_us)
        return {
            # a GPU profiler takes `attended` away from `graph`
            table: [row_of_repeats(KEYS.get(table, KEYS["graph"]), *point) for point in sorted(points.items())]
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
