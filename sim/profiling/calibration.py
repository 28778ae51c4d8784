"""In-service times of captured steps, learned from runs in service on a machine whose steps were measured.

A step takes `time + slowed x excess`: by how much the power state, which is what the device computed in the last tens
of milliseconds (`sim.power_state`), exceeds a limit. The streams of a profiler cannot tell the two apart, nor what
serving does and they do not; a run in service at all loads can. Attention is taken to be as the profile says.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.config import ServingConfig
from engine.records.recorder import Recorder
from engine.records.run_folder import RunRecords
from sim.power_state import PowerState
from sim.profile.curves import Curve
from sim.profile.format import IN_SERVICE, Profile, Row
from sim.profile.meta import PowerCalibration
from sim.profiling.held_out import with_held_out_error
from sim.profiling.samples import OUTLIER
from sim.replay import replay
from sim.simulate import predict
from traces.arrivals import gamma, with_arrivals
from traces.errors import TandemError
from traces.request import TraceRequest
from traces.synthetic import synthetic
from traces.trace import Trace

# The run in service: shares of what the machine can do, each for as long, one of them too much, which fills the batch;
# how bursty arrivals are, so that steps of all sizes come by at all loads; the most requests, if it can do much.
LOADS, LOAD_S, BURSTINESS, MOST = (0.1, 0.3, 0.5, 0.7, 0.9, 2.0, 0.2, 0.4, 0.6, 0.8), 6.0, 0.3, 10_000
MEAN_PROMPT, MEAN_OUTPUT, SIGMA, LONGEST = 230, 200, 1.1, 1024  # of lengths, much as ShareGPT's
MEMORIES_US = (10e3, 20e3, 30e3, 40e3, 60e3, 80e3, 120e3, 160e3)  # time constants of the power state, to choose from
LIMITS = tuple(twentieth / 20 for twentieth in range(13))  # its values up to which nothing slows down, to choose from
ENOUGH = 6  # steps of a captured size that tell its time to 1 %; the times of others lie between those, to 3 %
# How certain the slope of all sizes together is for one of them, in sums of squares of the power state: a size that ran
# at states that vary by less takes that slope, by more its own.
CERTAINTY = 0.04

Floats = NDArray[np.float64]


# -- the calibration load ------------------------------------------------------------------------------------------


def calibration_load(profile: Profile, config: ServingConfig) -> Trace:
    """Requests to calibrate a machine with: they arrive in bursts, at `LOADS` of what simulation on its measured
    profile says that it can do, for a minute at most.
    """
    capacity = _capacity(_lengths(8 * config.max_seqs, config).requests, config, profile)  # requests a second
    seconds = min(LOAD_S, MOST / (capacity * sum(LOADS)))
    counts = [max(1, round(load * capacity * seconds)) for load in LOADS]
    turns = [gamma(count, capacity, BURSTINESS, seed=turn) for turn, count in enumerate(counts)]
    filled = [(turn + drawn / max(1, drawn[-1])) * 1e9 * seconds for turn, drawn in enumerate(turns)]
    trace = with_arrivals(_lengths(sum(counts), config), np.concatenate(filled).astype(np.int64))
    return replace(trace, meta=trace.meta | {"arrivals": {"process": "calibration", "rate": capacity, "loads": LOADS}})


def _lengths(count: int, config: ServingConfig) -> Trace:
    """Requests at time 0 whose lengths are lognormal, but for the longest."""
    longest = min(LONGEST, config.max_model_len // 2)

    means = (max(1, min(mean, longest / 4)) for mean in (MEAN_PROMPT, MEAN_OUTPUT))
    prompts, outputs = (f"lognormal:{math.log(mean) - SIGMA**2 / 2}:{SIGMA}" for mean in means)
    drawn = synthetic(count, 0, prompts, outputs)

    def cut(request: TraceRequest) -> TraceRequest:
        prompt, output = (min(length, longest) for length in (request.prompt_len, request.output_len))
        return replace(request, prompt_len=prompt, output_len=output, max_tokens=output)

    return replace(drawn, requests=[cut(each) for each in drawn.requests])


def _capacity(requests: Sequence[TraceRequest], config: ServingConfig, profile: Profile) -> float:
    recorder = Recorder()
    predict(requests, config, profile, recorder)
    end_ns: int = recorder.tables()["steps"]["completed_ns"][-1].as_py()
    return 1e9 * len(requests) / end_ns


# -- calibration ---------------------------------------------------------------------------------------------------


def calibrate(profile: Profile, runs: Sequence[tuple[RunRecords, ServingConfig]]) -> Profile:
    """A measured profile with what runs in service tell of it: the table of in-service times, and `meta.power`.

    Args:
        profile: of a device whose steps are captured.
        runs: in service on that device, at loads from little to all that it can do, with their limits and policies.

    Raises:
        TandemError: the profile has no captured steps, or a run too few.
    """
    check_captured(profile)
    bare = without_in_service(profile)
    graph = bare.tables["graph"]
    row_us = min(row["time_us"] / row["rows"] for row in graph if row["kind"] == "mixed")
    power, sizes = _best_fit([_captured_steps(bare, run, config, row_us) for run, config in runs], row_us)
    in_service = [row for kind in sizes for row in _in_service(kind, graph, sizes[kind])]
    return with_held_out_error(Profile(replace(bare.meta, power=power), bare.tables | {IN_SERVICE: in_service}))


def check_captured(profile: Profile) -> None:
    """Raises TandemError if a profile has no captured steps, which are what is calibrated."""
    if "graph" not in profile.tables:
        raise TandemError("only a profile of captured steps can be calibrated, as tandem profile measures on a GPU")


def without_in_service(profile: Profile) -> Profile:
    """As it was before it was calibrated."""
    tables = {name: rows for name, rows in profile.tables.items() if name != IN_SERVICE}
    return replace(profile, meta=replace(profile.meta, power=None), tables=tables)


class _CapturedStep(NamedTuple):
    """A captured step of a run.

    Attributes:
        kind: `mixed` if it prefills, else `decode`.
        rows: of its captured size.
        ratio: what it took but for attention, over what the profile says.
        best_us: what the device would have needed at its best for what the step computes.
        start_us: when it began.
        time_us: how long it took.
    """

    kind: str
    rows: int
    ratio: float
    best_us: float
    start_us: float
    time_us: float


def _captured_steps(profile: Profile, run: RunRecords, config: ServingConfig, row_us: float) -> list[_CapturedStep]:
    sizes = profile.meta.graphs
    assert sizes, "has table graph"
    found = []
    parts_us = replay(run, config, profile).parts_us
    for step, parts in zip(run.tables["steps"].to_pylist(), parts_us, strict=False):  # a replay may end early
        tokens = step["prefill_tokens"] + step["decode_tokens"]
        rows = sizes.rows(tokens, step["chunks"]) if tokens else None
        if rows is not None:
            time_us = step["device_ns"] / 1e3
            alone_us = parts["dense"] + parts["head"] + parts["padding"]
            ratio = (time_us - (sum(parts.values()) - alone_us)) / alone_us
            best_us = row_us * tokens + parts["prefill_attention"]
            kind, start_us = "mixed" if step["chunks"] else "decode", step["device_start_ns"] / 1e3
            found.append(_CapturedStep(kind, rows, ratio, best_us, start_us, time_us))
    if len(found) < ENOUGH:
        raise TandemError(f"the run has {len(found)} captured steps, too few to calibrate a profile on")
    return found


def _power_shares(steps: Sequence[_CapturedStep], memory_us: float) -> list[float]:
    """The power state as each step of a run began."""
    state, end_us, shares = PowerState(memory_us), steps[0].start_us, []
    for step in steps:
        state.rested(max(0.0, step.start_us - end_us))
        shares.append(state.share)
        state.worked(step.time_us, step.best_us)
        end_us = step.start_us + step.time_us
    return shares


class _Size(NamedTuple):
    """Of one captured size, as shares of what the profile says: its time below the limit, what an excess of 1 adds."""

    rows: int
    time: float
    slowed: float
    spread: float


def _best_fit(
    runs: Sequence[Sequence[_CapturedStep]], row_us: float
) -> tuple[PowerCalibration, dict[str, list[_Size]]]:
    """The power state that leaves the least squared residuals, and the captured sizes by kind of step."""
    kinds, rows, ratios, *_ = map(np.array, zip(*(step for run in runs for step in run), strict=True))
    found = []
    for memory_us in MEMORIES_US:
        shares = np.array([share for run in runs for share in _power_shares(run, memory_us)])
        for limit in LIMITS:
            excess = np.maximum(0.0, shares - limit)
            of_kinds = [(kind, kinds == kind) for kind in ("decode", "mixed")]
            fits = {kind: _fit_kind(rows[of], ratios[of], excess[of]) for kind, of in of_kinds}
            squares = sum(squares for _, squares in fits.values())
            found.append((squares, PowerCalibration(memory_us, row_us, limit), fits))
    _, power, fits = min(found, key=lambda fit: fit[0])
    return power, {kind: sizes for kind, (sizes, _) in fits.items()}


def _fit_kind(rows: NDArray[np.int64], ratios: Floats, excess: Floats) -> tuple[list[_Size], float]:
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
            fits.append(_Size(int(size), float(rest.mean()), own, float(rest.std())))
    return fits or [_Size(1, 1.0, 0.0, 0.0)], squares


def _moments(values: Floats, at: Floats) -> tuple[float, float]:
    off = at - at.mean()
    return float(off @ values), float(off @ off)


def _in_service(kind: str, graph: Sequence[Row], sizes: Sequence[_Size]) -> Iterator[Row]:
    """The captured steps of a kind in service; one that came by too rarely, as those next to it."""
    time, slowed, spread = (
        Curve({size.rows: getattr(size, name) for size in sizes}) for name in ("time", "slowed", "spread")
    )
    for rows, time_us in [(row["rows"], row["time_us"]) for row in graph if row["kind"] == kind]:
        at = min(max(rows, sizes[0].rows), sizes[-1].rows)
        times = {"time_us": time_us * time(at), "slowed_us": time_us * slowed(at)}
        yield {"kind": kind, "rows": rows, **times, "spread": spread(at)}
