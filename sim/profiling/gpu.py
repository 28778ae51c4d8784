"""Measures a GPU: whole steps in the graphs that serve, and apart from them the attention that comes on top.

A captured step costs what its size says, and beyond that what its requests attend to. Steps of all sizes run in random
order, one behind the other, those that prefill between others that do not. A GPU at its power limit is the slower the
more it has computed in the last tens of milliseconds: a step alone, or many of its kind, would not take as long as in
service. A run in service tells how much slower (`calibration`). Operations are timed alone as well: steps too large to
be captured are made of them, and they say where the time of others goes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from engine.config import ServingConfig
from engine.model.graph_sizes import GraphSizes
from sim.profile.format import Row
from sim.profile.meta import MemoryFacts, ProfileMeta
from sim.profiling.batches import BatchShape, shuffled
from sim.profiling.device_profiler import DeviceProfiler, Point
from sim.profiling.held_out import RESTS, TimedSteps, serving_batches
from sim.profiling.samples import Sample
from sim.terms import CapturedGraphs, DecodeAttention, Dense, Head, PrefillAttention

if TYPE_CHECKING:
    from engine.executor.executor import Executor

ROUNDS = 2  # of every operation and attention, which repeat it themselves
DISTURBED = 1.1  # times the shortest of a point's rounds: one that took longer was kept waiting, by the host or another
STREAMS = 10  # runs over all captured sizes
TYPICAL, TYPICAL_IMBALANCE = 384, 1.7  # mean context of the decodes in a stream, and the imbalance of their contexts
HELD_OUT = 48


class GpuProfiler(DeviceProfiler):
    """Its work are points of tables, table `graph` as a whole, and `attended`: all that captured steps attend to."""

    def __init__(self, executor: Executor, config: ServingConfig) -> None:
        super().__init__(executor, config)
        self._sizes = GraphSizes.within(config.max_seqs, config.max_batched_tokens)
        shapes = {(kind, rows): self._captured(kind, rows) for kind, rows in CapturedGraphs.points(self._sizes)}
        self._captures = {key: shape for key, shape in shapes.items() if shape}
        self._orders = random.Random(0)
        points = [Point("attended"), *self._points()]
        self.work = shuffled([Point("graph")] * STREAMS + [point for point in points for _ in range(ROUNDS)])
        self.held_out = serving_batches(config, HELD_OUT)

    def _captured(self, kind: str, rows: int) -> BatchShape | None:
        """Decodes as in service; as few prompts as fill a step, or None if that has no room for so many prompts."""
        longest = self._config.max_model_len
        if kind == "decode":
            mean = min(TYPICAL, self._config.num_blocks * self._config.block_size // rows // 4)
            shape = BatchShape.decoding(rows, mean, TYPICAL_IMBALANCE if rows >= 4 else 1.0)
            return BatchShape((), tuple(min(context, longest - 1) for context in shape.decodes))
        whole, rest = divmod(rows, longest)
        chunks = ((longest, 0),) * whole + ((rest, 0),) * (rest > 0)
        return BatchShape(chunks, ()) if len(chunks) <= self._sizes.prefills(rows) else None

    def _points(self) -> Iterator[Point]:
        for tokens in Dense.points(self._sizes, self._config):
            yield Point("dense", (tokens,))
        for samples in Head.points(self._sizes):
            yield Point("head", (samples,))
        for sequences, mean, imbalance in DecodeAttention.points(self._config):
            shape = BatchShape.decoding(sequences, mean, imbalance)
            if shape.decodes_fit(self._config):
                yield Point("decode_attention", (sequences, shape.kv_tokens, imbalance), shape)
        for chunk in PrefillAttention.points(self._config):
            yield Point("prefill_attention", chunk, BatchShape((chunk,), ()))

    def __enter__(self) -> GpuProfiler:
        self._meter = self._executor.meter(self._config)
        return self

    def __exit__(self, *_: object) -> None:
        del self._meter

    def state(self, when: str = "before") -> dict[str, Any]:
        """As in `DeviceProfiler`: clocks, power, temperature and driver."""
        return {when: self._meter.state(refuse_busy=when == "before")}

    def measure(self, point: Point) -> list[Sample]:
        """As in `DeviceProfiler`."""
        table, key, shape = point
        if shape:
            return [Sample(table, key, self._meter.attention_us(shape))]
        if table == "graph":
            return self._stream()
        if table == "attended":
            return [Sample(table, key, self._meter.attention_us(shape)) for key, shape in self._captures.items()]
        if table == "head":
            return [Sample(table, key, self._meter.head_us(*key))]
        return [Sample(table, (name, *key), time_us) for name, time_us in self._meter.operations_us(*key).items()]

    def _stream(self) -> list[Sample]:
        """Every size that prefills once, and before each of them some that only decode, all in random order."""
        prefills, decodes = ([key for key in self._captures if key[0] == kind] for kind in ("mixed", "decode"))
        decodes *= -(-RESTS * len(prefills) // len(decodes))
        self._orders.shuffle(prefills)
        self._orders.shuffle(decodes)
        keys = [key for turn, key in enumerate(prefills) for key in (*decodes[RESTS * turn :][:RESTS], key)]
        times = self._meter.stream_us([self._captures[key] for key in keys])
        return [Sample("graph", key, time_us) for key, time_us in zip(keys, times, strict=True)]

    def batch_us(self, shape: BatchShape) -> float:
        """As in `DeviceProfiler`: over and over; a batch that prefills, between steps of its decodes alone."""
        steps, counted = TimedSteps.of(shape, self._config.block_size, captured=True)
        requests = shape.requests(self._executor.model.vocab_size, len(steps))
        return fmean(self._meter.steps_us(requests, steps)[counted])

    def describe(self, meta: ProfileMeta) -> ProfileMeta:
        """As in `DeviceProfiler`: the captured sizes, the memory, and how often a point was measured."""
        notes = {
            "repeats": f"{STREAMS} streams of captured steps, {ROUNDS} rounds of operations and attention",
            "disturbed": f"rounds that took over {DISTURBED} times the shortest are left out",
        }
        memory = MemoryFacts(**self._meter.memory())
        return replace(meta, graphs=self._sizes, memory=memory, notes=meta.notes | notes)

    def tables(self, samples: Sequence[Sample]) -> dict[str, list[Row]]:
        """As in `DeviceProfiler`: a captured step without the attention of those that were measured."""
        tables = super().tables([*_undisturbed(samples)])
        attended = {(row["kind"], row["rows"]): row["time_us"] for row in tables.pop("attended")}
        tables["graph"] = [
            row | {"time_us": row["time_us"] - attended[row["kind"], row["rows"]]} for row in tables["graph"]
        ]
        return tables


def _undisturbed(samples: Sequence[Sample]) -> Iterator[Sample]:
    """Of operations and attention the rounds that none held up; of streams all, whose steps vary with those before."""
    shortest: dict[tuple[str, tuple[Any, ...]], float] = {}
    for table, key, time_us in samples:
        shortest[table, key] = min(time_us, shortest.get((table, key), time_us))
    for sample in samples:
        if sample.table == "graph" or sample.time_us <= DISTURBED * shortest[sample.table, sample.key]:
            yield sample
