"""How a machine is measured: on a CPU the parts of a pass, timed from inside; on a GPU whole captured steps.

A rig has work to do, item by item, each item as often as it is to be repeated, in random order. It gives samples, times
of points in tables. Everything runs as it does when serving: on the thread that serves, or in the graphs that serve.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

from engine.config import ServingConfig
from engine.model.graph_sizes import GraphSizes
from engine.step import Step
from sim.profile.format import Row
from sim.profiling.batches import (
    HELD_OUT,
    Pass,
    grid,
    mixed_passes,
    served_passes,
    shuffled,
    uneven,
    uneven_grid,
    up_to,
)
from sim.profiling.samples import Sample, rows_of

if TYPE_CHECKING:
    from engine.executor.executor import Executor


class Batch(NamedTuple):
    """A held-out batch: the steps that ran on a machine that had rested, those that count, and their mean time."""

    steps: list[Step]
    counted: slice
    time_us: float


class Rig(Protocol):
    """Measures one machine. Used as a context manager, but for `work` and `num_held_out`, which cost nothing."""

    @property
    def work(self) -> Sequence[Any]:
        """Items, each as often as it is to be measured, in the order to measure them in."""

    @property
    def num_held_out(self) -> int:
        """Batches that `held_out` gives."""

    def __enter__(self) -> Self:
        """Get ready, which may take seconds."""

    def __exit__(self, *exception: object) -> None:
        """Give everything back."""

    def state(self, when: str = "before") -> dict[str, Any]:
        """The machine's own account of its state. Raises TandemError if it is in no state to be measured."""

    def measure(self, item: Any) -> list[Sample]:
        """Do an item of the work."""

    def table_of(self, item: Any) -> str:
        """The table that an item is for."""

    def facts(self) -> dict[str, Any]:
        """What a profile should say of the machine, and of how it was measured."""

    def tables(self, samples: Sequence[Sample]) -> dict[str, list[Row]]:
        """The profile's tables, made of samples."""

    def held_out(self) -> Iterator[Batch]:
        """Measure random batches that are in no table."""


def rig_for(executor: Executor, config: ServingConfig) -> Rig:
    """The rig for an executor's machine."""
    return (CapturedSteps if executor.captures else Groups)(executor, config)


# -- a CPU -------------------------------------------------------------------------------------------------

SHORT_TOKENS, SHORT_REPEATS, LONG_REPEATS = 32, 12, 5  # short passes are quick, and vary more
HELD_OUT_REPEATS = 3


class Groups:
    """Times a pass's groups of operations from inside, on a thread like the one that serves."""

    num_held_out = HELD_OUT

    def __init__(self, executor: Executor, config: ServingConfig) -> None:
        self._executor = executor
        self._config = config
        self.work = shuffled(one for one in grid(config) for _ in range(_repeats(one)))

    def __enter__(self) -> Groups:
        self._caches = self._executor.caches(self._config)
        self._caches[0].data.normal_()  # unwritten memory may hold denormals, which are slow to compute with
        self._thread = ThreadPoolExecutor(
            1, initializer=self._executor.runner([], self._caches, self._config).prepare_thread
        )
        for one in (Pass(((self._config.block_size, 0),), ()), Pass((), (1,))):  # first passes allocate
            self._run(one)
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def state(self, when: str = "before") -> dict[str, Any]:
        """As in `Rig`: nothing that a CPU tells."""
        return {}

    def table_of(self, item: Pass) -> str:
        """As in `Rig`, the others of its tables aside."""
        return "prefill_attention" if item.chunks else "decode_attention"

    def measure(self, item: Pass) -> list[Sample]:
        """Run a pass."""
        groups = self._run(item)
        samples = []
        if item.chunks:
            samples.append(Sample("prefill_attention", item.chunks[0], groups.pop("attention_prefill")))
        if item.decodes:
            key = (len(item.decodes), item.kv_tokens, 1.0)
            samples.append(Sample("decode_attention", key, groups.pop("attention_decode")))
        samples.append(Sample("head", (len(item.chunks) + len(item.decodes),), groups.pop("head")))
        return samples + [Sample("dense", (group, item.tokens), time_us) for group, time_us in groups.items()]

    def _run(self, one: Pass) -> dict[str, float]:
        """Microseconds by group of operations, from the step's delta to its tokens on the host."""
        return self._thread.submit(self._time, one).result()

    def _time(self, one: Pass) -> dict[str, float]:
        runner = self._executor.runner(one.requests(self._executor.model.vocab_size), self._caches, self._config)
        (step,) = one.steps(self._config.block_size)
        groups: defaultdict[str, float] = defaultdict(float)
        last = time.perf_counter_ns()

        def mark(group: str) -> None:
            nonlocal last
            now = time.perf_counter_ns()
            groups[group] += (now - last) / 1000
            last = now

        runner.run(step, mark)
        mark("finish")
        return groups

    def facts(self) -> dict[str, Any]:
        """How often a pass ran."""
        return {"repeats": {f"up to {SHORT_TOKENS} tokens": SHORT_REPEATS, "longer": LONG_REPEATS}}

    def tables(self, samples: Sequence[Sample]) -> dict[str, list[Row]]:
        """As in `Rig`: as they are."""
        return rows_of(samples)

    def held_out(self) -> Iterator[Batch]:
        """Mixed batches, each a few times."""
        for one in mixed_passes(self._config):
            times = [sum(self._run(one).values()) for _ in range(HELD_OUT_REPEATS)]
            yield Batch(one.steps(self._config.block_size), slice(None), fmean(times))


