"""Where the closed-loop error comes from: which kind of step, the host, or queueing; and which kernel.

A request waits for steps. An error of the latency model about the steps that a request of the real run waited for is an
error about the request. The same holds for the host's time between steps. The rest of the error is queueing: other
batches ran, and other requests waited. Near saturation queueing makes large errors of small ones.
It compares records with records. The parts that a latency model takes the real run's steps to be made of are given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from analysis.metrics.columns import NS_PER_MS, Floats, Ints, column, completed_requests, step_kinds, waits_ns
from analysis.metrics.names import JUDGED_LATENCIES
from analysis.metrics.summary import request_metrics
from engine.records.run_folder import RunRecords
from sim.replay import Replay

TERMS = ("decode", "prefill", "mixed", "swap", "host", "queueing")
"""Kinds of steps, the host between steps, and queueing with batching."""
STEPS_MIN = 50  # with fewer steps, and fewer that hold a kernel, a fit says nothing about it
CERTAIN = 3.0  # standard errors
NEGLIGIBLE = 0.0005  # is shown as 0.0 %


def attribute(sim: RunRecords, real: RunRecords, replayed: Replay, ids: Ints) -> dict[str, Any]:
    """Break the errors of mean TTFT, TPOT and E2E down.

    Args:
        sim: the simulated run.
        real: the real run.
        replayed: the real run, replayed on a profile to its end.
        ids: the requests that completed in both runs.

    Returns:
        `latencies`: {latency: {real_ms, error_ms, error, terms: {term: {ms, error}}, largest}}, errors being fractions
        of the real mean and the terms adding up to the error; `kernels`: as `fit_kernels` returns it, or None without
        predicted parts.
    """
    ours, theirs = (request_metrics(run, ids) for run in (sim, real))
    waited = _waited_ms(sim, real, replayed, ids) if len(ids) else {}
    found = {}
    for name in JUDGED_LATENCIES:
        known = ~np.isnan(theirs[name]) & ~np.isnan(ours[name])
        if known.any():
            real_ms, sim_ms = (float(run[name][known].mean()) for run in (theirs, ours))
            found[name] = _split(real_ms, sim_ms - real_ms, waited[name])
    return {"latencies": found, "kernels": fit_kernels(real, replayed.parts_us) if replayed.parts_us else None}


def _split(real_ms: float, error_ms: float, direct_ms: Mapping[str, float]) -> dict[str, Any]:
    terms_ms = {**direct_ms, "queueing": error_ms - sum(direct_ms.values())}
    return {
        "real_ms": real_ms,
        "error_ms": error_ms,
        "error": error_ms / real_ms,
        "terms": {term: {"ms": ms, "error": ms / real_ms} for term, ms in terms_ms.items()},
        "largest": max(terms_ms, key=lambda term: abs(terms_ms[term])),
    }


# -- what requests waited for ----------------------------------------------------------------------------------


def _step_errors_ms(sim: RunRecords, real: RunRecords, replayed: Replay) -> dict[str, Floats]:
    """For each kind of step, and the host: predicted less real time of each step of the real run, (steps,)."""
    steps = real.tables["steps"]
    kinds = step_kinds(steps)
    assert replayed.predicted_ns is not None, "replayed without a profile"
    wrong_ns = replayed.predicted_ns - column(steps, "device_ns")
    device = {kind: np.where(kinds == kind, wrong_ns, 0) / NS_PER_MS for kind in TERMS if (kinds == kind).any()}
    return device | {"host": _difference_by_kind(_gaps_ns, sim, real)}


def _difference_by_kind(times_ns: Callable[[RunRecords], Floats], sim: RunRecords, real: RunRecords) -> Floats:
    """Of something that steps take, the simulated run's mean less the real one's, by the kind of each real step, ms."""
    ours, theirs = (_means(step_kinds(run.tables["steps"]), times_ns(run)) for run in (sim, real))
    differences = {kind: ours.get(kind, mean) - mean for kind, mean in theirs.items()}
    return np.array([differences[kind] for kind in step_kinds(real.tables["steps"])]) / NS_PER_MS


def _means(kinds: NDArray[np.str_], values: Floats) -> dict[str, float]:
    return {str(kind): float(values[kinds == kind].mean()) for kind in np.unique(kinds)}


def _gaps_ns(run: RunRecords) -> Floats:
    """For how long the device was not at work in each step's turn, (steps,)."""
    (begin, end), busy = _turns(run), _busy_ns(run)
    return end - begin - (busy(end) - busy(begin))


