"""What captured steps take while serving, learned from a run that is served on a machine whose steps were measured.

A step takes `time + slowed x excess`: by how much the load, which is what the device computed in the last tens of
milliseconds (`sim.power_state`), exceeds a limit. The profiler's streams tell the two no more apart than they tell what
serving does and they do not; a run that was served at all loads does. Attention is taken to be as the profile says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.config import ServingConfig
from engine.model.graph_sizes import GraphSizes
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords
from sim.latency_model import LatencyModel
from sim.power_state import Load
from sim.profile.format import Curve, Profile, Row
from sim.profiling.device_profiler import Batch, burst_steps, held_out_passes
from sim.profiling.profiler import held_out_error
from sim.profiling.samples import OUTLIER
from sim.simulate import predict, replay_parts
from traces.arrivals import gamma, with_arrivals
from traces.errors import TandemError
from traces.request import TraceRequest
from traces.synthetic import synthetic
from traces.trace import Trace

# The served run: shares of what the machine can do, each for as long, one of them too much, which fills the batch;
# how bursty arrivals are, so that steps of all sizes come by at all loads; the most requests, if it can do much.
LEVELS, LEVEL_S, BURSTINESS, MOST = (0.1, 0.3, 0.5, 0.7, 0.9, 2.0, 0.2, 0.4, 0.6, 0.8), 6.0, 0.3, 10_000
MEAN_PROMPT, MEAN_OUTPUT, SIGMA, LONGEST = 230, 200, 1.1, 1024  # of lengths, much as ShareGPT's
MEMORIES_US = (10e3, 20e3, 30e3, 40e3, 60e3, 80e3, 120e3, 160e3)  # time constants of the load, to choose from
LIMITS = tuple(twentieth / 20 for twentieth in range(13))  # loads up to which nothing slows down, to choose from
ENOUGH = 6  # steps of a captured size that tell its time to 1 %; what others take is read off between those, to 3 %
# How certain the slope of all sizes together is for one of them, in sums of squares of the load: a size that ran at
# loads that vary by less takes that slope, by more its own.
CERTAINTY = 0.04

Floats = NDArray[np.float64]


def levels(profile: Profile, config: ServingConfig) -> Trace:
    """Requests to calibrate a machine with: they arrive in bursts, at `LEVELS` of what simulation on its measured
    profile says that it can do, for a minute at most.
    """
    capacity = _capacity(_lengths(8 * config.max_seqs, config).requests, config, profile)  # requests a second
    seconds = min(LEVEL_S, MOST / (capacity * sum(LEVELS)))
    counts = [max(1, round(level * capacity * seconds)) for level in LEVELS]
    turns = [gamma(count, capacity, BURSTINESS, seed=turn) for turn, count in enumerate(counts)]
    filled = [(turn + drawn / max(1, drawn[-1])) * 1e9 * seconds for turn, drawn in enumerate(turns)]
    trace = with_arrivals(_lengths(sum(counts), config), np.concatenate(filled).astype(np.int64))
    return replace(trace, meta=trace.meta | {"arrivals": {"process": "levels", "rate": capacity, "levels": LEVELS}})


def _lengths(count: int, config: ServingConfig) -> Trace:
    """Requests at time 0 whose lengths are lognormal, but for the longest."""
    longest = min(LONGEST, config.max_model_len // 2)

    def drawn(mean: int) -> str:
        return f"lognormal:{math.log(max(1, min(mean, longest / 4))) - SIGMA**2 / 2}:{SIGMA}"

    def cut(request: TraceRequest) -> TraceRequest:
        prompt, output = (min(length, longest) for length in (request.prompt_len, request.output_len))
        return replace(request, prompt_len=prompt, output_len=output, max_tokens=output)

    drawn_lengths = synthetic(count, 0, drawn(MEAN_PROMPT), drawn(MEAN_OUTPUT))
    return replace(drawn_lengths, requests=[cut(each) for each in drawn_lengths.requests])


def _capacity(requests: Sequence[TraceRequest], config: ServingConfig, profile: Profile) -> float:
    recorder = Recorder()
    predict(requests, config, profile, recorder)
    end_ns: int = recorder.tables()["steps"]["completed_ns"][-1].as_py()
    return 1e9 * len(requests) / end_ns


class Served(NamedTuple):
    """The captured steps of one run, an entry of every array each.

    Attributes:
        prefills: whether it prefills.
        rows: of its captured size.
        ratio: what it took but for attention, over what the profile says.
        best_us: what the device would have needed at its best for what the step computes.
        start_us: when it began.
        time_us: how long it took.
    """

    prefills: NDArray[np.bool_]
    rows: NDArray[np.int64]
    ratio: Floats
    best_us: Floats
    start_us: Floats
    time_us: Floats

    def loads(self, memory_us: float) -> Floats:
        """The load as each step began, (steps,)."""
        load, end_us, shares = Load(memory_us), self.start_us[0], []
        for start_us, time_us, best_us in zip(self.start_us, self.time_us, self.best_us, strict=True):
            load.rested(max(0.0, start_us - end_us))
            shares.append(load.share)
            load.worked(time_us, best_us)
            end_us = start_us + time_us
        return np.array(shares)


class Fit(NamedTuple):
    """Of one captured size, as shares of what the profile says: the time below the limit, what an excess of 1 adds."""

    rows: int
    time: float
    slowed: float
    spread: float


def calibrate(profile: Profile, runs: Sequence[tuple[RunRecords, ServingConfig]]) -> Profile:
    """A measured profile with what served runs tell of it: table `served`, and the load's memory in its `meta`.

    Args:
        profile: of a device whose steps are captured.
        runs: served on that device, at loads from little to all that it can do, with their limits and policies.

    Raises:
        TandemError: the profile has no captured steps, or a run too few.
    """
    check_captured(profile)
    bare = without_served(profile)
    row_us = min(row["time_us"] / row["rows"] for row in bare.tables["graph"] if row["kind"] == "mixed")
    served = [_served(bare, run, config, row_us) for run, config in runs]
    loads = {memory_us: np.concatenate([run.loads(memory_us) for run in served]) for memory_us in MEMORIES_US}
    fits = {
        (memory_us, limit): _fit(served, np.maximum(0.0, loads[memory_us] - limit))
        for memory_us, limit in product(MEMORIES_US, LIMITS)
    }
    memory_us, limit = min(fits, key=lambda chosen: fits[chosen][1])
    by_kind, _ = fits[memory_us, limit]
    table = [row for kind, of_kind in by_kind.items() for row in _rows(bare.tables["graph"], kind, of_kind)]
    meta = bare.meta | {"load": {"memory_us": memory_us, "row_us": row_us, "limit": limit}}
    return _with_held_out(Profile(meta, bare.tables | {"served": table}))


def check_captured(profile: Profile) -> None:
    """Raises TandemError if a profile has no captured steps, which are what is calibrated."""
    if "graph" not in profile.tables:
        raise TandemError("only a profile of captured steps can be calibrated, as tandem profile measures on a GPU")


def _with_held_out(profile: Profile) -> Profile:
    """With the error on the batches that were held out as the profile predicts them now."""
    measured_us = profile.meta.get("held_out", {}).get("measured_us")
    if measured_us is None:
        return profile
    limits = ServingConfig(**profile.meta["limits"])
    bursts = [burst_steps(one, limits.block_size) for one in held_out_passes(limits)]
    batches = [Batch(*burst, time_us) for burst, time_us in zip(bursts, measured_us, strict=True)]
    return replace(profile, meta=profile.meta | {"held_out": held_out_error(LatencyModel(profile), batches)})


def without_served(profile: Profile) -> Profile:
    """As it was before it was calibrated."""
    meta = {name: value for name, value in profile.meta.items() if name != "load"}
    return replace(profile, meta=meta, tables={name: rows for name, rows in profile.tables.items() if name != "served"})


def _served(profile: Profile, run: RunRecords, config: ServingConfig, row_us: float) -> Served:
    sizes, steps = GraphSizes(**profile.meta["graphs"]), run.tables["steps"].to_pylist()
    taken = []
    for step, parts in zip(steps, replay_parts(run, config, profile), strict=False):  # a replay may end early
        tokens = step["prefill_tokens"] + step["decode_tokens"]
        rows = sizes.rows(tokens, step["chunks"]) if tokens else None
        if rows is not None:
            time_us = step["device_ns"] / 1e3
            pass_us = parts["dense"] + parts["head"] + parts["padding"]
            attention_us = sum(parts.values()) - pass_us
            best_us = row_us * tokens + parts["prefill_attention"]
            ratio = (time_us - attention_us) / pass_us
            taken.append((bool(step["chunks"]), rows, ratio, best_us, step["device_start_ns"] / 1e3, time_us))
    if len(taken) < ENOUGH:
        raise TandemError(f"the run has {len(taken)} captured steps, too few to calibrate a profile on")
    return Served(*map(np.array, zip(*taken, strict=True)))


def _fit(served: Sequence[Served], excess: Floats) -> tuple[dict[str, list[Fit]], float]:
    """The fits by kind of step, and the sum of their squared residuals."""
    prefills, rows, ratios = (np.concatenate([run[place] for run in served]) for place in range(3))
    fits, squares = {}, 0.0
    for kind, chosen in (("decode", ~prefills), ("mixed", prefills)):
        fits[kind], of_kind = _fit_kind(rows[chosen], ratios[chosen], excess[chosen])
        squares += of_kind
    return fits, squares


def _fit_kind(rows: NDArray[np.int64], ratios: Floats, excess: Floats) -> tuple[list[Fit], float]:
    sizes = [(size, ratios[rows == size], excess[rows == size]) for size in np.unique(rows)]
    sizes = [(size, np.minimum(of_size, OUTLIER * np.median(of_size)), at) for size, of_size, at in sizes]
    moments = [_moments(of_size, at) for _, of_size, at in sizes]
    slope = max(0.0, sum(xy for xy, _ in moments) / (sum(xx for _, xx in moments) or 1.0))
    fits, squares = [], 0.0
    for (size, of_size, at), (xy, xx) in zip(sizes, moments, strict=True):
        own = max(0.0, (xy + CERTAINTY * slope) / (xx + CERTAINTY))
        rest = of_size - own * at
        squares += float(((rest - rest.mean()) ** 2).sum())
        if len(of_size) >= ENOUGH:
            fits.append(Fit(int(size), float(rest.mean()), own, float(rest.std())))
    return fits, squares


def _moments(values: Floats, at: Floats) -> tuple[float, float]:
    off = at - at.mean()
    return float(off @ values), float(off @ off)


def _rows(graph: Sequence[Mapping[str, Any]], kind: str, fits: Sequence[Fit]) -> Iterator[Row]:
    """The captured steps of a kind, those too rarely served as those next to them."""
    if not fits:
        fits = [Fit(1, 1.0, 0.0, 0.0)]
    time, slowed, spread = (Curve({fit.rows: fit[place] for fit in fits}) for place in (1, 2, 3))
    for row in graph:
        if row["kind"] == kind:
            at = min(max(row["rows"], fits[0].rows), fits[-1].rows)
            yield {
                "kind": kind,
                "rows": row["rows"],
                "time_us": row["time_us"] * time(at),
                "slowed_us": row["time_us"] * slowed(at),
                "spread": spread(at),
            }
