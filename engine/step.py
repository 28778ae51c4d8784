"""A Step: what one iteration changes in the running batch, and the digest that chains the decisions.

A step is a delta. Requests that decode keep decoding, one token a step, until a step says otherwise, so a
steady step names nobody. Prefill is the same thing with more tokens: a chunk of a request's known tokens
(prompt, and after a preemption its output too) is run, and the chunk that reaches the last of them makes
the next token. Mixing both in a step is SARATHI's piggybacking.
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, partial
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, NamedTuple

ENCODING_VERSION = 2
DIGEST_BYTES = 16
GENESIS = b"tandem decisions"


class Chunk(NamedTuple):
    """Tokens `start` to `start + tokens` of a request's known tokens; `samples` if they are the last of them."""

    start: int
    tokens: int
    samples: bool


class Copies(NamedTuple):
    """KV blocks that are copied from one tier to the other: `source[i]` to `target[i]`."""

    source: list[int]
    target: list[int]


class StepLoad(NamedTuple):
    """What a step's batch weighs. It follows from the decisions, so the digest leaves it out.

    Attributes:
        kv_tokens: sum of the decodes' contexts, in tokens.
        kv_squares: sum of the squares of the decodes' contexts.
        kv_blocks_used: GPU blocks in use as the step was planned.
        running: requests that held blocks then.
        waiting: requests that waited then.
    """

    kv_tokens: int = 0
    kv_squares: int = 0
    kv_blocks_used: int = 0
    running: int = 0
    waiting: int = 0


NO_LOAD = StepLoad()
_NOBODY = MappingProxyType[int, Any]({})


def _nobody() -> Mapping[int, Any]:
    return _NOBODY


@dataclass(frozen=True, slots=True)
class Step:
    """One iteration's plan. Order of effect: `dropped` and `preempted` leave, `swapped_out` leave and are copied,
    `skipped` leave the decode set, `swapped_in` are copied back, `joined` enter it, chunks and decodes run, `finishing`
    leave.

    Attributes:
        index: the step's number, from 0.
        decodes: decoding requests that make a token in this step: all of the decode set, or 0.
        dropped: requests that ended (stop token, cancellation) since the last step, or whose last token, by
            `max_tokens`, has become known since, where they keep their blocks until then.
        preempted: requests that lose their blocks and will be prefilled again.
        swapped_out: request id -> its GPU blocks, and the CPU blocks that keep their contents.
        swapped_in: request id -> those CPU blocks, and its new GPU blocks; it joins in a later step.
        joined: request id -> context, of those that decode from now on.
        skipped: decoding requests that make no token in this step; they keep their blocks, and join in a later one.
        chunks: request id -> prefill chunk that runs in this step.
        blocks: request id -> KV blocks appended to its block table.
        finishing: requests whose last token, by `max_tokens`, is made in this step.
        load: what the batch weighs, for latency models and records.
        digest: hash of this and all earlier steps, but for their loads.
    """

    index: int
    decodes: int = 0
    dropped: Sequence[int] = ()
    preempted: Sequence[int] = ()
    swapped_out: Mapping[int, Copies] = field(default_factory=_nobody)
    swapped_in: Mapping[int, Copies] = field(default_factory=_nobody)
    joined: Mapping[int, int] = field(default_factory=_nobody)
    skipped: Sequence[int] = ()
    chunks: Mapping[int, Chunk] = field(default_factory=_nobody)
    blocks: Mapping[int, Sequence[int]] = field(default_factory=_nobody)
    finishing: Sequence[int] = ()
    load: StepLoad = NO_LOAD
    digest: bytes = b""

    @property
    def leaving(self) -> list[int]:
        """The requests that, if they decoded, decode no more before this step runs."""
        return [*self.dropped, *self.preempted, *self.swapped_out, *self.skipped]

    @property
    def prefill_tokens(self) -> int:
        """Tokens of all chunks together."""
        return sum([chunk.tokens for chunk in self.chunks.values()]) if self.chunks else 0

    @property
    def is_steady(self) -> bool:
        """Whether it changes nothing: who decoded decodes on."""
        return is_steady(self)

    @property
    def kind(self) -> str:
        """`decode`, `prefill`, `mixed`, or `swap` if it runs no token."""
        if self.chunks:
            return "mixed" if self.decodes else "prefill"
        return "decode" if self.decodes else "swap"