def _notices_ns(run: RunRecords) -> Floats:
    """From the device's end of a step until the host has its tokens, (steps,)."""
    return np.asarray(column(run.tables["steps"], "completed_ns") - _turns(run)[1], np.float64)


def _turns(run: RunRecords) -> tuple[Ints, Ints]:
    """Each step's turn: from the end of the step before, or the arrival that ended a wait, to its own end, (steps,)."""
    steps = run.tables["steps"]
    end, scheduled = np.maximum.accumulate(_device_end_ns(run)), column(steps, "scheduled_ns")
    begin = np.concatenate([scheduled[:1], end[:-1]])
    waits, arrivals = waits_ns(run), np.sort(column(run.tables["requests"], "arrival_ns"))
    woken = np.searchsorted(scheduled, waits, "right")  # the step after each wait
    waits, woken = waits[woken < len(end)], woken[woken < len(end)]
    # A loop that no arrival woke (but a cancellation) is taken to begin at its clock read.
    due = np.append(arrivals, np.iinfo(np.int64).max)[np.searchsorted(arrivals, waits, "right")]
    begin[woken] = np.maximum(begin[woken], np.minimum(due, scheduled[woken]))
    return begin, end


def _device_end_ns(run: RunRecords) -> Ints:
    return column(run.tables["steps"], "device_start_ns") + column(run.tables["steps"], "device_ns")


def _cumulative(begin: Ints, end: Ints, growth: Floats | Ints) -> Callable[[Ints], Floats]:
    """By time (ns), a quantity that grows at an even rate within each interval and stands still between them."""
    total = np.cumsum(growth)
    values = np.stack([total - growth, total], axis=1).ravel()
    times = np.stack([begin, end], axis=1).ravel()
    return lambda time_ns: np.asarray(np.interp(time_ns, times, values), np.float64)


def _busy_ns(run: RunRecords) -> Callable[[Ints], Floats]:
    """For how long the device has worked. Copies run beside computation; time in which it does both counts once."""
    start = column(run.tables["steps"], "device_start_ns")
    order = np.argsort(start, kind="stable")
    start, end = start[order], np.maximum.accumulate(_device_end_ns(run)[order])
    start = np.maximum(start, np.concatenate([start[:1], end[:-1]]))
    return _cumulative(start, end, end - start)


def _waited_ms(sim: RunRecords, real: RunRecords, replayed: Replay, ids: Ints) -> dict[str, dict[str, float]]:
    """The mean over requests of the error in the steps they waited for: latency -> cause -> ms (TPOT: ms a token).

    Of the step that was running when a request arrived, the share that it had left counts.
    """
    table, turns = completed_requests(real, ids), _turns(real)
    completed, arrival = column(real.tables["steps"], "completed_ns"), column(table, "arrival_ns")
    first, last = (np.searchsorted(completed, column(table, f"{which}_token_ns")) for which in ("first", "last"))
    gaps, notice_ms = column(table, "output_len") - 1, _difference_by_kind(_notices_ns, sim, real)
    waited: dict[str, dict[str, float]] = {name: {} for name in JUDGED_LATENCIES}
    for cause, wrong_ms in _step_errors_ms(sim, real, replayed).items():
        # A token is there once the host has noticed: of all steps, that counts of the last.
        spent, notices_ms = _cumulative(*turns, wrong_ms), notice_ms if cause == "host" else np.zeros_like(notice_ms)
        ttft, e2el = (spent(turns[1][step]) + notices_ms[step] - spent(arrival) for step in (first, last))
        waited["ttft"][cause], waited["e2el"][cause] = float(ttft.mean()), float(e2el.mean())
        if (gaps > 0).any():
            waited["tpot"][cause] = float(((e2el - ttft)[gaps > 0] / gaps[gaps > 0]).mean())
    return waited


