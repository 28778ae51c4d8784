"""How a machine is measured: on a CPU the parts of a pass, timed from inside; on a GPU whole captured steps.

A rig has work to do, item by item, each item as often as it is to be repeated, in random order. It gives samples, times
of points in tables. Everything runs as it does when serving: on the thread that serves, or in the graphs that serve.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

from engine.config import ServingConfig
from engine.graph_sizes import GraphSizes
from engine.step import Step
from sim.passes import (
    HELD_OUT,
    Pass,
    grid,
    mixed_passes,
    served_passes,
    shuffled,
    uneven_grid,
    up_to,
)
from sim.profile import Curve, Row

if TYPE_CHECKING:
    from engine.executor.executor import Executor

Times = dict[str, dict[tuple[Any, ...], list[float]]]
Batch = tuple[list[Step], float]
"""A held-out batch: the steps that ran, and what each took on average, in microseconds."""


class Sample(NamedTuple):
    """One time of one point of a table, in microseconds."""

    table: str
    key: tuple[Any, ...]
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

    def tables(self, measured: dict[str, list[Row]]) -> dict[str, list[Row]]:
        """The profile's tables, made of those of the samples."""

    def held_out(self) -> Iterator[Batch]:
        """Measure random batches that are in no table."""

    def facts(self) -> dict[str, Any]:
        """What a profile should say of how it was measured."""


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

    def tables(self, measured: dict[str, list[Row]]) -> dict[str, list[Row]]:
        """As in `Rig`: as they are."""
        return measured

    def held_out(self) -> Iterator[Batch]:
        """Mixed batches, each a few times."""
        for one in mixed_passes(self._config):
            times = [sum(self._run(one).values()) for _ in range(HELD_OUT_REPEATS)]
            yield one.steps(self._config.block_size), fmean(times)

    def facts(self) -> dict[str, Any]:
        """How often a pass ran."""
        return {"repeats": {f"up to {SHORT_TOKENS} tokens": SHORT_REPEATS, "longer": LONG_REPEATS}}


def _repeats(one: Pass) -> int:
    return SHORT_REPEATS if one.tokens <= SHORT_TOKENS else LONG_REPEATS


# -- a GPU -------------------------------------------------------------------------------------------------

ROUNDS = 2  # of every measurement
BURST, WARM = 10, 3  # steps that run one behind the other, of which the first do not count
# Serving has steps that only decode between those that prefill. Without them a GPU reaches its power limit and slows
# down more than it ever does when it serves: steps that prefill are measured with some in between.
CYCLES, RESTS = 5, 3
GPU_HELD_OUT = 48


class Point(NamedTuple):
    """Something to measure: a point of a table, or a pass of decodes whose time, less its captured step's, is one."""

    table: str
    key: tuple[Any, ...]
    one: Pass | None = None


