"""The forward passes that a profiler times: what runs in them, and which of them span the batches that limits allow."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator
from itertools import product
from typing import Any, NamedTuple, TypeVar

import numpy as np

from engine.config import ServingConfig
from engine.step import Chunk, Step, StepLoad
from traces.request import TraceRequest

TOKENS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
CONTEXTS = (16, 128, 512, 1024, 2048, 4096)
UNEVEN = (1.2, 1.8)  # unevenness of contexts (mean square over squared mean), which serving ShareGPT brings to about 2
UNEVEN_SEQUENCES = (4, 8, 12, *range(16, 64, 8), *range(64, 256, 16), 256, 384, 512, 768, 1024)
UNEVEN_CONTEXTS = (32, 128, 256, 512, 1024, 2048, 4096)  # their means
HELD_OUT = 12
Item = TypeVar("Item")


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

    @property
    def _lengths(self) -> list[int]:
        return [context + tokens for tokens, context in self.chunks] + [context + 1 for context in self.decodes]

    def requests(self, vocab_size: int, steps: int = 1) -> list[TraceRequest]:
        """Requests that put the data plane in the state where this is its next pass, for so many `steps`.

        Their tokens are random and all different: at its power limit a GPU is faster on rows that are alike.
        """
        lengths = self._lengths
        ids = random.Random(0).choices(range(vocab_size), k=max(lengths) + len(lengths))
        return [
            TraceRequest(each, 0, length, steps, steps, ids[each : each + length])
            for each, length in enumerate(lengths)
        ]

    def steps(self, block_size: int, repeats: int = 1, rests: int = 0) -> list[Step]:
        """Steps that run it over and over, on consecutive blocks: chunks again as they are, decodes a token further.

        Args:
            rests: steps after each that only decode.
        """
        blocks, used, count = dict[int, list[int]](), 0, repeats * (1 + rests)
        for each, length in enumerate(self._lengths):
            owned = -(-(length + count - 1) // block_size)
            blocks[each] = list(range(used, used + owned))
            used += owned
        joined = dict(enumerate(self.decodes, len(self.chunks)))
        steps = [self._step(index, rests) for index in range(count)]
        return [steps[0]._replace(blocks=blocks, joined=joined), *steps[1:]]

    def _step(self, index: int, rests: int) -> Step:
        chunks = {each: Chunk(context, tokens, True) for each, (tokens, context) in enumerate(self.chunks)}
        contexts = [context + index for context in self.decodes]
        load = StepLoad(sum(contexts), sum(each**2 for each in contexts), running=len(contexts) + len(chunks))
        return Step(index, len(contexts), chunks={} if index % (1 + rests) else chunks, load=load)


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


def uneven(sequences: int, mean: int, unevenness: float) -> tuple[int, ...]:
    """Contexts with this mean and unevenness, in random order: quantiles of a gamma distribution."""
    from scipy.optimize import brentq  # takes longer to import than a simulation takes to start
    from scipy.special import gammaincinv

    ranks = (np.arange(sequences) + 0.5) / sequences

    def shares(shape: float) -> np.ndarray[Any, Any]:
        quantiles = gammaincinv(shape, ranks)
        return np.asarray(quantiles / quantiles.mean())

    shape = brentq(lambda shape: (shares(shape) ** 2).mean() - unevenness, 0.05, 50)
    contexts = [max(1, round(mean * share)) for share in shares(shape)]
    random.Random(sequences).shuffle(contexts)
    return tuple(contexts)


def uneven_grid(config: ServingConfig) -> Iterator[tuple[float, Pass]]:
    """Decodes of uneven contexts, as serving has them, with their unevenness."""
    counts = [count for count in UNEVEN_SEQUENCES if count < config.max_seqs]
    counts += [config.max_seqs] if config.max_seqs >= 4 else []
    for count, mean, unevenness in product(counts, UNEVEN_CONTEXTS, UNEVEN):
        one = Pass((), uneven(count, mean, unevenness))
        blocks = sum(context // config.block_size + 1 for context in one.decodes)
        if blocks <= config.num_blocks and max(one.decodes) < config.max_model_len:
            yield unevenness, one


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