# -- which kernel ----------------------------------------------------------------------------------------------


def fit_kernels(real: RunRecords, parts: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Fit the measured times of the steps that compute as a sum of the predicted parts, each by a factor of its own.

    Args:
        real: the real run.
        parts: for each of its steps, the microseconds that each kernel is predicted to take.

    Returns:
        {steps, kernels: {kernel: {steps, error, uncertainty, ms_per_step, ms_uncertainty, certain}}, largest}:

        - `error`: (predicted - fitted) / fitted, None where the fit leaves nothing
        - `uncertainty`: how far, at most, a standard error of the fit moves `error`; None where that has no end, as of
          kernels that cannot be told apart
        - `ms_per_step`: what the error adds to a mean step; `ms_uncertainty`: the standard error of that
        - `certain`: whether the kernel may be named; `largest` is the one with most ms among these
    """
    computes = (step_kinds(real.tables["steps"]) != "swap") & (column(real.tables["steps"], "device_ns") > 0)
    measured_us = column(real.tables["steps"], "device_ns")[computes] / 1e3
    chosen = [parts[step] for step in np.flatnonzero(computes).tolist()]
    names = [name for name in chosen[0] if any(part[name] for part in chosen)] if len(chosen) >= STEPS_MIN else []
    predicted_us = np.array([[part[name] for name in names] for part in chosen]).reshape(len(chosen), len(names))
    factors, offs = (each.tolist() for each in _least_squares(predicted_us / measured_us[:, None]))
    kernels = dict(zip(names, map(_kernel, predicted_us.T, factors, offs), strict=True))
    certain = [name for name, kernel in kernels.items() if kernel["certain"]]
    largest = max(certain, key=lambda name: abs(kernels[name]["ms_per_step"]), default=None)
    return {"steps": len(chosen), "kernels": kernels, "largest": largest}


def _kernel(predicted_us: Floats, factor: float, off: float) -> dict[str, Any]:
    """A kernel's error from its factor, fitted / predicted, and the factor's standard error."""
    steps, mean_ms, known = int(np.count_nonzero(predicted_us)), float(predicted_us.mean()) / 1e3, np.isfinite(off)
    clear = factor > 0 and abs(factor - 1) > max(NEGLIGIBLE, CERTAIN * off)
    return {
        "steps": steps,
        "error": 1 / factor - 1 if factor > 0 else None,
        "uncertainty": 1 / (factor - off) - 1 / factor if off < factor else None,
        "ms_per_step": mean_ms * (1 - factor),
        "ms_uncertainty": mean_ms * off if known else None,
        "certain": clear and steps >= STEPS_MIN,
    }


def _least_squares(shares: Floats) -> tuple[Floats, Floats]:
    """Non-negative factors by which the columns of `shares` add up to 1 in each row, and their standard errors.

    Rows are relative to measured times, so that a long step weighs no more than a short one, and a hiccup no more than
    one step. Parts that grow alike cannot be told apart: their standard errors are infinite.
    """
    from scipy.optimize import nnls

    if not shares.size:
        return np.zeros(0), np.zeros(0)
    ones = np.ones(len(shares))
    factors, _ = nnls(shares, ones)
    scale = np.linalg.norm(shares, axis=0)
    if np.linalg.matrix_rank(shares / scale) < shares.shape[1]:
        return factors, np.full(len(factors), np.inf)
    variance = float(np.sum((shares @ factors - ones) ** 2)) / max(len(shares) - len(factors), 1)
    inverse = np.linalg.inv((shares / scale).T @ (shares / scale))
    return factors, np.asarray(np.sqrt(variance * np.diag(inverse)) / scale)