class CapturedSteps:
    """Times whole steps in the graphs that serve, two in flight, and what attention adds to them.

    A captured step costs what its size says, and beyond that what its requests attend to. Operations are timed alone as
    well: steps too large to be captured are made of them, and they say where the time of the others goes.
    """

    num_held_out = GPU_HELD_OUT

    def __init__(self, executor: Executor, config: ServingConfig) -> None:
        self._executor = executor
        self._config = config
        self._sizes = GraphSizes.within(config.max_seqs, config.max_batched_tokens)
        points = [*self._steps(), *self._operations(), *self._decodes(), *self._prefills()]
        self.work = shuffled(point for point in points for _ in range(ROUNDS))

    def _steps(self) -> Iterator[Point]:
        for kind in ("decode", "mixed"):
            yield from (Point("graph", (kind, rows)) for rows in getattr(self._sizes, kind))

    def _operations(self) -> Iterator[Point]:
        beyond = [tokens for tokens in (4096, 8192, 16384, 32768, 65536) if tokens <= self._config.max_batched_tokens]
        for tokens in sorted({*self._sizes.decode, *self._sizes.mixed, *beyond}):
            yield Point("dense", (tokens,))
        yield from (Point("head", (samples,)) for samples in self._sizes.decode)

    def _decodes(self) -> Iterator[Point]:
        room = self._config.num_blocks // self._config.max_seqs * self._config.block_size
        longest = self._config.max_model_len - BURST
        even = [
            Pass((), (context,) * count)
            for count in up_to(self._config.max_seqs)
            for context in sorted({*(16, 64, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536), longest})
            if context <= longest
            and (count * (context + BURST + self._config.block_size) <= room * self._config.max_seqs)
        ]
        yield from (_decode_point(one, 1.0) for one in even)
        yield from (_decode_point(one, unevenness) for unevenness, one in uneven_grid(self._config, BURST))

    def _prefills(self) -> Iterator[Point]:
        longest = self._config.max_model_len - BURST
        most = min(self._config.max_batched_tokens, longest)
        for chunk in sorted({*(each for each in up_to(most) if each >= 16), most}):
            for context in (0, 64, 256, 1024, 4096, 16384, 65536):
                if chunk + context <= longest:
                    yield Point("prefill_attention", (chunk, context))

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
        """Time a point once; steps in a burst."""
        if item.one:
            return [Sample(item.table, item.key, self._burst(item.one)[1])]
        if item.table == "graph":
            return [Sample("graph", item.key, self._padding_us(*item.key))]
        if item.table == "head":
            return [Sample("head", item.key, self._meter.head_us(*item.key))]
        if item.table == "prefill_attention":
            return [Sample("prefill_attention", item.key, self._meter.attention_us(*item.key))]
        times = self._meter.operations_us(*item.key)
        return [Sample("dense", (name, *item.key), time_us) for name, time_us in times.items()]

    def _padding_us(self, kind: str, rows: int) -> float:
        cycles, rests = (BURST, 0) if kind == "decode" else (CYCLES, RESTS)
        return fmean(self._meter.padding_us(kind, rows, cycles, rests)[_warm(rests) :])

    def _burst(self, one: Pass) -> Batch:
        steps, counted = burst_steps(one, self._config.block_size)
        requests = one.requests(self._executor.model.vocab_size, len(steps))
        return steps[counted], fmean(self._meter.steps_us(requests, steps)[counted])

    def tables(self, measured: dict[str, list[Row]]) -> dict[str, list[Row]]:
        """Attention of decodes is what a pass takes beyond its step without any."""
        captured = Curve({row["rows"]: row["time_us"] for row in measured["graph"] if row["kind"] == "decode"})
        for row in measured["decode_attention"]:
            row["time_us"] = max(0.0, row["time_us"] - captured(self._sizes.rows(row["sequences"], 0) or 0))
        return measured

    def held_out(self) -> Iterator[Batch]:
        """Batches as serving makes them."""
        for one in held_out_passes(self._config):
            yield self._burst(one)

    def facts(self) -> dict[str, Any]:
        """The captured sizes, the memory, and how often a point was measured."""
        return {
            "graphs": {
                name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self._sizes).items()
            },
            "memory": self._meter.memory(),
            "repeats": f"{ROUNDS} bursts of {BURST - WARM} steps, of {CYCLES - 1} where steps prefill",
        }


def held_out_passes(config: ServingConfig) -> list[Pass]:
    """The batches that a GPU's profile is tested on: the same ones within the same limits."""
    return served_passes(config, GPU_HELD_OUT, CYCLES * (1 + RESTS) + config.block_size)


def burst_steps(one: Pass, block_size: int) -> tuple[list[Step], slice]:
    """The steps that time a pass, and which of them count."""
    cycles, rests = (CYCLES, RESTS) if one.chunks else (BURST, 0)
    return one.steps(block_size, cycles, rests), slice(_warm(rests) * (1 + rests), None, 1 + rests)


def _decode_point(one: Pass, unevenness: float) -> Point:
    middle = (WARM + BURST - 1) / 2  # contexts grow in a burst
    count = len(one.decodes)
    return Point("decode_attention", (count, one.kv_tokens + round(count * middle), unevenness), one)


def _warm(rests: int) -> int:
    return 1 if rests else WARM
