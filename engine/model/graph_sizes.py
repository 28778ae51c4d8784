"""The numbers of rows for which an executor captures its steps as graphs. A step is padded to one of them.

The executor asks to choose a graph, the simulator to know the cost of a step. Knows no tensors.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from itertools import chain

GRAPH_TOKENS = 2048  # longer steps are launched kernel by kernel: they take longer than launching them
GRAPH_PREFILLS = 32  # requests with a chunk in a captured step


@dataclass(frozen=True, slots=True)
class GraphSizes:
    """The steps that are captured, by their number of rows (tokens).

    Attributes:
        decode: of steps that only decode, ascending.
        mixed: of steps that prefill too, ascending.
        max_seqs: requests that a step may hold.
        max_prefills: requests with a chunk in one captured step.
    """

    decode: tuple[int, ...]
    mixed: tuple[int, ...]
    max_seqs: int
    max_prefills: int

    @classmethod
    def within(cls, max_seqs: int, max_batched_tokens: int) -> GraphSizes:
        """The sizes for runs within these limits."""
        mixed = _sizes(min(GRAPH_TOKENS, max_batched_tokens))
        return cls(_sizes(max_seqs), mixed, max_seqs, GRAPH_PREFILLS)

    def prefills(self, rows: int) -> int:
        """Requests with a chunk that a captured mixed step of so many rows has room for."""
        return min(rows, self.max_seqs, self.max_prefills)

    def rows(self, tokens: int, prefills: int) -> int | None:
        """Rows of the captured step that holds `tokens` tokens, `prefills` requests' chunks among them, with the least
        padding; None if none does."""
        sizes = self.mixed if prefills else self.decode
        fitting = (rows for rows in sizes[bisect_left(sizes, tokens) :] if prefills <= self.prefills(rows))
        return next(fitting, None)


def _sizes(most: int) -> tuple[int, ...]:
    """Close together where a row more costs most.

    Matrices are multiplied in tiles of 128 rows. Between multiples of those cuBLAS has kernels that are slower than for
    more rows: on an H100, Llama-3-8B takes 16.3 ms for 448 rows, and 11.4 ms for 512. Such sizes are left out.
    """
    sizes = chain((1, 2, 4), range(8, 256, 8), (256, 288, 320, 384), range(512, 768, 64), range(768, most, 128))
    return tuple(sorted({min(size, most) for size in sizes} | {most}))
