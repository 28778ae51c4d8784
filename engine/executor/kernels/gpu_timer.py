"""Times calls on the GPU, many in one CUDA graph, so that launching them does not count."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch


def timing_event() -> torch.cuda.Event:
    """An event that knows when it happened."""
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def time_us(calls: Sequence[Callable[[], object]], replays: int = 10) -> float:
    """Median time of a call in a CUDA graph of all of them, in µs, once each is compiled."""
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    events = [timing_event() for _ in range(replays + 2)]
    for event in events:
        event.record()
        graph.replay()
    torch.cuda.synchronize()
    times = sorted(begin.elapsed_time(end) for begin, end in pairwise(events[1:]))
    return float(1e3 * times[len(times) // 2] / len(calls))
