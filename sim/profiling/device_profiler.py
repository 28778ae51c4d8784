"""How a machine is measured: on a CPU the operations of a step, timed from inside; on a GPU whole captured steps.

A device profiler has work to do, item by item, each item as often as it is to be repeated, in random order. It gives
samples, times of points in tables. Everything runs as it does when serving: on the thread that serves, or in the graphs
that serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, Self

from engine.config import ServingConfig
from sim.profile.format import Row
from sim.profile.meta import ProfileMeta
from sim.profiling.batches import BatchShape
from sim.profiling.cpu import CpuProfiler
from sim.profiling.gpu import GpuProfiler
from sim.profiling.samples import Sample

if TYPE_CHECKING:
    from engine.executor.executor import Executor


class DeviceProfiler(Protocol):
    """Measures one machine. Used as a context manager, but for `work` and `held_out`, which cost nothing."""

    @property
    def work(self) -> Sequence[Any]:
        """Items, each as often as it is to be measured, in the order to measure them in."""

    @property
    def held_out(self) -> Sequence[BatchShape]:
        """Random batches that are in no table."""

    def __enter__(self) -> Self:
        """Get ready, which may take seconds."""

    def __exit__(self, *exception: object) -> None:
        """Give everything back."""

    def state(self, when: str = "before") -> dict[str, Any]:
        """The machine's own account of its state. Raises TandemError if it is in no state to be measured."""

    def measure(self, item: Any) -> list[Sample]:
        """Do an item of the work."""

    def table_of(self, item: Any) -> str:
        """The table that an item is for."""

    def batch_us(self, shape: BatchShape) -> float:
        """Mean time of a held-out batch."""

    def describe(self, meta: ProfileMeta) -> ProfileMeta:
        """With what a profile should say of the machine, and of how it was measured."""

    def tables(self, samples: Sequence[Sample]) -> dict[str, list[Row]]:
        """The profile's tables, made of samples."""


def profiler_for(executor: Executor, config: ServingConfig) -> DeviceProfiler:
    """The device profiler for an executor's machine."""
    return (GpuProfiler if executor.captures else CpuProfiler)(executor, config)
