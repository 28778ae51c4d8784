"""The request as a workload knows it: its arrival, its length, and its end; and requests by the million.

A trace knows the future (`output_len`); a scheduler does not. Only a backend may read `output_len`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple, overload

import numpy as np

from traces.errors import TandemError
from traces.spill import BLOCK, Rows, SpilledRows

_INT64_MAX = 2**63 - 1  # every number of a request fits Parquet's int64 and the digest's
_LEAST = {"id": 0, "arrival_ns": 0, "prompt_len": 1, "output_len": 1, "max_tokens": 1, "priority": -_INT64_MAX}


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request of a trace.

    Attributes:
        id: position in arrival order, from 0; the request's name everywhere.
        arrival_ns: arrival, in integer nanoseconds since the start of the trace.
        prompt_len: prompt tokens, at least 1.
        output_len: output tokens at which the request really stops, 1 to `max_tokens`.
        max_tokens: the limit the client asked for, which a scheduler may know.
        prompt_token_ids: the prompt, `prompt_len` ids, or None when the trace carries none.
        hash_ids: stand for the prompt's first tokens, where the trace has no token ids. Requests whose first n ids are
            equal have their first n * `hash_block_size` tokens in common (as far as either prompt goes). Tokens beyond
            the last id are the request's own. As in Mooncake's traces.
        hash_block_size: tokens that one of `hash_ids` stands for.
        output_ids: the output as far as it is known, in the terms of the prompt: token ids; or after hash ids,
            ids of the blocks that follow the last that the prompt fills.
        predicted_length: somebody's estimate of `output_len`, shown to schedulers.
        priority: smaller is more urgent.
        client: who sent it, for fair sharing.
        cancel_ns: when the client gives up (same clock as `arrival_ns`), or None.
        ttft_slo_ns: time from its arrival to when its first token is due, or None.
        e2e_slo_ns: time from its arrival to when its last token is due, or None.

    Raises:
        TandemError: a value is of the wrong type, out of its range, or contradicts another.
    """

    id: int
    arrival_ns: int
    prompt_len: int
    output_len: int
    max_tokens: int
    prompt_token_ids: Sequence[int] | None = None
    hash_ids: Sequence[int] | None = None
    hash_block_size: int = 512
    output_ids: Sequence[int] | None = None
    predicted_length: int | None = None
    priority: int = 0
    client: str | None = None
    cancel_ns: int | None = None
    ttft_slo_ns: int | None = None
    e2e_slo_ns: int | None = None

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            _check_integer(name, getattr(self, name), least)
        for name in ("predicted_length", "cancel_ns", "ttft_slo_ns", "e2e_slo_ns"):
            if (value := getattr(self, name)) is not None:
                _check_integer(name, value, self.arrival_ns if name == "cancel_ns" else 1)
        if not isinstance(self.client, str | None):
            raise TandemError(f"client is {self.client!r:.60}: it must be a string")
        if self.client is not None and not _is_text(self.client):
            raise TandemError(f"client is {self.client!r:.60}: it has half of a character (a lone surrogate)")
        if self.output_len > self.max_tokens:
            raise TandemError(f"output_len is {self.output_len}, more than max_tokens, {self.max_tokens}")
        if self.prompt_token_ids is not None and len(self.prompt_token_ids) != self.prompt_len:
            raise TandemError(f"prompt_len is {self.prompt_len}, but there are {len(self.prompt_token_ids)} token ids")
        if self.output_ids is not None and self.prompt_token_ids is None and self.hash_ids is None:
            raise TandemError(
                "there are output_ids, but neither prompt_token_ids nor hash_ids: what they follow is unknown"
            )
        self._check_hash_ids()

    def moved(self, by_ns: int, request_id: int | None = None) -> TraceRequest:
        """The request as it comes later by so much, or earlier. A cancellation keeps its distance from the arrival.

        Args:
            request_id: what the moved one is called; None: the same.
        """
        name = self.id if request_id is None else request_id
        cancel_ns = None if self.cancel_ns is None else self.cancel_ns + by_ns
        return replace(self, id=name, arrival_ns=self.arrival_ns + by_ns, cancel_ns=cancel_ns)

    def _check_hash_ids(self) -> None:
        _check_integer("hash_block_size", self.hash_block_size, 1)
        if self.hash_ids is None:
            return
        if self.prompt_token_ids is not None:
            raise TandemError("there are both prompt_token_ids and hash_ids: give one of the two")
        most = -(-self.prompt_len // self.hash_block_size)
        if len(self.hash_ids) > most:
            raise TandemError(
                f"there are {len(self.hash_ids)} hash_ids, but a prompt of {self.prompt_len} tokens has {most} blocks "
                f"of {self.hash_block_size}: is hash_block_size right?"
            )


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _check_integer(name: str, value: Any, low: int) -> None:
    # `type`, not `isinstance`: a bool is an int to Python, and no length.
    if type(value) is not int or not low <= value <= _INT64_MAX:
        raise TandemError(f"{name} is {value!r:.60}: it must be an integer of at least {low}")


_SAYABLE = {field.name: field.default for field in fields(TraceRequest) if field.default is not MISSING}
_said, _UNSAID = attrgetter(*_SAYABLE), tuple(_SAYABLE.values())


class CompactRequests(Sequence[TraceRequest]):
    """Requests with ids 0, 1, 2, ... in order, which can be added to and not changed.

    They may be millions: one that has an arrival and lengths alone takes 32 bytes, and is made when asked for. Of many
    these bytes are in a temporary file.
    """

    def __init__(self) -> None:
        # (arrival_ns, prompt_len, output_len, max_tokens) of all; whole, those of which there is more to say
        self._numbers = SpilledRows(4)
        self._whole: dict[int, TraceRequest] = {}

    def append(self, request: TraceRequest) -> None:
        """Add a request. Raises ValueError if its id is not the next."""
        if request.id != len(self):
            raise ValueError(f"request {request.id} does not follow {len(self) - 1}")
        self._numbers.append((request.arrival_ns, request.prompt_len, request.output_len, request.max_tokens))
        if _said(request) != _UNSAID:
            self._whole[request.id] = request

    def extend(self, rows: Rows) -> None:
        """Add requests of which nothing else is known.

        Args:
            rows: (n, 4) arrival_ns, prompt_len, output_len, max_tokens, each as `TraceRequest` allows it.
        """
        self._numbers.extend(rows)

    def moved(self, by_ns: int) -> CompactRequests:
        """The same requests as they come later by so much, or earlier."""
        moved = CompactRequests()
        for block in self.blocks():
            moved.extend(block + np.array([by_ns, 0, 0, 0]))
        moved._whole = {place: request.moved(by_ns) for place, request in self._whole.items()}
        return moved

    @property
    def plain(self) -> bool:
        """Whether no request has more than an arrival and lengths."""
        return not self._whole

    def blocks(self, size: int = BLOCK) -> Iterator[Rows]:
        """(n, 4) arrival_ns, prompt_len, output_len, max_tokens of all, at most `size` at a time."""
        return self._numbers.blocks(size)

    @property
    def arrivals_ns(self) -> Iterator[int]:
        """The arrivals of all."""
        return chain.from_iterable(block[:, 0].tolist() for block in self.blocks())

    def __len__(self) -> int:
        return len(self._numbers)

    def __iter__(self) -> Iterator[TraceRequest]:
        rows = chain.from_iterable(block.tolist() for block in self.blocks())
        for position, row in enumerate(rows):
            yield self._whole.get(position) or TraceRequest(position, *row)

    @overload
    def __getitem__(self, index: int) -> TraceRequest: ...
    @overload
    def __getitem__(self, index: slice) -> list[TraceRequest]: ...
    def __getitem__(self, index: int | slice) -> TraceRequest | list[TraceRequest]:
        places = range(len(self))[index]
        if isinstance(places, range):
            return [self[place] for place in places]
        return self._whole.get(places) or TraceRequest(places, *self._numbers.read(places, places + 1)[0].tolist())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


class LengthTotals(NamedTuple):
    """Tokens of all prompts and of all outputs, and of the longest prompt with its output."""

    prompt: int
    output: int
    longest: int


def length_totals(requests: Sequence[TraceRequest]) -> LengthTotals:
    """The totals of one request or more."""
    compact = requests if isinstance(requests, CompactRequests) else CompactRequests()
    if not compact:
        for request in requests:
            compact.append(request)
    totals = [(*block[:, 1:3].sum(axis=0).tolist(), int(block[:, 1:3].sum(axis=1).max())) for block in compact.blocks()]
    prompts, outputs, longest = zip(*totals, strict=True)
    return LengthTotals(sum(prompts), sum(outputs), max(longest))
