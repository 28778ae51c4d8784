"""How much slower a GPU computes at its power limit, by how much it has computed of late.

A GPU that draws more than it may lowers its clock, and takes tens of milliseconds to do so: what a step takes depends
on the steps before it. What is bound by memory is not slowed down. *Compute* is therefore what a step takes beyond the
smallest step, which does nothing but read the weights, and the attention of decodes, which reads the KV cache; the
*load* is the share of the recent past spent on it, an exponentially weighted mean.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from math import exp
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sim.profile import Curve

MEMORIES_US = (10e3, 20e3, 40e3, 80e3, 160e3)  # time constants to choose from
LOADS = (0.0, 0.05, *(tenth / 10 for tenth in range(1, 11)))  # the slowdown is piecewise linear between these
NEGLIGIBLE = 0.002

Floats = NDArray[np.float64]


class Timed(NamedTuple):
    """A measured step: which one, how long it took, and how much of that it computes at full speed, in µs."""

    key: Any
    time_us: float
    compute_us: float


class PowerLimit:
    """The state of a device that slows down the more it computes.

    Attributes:
        load: the share of the recent past spent computing, 0 to 1.
    """

    __slots__ = ("_memory_us", "_slowdown", "load")

    def __init__(self, memory_us: float, slowdown: Mapping[float, float]) -> None:
        """
        Args:
            memory_us: what lies as long back counts e times less.
            slowdown: by load, the part that computing takes longer.
        """
        self.load = 0.0
        self._memory_us = memory_us
        self._slowdown = Curve(slowdown)

    def extra_us(self, compute_us: float) -> float:
        """How much longer computing takes than at full speed, now."""
        return compute_us * self._slowdown(self.load)

    def ran(self, time_us: float, compute_us: float) -> None:
        """Time has passed, some of it spent computing."""
        kept = exp(-time_us / self._memory_us)
        self.load = self.load * kept + (1.0 - kept) * compute_us / time_us

    def rested(self, time_us: float) -> None:
        """Time has passed."""
        self.load *= exp(-time_us / self._memory_us)


def at_full_speed(streams: Collection[Sequence[Timed]], power: Mapping[str, Any] | None) -> list[Timed]:
    """The steps of streams, each run by a device that had rested, as they would have been with no power limit."""
    if power is None:
        return [step for stream in streams for step in stream]
    return [
        step._replace(time_us=step.time_us - limit.extra_us(step.compute_us))
        for stream in streams
        for step, limit in _followed(stream, power)
    ]


def _followed(stream: Sequence[Timed], power: Mapping[str, Any]) -> Iterator[tuple[Timed, PowerLimit]]:
    """Each step, and the device just before it."""
    limit = PowerLimit(**power)
    for step in stream:
        yield step, limit
        limit.ran(step.time_us, step.compute_us)


def fit_power(streams: Collection[Sequence[Timed]]) -> dict[str, Any] | None:
    """The arguments of `PowerLimit` that explain best why steps of one key take now longer, now less.

    Args:
        streams: of steps that ran one behind the other, each stream on a device that had rested.

    Returns:
        The slowdown never falls with the load; None if it is negligible throughout.
    """
    _, memory_us, slowdowns = min(_fit(streams, memory_us) for memory_us in MEMORIES_US)
    if slowdowns[-1] < NEGLIGIBLE:
        return None
    return {"memory_us": memory_us, "slowdown": dict(zip(LOADS, slowdowns, strict=True))}


def _fit(streams: Collection[Sequence[Timed]], memory_us: float) -> tuple[float, float, list[float]]:
    """The residual for one time constant, that constant, and the slowdown at each of `LOADS`."""
    from scipy.optimize import nnls  # takes longer to import than a simulation takes to start

    steps = [step for stream in streams for step in stream]
    nothing = {"memory_us": memory_us, "slowdown": {0.0: 0.0}}
    loads = np.array([limit.load for stream in streams for _, limit in _followed(stream, nothing)])
    keys = np.unique([repr(step.key) for step in steps], return_inverse=True)[1]
    compute, times = (np.array([getattr(step, name) for step in steps]) for name in ("compute_us", "time_us"))
    low, high = np.array(LOADS[:-1]), np.array(LOADS[1:])
    passed = np.clip((loads[:, None] - low) / (high - low), 0, 1)  # (steps, pieces): how far into each piece
    # What a key takes at full speed is free: only how its times differ from their mean has to be explained.
    columns = _less_mean(compute[:, None] * passed, keys) / times[:, None]
    rises, residual = nnls(columns, _less_mean(times[:, None], keys)[:, 0] / times)
    return float(residual), memory_us, [0.0, *np.cumsum(rises).round(5).tolist()]


def _less_mean(values: Floats, keys: NDArray[np.intp]) -> Floats:
    """Values (steps, columns) less the mean of their key."""
    sums = np.zeros((keys.max() + 1, values.shape[1]))
    np.add.at(sums, keys, values)
    return values - (sums / np.bincount(keys)[:, None])[keys]
