"""The batches that a profiler times, by their shape, and those of them that are held out.

Held-out batches are random, and in no table: by them a profile's error is known. A profiler draws and measures them
once. They stay with the profile: calibration asks how well it predicts them now, a drift check measures the same ones
again.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from statistics import fmean
from typing import Any, NamedTuple, TypeVar

import numpy as np

from engine.config import ServingConfig
from engine.step import Chunk, Step, StepLoad
from sim.latency_model import LatencyModel
from sim.profile.format import Profile, Row
from traces.request import TraceRequest

Item = TypeVar("Item")
BURST, WARM = 10, 3  # steps of a captured batch that run one behind the other, of which the first do not count
# As often runs a captured batch that prefills, with steps between two of them that only decode, as when serving.
CYCLES, RESTS = 5, 3


class BatchShape(NamedTuple):
    """The shape of one step's batch: prefill chunks as (tokens, context), and decodes as contexts."""

    chunks: tuple[tuple[int, int], ...]
    decodes: tuple[int, ...]

    @classmethod
    def decoding(cls, sequences: int, mean: int, imbalance: float = 1.0) -> BatchShape:
        """Decodes alone, with this mean and imbalance of their contexts."""
        return cls((), imbalanced(sequences, mean, imbalance) if imbalance > 1 else (mean,) * sequences)

    @property
    def tokens(self) -> int:
        """Rows of the batch."""
        return sum(tokens for tokens, _ in self.chunks) + len(self.decodes)

    @property
    def kv_tokens(self) -> int:
        """KV tokens that its decodes attend to, their own included."""
        return sum(self.decodes) + len(self.decodes)

    def decodes_fit(self, config: ServingConfig) -> bool:
        """Whether `config` allows its decodes."""
        blocks = sum(context // config.block_size + 1 for context in self.decodes)
        return blocks <= config.num_blocks and max(self.decodes) < config.max_model_len

    @property
    def _lengths(self) -> list[int]:
        return [context + tokens for tokens, context in self.chunks] + [context + 1 for context in self.decodes]

    def requests(self, vocab_size: int, steps: int = 1) -> list[TraceRequest]:
        """Requests that put the data plane in the state where this is its next batch, for so many `steps`.

        Their tokens are random and all different: at its power limit a GPU is faster on rows that are alike.
        """
        lengths = self._lengths
        ids = random.Random(0).choices(range(vocab_size), k=max(lengths) + len(lengths))
        return [
            TraceRequest(each, 0, length, steps, steps, ids[each : each + length])
            for each, length in enumerate(lengths)
        ]

    def steps(self, block_size: int, repeats: int = 1, rests: int = 0) -> list[Step]:
        """Steps that run it over and over, on consecutive blocks: chunks again as they are, decodes a token further.

        Args:
            rests: steps after each that only decode.
        """
        blocks, used, count = dict[int, list[int]](), 0, repeats * (1 + rests)
        for each, length in enumerate(self._lengths):
            owned = -(-(length + count - 1) // block_size)
            blocks[each] = list(range(used, used + owned))
            used += owned
        joined = dict(enumerate(self.decodes, len(self.chunks)))
        steps = [self._step(index, rests) for index in range(count)]
        return [replace(steps[0], blocks=blocks, joined=joined), *steps[1:]]

    def timed_steps(self, block_size: int, captured: bool) -> tuple[list[Step], slice]:
        """The steps that time it on a machine that has rested, and which of them count.

        A captured step runs over and over; others run alone.
        """
        if not captured:
            return self.steps(block_size), slice(None)
        cycles, rests, warm = (CYCLES, RESTS, 1) if self.chunks else (BURST, 0, WARM)
        return self.steps(block_size, cycles, rests), slice(warm * (1 + rests), None, 1 + rests)

    def _step(self, index: int, rests: int) -> Step:
        chunks = {each: Chunk(context, tokens, True) for each, (tokens, context) in enumerate(self.chunks)}
        contexts = [context + index for context in self.decodes]
        load = StepLoad(sum(contexts), sum(each**2 for each in contexts), running=len(contexts) + len(chunks))
        return Step(index, len(contexts), chunks={} if index % (1 + rests) else chunks, load=load)


def imbalanced(sequences: int, mean: int, imbalance: float) -> tuple[int, ...]:
    """Contexts with this mean and imbalance, in random order: quantiles of a gamma distribution."""
    from scipy.optimize import brentq  # takes longer to import than a simulation takes to start
    from scipy.special import gammaincinv

    ranks = (np.arange(sequences) + 0.5) / sequences

    def shares(shape: float) -> np.ndarray[Any, Any]:
        quantiles = gammaincinv(shape, ranks)
        return np.asarray(quantiles / quantiles.mean())

    shape = brentq(lambda shape: (shares(shape) ** 2).mean() - imbalance, 0.05, 50)
    contexts = [max(1, round(mean * share)) for share in shares(shape)]
    random.Random(sequences).shuffle(contexts)
    return tuple(contexts)


class HeldOutBatch(NamedTuple):
    """A batch, and the mean time (us) of those of its steps that count."""

    shape: BatchShape
    time_us: float


def shuffled(items: Iterable[Item]) -> list[Item]:
    """In random order, so that a machine that slows down for a while slows no one size."""
    work = list(items)
    random.Random(0).shuffle(work)
    return work


def mixed_batches(config: ServingConfig, count: int) -> list[BatchShape]:
    """Random batches of a prefill chunk and decodes, within the limits."""
    generator = random.Random(1)
    longest = min(config.max_model_len, config.num_blocks * config.block_size // (config.max_seqs + 1)) - 1
    batches = []
    for _ in range(count):
        decodes = tuple(generator.randint(1, longest) for _ in range(generator.randint(1, config.max_seqs - 1)))
        tokens = generator.randint(1, min(config.max_batched_tokens - len(decodes), longest))
        batches.append(BatchShape(((tokens, generator.randint(0, longest - tokens)),), decodes))
    return batches


def serving_batches(config: ServingConfig, count: int) -> list[BatchShape]:
    """Random batches as when serving: half of them decode alone, the others beside one to three short chunks."""
    generator = random.Random(2)
    room = config.num_blocks * config.block_size // (config.max_seqs + 3)
    longest = min(config.max_model_len, room) - CYCLES * (1 + RESTS) - config.block_size

    def length(mean: float) -> int:
        return min(longest, 1 + round(generator.expovariate(1 / mean)))

    batches = []
    for number in range(count):
        sequences = round(math.exp(generator.uniform(0, math.log(config.max_seqs - 3)))) if config.max_seqs > 4 else 1
        decodes = tuple(length(longest / 5) for _ in range(sequences))
        budget = (config.max_batched_tokens - sequences) // 3
        chunks = [(min(length(longest / 8), budget), 0) for _ in range(generator.randint(1, 3) * (number % 2))]
        batches.append(BatchShape(tuple(chunks), decodes))
    return batches


def held_out_rows(batches: Iterable[HeldOutBatch]) -> list[Row]:
    """The table that keeps them."""
    return [
        {"chunks": list(map(list, shape.chunks)), "decodes": list(shape.decodes), "time_us": time_us, "spread": 0.0}
        for shape, time_us in batches
    ]


def held_out_batches(profile: Profile) -> list[HeldOutBatch]:
    """Those that a profile keeps."""
    return [
        HeldOutBatch(BatchShape(tuple(map(tuple, row["chunks"])), tuple(row["decodes"])), row["time_us"])
        for row in profile.tables.get("held_out", ())
    ]


def with_held_out_error(profile: Profile) -> Profile:
    """With the error on its held-out batches as it predicts them now; as it is where it keeps none."""
    batches = held_out_batches(profile)
    if not batches:
        return profile
    latency, block_size, by_kind = LatencyModel(profile), profile.meta.block_size, defaultdict(list)
    assert block_size, "a profile that was measured says of which blocks"
    for shape, measured_us in batches:
        steps, counted = shape.timed_steps(block_size, captured=profile.meta.graphs is not None)
        latency.rest()
        predicted_us = fmean([latency.device_ns(step) / 1000 for step in steps][counted])
        by_kind[steps[0].kind].append((predicted_us, measured_us))
    kinds = {kind: errors(pairs) for kind, pairs in sorted(by_kind.items())}
    held_out = {"batches": len(batches), **errors(chain(*by_kind.values())), "by_kind": kinds}
    return replace(profile, meta=replace(profile.meta, held_out=held_out))


def errors(pairs: Iterable[tuple[float, float]]) -> dict[str, float]:
    """MAPE and mean error of times that were predicted, each with the one that was measured."""
    found = [predicted / measured - 1 for predicted, measured in pairs]
    return {"mape": fmean(map(abs, found)), "mean_error": fmean(found)}
