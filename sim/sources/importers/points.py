"""Points between those that a source measured, and how well those predict points that are left out.

Times are microseconds of the whole model (all layers).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from statistics import fmean
from typing import Any

from sim.profile.curves import Curve, Surface
from sim.profile.format import Points

Plane = dict[tuple[float, float], float]  # time by two axes

FOLDS = 3
BETWEEN = 4  # a table gets this many steps from one measured chunk to the next
LEAST_CHUNK = 160  # fitted to the RTX 4090, where chunks after a context were measured: fewer tokens do not fill it
CONTEXTS = (0, *(2**power for power in range(4, 18)))
RULES = {
    "held_out": "every third interior point left out in turn (3 folds), read from the rest as a simulation would; "
    "for attention along the context, and across: whole chunks or numbers of sequences left out",
    "chunks": "between measured chunks a power law, at 3 points each",
    "contexts": "measured without earlier tokens only: a chunk after some costs its share of the pairs of a prefill of "
    f"both, chunks counted as {LEAST_CHUNK} tokens at least (8 % off in the median on the RTX 4090, P95 29 %)",
}


def plane(table: str, points: Points) -> Plane:
    """A table's points over two axes: dense operations summed, decodes by the context of each, and all alike."""
    if table == "dense":
        named = sorted({op for op, _ in points})
        ops = [Curve({tokens: time for (of, tokens), time in points.items() if of == op}) for op in named]
        return {(0, tokens): sum(curve(tokens) for curve in ops) for _, tokens in points}
    if table == "head":
        return {(0, samples): time for (samples,), time in points.items()}
    if table in ("decode_attention", "mixed_decode_attention"):
        return {(n, kv / n): time for (n, kv, *imbalance), time in points.items() if imbalance in ([], [1])}
    return {(chunk, context): time for (chunk, context), time in points.items()}


def between_chunks(points: Plane) -> Plane:
    """Chunks between the measured ones, by a power law: attention grows faster than its chunk, a chord is too long."""
    found, chunks = dict(points), sorted({chunk for chunk, _ in points})
    for low, high in pairwise(chunks):
        for step in range(1, BETWEEN):
            chunk = round(low * (high / low) ** (step / BETWEEN))
            weight = math.log(chunk / low) / math.log(high / low)
            shared = [context for of, context in points if of == low and (high, context) in points]
            for context in shared if low < chunk < high else ():
                found[chunk, context] = points[low, context] ** (1 - weight) * points[high, context] ** weight
    return found


def with_contexts(points: Plane) -> Plane:
    """Chunks after earlier tokens, if none were measured: `RULES["contexts"]`. No further than the longest prefill."""
    if any(context for _, context in points):
        return points
    logs = Curve({math.log(chunk): math.log(time) for (chunk, _), time in points.items()})
    longest = max(chunk for chunk, _ in points)

    def time(chunk: float, context: float) -> float:
        counted = max(chunk, LEAST_CHUNK)
        both = math.exp(logs(math.log(counted + context)))
        return max(points[chunk, 0], both * (1 - (context / (counted + context)) ** 2))

    chunks = [chunk for chunk, _ in points]
    return points | {(n, x): time(n, x) for n in chunks for x in CONTEXTS[1:] if n + x <= longest}


# -- held-out error ----------------------------------------------------------------------------------------


def cross_check(table: str, points: Points) -> dict[str, Any]:
    """Errors of a table read without some of its points, by `RULES["held_out"]`."""
    whole = plane(table, points)
    lines = sorted({x for x, _ in whole})
    inner = {line: sorted(y for x, y in whole if x == line)[1:-1] for line in lines}
    along = {(line, y): position % FOLDS for line, ys in inner.items() for position, y in enumerate(ys)}
    across = {key: lines.index(key[0]) % FOLDS for key in whole if key[0] in lines[1:-1]}
    found = {"along": _left_out(table, whole, along), "across": _left_out(table, whole, across)}
    of_axis = {axis: errors(of) for axis, of in found.items() if of}
    return of_axis["along"] if table in ("dense", "head") else of_axis


def errors(found: Iterable[float]) -> dict[str, float]:
    """Of relative errors: how many, mean, and median, P95 and largest of their sizes."""
    import numpy as np

    signed = list(found)
    sizes = np.abs(signed)
    of_sizes = {"median": np.median(sizes), "p95": np.percentile(sizes, 95), "max": sizes.max(), "mean": fmean(signed)}
    return {"points": len(signed)} | {name: round(float(value), 4) for name, value in of_sizes.items()}


def _left_out(table: str, points: Plane, held: Mapping[tuple[float, float], int]) -> list[float]:
    found = []
    for fold in range(FOLDS):
        rest = {key: time for key, time in points.items() if held.get(key) != fold}
        read = Surface(between_chunks(rest) if table == "prefill_attention" else rest)
        found += [read(*key) / points[key] - 1 for key, of in held.items() if of == fold]
    return found
