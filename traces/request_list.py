"""Requests by the million: one that has an arrival and lengths alone takes 32 bytes, and is made when asked for."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, fields
from typing import overload

from traces.request import TraceRequest

_UNSAID = {field.name: field.default for field in fields(TraceRequest) if field.default is not MISSING}


class CompactRequests(Sequence[TraceRequest]):
    """Requests with ids 0, 1, 2, ... in order, which can be added to and not changed."""

    def __init__(self) -> None:
        # (arrival_ns, prompt_len, output_len, max_tokens) of all; whole, those of which there is more to say
        self._numbers = array("q")
        self._whole: dict[int, TraceRequest] = {}

    def append(self, request: TraceRequest) -> None:
        """Add a request. Raises ValueError if its id is not the next."""
        if request.id != len(self):
            raise ValueError(f"request {request.id} does not follow {len(self) - 1}")
        self._numbers.extend((request.arrival_ns, request.prompt_len, request.output_len, request.max_tokens))
        if any(getattr(request, name) != value for name, value in _UNSAID.items()):
            self._whole[request.id] = request

    @property
    def arrivals_ns(self) -> array[int]:
        """The arrivals of all."""
        return self._numbers[::4]

    def __len__(self) -> int:
        return len(self._numbers) // 4

    def __iter__(self) -> Iterator[TraceRequest]:
        numbers = iter(self._numbers)
        for position, four in enumerate(zip(numbers, numbers, numbers, numbers, strict=True)):
            yield self._whole.get(position) or TraceRequest(position, *four)

    @overload
    def __getitem__(self, index: int) -> TraceRequest: ...
    @overload
    def __getitem__(self, index: slice) -> list[TraceRequest]: ...
    def __getitem__(self, index: int | slice) -> TraceRequest | list[TraceRequest]:
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self[place] for place in places]
        arrival_ns, prompt_len, output_len, max_tokens = self._numbers[4 * places : 4 * places + 4]
        return self._whole.get(places) or TraceRequest(places, arrival_ns, prompt_len, output_len, max_tokens)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]
