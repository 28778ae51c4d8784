"""The batches that a profiler times, by their shape."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np

from engine.config import ServingConfig
from engine.step import Chunk, Step, StepLoad
from traces.request import TraceRequest

Item = TypeVar("Item")


class BatchShape(NamedTuple):
    """The shape of one step's batch: prefill chunks as (tokens, context), and decodes as contexts."""

    chunks: tuple[tuple[int, int], ...]
    decodes: tuple[int, ...]

    @classmethod
    def decoding(cls, sequences: int, mean: int, imbalance: float = 1.0) -> BatchShape:
        """Decodes alone, with this mean and imbalance of their contexts."""
        return cls((), imbalanced(sequences, mean, imbalance) if imbalance > 1 else (mean,) * sequences)

    @property
    def tokens(self) -> int:
        """Rows of the batch."""
        return sum(tokens for tokens, _ in self.chunks) + len(self.decodes)

    @property
    def kv_tokens(self) -> int:
        """KV tokens that its decodes attend to, their own included."""
        return sum(self.decodes) + len(self.decodes)

    def decodes_fit(self, config: ServingConfig) -> bool:
        """Whether `config` allows its decodes."""
        blocks = sum(context // config.block_size + 1 for context in self.decodes)
        return blocks <= config.num_blocks and max(self.decodes) < config.max_model_len

    @property
    def _lengths(self) -> list[int]:
        return [context + tokens for tokens, context in self.chunks] + [context + 1 for context in self.decodes]

    def requests(self, vocab_size: int, steps: int = 1) -> list[TraceRequest]:
        """Requests that put the data plane in the state where this is its next batch, for so many `steps`.

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
        return [replace(steps[0], blocks=blocks, joined=joined), *steps[1:]]

    def _step(self, index: int, rests: int) -> Step:
        chunks = {each: Chunk(context, tokens, True) for each, (tokens, context) in enumerate(self.chunks)}
        contexts = [context + index for context in self.decodes]
        load = StepLoad(sum(contexts), sum(each**2 for each in contexts), running=len(contexts) + len(chunks))
        return Step(index, len(contexts), chunks={} if index % (1 + rests) else chunks, load=load)


def imbalanced(sequences: int, mean: int, imbalance: float) -> tuple[int, ...]:
    """Contexts with this mean and imbalance, in random order: quantiles of a gamma distribution."""
    from scipy.optimize import brentq  # takes longer to import than a simulation takes to start
    from scipy.special import gammaincinv

    ranks = (np.arange(sequences) + 0.5) / sequences

    def shares(shape: float) -> np.ndarray[Any, Any]:
        quantiles = gammaincinv(shape, ranks)
        return np.asarray(quantiles / quantiles.mean())

    shape = brentq(lambda shape: (shares(shape) ** 2).mean() - imbalance, 0.05, 50)
    contexts = [max(1, round(mean * share)) for share in shares(shape)]
    random.Random(sequences).shuffle(contexts)
    return tuple(contexts)


def shuffled(items: Iterable[Item]) -> list[Item]:
    """In random order, so that a machine that slows down for a while slows no one size."""
    work = list(items)
    random.Random(0).shuffle(work)
    return work
