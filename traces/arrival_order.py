"""Requests in order of arrival, in little memory: those that come late are set aside, and merged at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain, pairwise
from operator import attrgetter

import numpy as np

from traces.request import CompactRequests, TraceRequest
from traces.spill import IN_MEMORY, Rows


class ArrivalSorter:
    """Takes requests as they come.

    Attributes:
        late: those that came after one that arrives later, in the order in which they came.
        origin_ns: what time counts from.
    """

    def __init__(self) -> None:
        self.late = CompactRequests()
        self.origin_ns = 0
        self._in_order, self._latest_ns = CompactRequests(), 0

    @property
    def next_id(self) -> int:
        """The id that the next request has, if it comes in order."""
        return len(self._in_order)

    def __len__(self) -> int:
        return len(self._in_order) + len(self.late)

    def add(self, request: TraceRequest) -> None:
        """Add a request, whose id is `next_id`."""
        if request.arrival_ns >= self._latest_ns:
            self._latest_ns = request.arrival_ns
            self._in_order.append(request)
        else:
            self.late.append(replace(request, id=len(self.late)))

    def extend(self, rows: Rows) -> None:
        """Add requests of which nothing else is known, (n, 4), as `CompactRequests` takes them."""
        latest = np.maximum.accumulate(np.concatenate(([self._latest_ns], rows[:, 0])))
        late = rows[:, 0] < latest[:-1]
        self._latest_ns = int(latest[-1])
        self._in_order.extend(rows[~late])
        self.late.extend(rows[late])

    @property
    def first_ns(self) -> int:
        """The earliest arrival; 0 if there is no request."""
        firsts = [int(block[:, 0].min()) for part in (self._in_order, self.late) for block in part.blocks()]
        return min(firsts, default=0)

    def in_order(self) -> Sequence[TraceRequest]:
        """All requests; those of equal arrival in the order in which they came."""
        # None of equal arrival was added in order after one was set aside: by then, a later one had come.
        if self.late and not (self.late.plain and self._in_order.plain):
            ordered = sorted(chain(self._in_order, self.late), key=attrgetter("arrival_ns"))
            return [each.moved(-self.origin_ns, position) for position, each in enumerate(ordered)]
        for run in self.late.blocks(IN_MEMORY):
            self._in_order = _merged(self._in_order, run[np.argsort(run[:, 0], kind="stable")])
        return self._in_order.moved(-self.origin_ns) if self.origin_ns else self._in_order


def _merged(requests: CompactRequests, late: Rows) -> CompactRequests:
    """Both in order of arrival; of equal arrivals the late come last."""
    merged = CompactRequests()
    for block in requests.blocks():
        due = np.searchsorted(late[:, 0], block[-1, 0])
        both, late = np.concatenate((block, late[:due])), late[due:]
        merged.extend(both[np.argsort(both[:, 0], kind="stable")])
    merged.extend(late)
    return merged


def ascending(requests: Sequence[TraceRequest]) -> bool:
    """Whether arrivals never fall."""
    if not isinstance(requests, CompactRequests):
        return all(one.arrival_ns <= other.arrival_ns for one, other in pairwise(requests))
    latest_ns = 0
    for block in requests.blocks():
        if block[0, 0] < latest_ns or (np.diff(block[:, 0]) < 0).any():
            return False
        latest_ns = block[-1, 0]
    return True
