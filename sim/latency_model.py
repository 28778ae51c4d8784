"""How long a step takes, composed from a profile. Pure Python: a lookup costs microseconds of host time."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from engine.model.graph_sizes import GraphSizes
from engine.step import Copies, Step
from sim.power_state import Load
from sim.profile.format import Curve, Profile, Surface
from traces.errors import TandemError

PARTS = ("dense", "head", "padding", "prefill_attention", "decode_attention", "skew", "power")
"""What a step's time is made of: layers by tokens, the head by samples, what padding to a captured size adds, attention
of prefill chunks, of decodes were their contexts all alike, what their unevenness adds, and what the power limit adds,
by what the device has computed of late."""


AXES = {
    "dense": ("tokens",),
    "head": ("samples",),
    "graph": ("rows",),
    "swap": ("blocks",),
    "prefill_attention": ("chunk", "context"),
    "decode_attention": ("sequences", "context"),
    "mixed_decode_attention": ("sequences", "context"),
}
"""Tables that are asked -> by what."""


class _Asked(NamedTuple):
    """A look-up: the table, whether it was measured there, what it said, and where it was asked."""

    table: str
    covered: bool
    time_us: float
    at: tuple[float, ...]


@dataclass(slots=True)
class _Beyond:
    """Look-ups of one table outside what was measured: the time that they gave, and the ends of where they lay."""

    time_us: float
    least: tuple[float, ...]
    most: tuple[float, ...]

    def add(self, time_us: float, at: tuple[float, ...]) -> None:
        self.time_us += time_us
        self.least = tuple(map(min, self.least, at))
        self.most = tuple(map(max, self.most, at))


@dataclass(slots=True)
class _Decodes:
    """What is known of steps that decode so many sequences, before their contexts are.

    Attributes:
        without_us: dense, head and padding of a step that does nothing else, and what full load adds.
        asked: the tables that these come from.
        curves: attention by mean context, for each level of unevenness.
        measured: the ranges of the mean context that the table covers.
        alone: how many steps did nothing else.
        attended: how many steps asked for the attention,
        outside: and how many of them outside those ranges.
    """

    without_us: tuple[float, float, float, float]
    asked: list[_Asked]
    curves: list[Curve]
    measured: list[tuple[float, float]]
    alone: int = 0
    attended: int = 0
    outside: int = 0


class LatencyModel:
    """Sums a step's parts. What follows from the number of decoding sequences alone is looked up once for each.

    Of a device at its power limit it follows the load: ask for steps in their order, with when they start.
    """

    def __init__(self, profile: Profile, ignore: Collection[str] = ()) -> None:
        """`ignore` names `PARTS` that are to count for nothing, to see what they are worth."""
        self._asked: Counter[tuple[str, bool]] = Counter()  # but for what `_Decodes` count
        self._beyond: dict[str, _Beyond] = {}  # likewise
        self._time_us = 0.0  # of all steps and copies
        tables = self._tables = profile.tables
        self._ignored = [PARTS.index(part) for part in PARTS if part in ignore]
        self._dense = _sum_of(list(_curves(tables["dense"], "op", "tokens").values()))
        self._head = Curve({row["samples"]: row["time_us"] for row in tables["head"]})
        self._prefill = Surface({(row["chunk"], row["context"]): row["time_us"] for row in tables["prefill_attention"]})
        self._levels, self._decode = _decode_surfaces(tables["decode_attention"])
        self._mixed_decode = _surface(tables.get("mixed_decode_attention", ()))
        self._decodes: dict[int, _Decodes] = {}
        self._swap = _curves(tables.get("swap", ()), "direction", "blocks")
        self._graph = _curves(tables.get("served", tables.get("graph", ())), "kind", "rows")
        self._slowed = _curves(tables.get("served", ()), "kind", "rows", "slowed_us")
        self._sizes = GraphSizes(**profile.meta["graphs"]) if self._graph else None
        # Where steps are captured all chunks attend at once, and the longest leaves room for what the others compute.
        self._pair_us = _least_pair_us(tables["prefill_attention"]) if self._graph else None
        load = profile.meta.get("load")
        self._load = Load(load["memory_us"]) if load else None
        self._row_us: float = load["row_us"] if load else 0.0
        self._limit: float = load["limit"] if load else 0.0
        self._end_ns = 0  # of the last step
        largest = max(tables.get("served", ()), key=lambda row: row["rows"], default=None)
        # Steps larger than captured are taken to slow down as the largest of those.
        self._most_slowed = largest["slowed_us"] / largest["time_us"] if largest else 0.0

    @property
    def lookups(self) -> Counter[str]:
        """How often each table was asked."""
        return self._counts({True, False})

    @property
    def outside(self) -> Counter[str]:
        """How often each table was asked outside what was measured, and extrapolated."""
        return self._counts({False})

    def _counts(self, covered: Collection[bool]) -> Counter[str]:
        asked = self._asked.copy()
        for batch in self._decodes.values():
            asked.update({(each.table, each.covered): batch.alone for each in batch.asked})
            asked["decode_attention", True] += batch.attended - batch.outside
            asked["decode_attention", False] += batch.outside
        counts: Counter[str] = Counter()
        for (table, is_covered), count in asked.items():
            if count and is_covered in covered:
                counts[table] += count
        return counts

    def coverage(self) -> dict[str, Any]:
        """How far predictions rest on what was measured.

        Returns:
            - `lookups`: how often tables were asked
            - `beyond`: {table: {count, lookups, device_time, axes}} of those that were asked outside what was measured:
              how many look-ups lay there, which share of the table's, which share of all device time these gave
              (extrapolated), and {axis: {asked: [least, most] of these, measured: [least, most]}}
        """
        lookups, outside = self.lookups, self.outside
        beyond = self._all_beyond()
        return {
            "lookups": lookups.total(),
            "beyond": {
                table: {
                    "count": count,
                    "lookups": count / lookups[table],
                    "device_time": beyond[table].time_us / self._time_us if self._time_us else 0.0,
                    "axes": self._axes(table, beyond[table]),
                }
                for table, count in outside.items()
            },
        }

    def _all_beyond(self) -> dict[str, _Beyond]:
        found = {table: _Beyond(of.time_us, of.least, of.most) for table, of in self._beyond.items()}
        for batch in self._decodes.values():
            for each in batch.asked if batch.alone else ():
                if not each.covered:
                    of = found.setdefault(each.table, _Beyond(0.0, each.at, each.at))
                    of.add(batch.alone * each.time_us, each.at)
        return found

    def _axes(self, table: str, beyond: _Beyond) -> dict[str, dict[str, list[float]]]:
        rows = self._tables.get("served", self._tables.get("graph", [])) if table == "graph" else self._tables[table]
        asked = zip(AXES[table], zip(beyond.least, beyond.most, strict=True), strict=True)
        measured = {axis: [_along(axis, row) for row in rows] for axis in AXES[table]}
        return {
            axis: {"asked": [*ends], "measured": [min(measured[axis]), max(measured[axis])]} for axis, ends in asked
        }

    def _extrapolated(self, table: str, time_us: float, *at: float) -> None:
        self._beyond.setdefault(table, _Beyond(0.0, at, at)).add(time_us, at)

    def device_ns(self, step: Step, start_ns: int | None = None) -> int:
        """Time that the data plane works on a step: its compute, or its copies if it has nothing else.

        Args:
            start_ns: when it begins; right after the step before if None.
        """
        return self.predict(step, start_ns)[0]

    def predict(self, step: Step, start_ns: int | None = None) -> tuple[int, tuple[float, ...]]:
        """As `device_ns`, and the microseconds by `PARTS` that it is made of: nothing, of copies."""
        if not step.decodes and step.kind == "swap":
            return self.copies_ns(step), ()
        dense, head, padding, slowed, prefill, decode, skew = self._parts_us(step)
        time_us, power = dense + head + padding + prefill + decode + skew, 0.0
        if self._load:
            best_us = self._row_us * (step.prefill_tokens + step.decodes) + prefill
            power = self._follow(self._load, slowed, time_us, best_us, start_ns)
            time_us += power
        parts = dense, head, padding, prefill, decode, skew, power
        for part in self._ignored:
            time_us -= parts[part]
        self._time_us += time_us
        return round(1000 * time_us), parts

    def _follow(self, load: Load, slowed: float, time_us: float, best_us: float, start_ns: int | None) -> float:
        """What the load adds to a step that takes `time_us` at none; the step is then part of the load."""
        begin_ns = max(self._end_ns, start_ns or 0)
        if begin_ns > self._end_ns:
            load.rested((begin_ns - self._end_ns) / 1000)
        extra_us = slowed * max(0.0, load.share - self._limit)
        load.worked(time_us + extra_us, best_us)
        self._end_ns = begin_ns + round(1000 * (time_us + extra_us))
        return extra_us

    def rest(self) -> None:
        """The device does nothing for so long that it is under no load."""
        if self._load:
            self._load.share = 0.0

    def parts_us(self, step: Step) -> dict[str, float]:
        """Microseconds by `PARTS`, all of which add up to the step's compute."""
        return dict(zip(PARTS, self.predict(step)[1], strict=True))

    def _parts_us(self, step: Step) -> tuple[float, ...]:
        if not step.chunks:
            batch = self._decodes_of(step.decodes)
            batch.alone += 1
            return *batch.without_us, 0.0, *self._attention_us(step, batch)
        samples = step.decodes + sum(chunk.samples for chunk in step.chunks.values())
        without_us, asked = self._pass_us(step.prefill_tokens + step.decodes, len(step.chunks), samples)
        for each in asked:
            self._asked[each.table, each.covered] += 1
            if not each.covered:
                self._extrapolated(each.table, each.time_us, *each.at)
        decode_us = self._attention_us(step, self._decodes_of(step.decodes)) if step.decodes else (0.0, 0.0)
        return *without_us, self._prefill_us(step), *decode_us

    def _decodes_of(self, sequences: int) -> _Decodes:
        if (batch := self._decodes.get(sequences)) is None:
            without_us, asked = self._pass_us(sequences, 0, sequences)
            curves = [surface.at(sequences) for surface in self._decode]
            batch = _Decodes(without_us, asked, curves, self._decode[0].measured(sequences))
            self._decodes[sequences] = batch
        return batch

    def _pass_us(
        self, tokens: int, prefills: int, samples: int
    ) -> tuple[tuple[float, float, float, float], list[_Asked]]:
        """A pass without attention, as captured, or as launched kernel by kernel: dense, head, padding, and what full
        load adds to these."""
        rows = self._sizes.rows(tokens, prefills) if self._sizes else None
        if self._sizes is None or rows is None:
            head_us, asked = self._head_us(samples)
            dense_us = self._dense(tokens)
            dense = _Asked("dense", self._dense.covers(tokens), dense_us, (tokens,))
            return (dense_us, head_us, 0.0, self._most_slowed * dense_us), [dense, *asked]
        kind = "mixed" if prefills else "decode"
        graph, slowed_us = self._graph[kind], self._slowed[kind](rows) if self._slowed else 0.0
        whole, unpadded = graph(rows), graph(tokens)
        head_us, asked = self._head_us(min(rows, self._sizes.max_seqs))
        captured = _Asked("graph", graph.covers(rows), whole - head_us, (rows,))
        return (unpadded - head_us, head_us, whole - unpadded, slowed_us), [captured, *asked]

    def _head_us(self, samples: int) -> tuple[float, list[_Asked]]:
        if not samples:
            return 0.0, []
        head_us = self._head(samples)
        return head_us, [_Asked("head", self._head.covers(samples), head_us, (samples,))]

    def copies_ns(self, step: Step) -> int:
        """Time of a step's copies between the tiers. Raises TandemError if the profile has none."""
        return round(1000 * (self._copies_us("out", step.swapped_out) + self._copies_us("in", step.swapped_in)))

    def _copies_us(self, direction: str, swaps: Mapping[int, Copies]) -> float:
        if not swaps:
            return 0.0
        if direction not in self._swap:
            raise TandemError(
                "the profile has no table swap, and the run swaps: "
                "measure the profile with --cpu-blocks, or simulate with --cpu-blocks 0"
            )
        blocks, curve = sum(len(copies.source) for copies in swaps.values()), self._swap[direction]
        time_us, covered = curve(blocks), curve.covers(blocks)
        self._asked["swap", covered] += 1
        self._time_us += time_us
        if not covered:
            self._extrapolated("swap", time_us, blocks)
        return time_us

    def _prefill_us(self, step: Step) -> float:
        times: list[float] = []
        pairs, beyond = [], []
        for start, tokens, _ in step.chunks.values():
            covered = self._prefill.covers(tokens, start)
            self._asked["prefill_attention", covered] += 1
            if not covered:
                beyond.append((len(times), tokens, start))
            times.append(self._prefill(tokens, start))
            pairs.append(_pairs(tokens, start))
        longest = max(range(len(times)), key=times.__getitem__)
        for place, *at in beyond:  # of chunks that attend at once, the others' time is by pairs
            counts = self._pair_us is None or place == longest
            self._extrapolated("prefill_attention", times[place] if counts else 0.0, *at)
        if self._pair_us is None:
            return sum(times)
        return times[longest] + self._pair_us * (sum(pairs) - pairs[longest])

    def _attention_us(self, step: Step, batch: _Decodes) -> tuple[float, float]:
        """Attention of decodes with contexts all alike, and what their unevenness adds."""
        sequences, levels, covered = step.decodes, self._levels, True
        context = step.load.kv_tokens / sequences + 1  # a decode attends to its own token too
        even, skew = batch.curves[0](context), 0.0
        batch.attended += 1
        for low, high in batch.measured:
            if low <= context <= high:
                break
        else:
            batch.outside, covered = batch.outside + 1, False
        if len(levels) > 1:
            squares = step.load.kv_squares + 2 * step.load.kv_tokens + sequences
            unevenness = min(squares / sequences / context**2, levels[-1])
            right = bisect_right(levels, unevenness, 1, len(levels) - 1)
            low, high = levels[right - 1], levels[right]
            below = batch.curves[right - 1](context) if right > 1 else even
            above = batch.curves[right](context)
            skew = max(0.0, below + (unevenness - low) * (above - below) / (high - low)) - even
        if step.chunks and self._mixed_decode and even:
            inside = self._mixed_decode.covers(sequences, context)
            self._asked["mixed_decode_attention", inside] += 1
            mixed = self._mixed_decode(sequences, context)
            even, skew = mixed, skew * mixed / even  # unevenness is taken to cost its share there too
            if not inside:
                self._extrapolated("mixed_decode_attention", even, sequences, context)
            if not covered:
                self._extrapolated("decode_attention", skew, sequences, context)
            return even, skew
        if not covered:
            self._extrapolated("decode_attention", even + skew, sequences, context)
        return even, skew


