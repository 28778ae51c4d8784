"""A request as a scheduler sees it: what the client asked for, and how far it has got."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from engine.decode_set import DecodeSet
from engine.prefix_hash import Content, chain_hash
from traces.request import TraceRequest

_ASKED = "id arrival_ns prompt_len max_tokens predicted_length priority client ttft_slo_ns e2e_slo_ns"
_asked = attrgetter(*_ASKED.split())  # what a trace says of a request, as the first fields of `Request`
LENGTH, STOP, FAILED, CANCELLED, REJECTED = "length", "stop", "failed", "cancelled", "rejected"


@dataclass(slots=True, eq=False, weakref_slot=True)
class Request:
    """One request in the serving system. Where it will stop is not known here.

    Progress is counted when a step is planned, not when it completes.

    Attributes:
        id: position in arrival order.
        arrival_ns: when the client sent it.
        prompt_len: prompt tokens.
        max_tokens: output tokens at which it is cut off.
        predicted_length: an estimate of its output tokens, if the workload has one.
        priority: smaller is more urgent.
        client: who sent it.
        ttft_slo_ns, e2e_slo_ns: within what time of its arrival its first and its last token are due, or None.
        content: what its prompt begins with, if the workload says so.
        block_hashes: one for each KV block that its prompt fills, where prefixes are cached, and where outputs are
            cached too, for each that its known output fills.
        output_ids: what these last blocks hold, one id for each.
        blocks: ids of its KV blocks, in order of position.
        cpu_blocks: ids of the blocks that keep its cache in host memory, while it is swapped out.
        preemptions: how often it has lost its blocks.
        swaps: how often they were swapped out.
        admission: the number, among all admissions of the run, of its last.
        cached_tokens: prompt tokens that were found in the prefix cache, each time that it was admitted.
        refused: why the backend cannot take it, or None: whoever delivers it knows, and it is rejected as it arrives.
        outcome: how it ended (`length`, `stop`, `cancelled`, `rejected`), or None.
        reason: why it was rejected.
    """

    id: int
    arrival_ns: int
    prompt_len: int
    max_tokens: int
    predicted_length: int | None = None
    priority: int = 0
    client: str | None = None
    ttft_slo_ns: int | None = None
    e2e_slo_ns: int | None = None
    content: Content | None = None
    block_hashes: Content | None = None
    output_ids: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    cpu_blocks: list[int] = field(default_factory=list)
    preemptions: int = 0
    swaps: int = 0
    admission: int = -1
    cached_tokens: int = 0
    refused: str | None = None
    outcome: str | None = None
    reason: str | None = None
    records_hashes: bool = False  # whether records have its blocks' hashes in place of what the workload says
    published: int = 0  # of its blocks, how many of the first may be found by their hash, or never will
    last_step: int = -1  # the step that makes its last token, once that is planned
    _computed: int = 0
    _generated: int = 0
    _decoding: DecodeSet | None = None

    @classmethod
    def from_trace(cls, source: TraceRequest, refused: str | None = None) -> Request:
        """The scheduler's view of a trace's request: everything but where it stops."""
        request = cls(*_asked(source))
        request.content, request.refused = Content.of(source), refused
        return request

    @property
    def deadline_ns(self) -> int | None:
        """When its next promise is due, of the first token until that is made, then of the last; None without one."""
        slos = (None if self.generated else self.ttft_slo_ns, self.e2e_slo_ns)
        due = [slo_ns for slo_ns in slos if slo_ns is not None]
        return self.arrival_ns + min(due) if due else None

    @property
    def last_context(self) -> int:
        """Tokens in the cache once its last token, by `max_tokens`, is made: that one is never fed back."""
        return self.prompt_len + self.max_tokens - 1

    @property
    def computed(self) -> int:
        """Tokens whose keys and values are in the cache once all planned steps have run."""
        return self._computed if self._decoding is None else self._decoding.context(self.id)

    @property
    def generated(self) -> int:
        """Output tokens made once all planned steps have run."""
        # A decoding request has cached everything but its newest token.
        return self._generated if self._decoding is None else self.computed + 1 - self.prompt_len

    @property
    def to_prefill(self) -> int:
        """Tokens still to be cached before the request can make its next token."""
        return self.prompt_len + self._generated - self._computed

    def learn(self, own: Sequence[int]) -> None:
        """Take note of what the next block holds beyond those with a hash."""
        if self.block_hashes and self.content:
            hashes = self.block_hashes.ids
            assert isinstance(hashes, array), "as `Content.hashes` makes them"
            hashes.append(chain_hash(hashes[-1] if hashes else None, own))
            self.output_ids.append(hashes[-1] if self.records_hashes else own[0])

    def prefilled(self, tokens: int) -> None:
        """Count a planned prefill chunk, or tokens found in the prefix cache."""
        self._computed += tokens

    def sampled(self) -> None:
        """Count the token that a completed prefill makes."""
        self._generated += 1

    def start_decoding(self, decoding: DecodeSet) -> None:
        """Join the decode set, which counts the progress from here on."""
        decoding.add(self.id, self._computed)
        self._decoding = decoding

    def stop_decoding(self) -> None:
        """Leave the decode set and take the progress along."""
        if self._decoding is not None:
            self._computed = self.computed
            self._generated = self._computed + 1 - self.prompt_len
            self._decoding.discard(self.id)
            self._decoding = None

    def forget_cache(self) -> None:
        """Preemption by recompute: the tokens stay, their keys and values are lost."""
        self._computed = self.published = 0
        self.preemptions += 1


def unknown_token(source: TraceRequest, vocab_size: int) -> str | None:
    """Why a model cannot take a prompt: a token id is none of its `vocab_size`. None if it can take it."""
    ids = source.prompt_token_ids
    if ids is None or 0 <= min(ids) <= max(ids) < vocab_size:
        return None
    unknown = max(ids) if min(ids) >= 0 else min(ids)
    return f"token id {unknown} is not in the model's vocabulary, which has {vocab_size}"
