"""How long a step takes, composed from a profile. Pure Python: a lookup costs microseconds of host time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from engine.step import Chunk, Copies, Step
from sim.profile import Curve, Profile, Surface
from traces.errors import TandemError


class LatencyModel:
    """Sums a step's parts: dense layers by tokens, attention by request, the head by samples.

    Attributes:
        lookups: how often each table was asked.
        outside: how often each table was asked outside what was measured, and extrapolated.
    """

    def __init__(self, profile: Profile) -> None:
        self.lookups: Counter[str] = Counter()
        self.outside: Counter[str] = Counter()
        tables = profile.tables
        ops = {row["op"]: {} for row in tables["dense"]}  # type: dict[str, dict[float, float]]
        for row in tables["dense"]:
            ops[row["op"]][row["tokens"]] = row["time_us"]
        self._dense = _sum_of([Curve(points) for points in ops.values()])
        self._head = Curve({row["samples"]: row["time_us"] for row in tables["head"]})
        self._prefill = Surface({(row["chunk"], row["context"]): row["time_us"] for row in tables["prefill_attention"]})
        directions: dict[str, dict[float, float]] = {}
        for row in tables.get("swap", ()):
            directions.setdefault(row["direction"], {})[row["blocks"]] = row["time_us"]
        self._swap = {direction: Curve(points) for direction, points in directions.items()}
        # Over the mean context, so that interpolating between numbers of sequences keeps their lengths.
        self._decode = Surface(
            {
                (row["sequences"], row["kv_tokens"] / row["sequences"]): row["time_us"]
                for row in tables["decode_attention"]
            }
        )

    def device_ns(self, step: Step) -> int:
        """Time that the data plane works on a step: its compute, or its copies if it has nothing else."""
        if step.kind == "swap":
            return self.copies_ns(step)
        samples = step.decodes + sum(chunk.samples for chunk in step.chunks.values())
        time_us = self._dense_us(step.prefill_tokens + step.decodes) + self._head_us(samples)
        for chunk in step.chunks.values():
            time_us += self._prefill_us(chunk)
        if step.decodes:
            time_us += self._decode_us(step.decodes, step.kv_tokens)
        return round(time_us * 1000)

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

    def _dense_us(self, tokens: int) -> float:
        self._count("dense", self._dense.covers(tokens))
        return self._dense(tokens)

    def _head_us(self, samples: int) -> float:
        if not samples:
            return 0.0
        self._count("head", self._head.covers(samples))
        return self._head(samples)

    def _prefill_us(self, chunk: Chunk) -> float:
        self._count("prefill_attention", self._prefill.covers(chunk.tokens, chunk.start))
        return self._prefill(chunk.tokens, chunk.start)

    def _decode_us(self, sequences: int, kv_tokens: int) -> float:
        context = kv_tokens / sequences + 1  # a decode attends to its own token too
        self._count("decode_attention", self._decode.covers(sequences, context))
        return self._decode(sequences, context)

    def _count(self, table: str, covered: bool) -> None:
        self.lookups[table] += 1
        if not covered:
            self.outside[table] += 1


def _sum_of(curves: list[Curve]) -> Curve:
    """The sum of piecewise-linear curves is piecewise linear over the union of their points."""
    xs = {x for curve in curves for x in curve.xs}
    return Curve({x: sum(curve(x) for curve in curves) for x in xs})