def _along(axis: str, row: Mapping[str, float]) -> float:
    """Where a row of a table lies along an axis."""
    return row["kv_tokens"] / row["sequences"] if axis == "context" and "kv_tokens" in row else row[axis]


def _pairs(chunk: float, context: float) -> float:
    """Pairs of a query and a key that a chunk attends to."""
    return chunk * (context + (chunk + 1) / 2)


def _least_pair_us(rows: Collection[Mapping[str, float]]) -> float:
    """Time of a pair where the device computes at its best."""
    return min(row["time_us"] / _pairs(row["chunk"], row["context"]) for row in rows)


def _curves(rows: Collection[Mapping[str, float]], name: str, axis: str, values: str = "time_us") -> dict[str, Curve]:
    """A table with one named column and one axis: a curve for each name."""
    points: dict[str, dict[float, float]] = {}
    for row in rows:
        points.setdefault(str(row[name]), {})[row[axis]] = row[values]
    return {each: Curve(of_name) for each, of_name in points.items()}


def _decode_surfaces(rows: Collection[Mapping[str, float]]) -> tuple[list[float], list[Surface]]:
    """Levels of unevenness, from 1 up, and a surface for each over sequences and their mean context.

    Over the mean context, so that interpolating between numbers of sequences keeps their lengths.
    """
    by_level: dict[float, list[Mapping[str, float]]] = {}
    for row in rows:
        by_level.setdefault(row["unevenness"], []).append(row)
    levels = sorted(by_level)
    return levels, [surface for level in levels if (surface := _surface(by_level[level]))]


def _surface(rows: Collection[Mapping[str, float]]) -> Surface | None:
    """Decodes over sequences and their mean context; None without rows."""
    points = {(row["sequences"], row["kv_tokens"] / row["sequences"]): row["time_us"] for row in rows}
    return Surface(points) if points else None


def _sum_of(curves: list[Curve]) -> Curve:
    """The sum of piecewise-linear curves is piecewise linear over the union of their points."""
    xs = {x for curve in curves for x in curve.xs}
    return Curve({x: sum(curve(x) for curve in curves) for x in xs})
