"""How long a step takes, composed from a profile. Pure Python: a lookup costs microseconds of host time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

from engine.graph_sizes import GraphSizes
from engine.step import Copies, Step
from sim.profile import Curve, Profile, Surface
from traces.errors import TandemError

PARTS = ("dense", "head", "padding", "prefill_attention", "decode_attention", "skew")
"""What a step's time is made of: layers by tokens, the head by samples, what padding to a captured size adds, attention
of prefill chunks, of decodes were their contexts all alike, and what their unevenness adds."""


class LatencyModel:
    """Sums a step's parts.

    Attributes:
        lookups: how often each table was asked.
        outside: how often each table was asked outside what was measured, and extrapolated.
    """

    def __init__(self, profile: Profile, ignore: Collection[str] = ()) -> None:
        """`ignore` names `PARTS` that are to count for nothing, to see what they are worth."""
        self.lookups: Counter[str] = Counter()
        self.outside: Counter[str] = Counter()
        tables = profile.tables
        self._ignored = frozenset(ignore) & frozenset(PARTS)
        self._dense = _sum_of(list(_curves(tables["dense"], "op", "tokens").values()))
        self._head = Curve({row["samples"]: row["time_us"] for row in tables["head"]})
        self._prefill = Surface({(row["chunk"], row["context"]): row["time_us"] for row in tables["prefill_attention"]})
        self._decode = _decode_surfaces(tables["decode_attention"])
        self._by_context: dict[int, list[Curve]] = {}
        self._mixed_decode = _surface(tables.get("mixed_decode_attention", ()))
        self._swap = _curves(tables.get("swap", ()), "direction", "blocks")
        self._graph = _curves(tables.get("graph", ()), "kind", "rows")
        self._sizes = GraphSizes(**profile.meta["graphs"]) if self._graph else None
        # Where steps are captured all chunks attend at once, and the longest leaves room for what the others compute.
        self._pair_us = _least_pair_us(tables["prefill_attention"]) if self._graph else None

    def device_ns(self, step: Step) -> int:
        """Time that the data plane works on a step: its compute, or its copies if it has nothing else."""
        if step.kind == "swap":
            return self.copies_ns(step)
        parts = self.parts_us(step)
        time_us = sum(parts.values())
        if self._ignored:
            time_us -= sum(parts[part] for part in self._ignored)
        return round(1000 * time_us)

    def parts_us(self, step: Step) -> dict[str, float]:
        """Microseconds by `PARTS`, all of which add up to the step's compute."""
        if step.chunks:
            samples = step.decodes + sum(chunk.samples for chunk in step.chunks.values())
            parts = self._pass_us(step.prefill_tokens + step.decodes, len(step.chunks), samples)
            parts["prefill_attention"] = self._prefill_us(step)
        else:
            parts = self._pass_us(step.decodes, 0, step.decodes)
            parts["prefill_attention"] = 0.0
        parts["decode_attention"], parts["skew"] = self._decode_us(step)
        return parts

    def _pass_us(self, tokens: int, prefills: int, samples: int) -> dict[str, float]:
        """A pass without attention, as captured, or as launched kernel by kernel."""
        rows = self._sizes.rows(tokens, prefills) if self._sizes else None
        if self._sizes is None or rows is None:
            self._count("dense", self._dense.covers(tokens))
            return {"dense": self._dense(tokens), "head": self._head_us(samples), "padding": 0.0}
        graph = self._graph["mixed" if prefills else "decode"]
        self._count("graph", graph.covers(rows))
        whole, unpadded = graph(rows), graph(tokens)
        head = self._head_us(min(rows, self._sizes.max_seqs))
        return {"dense": unpadded - head, "head": head, "padding": whole - unpadded}

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
        self._count("swap", curve.covers(blocks))
        return curve(blocks)

    def _head_us(self, samples: int) -> float:
        if not samples:
            return 0.0
        self._count("head", self._head.covers(samples))
        return self._head(samples)

    def _prefill_us(self, step: Step) -> float:
        times, pairs = [], []
        for start, tokens, _ in step.chunks.values():
            self._count("prefill_attention", self._prefill.covers(tokens, start))
            times.append(self._prefill(tokens, start))
            pairs.append(_pairs(tokens, start))
        if self._pair_us is None:
            return sum(times)
        longest = max(range(len(times)), key=times.__getitem__)
        return times[longest] + self._pair_us * (sum(pairs) - pairs[longest])

    def _decode_us(self, step: Step) -> tuple[float, float]:
        """Attention of decodes with contexts all alike, and what their unevenness adds."""
        if not step.decodes:
            return 0.0, 0.0
        sequences = step.decodes
        context = step.kv_tokens / sequences + 1  # a decode attends to its own token too
        levels, surfaces = self._decode
        curves = self._by_context.get(sequences)
        if curves is None:  # in a run many steps have the same number of sequences
            curves = self._by_context[sequences] = [surface.at(sequences) for surface in surfaces]
        even, skew = curves[0](context), 0.0
        self._count("decode_attention", surfaces[0].covers(sequences, context))
        if len(levels) > 1:
            squares = step.kv_squares + 2 * step.kv_tokens + sequences
            uneven = Curve(dict(zip(levels, (curve(context) for curve in curves), strict=True)))
            skew = uneven(min(squares / sequences / context**2, levels[-1])) - even
        if step.chunks and self._mixed_decode and even:
            self._count("mixed_decode_attention", self._mixed_decode.covers(sequences, context))
            mixed = self._mixed_decode(sequences, context)
            return mixed, skew * mixed / even  # unevenness is taken to cost its share there too
        return even, skew

    def _count(self, table: str, covered: bool) -> None:
        self.lookups[table] += 1
        if not covered:
            self.outside[table] += 1


def _pairs(chunk: float, context: float) -> float:
    """Pairs of a query and a key that a chunk attends to."""
    return chunk * (context + (chunk + 1) / 2)


def _least_pair_us(rows: Collection[Mapping[str, float]]) -> float:
    """Time of a pair where the device computes at its best."""
    return min(row["time_us"] / _pairs(row["chunk"], row["context"]) for row in rows)


def _curves(rows: Collection[Mapping[str, float]], name: str, axis: str) -> dict[str, Curve]:
    """A table with one named column and one axis: a curve for each name."""
    points: dict[str, dict[float, float]] = {}
    for row in rows:
        points.setdefault(str(row[name]), {})[row[axis]] = row["time_us"]
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
