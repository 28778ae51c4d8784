"""The state of a device at its power limit: it computes the slower the more it has computed of late.

A GPU that draws more than it may lowers its clock, tens of milliseconds later. The time of a step therefore depends on
the steps before it. The effect is larger, the closer the step is to being bound by computing.
`sim.profiling.calibration` measures it.
"""

from __future__ import annotations

from math import exp


class PowerState:
    """The share of the recent past that a device would have needed, at its best, for what it computed.

    An exponentially weighted mean over time.

    Attributes:
        share: 0 of a device that has rested.
    """

    __slots__ = ("_memory_us", "share")

    def __init__(self, memory_us: float) -> None:
        """`memory_us`: the time constant; work that lies this long back counts e times less."""
        self.share = 0.0
        self._memory_us = memory_us

    def worked(self, time_us: float, best_us: float) -> None:
        """A step took `time_us`, of which the device needed `best_us` at its best."""
        kept = exp(-time_us / self._memory_us)
        self.share = self.share * kept + (1.0 - kept) * best_us / time_us

    def rested(self, time_us: float) -> None:
        """The device computed nothing for `time_us`."""
        self.share *= exp(-time_us / self._memory_us)
