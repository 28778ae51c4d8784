"""Held-out batches: random batches that are in no table, by which a profile's error is known.

A profiler draws and measures them once. They stay with the profile: calibration asks how well it predicts them now, a
drift check measures the same ones again.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any, NamedTuple

from engine.config import ServingConfig
from engine.step import Step
from sim.latency_model import LatencyModel
from sim.profile.format import Profile, Row
from sim.profiling.batches import BatchShape

BURST, WARM = 10, 3  # steps of a captured batch that run one behind the other, of which the first do not count
# As often runs a captured batch that prefills, with steps between two of them that only decode, as when serving.
CYCLES, RESTS = 5, 3


class HeldOutBatch(NamedTuple):
    """A batch, and the mean time (us) of those of its steps that count."""

    shape: BatchShape
    time_us: float


class TimedSteps(NamedTuple):
    """The steps that time a batch on a machine that has rested, and which of them count."""

    steps: list[Step]
    counted: slice

    @classmethod
    def of(cls, shape: BatchShape, block_size: int, captured: bool) -> TimedSteps:
        """A captured step runs over and over; others run alone."""
        if not captured:
            return cls(shape.steps(block_size), slice(None))
        cycles, rests, warm = (CYCLES, RESTS, 1) if shape.chunks else (BURST, 0, WARM)
        return cls(shape.steps(block_size, cycles, rests), slice(warm * (1 + rests), None, 1 + rests))


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
    return replace(profile, meta=replace(profile.meta, held_out=_error(profile, batches))) if batches else profile


def _error(profile: Profile, batches: Sequence[HeldOutBatch]) -> dict[str, Any]:
    """MAPE and mean error, of all batches and by kind of step."""
    latency, block_size = LatencyModel(profile), profile.meta.block_size
    assert block_size, "a profile that was measured says of which blocks"
    predicted, by_kind = [], defaultdict(list)
    for place, batch in enumerate(batches):
        steps, counted = TimedSteps.of(batch.shape, block_size, captured=profile.meta.graphs is not None)
        latency.rest()
        predicted.append(fmean([latency.device_ns(step) / 1000 for step in steps][counted]))
        by_kind[steps[0].kind].append(place)
    measured = [batch.time_us for batch in batches]
    kinds = {
        kind: errors([predicted[place] for place in places], [measured[place] for place in places])
        for kind, places in sorted(by_kind.items())
    }
    return {"batches": len(batches), **errors(predicted, measured), "by_kind": kinds}


def errors(predicted: Sequence[float], measured: Sequence[float]) -> dict[str, float]:
    """MAPE and mean error."""
    found = [one / other - 1 for one, other in zip(predicted, measured, strict=True)]
    return {"mape": fmean(map(abs, found)), "mean_error": fmean(found)}
