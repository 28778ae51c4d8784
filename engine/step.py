"""A Step: what one iteration changes in the running batch, and the digest that chains the decisions.

A step is a delta. Requests that decode keep decoding, one token a step, until a step says otherwise, so a
steady step names nobody. Prefill is the same thing with more tokens: a chunk of a request's known tokens
(prompt, and after a preemption its output too) is run, and the chunk that reaches the last of them makes
the next token. Mixing both in a step is SARATHI's piggybacking.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from typing import NamedTuple

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


@dataclass(slots=True)
class Step:
    """One iteration's plan. Order of effect: `dropped` and `preempted` leave, `swapped_out` leave and are copied,
    `skipped` leave the decode set, `swapped_in` are copied back, `joined` enter it, chunks and decodes run, `finishing`
    leave.

    Attributes:
        index: the step's number, from 0.
        dropped: requests that ended (stop token, cancellation) since the last step, or whose last token, by
            `max_tokens`, has become known since, where they keep their blocks until then.
        preempted: requests that lose their blocks and will be prefilled again.
        swapped_out: request id -> its GPU blocks, and the CPU blocks that keep their contents.
        swapped_in: request id -> those CPU blocks, and its new GPU blocks; it joins in a later step.
        joined: request id -> context, of those that decode from now on.
        skipped: decoding requests that make no token in this step; they keep their blocks, and join in a later one.
        chunks: request id -> prefill chunk that runs in this step.
        blocks: request id -> KV blocks appended to its block table.
        decodes: decoding requests that make a token in this step: all of the decode set, or 0.
        finishing: requests whose last token, by `max_tokens`, is made in this step.
        digest: hash of this and all earlier steps.
        kv_tokens, kv_squares: sum of the decodes' contexts in tokens, and of their squares: what attention costs.
        kv_blocks_used, running, waiting: for the records: blocks in use, and queue lengths as the step was planned.
    """

    index: int
    dropped: list[int] = field(default_factory=list)
    preempted: list[int] = field(default_factory=list)
    swapped_out: dict[int, Copies] = field(default_factory=dict)
    swapped_in: dict[int, Copies] = field(default_factory=dict)
    joined: dict[int, int] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)
    chunks: dict[int, Chunk] = field(default_factory=dict)
    blocks: dict[int, list[int]] = field(default_factory=dict)
    decodes: int = 0
    finishing: list[int] = field(default_factory=list)
    digest: bytes = b""
    kv_tokens: int = 0
    kv_squares: int = 0
    kv_blocks_used: int = 0
    running: int = 0
    waiting: int = 0

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
        return not (
            self.chunks
            or self.finishing
            or self.blocks
            or self.joined
            or self.skipped
            or self.dropped
            or self.preempted
            or self.swapped_out
            or self.swapped_in
        )

    @property
    def kind(self) -> str:
        """`decode`, `prefill`, `mixed`, or `swap` if it runs no token."""
        if self.chunks:
            return "mixed" if self.decodes else "prefill"
        return "decode" if self.decodes else "swap"


_STEADY = struct.Struct("<3q64x")  # the last eight fields are lists without an entry


def chain_digest(previous: bytes, step: Step) -> bytes:
    """d_n = H(d_{n-1}, canonical bytes of the delta): 16 bytes that stand for every decision so far."""
    # A steady step's are what `_encode` would make of it, at a fraction of the cost; most steps are steady.
    steady = step.is_steady
    delta = _STEADY.pack(ENCODING_VERSION, step.index, step.decodes) if steady else _encode(step)
    return blake2b(previous + delta, digest_size=DIGEST_BYTES).digest()


def _encode(step: Step) -> bytes:
    out = _encode_copies(step.swapped_out) if step.swapped_out else ()
    back = _encode_copies(step.swapped_in) if step.swapped_in else ()
    joined = [n for item in step.joined.items() for n in item] if step.joined else ()
    chunks = [n for each, chunk in step.chunks.items() for n in (each, *chunk)] if step.chunks else ()
    blocks = [n for each, new in step.blocks.items() for n in (each, len(new), *new)] if step.blocks else ()
    numbers = [
        ENCODING_VERSION, step.index, step.decodes,
        len(step.dropped), *step.dropped,
        len(step.preempted), *step.preempted,
        len(out), *out,
        len(back), *back,
        len(joined), *joined,
        len(chunks), *chunks,
        len(blocks), *blocks,
        len(step.finishing), *step.finishing,
    ]  # fmt: skip
    if step.skipped:  # at the end, so that the digest of a step without any is what it was before there were any
        numbers += [len(step.skipped), *step.skipped]
    return _packer(len(numbers))(*numbers)


@cache
def _packer(count: int) -> Callable[..., bytes]:
    return struct.Struct(f"<{count}q").pack


def _encode_copies(swaps: dict[int, Copies]) -> list[int]:
    return [n for each, copies in swaps.items() for n in (each, len(copies.source), *copies.source, *copies.target)]
