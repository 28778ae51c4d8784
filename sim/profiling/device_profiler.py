"""What the profilers of all devices have in common.

A device profiler has work to do, item by item, each item as often as it is to be repeated, in random order. It gives
samples, times of points in tables. Everything runs as it does when serving: on the thread that serves, or in the graphs
that serve.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from engine.config import ServingConfig
from sim.profile.format import Row
from sim.profile.meta import ProfileMeta
from sim.profiling.batches import BatchShape
from sim.profiling.samples import Sample, rows_of_samples

if TYPE_CHECKING:
    from engine.executor.executor import Executor


class Point(NamedTuple):
    """Something to measure for a table: by its key, or by what says more to the profiler; and a batch if one is run."""

    table: str
    key: tuple[Any, ...] = ()
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
        """The profile's tables, made of samples."""
        return rows_of_samples(samples)
