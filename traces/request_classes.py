"""Classes of requests: their clients, priorities and deadlines; and predictions of their lengths.

Seeded, and made when the trace is made: no scheduler draws a random number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np

from traces.errors import TandemError
from traces.trace import Trace

NS_PER_MS = 1e6


@dataclass(frozen=True, slots=True)
class RequestClass:
    """Requests that are alike but for their lengths.

    Attributes:
        client: who sends them.
        share: of all requests, relative to the other classes' shares.
        priority: smaller is more urgent.
        ttft_slo_ms, e2e_slo_ms: time from a request's arrival to when its first and last token are due.
        patience_ms: time from its arrival after which a request is cancelled, unless it has ended.

    Raises:
        TandemError: a value is out of range.
    """

    client: str
    share: float = 1.0
    priority: int = 0
    ttft_slo_ms: float | None = None
    e2e_slo_ms: float | None = None
    patience_ms: float | None = None

    def __post_init__(self) -> None:
        for name in ("share", "ttft_slo_ms", "e2e_slo_ms", "patience_ms"):
            value = getattr(self, name)
            if value is not None and not 1e-6 <= value < 1e12:
                raise TandemError(f"class {self.client!r}: {name} is {value}: give a positive number")


def read_class(text: str) -> RequestClass:
    """A class as written on a command line: `CLIENT`, or `CLIENT:share=3:priority=1:ttft_slo_ms=200`.

    Raises:
        TandemError: an attribute is unknown, or its value is no number.
    """
    client, *attributes = text.split(":")
    known = [each.name for each in fields(RequestClass)][1:]
    values: dict[str, float] = {}
    for attribute in attributes:
        name, _, value = attribute.partition("=")
        if name not in known:
            raise TandemError(f"class {text!r}: no attribute {name!r}: use {', '.join(known)}")
        try:
            values[name] = int(value) if name == "priority" else float(value)
        except ValueError:
            raise TandemError(f"class {text!r}: {name} is {value!r}: give a number") from None
    return RequestClass(client, **values)  # type: ignore[arg-type]


def assign_classes(trace: Trace, classes: Sequence[RequestClass], seed: int = 0) -> Trace:
    """Give every request a class, at random by the classes' shares: a share of 3 beside one of 1 gets three quarters.

    Raises:
        TandemError: a request is cancelled later than fits a trace.
    """
    shares = np.array([each.share for each in classes])
    generator = np.random.Generator(np.random.PCG64(seed))
    chosen = generator.choice(len(classes), len(trace.requests), p=shares / shares.sum()).tolist()
    requests = []
    for request, index in zip(trace.requests, chosen, strict=True):
        of = classes[index]
        ttft_ns, e2e_ns, patience_ns = map(_nanoseconds, (of.ttft_slo_ms, of.e2e_slo_ms, of.patience_ms))
        cancel_ns = None if patience_ns is None else request.arrival_ns + patience_ns
        times: dict[str, Any] = {"ttft_slo_ns": ttft_ns, "e2e_slo_ns": e2e_ns, "cancel_ns": cancel_ns}
        requests.append(replace(request, client=of.client, priority=of.priority, **times))
    meta = {"classes": [asdict(each) for each in classes], "classes_seed": seed}
    return replace(trace, requests=requests, meta=trace.meta | meta)


def predict_lengths(trace: Trace, noise: float, seed: int = 0) -> Trace:
    """Give every request a `predicted_length`: its output's length, times a lognormal error without bias in the median.

    Args:
        trace: the workload.
        noise: standard deviation of the error's logarithm: 0 is an oracle; 0.5 is off by a factor of 1.6 or more in
            a third of the cases.
        seed: of the errors.

    Raises:
        TandemError: `noise` is negative or beyond 10.
    """
    if not 0 <= noise <= 10:
        raise TandemError(f"noise is {noise}: give a number from 0 (an oracle) to 10")
    errors = np.random.Generator(np.random.PCG64(seed)).lognormal(0, noise, len(trace.requests))
    requests = [
        replace(request, predicted_length=max(round(request.output_len * error), 1))
        for request, error in zip(trace.requests, errors.tolist(), strict=True)
    ]
    return replace(trace, requests=requests, meta=trace.meta | {"predictions": {"noise": noise, "seed": seed}})


def _nanoseconds(milliseconds: float | None) -> int | None:
    return None if milliseconds is None else round(milliseconds * NS_PER_MS)
