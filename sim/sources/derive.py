"""A profile of another model on a profiled GPU: what the two models share is reused, the rest is estimated, marked so.

An operation's time belongs to its shape: a matrix product of n x k, or attention of so many heads, takes as long in one
model as in another, as often as there are layers. What has another shape is estimated from the nearest that was
measured: a time that is fixed, and beyond that one in proportion to the roofline's. As a ratio alone, small batches
would be up to five times as far off, and products of a small model four times. A product is estimated from the measured
one with about as many weights, at as many tokens; what is fixed is the time that a product of no weights would take, on
the line through all products at the fewest tokens. Of attention and small kernels it is the least time in their table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import numpy as np

from engine.model.config import ModelConfig
from sim.memory_model import DTYPE_BYTES
from sim.profile.curves import Curve
from sim.profile.format import Profile, Row
from sim.sources.roofline import Floor, gemm_shapes, memory_facts, sheet_of, small_kernels
from sim.terms import curves
from traces.errors import TandemError

REUSED, SCALED, ESTIMATED = ORDER = ("reused", "scaled", "estimated")  # of a table: as its weakest part
KEPT = ("sources", "statistic")  # of the notes


def derive_profile(source: Profile, model: ModelConfig, name: str) -> Profile:
    """Make a profile of `model` from one of another model on the same GPU.

    Args:
        name: what to call `source` in the result's data sheet.

    Raises:
        TandemError: the source is itself derived, its GPU has no data sheet, or an operation is not known.
    """
    if source.meta.derived:
        raise TandemError(f"{name} is itself derived: derive from the profile that was measured")
    sheet, item, block_size = sheet_of(source.meta.device), DTYPE_BYTES[source.meta.dtype], source.meta.block_size
    if block_size is None:
        raise TandemError(f"{name} does not say its block size: derive from a profile that was measured or imported")
    made = _Derivation(source, Floor(sheet, source.model, item), Floor(sheet, model, item))
    found = {table: derive(source.tables[table]) for table, derive in made.ways().items() if table in source.tables}
    origins = {table: origin for table, (_, origin) in found.items()}
    for table, origin in origins.items():
        origin["of"] = (source.meta.tables or {}).get(table, {}).get("how", "measured")
    meta = replace(
        source.meta,
        model=model,
        source=f"derived from {name}: nothing of {model.name} was measured; {source.meta.source}",
        kv_blocks=None,
        power=None,
        memory=memory_facts(sheet, model, item, block_size),
        data_sheet=sheet,
        held_out={"rule": f"none: nothing of {model.name} was measured"},
        tables=origins,
        derived={"from": name, "model": source.model.name},
        notes={note: source.meta.notes[note] for note in KEPT if note in source.meta.notes},
    )
    return Profile(meta, {table: rows for table, (rows, _) in found.items()})


PRODUCTS = ("qkv", "o", "gate_up", "down")
ONCE = ("embed", "plan", "finish")  # not in every layer; the first moves rows of the model's width, the others none
Origin = dict[str, Any]  # `how` of `ORDER`, and rules
Derived = tuple[list[Row], Origin]


@dataclass(frozen=True, slots=True)
class _Derivation:
    source: Profile
    old: Floor
    new: Floor

    @property
    def _layers(self) -> float:
        return self.new.model.num_layers / self.old.model.num_layers

    @property
    def _same(self) -> str:
        """What a table is whose shape is the same in both models."""
        return REUSED if self._layers == 1 else SCALED

    def ways(self) -> dict[str, Callable[[list[Row]], Derived]]:
        """By table, what derives its rows."""
        return {
            "dense": self.dense,
            "prefill_attention": self.prefill,
            "decode_attention": self.decode,
            "mixed_decode_attention": self.decode,
            "head": self.head,
            "host": self.host,
            "swap": self.swap,
            "graph": self.graph,
        }

    def dense(self, rows: list[Row]) -> Derived:
        """By operation."""
        by_op: dict[str, list[Row]] = {}
        for row in rows:
            by_op.setdefault(row["op"], []).append(row)
        found = {op: self._product(op, by_op) if op in PRODUCTS else self._small(op, by_op[op]) for op in by_op}
        rules = [f"{op}: {origin['rules'][0]}" for op, (_, origin) in found.items()]
        how = max((origin["how"] for _, origin in found.values()), key=ORDER.index)
        return [row for rows, _ in found.values() for row in rows], {"how": how, "rules": rules}

    def _product(self, op: str, by_op: dict[str, list[Row]]) -> Derived:
        old, new = gemm_shapes(self.old.model), gemm_shapes(self.new.model)[op]
        measured = [each for each in PRODUCTS if each in by_op]
        near = min(measured, key=lambda each: (old[each] != new, abs(math.log(math.prod(old[each]) / math.prod(new)))))
        n, k = old[near]
        rows = _fixed_and_rest(
            [row | {"op": op} for row in by_op[near]],
            self._layers,
            lambda row: self._layers * self._gemm_ratio(row["tokens"], new, (n, k)),
            self._fixed_us({old[each]: by_op[each] for each in measured}),
        )
        of = f"{near} (n {n}, k {k}) of {self.old.model.name}"
        if (n, k) == new:
            return rows, self._origin(self._same, f"as {of}")
        return rows, self._origin(ESTIMATED, f"n {new[0]}, k {new[1]}: beyond a fixed time, by the roofline; from {of}")

    def _fixed_us(self, by_shape: Mapping[tuple[int, int], list[Row]]) -> float:
        """What a product of no weights would take, in all layers."""
        first = {shape: min(rows, key=lambda row: row["tokens"]) for shape, rows in by_shape.items()}
        if len(first) < 2:
            return 0.0
        least = np.array([self.old.gemm_us(row["tokens"], *shape) for shape, row in first.items()])
        times = np.array([row["time_us"] for row in first.values()])
        at_none = np.polyfit(least, times, 1, w=1 / times)[1]
        return float(np.clip(at_none, 0, min(row["time_us"] for rows in by_shape.values() for row in rows)))

    def _gemm_ratio(self, tokens: int, new: tuple[int, int], old: tuple[int, int]) -> float:
        return self.new.gemm_us(tokens, *new) / self.old.gemm_us(tokens, *old)

    def _small(self, op: str, rows: list[Row]) -> Derived:
        """Kernels that only move memory, or host work."""
        old, new = (_traffic(op, floor.model) for floor in (self.old, self.new))
        fixed = 1.0 if op in ONCE else self._layers
        scaled = _fixed_and_rest(rows, fixed, lambda row: new / old if old else 1.0)
        if new == old * fixed or not old:
            return scaled, self._origin(self._same if fixed != 1 else REUSED, f"as {op} of {self.old.model.name}")
        return scaled, self._origin(ESTIMATED, f"beyond its least time, by memory traffic ({new / old:.3f} times)")

    def prefill(self, rows: list[Row]) -> Derived:
        """By heads."""
        return self._attention(rows, lambda floor, row: floor.prefill_us(row["chunk"], row["context"]))

    def decode(self, rows: list[Row]) -> Derived:
        """By heads."""
        return self._attention(rows, lambda floor, row: floor.decode_us(row["sequences"], row["kv_tokens"]))

    def _attention(self, rows: list[Row], time_us: Callable[[Floor, Row], float]) -> Derived:
        old, new = (
            f"{of.num_heads} heads, {of.num_kv_heads} of KV, head_dim {of.head_dim}"
            for of in (self.old.model, self.new.model)
        )
        scaled = _fixed_and_rest(rows, self._layers, lambda row: time_us(self.new, row) / time_us(self.old, row))
        if old == new:
            return scaled, self._origin(self._same, f"as {old} of {self.old.model.name}")
        return scaled, self._origin(ESTIMATED, f"{new}: beyond its least time, by the roofline; from {old}")

    def head(self, rows: list[Row]) -> Derived:
        """By vocabulary and width."""
        old, new = ((of.vocab_size, of.hidden_size) for of in (self.old.model, self.new.model))
        scaled = [row | {"time_us": row["time_us"] * self._gemm_ratio(row["samples"], new, old)} for row in rows]
        of = f"n {old[0]}, k {old[1]} of {self.old.model.name}"
        if old == new:
            return scaled, self._origin(REUSED, f"as {of}")
        return scaled, self._origin(ESTIMATED, f"n {new[0]}, k {new[1]}: the roofline over the efficiency of {of}")

    def host(self, rows: list[Row]) -> Derived:
        """The loop's own work does not depend on the model; a launch, kernel by kernel, would on its layers."""
        return rows, self._origin(REUSED, f"of {self.old.model.name}")

    def swap(self, rows: list[Row]) -> Derived:
        """By the bytes of a block."""
        ratio = self.new.model.kv_bytes_per_token(1) / self.old.model.kv_bytes_per_token(1)
        origin = self._origin(REUSED if ratio == 1 else ESTIMATED, f"{ratio:.3f} times the bytes of a block")
        return _fixed_and_rest(rows, 1.0, lambda row: ratio), origin

    def graph(self, rows: list[Row]) -> Derived:
        """A whole captured step, in proportion to its operations."""
        assert self.source.meta.graphs, "has table graph"
        dense, head = (self.source.tables[table] for table in ("dense", "head"))
        most = self.source.meta.graphs.max_seqs
        old, new = _operations(dense, head, most), _operations(self.dense(dense)[0], self.head(head)[0], most)
        scaled = [row | {"time_us": row["time_us"] * new(row["rows"]) / old(row["rows"])} for row in rows]
        return scaled, self._origin(ESTIMATED, "in proportion to the sum of its operations and head")

    def _origin(self, how: str, rule: str) -> Origin:
        layers = f", {self._layers:g} times the layers" if how == SCALED else ""
        return {"how": how, "rules": [rule + layers]}


def _traffic(op: str, model: ModelConfig) -> int:
    """Numbers that an operation moves per token, in all layers."""
    kernels = small_kernels(model)
    kernels["small"] = tuple(chain(*kernels.values()))  # all of them, as one operation
    if op in kernels:
        return model.num_layers * sum(kernels[op])
    if op not in ONCE:
        raise TandemError(f"profile table dense: '{op}' is no operation that is known; choose another profile")
    return 2 * model.hidden_size if op == "embed" else 0


def _fixed_and_rest(
    rows: list[Row], fixed: float, ratio: Callable[[Row], float], least: float | None = None
) -> list[Row]:
    """The `least` time (else the least of `rows`) times `fixed`, and what each row takes beyond it times its ratio."""
    least = min(row["time_us"] for row in rows) if least is None else least
    return [row | {"time_us": least * fixed + (row["time_us"] - least) * ratio(row)} for row in rows]


def _operations(dense: list[Row], head: list[Row], most: int) -> Callable[[int], float]:
    operations, of_head = curves(dense, "op", "tokens"), Curve({row["samples"]: row["time_us"] for row in head})
    return lambda rows: sum(curve(rows) for curve in operations.values()) + of_head(min(rows, most))
