"""Measures a CPU: the groups of operations of a step, timed from inside, on a thread like the one that serves."""

from __future__ import annotations

import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from statistics import fmean
from typing import TYPE_CHECKING

from engine.config import ServingConfig
from sim.profile.meta import ProfileMeta
from sim.profiling.batches import BatchShape, shuffled
from sim.profiling.device_profiler import DeviceProfiler, Point
from sim.profiling.held_out import TimedSteps, mixed_batches
from sim.profiling.samples import Sample
from sim.terms import up_to

if TYPE_CHECKING:
    from engine.executor.executor import Executor

CONTEXTS = (16, 128, 512, 1024, 2048, 4096)
SHORT_TOKENS, SHORT_REPEATS, LONG_REPEATS = 32, 12, 5  # short batches are quick, and vary more
HELD_OUT, HELD_OUT_REPEATS = 12, 3


class CpuProfiler(DeviceProfiler):
    """Runs each batch as a whole, which gives samples of all that it runs."""

    def __init__(self, executor: Executor, config: ServingConfig) -> None:
        super().__init__(executor, config)
        self.work = shuffled(
            Point("prefill_attention" if shape.chunks else "decode_attention", shape)
            for shape in grid(config)
            for _ in range(SHORT_REPEATS if shape.tokens <= SHORT_TOKENS else LONG_REPEATS)
        )
        self.held_out = mixed_batches(config, HELD_OUT)

    def __enter__(self) -> CpuProfiler:
        self._caches = self._executor.caches(self._config)
        self._caches[0].data.normal_()  # unwritten memory may hold denormals, which are slow to compute with
        self._thread = ThreadPoolExecutor(
            1, initializer=self._executor.runner([], self._caches, self._config).prepare_thread
        )
        for first in (BatchShape(((self._config.block_size, 0),), ()), BatchShape((), (1,))):  # which allocate
            self._run(first)
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown()

    def measure(self, point: Point) -> list[Sample]:
        """As in `DeviceProfiler`."""
        shape, samples = BatchShape(*point.key), []
        groups = self._run(shape)
        if shape.chunks:
            samples.append(Sample("prefill_attention", shape.chunks[0], groups.pop("attention_prefill")))
        if shape.decodes:
            key = (len(shape.decodes), shape.kv_tokens, 1.0)
            samples.append(Sample("decode_attention", key, groups.pop("attention_decode")))
        samples.append(Sample("head", (len(shape.chunks) + len(shape.decodes),), groups.pop("head")))
        return samples + [Sample("dense", (group, shape.tokens), time_us) for group, time_us in groups.items()]

    def batch_us(self, shape: BatchShape) -> float:
        """As in `DeviceProfiler`: of a few runs."""
        return fmean(sum(self._run(shape).values()) for _ in range(HELD_OUT_REPEATS))

    def _run(self, shape: BatchShape) -> dict[str, float]:
        """Microseconds by group of operations, from the step's delta to its tokens on the host."""
        return self._thread.submit(self._time, shape).result()

    def _time(self, shape: BatchShape) -> dict[str, float]:
        runner = self._executor.runner(shape.requests(self._executor.model.vocab_size), self._caches, self._config)
        (step,) = TimedSteps.of(shape, self._config.block_size, captured=False).steps
        groups: defaultdict[str, float] = defaultdict(float)
        last = time.perf_counter_ns()

        def ended(group: str) -> None:
            nonlocal last
            now = time.perf_counter_ns()
            groups[group] += (now - last) / 1000
            last = now

        runner.run(step, ended)
        ended("finish")
        return groups

    def describe(self, meta: ProfileMeta) -> ProfileMeta:
        """As in `DeviceProfiler`: how often a batch ran."""
        repeats = {f"up to {SHORT_TOKENS} tokens": SHORT_REPEATS, "longer": LONG_REPEATS}
        return replace(meta, notes=meta.notes | {"repeats": repeats})


def grid(config: ServingConfig) -> list[BatchShape]:
    """Batches that span all that `config` allows: chunks by context, and decodes by context."""
    longest, room = config.max_model_len, config.num_blocks * config.block_size
    contexts = [0, *(context for context in CONTEXTS if context < longest), longest - 1]
    # Chunks below 16 tokens are rare, and their attention close to linear.
    prefills = [
        BatchShape(((tokens, min(context, longest - tokens)),), ())
        for tokens, context in product(up_to(min(config.max_batched_tokens, longest, room)), contexts)
        if tokens == 1 or tokens >= 16
    ]
    decodes = [
        BatchShape.decoding(count, min(context, room // count - config.block_size))
        for count, context in product(up_to(config.max_seqs), contexts[1:])
    ]
    return sorted({shape for shape in prefills + decodes if min(shape.decodes, default=1) > 0})
