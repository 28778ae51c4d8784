"""When requests arrive: seeded arrival processes, in integer nanoseconds from the start of the trace.

The processes are those of vLLM's serving benchmark. The first request too waits its delay, so that nothing arrives at
time 0; and cumulative delays are rescaled so that the last of n arrives at n / rate exactly, which keeps the offered
load the same for every seed. (Conditioned in this way, a short Poisson trace is a little more even than an
unconditioned one.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from traces.errors import TandemError
from traces.trace import Trace

ArrivalsNs = npt.NDArray[np.int64]

_LONGEST_S = 1e9  # about 30 years: far inside 63 bits of nanoseconds


def poisson(n: int, rate: float, seed: int) -> ArrivalsNs:
    """(n,) arrivals, `rate` a second, with independent exponential delays.

    Raises:
        TandemError: `rate` is not a positive number.
    """
    return gamma(n, rate, 1.0, seed)


def gamma(n: int, rate: float, burstiness: float, seed: int) -> ArrivalsNs:
    """(n,) arrivals with gamma-distributed delays of shape `burstiness` and scale 1 / (rate * burstiness).

    Burstiness 1 is Poisson; below 1, arrivals come in bursts; above, they are more even.

    Raises:
        TandemError: `rate` or `burstiness` is not a positive number.
    """
    span_s = _span_s(n, rate)
    if not 0 < burstiness < math.inf:
        raise TandemError(f"burstiness is {burstiness}: it must be a positive number (1 is Poisson)")
    generator = np.random.Generator(np.random.PCG64(seed))
    cumulative = np.cumsum(generator.gamma(burstiness, 1 / (rate * burstiness), n))
    if cumulative[-1] == 0:
        raise TandemError(f"burstiness is {burstiness}: so small that every delay is 0; use all_at_once")
    return _nanoseconds(cumulative / cumulative[-1] * span_s)


def uniform(n: int, rate: float) -> ArrivalsNs:
    """(n,) arrivals, one every 1 / `rate` seconds, the first after one such delay.

    Raises:
        TandemError: `rate` is not a positive number.
    """
    return _nanoseconds(np.linspace(0, _span_s(n, rate), n + 1)[1:])


def all_at_once(n: int) -> ArrivalsNs:
    """(n,) arrivals at time 0: offline batch processing, and the way that capacity is measured."""
    return np.zeros(n, dtype=np.int64)


def with_arrivals(trace: Trace, arrivals_ns: ArrivalsNs) -> Trace:
    """The same requests, in the same order, arriving at `arrivals_ns`: (n,) nanoseconds, ascending.

    A cancellation keeps its distance from the request's arrival.

    Raises:
        ValueError: there are more or fewer arrivals than requests, or they do not ascend.
    """
    pairs = zip(trace.requests, arrivals_ns.tolist(), strict=True)
    moved = [request.moved(arrival_ns - request.arrival_ns) for request, arrival_ns in pairs]
    return replace(trace, requests=moved)


def assign_arrivals(trace: Trace, process: str, *, rate: float = 1.0, seed: int = 0, burstiness: float = 1.0) -> Trace:
    """`with_arrivals` for a process by name; `meta["arrivals"]` records the parameters that the process has.

    Raises:
        TandemError: the process is unknown or its parameters are out of range.
    """
    known: dict[str, tuple[Callable[..., ArrivalsNs], dict[str, Any]]] = {
        "poisson": (poisson, {"rate": rate, "seed": seed}),
        "gamma": (gamma, {"rate": rate, "burstiness": burstiness, "seed": seed}),
        "uniform": (uniform, {"rate": rate}),
        "all_at_once": (all_at_once, {}),
    }
    if process not in known:
        raise TandemError(f"unknown arrival process {process!r}: use {', '.join(known)}")
    arrivals, parameters = known[process]
    timed = with_arrivals(trace, arrivals(len(trace.requests), **parameters))
    return replace(timed, meta={**trace.meta, "arrivals": {"process": process, **parameters}})


def _span_s(n: int, rate: float) -> float:
    if not 0 < rate < math.inf:
        raise TandemError(f"rate is {rate}: it must be a positive number of requests a second")
    if n / rate > _LONGEST_S:
        raise TandemError(f"rate is {rate}: {n} requests would take more than {_LONGEST_S:g} s")
    return n / rate


def _nanoseconds(times_s: npt.NDArray[np.float64]) -> ArrivalsNs:
    return np.rint(times_s * 1e9).astype(np.int64)
