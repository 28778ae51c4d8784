"""The shapes of the batches that are captured as CUDA graphs, and which of them holds a batch. Knows no tensors."""

from __future__ import annotations

from engine.config import ServingConfig
from engine.executor.batch import Shape
from engine.executor.batch_state import table_width
from engine.model.graph_sizes import GraphSizes


class Shapes:
    """The shapes for runs within a config's limits.

    Attributes:
        blocks: of the longest request.
    """

    def __init__(self, config: ServingConfig, tile_rows: int) -> None:
        """`tile_rows`: query rows of a tile of a chunk."""
        self.blocks = table_width(config)
        self._sizes = GraphSizes.within(config.max_seqs, config.max_batched_tokens)
        self._max_tokens, self._tile_rows = config.max_batched_tokens, tile_rows

    @property
    def largest(self) -> Shape:
        """Room for any step that the limits allow, captured or not."""
        tokens, seqs = self._max_tokens, self._sizes.max_seqs
        return Shape(tokens, seqs, seqs, seqs, tokens // self._tile_rows + seqs, self.blocks)

    @property
    def captured(self) -> list[Shape]:
        """The largest first, so that the others find its memory to use again."""
        mixed = [self.of("mixed", rows) for rows in reversed(self._sizes.mixed)]
        return mixed + [self.of("decode", rows) for rows in reversed(self._sizes.decode)]

    def of(self, kind: str, rows: int) -> Shape:
        """Room for any step of so many rows that only decodes (`decode`), or prefills too (`mixed`).

        A chunk's last tile may be short, and every request may be sampled.
        """
        decodes = min(rows, self._sizes.max_seqs)
        prefills = self._sizes.prefills(rows) if kind == "mixed" else 0
        tiles = rows // self._tile_rows + prefills if prefills else 0
        return Shape(rows, decodes, prefills, decodes, tiles, self.blocks)

    def holding(self, exact: Shape) -> Shape:
        """The captured shape that holds a batch with the least padding; the batch's own if none does."""
        rows = self._sizes.rows(exact.tokens, exact.prefills)
        if rows is None:
            return exact._replace(blocks=self.blocks)
        return self.of("mixed" if exact.prefills else "decode", rows)
