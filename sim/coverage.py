"""How far predictions rest on what was measured: which tables were asked, and which of them outside their points."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from sim.profile.format import KEYS, Row

AXIS_OF = {"kv_tokens": "context"}  # decodes are read by their mean context
LABELS = ("op", "kind", "direction", "imbalance")  # key columns along which nothing is extrapolated


class Note(Protocol):
    """Takes note of a look-up."""

    def __call__(self, table: str, covered: bool, time_us: float, *at: float) -> None:
        """Of a table that was asked `at` a point, whether it was measured there, and the time that it gave."""


@dataclass(slots=True)
class Extrapolated:
    """Look-ups of one table outside its points: how many, the time that they gave, and the ends of where they lay."""

    count: int
    time_us: float
    least: tuple[float, ...]
    most: tuple[float, ...]


@dataclass(slots=True)
class Coverage:
    """Look-ups by table, and those of them that were extrapolated."""

    asked: Counter[str] = field(default_factory=Counter)
    beyond: dict[str, Extrapolated] = field(default_factory=dict)

    def note(self, table: str, covered: bool, time_us: float, *at: float) -> None:
        """As in `Note`."""
        self.asked[table] += 1
        if not covered:
            self._extrapolate(table, Extrapolated(1, time_us, at, at))

    def _extrapolate(self, table: str, new: Extrapolated, times: int = 1) -> None:
        found = self.beyond.setdefault(table, Extrapolated(0, 0.0, new.least, new.most))
        found.count += times * new.count
        found.time_us += times * new.time_us
        found.least = tuple(map(min, found.least, new.least))
        found.most = tuple(map(max, found.most, new.most))

    def add(self, other: Coverage, times: int = 1) -> None:
        """Add the look-ups of another, each made so many times."""
        for table, count in other.asked.items() if times else ():
            self.asked[table] += times * count
        for table, new in other.beyond.items() if times else ():
            self._extrapolate(table, new, times)

    def report(self, tables: Mapping[str, Sequence[Row]], device_us: float) -> dict[str, Any]:
        """What `LatencyModel.coverage` returns, where all steps and copies took `device_us`."""
        beyond = {
            table: {
                "count": found.count,
                "lookups": found.count / self.asked[table],
                "device_time": found.time_us / device_us if device_us else 0.0,
                "axes": _axes(table, found, tables[table]),
            }
            for table, found in self.beyond.items()
        }
        return {"lookups": self.asked.total(), "beyond": beyond}


def _axes(table: str, found: Extrapolated, rows: Sequence[Row]) -> dict[str, dict[str, list[float]]]:
    keys = [key for key in KEYS[table] if key not in LABELS]
    axes = {}
    for key, *asked in zip(keys, found.least, found.most, strict=True):
        measured = [row[key] / row["sequences"] if key in AXIS_OF else row[key] for row in rows]
        axes[AXIS_OF.get(key, key)] = {"asked": asked, "measured": [min(measured), max(measured)]}
    return axes