def _repeats(one: Pass) -> int:
    return SHORT_REPEATS if one.tokens <= SHORT_TOKENS else LONG_REPEATS


# -- a GPU -------------------------------------------------------------------------------------------------

ROUNDS = 2  # of every operation and attention, which repeat it themselves
DISTURBED = 1.1  # times the shortest of a point's rounds: one that took longer was kept waiting, by the host or another
STREAMS, RESTS = 10, 3  # passes over all captured sizes; steps that only decode between two that prefill, as in serving
TYPICAL, TYPICAL_UNEVENNESS = 384, 1.7  # mean context of the decodes in a stream, and its unevenness
CONTEXTS_BY_16 = (16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
BURST, WARM = 10, 3  # steps of a held-out batch that run one behind the other, of which the first do not count
CYCLES = 5  # as often runs a held-out batch that prefills
GPU_HELD_OUT = 48


class Point(NamedTuple):
    """Something to measure: a point of a table, all of table `graph` at once, or all that its steps attend to."""

    table: str
    key: tuple[Any, ...] = ()
    one: Pass | None = None


class CapturedSteps:
    """Times whole steps in the graphs that serve, and apart from them the attention that comes on top.

    A captured step costs what its size says, and beyond that what its requests attend to. Steps of all sizes run in
    random order, one behind the other, those that prefill between others that do not: a GPU at its power limit is the
    slower the more it has computed in the last tens of milliseconds, so that a step alone, or many of its kind, would
    not take what it takes in serving. How much slower, a run that is served tells (`calibration`). Operations are
    timed alone as well: steps too large to be captured are made of them, and they say where the time of others
    goes.
    """

    num_held_out = GPU_HELD_OUT

    def __init__(self, executor: Executor, config: ServingConfig) -> None:
        self._executor = executor
        self._config = config
        self._sizes = GraphSizes.within(config.max_seqs, config.max_batched_tokens)
        self._steps = {("decode", rows): self._typical(rows) for rows in self._sizes.decode}
        self._steps |= {("mixed", rows): one for rows in self._sizes.mixed if (one := self._prompts(rows))}
        self._orders = random.Random(0)
        points = [*self._operations(), *self._decodes(), *self._prefills()]
        streams = [Point("graph")] * STREAMS
        self.work = shuffled(streams + [point for point in (Point("attended"), *points) for _ in range(ROUNDS)])

    def _typical(self, sequences: int) -> Pass:
        mean = min(TYPICAL, self._config.num_blocks * self._config.block_size // sequences // 4)
        contexts = uneven(sequences, mean, TYPICAL_UNEVENNESS) if sequences >= 4 else (mean,) * sequences
        return Pass((), tuple(min(context, self._config.max_model_len - 1) for context in contexts))

    def _prompts(self, rows: int) -> Pass | None:
        """As few prompts as fill a captured step; None if a step of so many rows has no room for so many prompts."""
        whole, rest = divmod(rows, self._config.max_model_len)
        chunks = ((self._config.max_model_len, 0),) * whole + ((rest, 0),) * (rest > 0)
        return Pass(chunks, ()) if len(chunks) <= self._sizes.prefills(rows) else None

    def _operations(self) -> Iterator[Point]:
        beyond = [tokens for tokens in (4096, 8192, 16384, 32768, 65536) if tokens <= self._config.max_batched_tokens]
        for tokens in sorted({*self._sizes.decode, *self._sizes.mixed, *beyond}):
            yield Point("dense", (tokens,))
        yield from (Point("head", (samples,)) for samples in self._sizes.decode)

    def _decodes(self) -> Iterator[Point]:
        room, longest = self._config.num_blocks, self._config.max_model_len - 1
        even = [
            Pass((), (context,) * count)
            for count in up_to(self._config.max_seqs)
            for context in sorted({*(each for each in CONTEXTS_BY_16 if each < longest), longest})
            if count * (context // self._config.block_size + 1) <= room
        ]
        yield from (Point("decode_attention", (len(one.decodes), one.kv_tokens, 1.0), one) for one in even)
        for unevenness, one in uneven_grid(self._config):
            yield Point("decode_attention", (len(one.decodes), one.kv_tokens, unevenness), one)

    def _prefills(self) -> Iterator[Point]:
        most = min(self._config.max_batched_tokens, self._config.max_model_len)
        for chunk in sorted({*(each for each in up_to(most) if each in (1, 4) or each >= 16), most}):
            for context in (0, 64, 256, 1024, 4096, 16384, 65536):
                if chunk + context <= self._config.max_model_len:
                    yield Point("prefill_attention", (chunk, context), Pass(((chunk, context),), ()))

    def __enter__(self) -> CapturedSteps:
        self._meter = self._executor.meter(self._config)
        return self

    def __exit__(self, *_: object) -> None:
        del self._meter

    def state(self, when: str = "before") -> dict[str, Any]:
        """As in `Rig`: clocks, power, temperature and driver."""
        return {when: self._meter.state(refuse_busy=when == "before")}

    def table_of(self, item: Point) -> str:
        """As in `Rig`."""
        return item.table

    def measure(self, item: Point) -> list[Sample]:
        """Time a point, or a step of every captured size."""
        if item.one:
            return [Sample(item.table, item.key, self._meter.attention_us(item.one))]
        if item.table == "graph":
            return self._stream()
        if item.table == "attended":
            return [Sample("attended", key, self._meter.attention_us(one)) for key, one in self._steps.items()]
        if item.table == "head":
            return [Sample("head", item.key, self._meter.head_us(*item.key))]
        times = self._meter.operations_us(*item.key)
        return [Sample("dense", (name, *item.key), time_us) for name, time_us in times.items()]

    def _stream(self) -> list[Sample]:
        """Every size that prefills once, and before each of them some that only decode, all in random order."""
        prefills, decodes = ([key for key in self._steps if key[0] == kind] for kind in ("mixed", "decode"))
        decodes *= -(-RESTS * len(prefills) // len(decodes))
        self._orders.shuffle(prefills)
        self._orders.shuffle(decodes)
        keys = [key for turn, key in enumerate(prefills) for key in (*decodes[RESTS * turn :][:RESTS], key)]
        times = self._meter.stream_us([self._steps[key] for key in keys])
        return [Sample("graph", key, time_us) for key, time_us in zip(keys, times, strict=True)]

    def facts(self) -> dict[str, Any]:
        """The captured sizes, the memory, and how often a point was measured."""
        return {
            "graphs": {
                name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self._sizes).items()
            },
            "memory": self._meter.memory(),
            "repeats": f"{STREAMS} streams of captured steps, {ROUNDS} rounds of operations and attention",
            "disturbed": f"rounds that took over {DISTURBED} times the shortest are left out",
        }

    def tables(self, samples: Sequence[Sample]) -> dict[str, list[Row]]:
        """A captured step without the attention of those that were measured."""
        tables = rows_of(_undisturbed(samples))
        attended = {(row["kind"], row["rows"]): row["time_us"] for row in tables.pop("attended")}
        tables["graph"] = [
            row | {"time_us": row["time_us"] - attended[row["kind"], row["rows"]]} for row in tables["graph"]
        ]
        return tables

    def held_out(self) -> Iterator[Batch]:
        """Batches as serving makes them, over and over; those that prefill between steps of their decodes alone."""
        for one in held_out_passes(self._config):
            yield self._burst(one)

    def _burst(self, one: Pass) -> Batch:
        steps, counted = burst_steps(one, self._config.block_size)
        requests = one.requests(self._executor.model.vocab_size, len(steps))
        return Batch(steps, counted, fmean(self._meter.steps_us(requests, steps)[counted]))


def held_out_passes(config: ServingConfig) -> list[Pass]:
    """The batches that a GPU's profile is tested on: the same ones within the same limits."""
    return served_passes(config, GPU_HELD_OUT, CYCLES * (1 + RESTS) + config.block_size)


def burst_steps(one: Pass, block_size: int) -> tuple[list[Step], slice]:
    """The steps that time a pass, and which of them count."""
    cycles, rests, warm = (CYCLES, RESTS, 1) if one.chunks else (BURST, 0, WARM)
    return one.steps(block_size, cycles, rests), slice(warm * (1 + rests), None, 1 + rests)


def _undisturbed(samples: Sequence[Sample]) -> Iterator[Sample]:
    """Of operations and attention the rounds that none held up; of streams all, whose steps vary with those before."""
    shortest: dict[tuple[str, tuple[Any, ...]], float] = {}
    for table, key, time_us in samples:
        shortest[table, key] = min(time_us, shortest.get((table, key), time_us))
    for sample in samples:
        if sample.table == "graph" or sample.time_us <= DISTURBED * shortest[sample.table, sample.key]:
            yield sample
