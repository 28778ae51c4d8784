"""The forward passes that a profiler times: what runs in them, and which of them span the batches that limits allow."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from typing import NamedTuple, TypeVar

from engine.config import ServingConfig
from engine.step import Chunk, Step
from traces.request import TraceRequest

TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
CONTEXTS = (16, 128, 512, 1024, 2048, 4096)
LONG_SHARE, UNEVEN = 0.25, 2.0  # of an uneven batch: how many of its contexts are the long ones, and its unevenness
HELD_OUT = 12
Item = TypeVar("Item")
_IDS = tuple(range(1000)) * 200  # token ids repeat: what they are costs nothing


class Pass(NamedTuple):
    """One forward pass to measure: prefill chunks as (tokens, context), and decodes as contexts."""

    chunks: tuple[tuple[int, int], ...]
    decodes: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Rows of the pass."""
        return sum(tokens for tokens, _ in self.chunks) + len(self.decodes)

    @property
    def kv_tokens(self) -> int:
        """KV tokens that its decodes attend to, their own included."""
        return sum(self.decodes) + len(self.decodes)

    def requests(self, repeats: int = 1) -> list[TraceRequest]:
        """Requests that put the data plane in the state where this is its next pass, `repeats` times over."""
        lengths = [context + tokens for tokens, context in self.chunks] + [context + 1 for context in self.decodes]
        return [
            TraceRequest(each, 0, length, repeats, repeats, list(_IDS[:length])) for each, length in enumerate(lengths)
        ]

    def steps(self, block_size: int, repeats: int = 1) -> list[Step]:
        """Steps that run it over and over, on consecutive blocks: chunks again as they are, decodes a token further."""
        first, used = Step(0), 0
        for request in self.requests():
            count = -(-(request.prompt_len + repeats - 1) // block_size)
            first.blocks[request.id] = list(range(used, used + count))
            used += count
        first.joined = dict(enumerate(self.decodes, len(self.chunks)))
        steps = [first, *(Step(index) for index in range(1, repeats))]
        for index, step in enumerate(steps):
            step.chunks = {each: Chunk(context, tokens, True) for each, (tokens, context) in enumerate(self.chunks)}
            contexts = [context + index for context in self.decodes]
            step.decodes, step.kv_tokens = len(contexts), sum(contexts)
            step.kv_squares, step.running = sum(context**2 for context in contexts), len(contexts) + len(self.chunks)
        return steps


def grid(config: ServingConfig) -> list[Pass]:
    """Passes that span every batch that `config` allows: chunks by context, and decodes by context."""
    longest, room = config.max_model_len, config.num_blocks * config.block_size
    most = min(config.max_batched_tokens, longest, room)
    chunks = [tokens for tokens in TOKENS if tokens < most] + [most]
    contexts = [0, *(context for context in CONTEXTS if context < longest), longest - 1]
    # Chunks below 16 tokens are rare, and their attention close to linear.
    prefills = [
        Pass(((tokens, min(context, longest - tokens)),), ())
        for tokens in chunks
        if tokens == 1 or tokens >= 16
        for context in contexts
    ]
    decodes = [
        Pass((), (min(context, room // count - config.block_size),) * count)
        for count in up_to(config.max_seqs)
        for context in contexts[1:]
    ]
    return sorted({one for one in prefills + decodes if min(one.decodes, default=1) > 0})


def up_to(most: int) -> list[int]:
    """Numbers to sample between 1 and `most`, both included."""
    return [count for count in TOKENS if count < most] + [most]


def uneven(sequences: int, mean: int) -> tuple[int, ...]:
    """Contexts with this mean of which a few are long, such that the mean square is `UNEVEN` times the mean squared."""
    width = math.sqrt(UNEVEN - 1)
    longer = mean * (1 + width * math.sqrt((1 - LONG_SHARE) / LONG_SHARE))
    shorter = mean * (1 - width * math.sqrt(LONG_SHARE / (1 - LONG_SHARE)))
    many = round(LONG_SHARE * sequences)
    return (*(round(longer),) * many, *(round(shorter),) * (sequences - many))


def uneven_grid(config: ServingConfig, slack: int) -> Iterator[Pass]:
    """Decodes of uneven contexts; `slack` tokens of each stay free."""
    room = config.num_blocks * config.block_size
    for count in up_to(config.max_seqs):
        for mean in CONTEXTS:
            one = Pass((), uneven(count, mean))
            fits = sum(context + slack + config.block_size for context in one.decodes) <= room
            if count >= 8 and fits and max(one.decodes) + slack < config.max_model_len:
                yield one


def mixed_passes(config: ServingConfig, count: int = HELD_OUT) -> list[Pass]:
    """Random batches of a prefill chunk and decodes, within the limits."""
    generator = random.Random(1)
    longest = min(config.max_model_len, config.num_blocks * config.block_size // (config.max_seqs + 1)) - 1
    passes = []
    for _ in range(count):
        decodes = tuple(generator.randint(1, longest) for _ in range(generator.randint(1, config.max_seqs - 1)))
        tokens = generator.randint(1, min(config.max_batched_tokens - len(decodes), longest))
        passes.append(Pass(((tokens, generator.randint(0, longest - tokens)),), decodes))
    return passes


def served_passes(config: ServingConfig, count: int, slack: int) -> list[Pass]:
    """Random batches as serving makes them: half of them decode alone, the others beside one to three short chunks."""
    generator = random.Random(2)
    longest = min(config.max_model_len, config.num_blocks * config.block_size // (config.max_seqs + 3)) - slack

    def length(mean: float) -> int:
        return min(longest, 1 + round(generator.expovariate(1 / mean)))

    passes = []
    for number in range(count):
        sequences = round(math.exp(generator.uniform(0, math.log(config.max_seqs - 3)))) if config.max_seqs > 4 else 1
        decodes = tuple(length(longest / 5) for _ in range(sequences))
        budget = (config.max_batched_tokens - sequences) // 3
        chunks = [(min(length(longest / 8), budget), 0) for _ in range(generator.randint(1, 3) * (number % 2))]
        passes.append(Pass(tuple(chunks), decodes))
    return passes


def shuffled(items: Iterable[Item]) -> list[Item]:
    """In random order, so that a machine that slows down for a while slows no one size."""
    work = list(items)
    random.Random(0).shuffle(work)
    return work
