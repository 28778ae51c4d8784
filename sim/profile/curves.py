"""Interpolation between measured times: piecewise linear over one axis, or over two."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from itertools import pairwise


class Curve:
    """Piecewise-linear time over one axis. Beyond its ends it goes on along its last (first) piece."""

    __slots__ = ("_bends", "_pieces", "xs")

    def __init__(self, points: Mapping[float, float]) -> None:
        self.xs = sorted(points)
        corners = [(x, points[x]) for x in self.xs]
        self._bends = self.xs[1:-1]  # where one piece ends and the next begins
        self._pieces = [(x0, y0, y1 - y0, x1 - x0) for (x0, y0), (x1, y1) in pairwise(corners)] or [(*corners[0], 0, 1)]

    def __call__(self, x: float) -> float:
        """Time at `x`, at least 0."""
        x0, y0, rise, run = self._pieces[bisect_right(self._bends, x)]
        time = y0 + (x - x0) * rise / run
        return time if time > 0.0 else 0.0

    def covers(self, x: float) -> bool:
        """Whether `x` lies in the measured range."""
        return self.xs[0] <= x <= self.xs[-1]


class Surface:
    """Piecewise-linear time over two axes: a curve over the second axis at each measured value of the first."""

    __slots__ = ("_curves", "_measured", "xs")

    def __init__(self, points: Mapping[tuple[float, float], float]) -> None:
        rows: dict[float, dict[float, float]] = {}
        for (x, y), time in points.items():
            rows.setdefault(x, {})[y] = time
        self.xs = sorted(rows)
        self._curves = [Curve(rows[x]) for x in self.xs]
        ranges = [(curve.xs[0], curve.xs[-1]) for curve in self._curves]
        self._measured = [sorted(set(beside)) for beside in pairwise(ranges)] or [ranges]  # from each x to the next

    def __call__(self, x: float, y: float) -> float:
        """Time at (x, y), at least 0."""
        left, right, weight = self._beside(x)
        low = left(y)
        return max(0.0, low + weight * (right(y) - low))

    def at(self, x: float) -> Curve:
        """Time over the second axis at `x`: what calls with this `x` return."""
        left, right, weight = self._beside(x)
        points = {}
        for y in {*left.xs, *right.xs}:
            low = left(y)
            points[y] = low + weight * (right(y) - low)
        return Curve(points)

    def _beside(self, x: float) -> tuple[Curve, Curve, float]:
        """The measured curves on both sides of `x` (or at the end it lies beyond), and how far it is from the first."""
        xs, curves = self.xs, self._curves
        if len(xs) == 1:
            return curves[0], curves[0], 0.0
        right = bisect_right(xs, x, 1, len(xs) - 1)
        return curves[right - 1], curves[right], (x - xs[right - 1]) / (xs[right] - xs[right - 1])

    def covers(self, x: float, y: float) -> bool:
        """Whether (x, y) lies in the measured range."""
        return any(low <= y <= high for low, high in self.measured(x))

    def measured(self, x: float) -> list[tuple[float, float]]:
        """The ranges of the second axis that were measured beside `x`: a point in any of them is covered."""
        if not self.xs[0] <= x <= self.xs[-1]:
            return []
        return self._measured[bisect_right(self.xs, x, 1, len(self._measured)) - 1]
