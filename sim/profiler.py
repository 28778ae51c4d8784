"""Measures a latency profile on the machine at hand, by timing the executor's own forward passes from inside.

Passes of chosen sizes run as they do when serving; the model reports the end of each group of operations, and what a
group took goes into the table that its cost depends on. The only part of `sim` that reaches the executor.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from statistics import fmean, median, quantiles
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.config import ServingConfig
from engine.recorder import Recorder
from engine.step import Chunk, Step
from sim.latency import LatencyModel
from sim.profile import TABLES, Profile, Row
from traces.request import TraceRequest

if TYPE_CHECKING:
    from engine.executor.executor import Executor
    from engine.executor.runner import Runner

SHORT_TOKENS, SHORT_REPEATS, LONG_REPEATS = 32, 12, 5  # short passes are quick, and vary more
HELD_OUT, HELD_OUT_REPEATS = 12, 3
WARM_UP = 2
OUTLIER = 2.0
TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
CONTEXTS = (16, 128, 512, 1024, 2048, 4096)
VOCABULARY_OF_PASSES = 1000  # token ids repeat: what they are costs nothing


class Pass(NamedTuple):
    """One forward pass to measure: prefill chunks as (tokens, context), and decodes as contexts."""

    chunks: tuple[tuple[int, int], ...]
    decodes: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Rows of the pass."""
        return sum(tokens for tokens, _ in self.chunks) + len(self.decodes)

    @property
    def requests(self) -> list[TraceRequest]:
        """Requests that put the data plane in the state where this is its next pass."""
        lengths = [context + tokens for tokens, context in self.chunks] + [context + 1 for context in self.decodes]
        ids = [[position % VOCABULARY_OF_PASSES for position in range(length)] for length in lengths]
        return [TraceRequest(each, 0, length, 1, 1, ids[each]) for each, length in enumerate(lengths)]

    def step(self, block_size: int) -> Step:
        """The step that runs it, on consecutive blocks."""
        step, used = Step(0), 0
        for request in self.requests:
            count = -(-request.prompt_len // block_size)
            step.blocks[request.id] = list(range(used, used + count))
            used += count
        for request_id, (tokens, context) in enumerate(self.chunks):
            step.chunks[request_id] = Chunk(context, tokens, True)
        for request_id, context in enumerate(self.decodes, len(self.chunks)):
            step.joined[request_id] = context
        step.decodes, step.kv_tokens = len(self.decodes), sum(self.decodes)
        return step


def plan(config: ServingConfig) -> list[Pass]:
    """The passes that span every batch that `config` allows: chunks by context, and decodes by context."""
    longest, room = config.max_model_len, config.num_blocks * config.block_size
    most = min(config.max_batched_tokens, longest, room)
    chunks = [tokens for tokens in TOKENS if tokens < most] + [most]
    contexts = [0, *(context for context in CONTEXTS if context < longest), longest - 1]
    # Chunks below 16 tokens are rare, and their attention close to linear.
    prefills = [
        Pass(((tokens, min(context, longest - tokens)),), ())
        for tokens in chunks
        if tokens == 1 or tokens >= 16
        for context in contexts
    ]
    sequences = [count for count in TOKENS if count < config.max_seqs] + [config.max_seqs]
    decodes = [
        Pass((), (min(context, room // count - config.block_size),) * count)
        for count in sequences
        for context in contexts[1:]
    ]
    return sorted({one for one in prefills + decodes if min(one.decodes, default=1) > 0})


def measure_profile(
    executor: Executor, config: ServingConfig, show: Callable[[int], None] = lambda done: None
) -> Profile:
    """Measure a profile of the executor's model for runs within `config`.

    Args:
        show: told how many of `count_passes(config)` passes are done.

    Returns:
        The profile, with the error of its latency model on random mixed batches that were held out.
    """
    with _Meter(executor, config, show) as meter:
        for one in _shuffled([each for each in plan(config) for _ in range(_repeats(each))]):
            meter.measure(one)
        held_out = meter.measure_held_out()
    tables = meter.tables() | {"host": measure_host(executor, config)}
    if config.num_cpu_blocks:
        tables["swap"] = [
            {"direction": direction, "blocks": blocks, "time_us": typical(times), "spread": _spread(times)}
            for direction, blocks, times in executor.measure_swap(config)
        ]
    meta = {
        "device": executor.device,
        "model": asdict(executor.model),
        "dtype": executor.dtype,
        "source": "measured",
        "kernels": executor.kernels,
        "kv_blocks": config.num_blocks,
        "block_size": config.block_size,
        "limits": asdict(config),
        "repeats": {f"up to {SHORT_TOKENS} tokens": SHORT_REPEATS, "longer": LONG_REPEATS},
        "statistic": f"mean, outliers clipped at {OUTLIER:g} x median",
        "date": time.strftime("%Y-%m-%d"),
    }
    profile = Profile(meta, tables)
    return replace(profile, meta=meta | {"held_out": _held_out_error(LatencyModel(profile), held_out)})


def measure_drift(
    executor: Executor, profile: Profile, show: Callable[[int], None] = lambda done: None
) -> dict[str, float]:
    """How far the machine has moved since it was profiled: the held-out batches, measured again.

    Returns:
        `mean_error`, `mape`: of the old times against the new ones, as if those had been a prediction.
    """
    with _Meter(executor, ServingConfig(**profile.meta["limits"]), show) as meter:
        now = [time_us for _, time_us in meter.measure_held_out()]
    return _errors(profile.meta["held_out"]["measured_us"], now)


COUNT_DRIFT = WARM_UP + HELD_OUT * HELD_OUT_REPEATS
"""How many passes `measure_drift` runs."""


def count_passes(config: ServingConfig) -> int:
    """How many passes `measure_profile` runs."""
    return COUNT_DRIFT + sum(_repeats(one) for one in plan(config))


def _repeats(one: Pass) -> int:
    return SHORT_REPEATS if one.tokens <= SHORT_TOKENS else LONG_REPEATS


def _shuffled(passes: list[Pass]) -> list[Pass]:
    """In random order, so that a machine that slows down for a while does not slow one size."""
    random.Random(0).shuffle(passes)
    return passes


class _Meter:
    """Runs passes on a thread like the one that serves, and collects times by table and point, in microseconds."""

    def __init__(self, executor: Executor, config: ServingConfig, show: Callable[[int], None]) -> None:
        self._caches = executor.caches(config)
        self._caches[0].data.normal_()  # unwritten memory may hold denormals, which are slow to compute with
        self._executor = executor
        self._config = config
        self._show = show
        self._done = 0
        self._times: dict[str, dict[tuple[Any, ...], list[float]]] = {table: defaultdict(list) for table in TABLES}

    def __enter__(self) -> _Meter:
        self._thread = ThreadPoolExecutor(1, initializer=self._runner([]).prepare_thread)
        for one in (Pass(((self._config.block_size, 0),), ()), Pass((), (1,))):  # first passes allocate
            self._run(one)
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def _runner(self, requests: Sequence[TraceRequest]) -> Runner:
        return self._executor.runner(requests, self._caches, self._config)

    def measure(self, one: Pass) -> None:
        """Run a pass and file its times."""
        groups = self._run(one)
        if one.chunks:
            self._file("prefill_attention", one.chunks[0], groups.pop("attention_prefill"))
        if one.decodes:
            self._file(
                "decode_attention",
                (len(one.decodes), sum(one.decodes) + len(one.decodes)),
                groups.pop("attention_decode"),
            )
        self._file("head", (len(one.chunks) + len(one.decodes),), groups.pop("head"))
        for group, time_us in groups.items():
            self._file("dense", (group, one.tokens), time_us)

    def _file(self, table: str, key: tuple[Any, ...], time_us: float) -> None:
        self._times[table][key].append(time_us)

    def _run(self, one: Pass) -> dict[str, float]:
        """Microseconds by group of operations, from the step's delta to its tokens on the host."""
        self._done += 1
        self._show(self._done)
        return self._thread.submit(self._time, one).result()

    def _time(self, one: Pass) -> dict[str, float]:
        runner, step = self._runner(one.requests), one.step(self._config.block_size)
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

    def measure_held_out(self) -> list[tuple[Step, float]]:
        """Random mixed batches that are not in the tables, and how long they take in microseconds."""
        return [
            (
                one.step(self._config.block_size),
                typical([sum(self._run(one).values()) for _ in range(HELD_OUT_REPEATS)]),
            )
            for one in _mixed_passes(self._config)
        ]

    def tables(self) -> dict[str, list[Row]]:
        """Medians and spreads."""
        return {
            table: [
                dict(zip(keys, key, strict=True)) | {"time_us": typical(times), "spread": _spread(times)}
                for key, times in sorted(self._times[table].items())
            ]
            for table, keys in TABLES.items()
        }


def _held_out_error(latency: LatencyModel, batches: Sequence[tuple[Step, float]]) -> dict[str, Any]:
    measured = [measured_us for _, measured_us in batches]
    predicted = [latency.device_ns(step) / 1000 for step, _ in batches]
    return {"batches": len(batches), **_errors(predicted, measured), "measured_us": measured}


def _errors(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    errors = [one / other - 1 for one, other in zip(predicted, measured, strict=True)]
    return {"mape": fmean(map(abs, errors)), "mean_error": fmean(errors)}


def _mixed_passes(config: ServingConfig) -> list[Pass]:
    """Random batches of a prefill chunk and decodes, within the limits."""
    generator = random.Random(1)
    longest = min(config.max_model_len, config.num_blocks * config.block_size // (config.max_seqs + 1)) - 1
    passes = []
    for _ in range(HELD_OUT):
        decodes = tuple(generator.randint(1, longest) for _ in range(generator.randint(1, config.max_seqs - 1)))
        tokens = generator.randint(1, min(config.max_batched_tokens - len(decodes), longest))
        passes.append(Pass(((tokens, generator.randint(0, longest - tokens)),), decodes))
    return passes


def measure_host(executor: Executor, config: ServingConfig) -> list[Row]:
    """The host's times around a step, from a short real run through the serving loop."""
    requests = [TraceRequest(each, each * 400_000_000, 8, 8, 8) for each in range(8)]
    recorder = Recorder()
    executor.serve(requests, replace(config, scheduler="fcfs", pipeline_depth=1), recorder)
    tables = {name: table.to_pydict() for name, table in recorder.tables().items()}
    steps, turns, served = tables["steps"], tables["iterations"], tables["requests"]
    ends = [start + work for start, work in zip(steps["device_start_ns"], steps["device_ns"], strict=True)]
    samples = {
        "plan": _differences(steps["planned_ns"], steps["scheduled_ns"]),
        "launch": _differences(steps["launched_ns"], steps["planned_ns"]),
        "notice": _differences(steps["completed_ns"], ends),
        "turn": _differences(turns["now_ns"][1:], turns["completed_ns"][:-1]),
        "wake": _differences(*_woken(served, turns)),
    }
    return [_host_row(term, times) for term, times in samples.items()]


def _host_row(term: str, times: Sequence[float]) -> Row:
    return {"term": term, "time_us": max(0.0, typical(times or [0.0])), "spread": _spread(times)}


def _woken(served: dict[str, list[Any]], turns: dict[str, list[Any]]) -> tuple[list[int], list[int]]:
    """Delivery and arrival of the requests that found the serving loop idle."""
    idle = [step is None and done is None for step, done in zip(turns["step"], turns["completed_step"], strict=True)]
    reads = {now for now, was_idle in zip(turns["now_ns"][1:], idle, strict=False) if was_idle}
    pairs = zip(served["delivered_ns"], served["arrival_ns"], strict=True)
    found = [(delivered, arrival) for delivered, arrival in pairs if delivered in reads]
    return [delivered for delivered, _ in found], [arrival for _, arrival in found]


def _differences(later: Sequence[int | None], earlier: Sequence[int | None]) -> list[float]:
    pairs = zip(later, earlier, strict=True)
    return [(end - start) / 1000 for end, start in pairs if end is not None and start is not None]


def typical(times: Sequence[float]) -> float:
    """The mean of repeats, outliers clipped. Means add up where medians do not: a step is a sum of many groups."""
    ceiling = OUTLIER * median(times)
    return fmean(min(time, ceiling) for time in times)


def _spread(times: Sequence[float]) -> float:
    """Interquartile range over median; 0 for a single time."""
    if len(times) < 2 or not median(times):
        return 0.0
    low, _, high = quantiles(times, n=4)
    return (high - low) / median(times)