@dataclass(slots=True)
class StepDraft:
    """A step under construction, and the same object once it is sealed: attributes as in `Step`."""

    index: int = 0
    decodes: int = 0
    dropped: list[int] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    swapped_out: dict[int, Copies] = field(default_factory=dict)
    swapped_in: dict[int, Copies] = field(default_factory=dict)
    joined: dict[int, int] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)
    chunks: dict[int, Chunk] = field(default_factory=dict)
    blocks: defaultdict[int, list[int]] = field(default_factory=partial(defaultdict, list))
    finishing: list[int] = field(default_factory=list)
    load: StepLoad = NO_LOAD
    digest: bytes = b""

    @property
    def prefill_tokens(self) -> int:
        """Tokens of all chunks together."""
        return sum([chunk.tokens for chunk in self.chunks.values()]) if self.chunks else 0

    def take_out(self, request_id: int) -> None:
        """A request runs nothing in this step."""
        for part in (self.chunks, self.blocks, self.joined):
            part.pop(request_id, None)
        if request_id in self.skipped:
            self.skipped.remove(request_id)

    def seal(self, index: int, decodes: int, load: StepLoad, previous: bytes) -> Step:
        """Make it a step, which follows one with the digest `previous`."""
        self.index, self.decodes, self.load = index, decodes, load
        self.digest = blake2b(previous + self._encode(), digest_size=DIGEST_BYTES).digest()
        return _frozen(self)

    def _encode(self) -> bytes:
        """Canonical bytes of the decisions."""
        out = _encode_copies(self.swapped_out) if self.swapped_out else ()
        back = _encode_copies(self.swapped_in) if self.swapped_in else ()
        joined = [n for item in self.joined.items() for n in item] if self.joined else ()
        chunks = [n for each, chunk in self.chunks.items() for n in (each, *chunk)] if self.chunks else ()
        blocks = [n for each, new in self.blocks.items() for n in (each, len(new), *new)] if self.blocks else ()
        numbers = [
            ENCODING_VERSION, self.index, self.decodes,
            len(self.dropped), *self.dropped,
            len(self.preempted), *self.preempted,
            len(out), *out,
            len(back), *back,
            len(joined), *joined,
            len(chunks), *chunks,
            len(blocks), *blocks,
            len(self.finishing), *self.finishing,
        ]  # fmt: skip
        if self.skipped:  # at the end, so that the digest of a step without any is what it was before there were any
            numbers += [len(self.skipped), *self.skipped]
        return _packer(len(numbers))(*numbers)


def steady_step(index: int, decodes: int, load: StepLoad, previous: bytes) -> Step:
    """A step that changes nothing, as most do: what an empty draft would be sealed to, at a fraction of the cost."""
    digest = blake2b(previous + _pack_steady(ENCODING_VERSION, index, decodes), digest_size=DIGEST_BYTES).digest()
    return _frozen(StepDraft(index, decodes, *_NO_CHANGE, load, digest))  # type: ignore[call-arg]


def _frozen(draft: StepDraft) -> Step:
    """The draft, which nobody can change any more. It has a step's slots, so that nothing is copied."""
    draft.__class__ = Step  # type: ignore[assignment]
    return draft  # type: ignore[return-value]


_pack_steady = struct.Struct("<3q64x").pack  # eight lists without an entry
_NO_CHANGE: Sequence[Any] = [getattr(Step(0), each.name) for each in fields(Step)[2:-2]]


def is_steady(step: Step | StepDraft) -> bool:
    """Whether a step changes nothing: who decoded decodes on."""
    return not (
        step.chunks
        or step.finishing
        or step.blocks
        or step.joined
        or step.skipped
        or step.dropped
        or step.preempted
        or step.swapped_out
        or step.swapped_in
    )


@cache
def _packer(count: int) -> Callable[..., bytes]:
    return struct.Struct(f"<{count}q").pack


def _encode_copies(swaps: dict[int, Copies]) -> list[int]:
    return [n for each, copies in swaps.items() for n in (each, len(copies.source), *copies.source, *copies.target)]
