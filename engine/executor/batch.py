"""The data of one forward pass: a flat batch of tokens, and the paged KV cache that they read and write.

Knows tensors and block ids; does not know requests, schedulers or steps. All integers of a batch lie in one buffer, so
that one copy brings them to a device, and so that a CUDA graph finds those of every batch in the same place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch

from engine.model.config import ModelConfig

Ints = np.ndarray[Any, np.dtype[np.int32]]
_ALIGNMENT = 32  # words between the starts of sections: kernels are compiled for aligned pointers


class Span(NamedTuple):
    """One request's token rows in a batch."""

    row: int  # the first
    tokens: int
    context: int  # KV tokens after this pass, its own rows included


@dataclass(slots=True)
class ForwardBatch:
    """The tokens of one forward pass, request after request: decodes first, one token row each, then prefill chunks.

    A request's token rows are consecutive and in order of position. Token rows, requests, samples and tiles may be
    padded. Padding costs time and changes no result: a padding row has slot -1, a padding decode has no context.

    The integers are NumPy arrays where a batch is packed, and tensors where it is computed.
    """

    token_ids: Any  # (tokens,) int32; below 0: `last_tokens[-1 - id]`, which is on the device alone
    positions: Any  # (tokens,) int32, from 0 in each request
    slots: Any  # (tokens,) int32, block * block_size + offset: where the token's K and V go; -1: nowhere
    context_lens: Any  # (decodes,) int32, KV tokens of each decode after this pass
    sample_rows: Any  # (samples,) int32, token rows whose next token is wanted
    sample_table_rows: Any  # (samples,) int32, rows of `last_tokens` that take the new tokens
    tiles: Any  # (tiles, 4) int32, for a data plane that works through tiles: request, row, end, position
    block_tables: Any  # (decodes + prefills, blocks) int32; the padding of a table is never read
    _: KW_ONLY
    prefills: Sequence[Span] = ()  # for a data plane that works through them one by one
    last_tokens: torch.Tensor | None = None  # (table rows + 1,) int64, the newest token of each table row
    all_rows: bool = False  # the next token of every token row is wanted, and `sample_rows` is not read

    @property
    def num_decodes(self) -> int:
        """Decodes, padding included."""
        return len(self.context_lens)


class Shape(NamedTuple):
    """The room of a batch."""

    tokens: int
    decodes: int
    prefills: int
    samples: int
    tiles: int
    blocks: int  # of one request

    @property
    def words(self) -> int:
        """int32 words of a batch's buffer."""
        return sum(map(_aligned, self._sizes()))

    def _sizes(self) -> tuple[int, ...]:
        tables = (self.decodes + self.prefills) * self.blocks
        return (*(self.tokens,) * 3, self.decodes, self.samples, self.samples, 4 * self.tiles, tables)

    def split(
        self,
        words: Any,  # (words,) int32, an array or a tensor
        prefills: Sequence[Span] = (),
        last_tokens: torch.Tensor | None = None,  # (table rows + 1,) int64
        all_rows: bool = False,
    ) -> ForwardBatch:
        """The batch whose integers are views of a buffer; further arguments as in `ForwardBatch`."""
        sizes = self._sizes()
        starts = accumulate(map(_aligned, sizes[:-1]), initial=0)
        parts = [words[start : start + size] for start, size in zip(starts, sizes, strict=True)]
        parts[-2:] = parts[-2].reshape(-1, 4), parts[-1].reshape(-1, self.blocks)
        return ForwardBatch(*parts, prefills=prefills, last_tokens=last_tokens, all_rows=all_rows)


def _aligned(words: int) -> int:
    return -(-words // _ALIGNMENT) * _ALIGNMENT


class Decodes(NamedTuple):
    """The decoding requests of a pass, in order."""

    token_ids: Ints  # (decodes,), as in `ForwardBatch`
    contexts: Ints  # (decodes,) KV tokens before this pass
    tables: Ints  # (decodes, blocks)
    table_rows: Ints  # (decodes,) the rows of the block tables, and of `last_tokens`

    @classmethod
    def none(cls) -> Decodes:
        """No requests."""
        empty = np.empty(0, np.int32)
        return cls(empty, empty, empty.reshape(0, 0), empty)


class Prefill(NamedTuple):
    """A prompt, or a chunk of one: its tokens, the position of the first, the request's blocks."""

    token_ids: Sequence[int]
    start: int
    table: Ints  # (blocks,)
    samples: bool
    table_row: int = 0


class Packing(NamedTuple):
    """The rules by which a batch is packed."""

    block_size: int
    tile_rows: int  # query rows of a tile; 0: no tiles
    no_table_row: int  # where the tokens of padding samples are noted

    def shape_of(self, decodes: Decodes, prefills: Sequence[Prefill]) -> Shape:
        """Room for exactly these requests."""
        rows, widest = decodes.tables.shape
        lengths = [len(each.token_ids) for each in prefills]
        tiles = sum(-(-length // self.tile_rows) for length in lengths) if self.tile_rows else 0
        samples = rows + sum(each.samples for each in prefills)
        blocks = max([widest, *(len(each.table) for each in prefills)])
        return Shape(rows + sum(lengths), rows, len(prefills), samples, tiles, blocks)

    def pack(self, out: ForwardBatch, decodes: Decodes, prefills: Sequence[Prefill]) -> list[Span]:
        """Write requests into a batch of arrays with room for them and pad the rest; returns where the prefills are."""
        rows, spans = len(decodes.contexts), []
        _write(out.token_ids, decodes.token_ids, 0)
        _write(out.positions, decodes.contexts, 0)
        _write(out.slots, self._slots(decodes.tables, decodes.contexts, np.arange(rows)), -1)
        _write(out.context_lens, decodes.contexts + 1, 0)
        _write(out.sample_rows, np.arange(rows), 0)
        _write(out.sample_table_rows, decodes.table_rows, self.no_table_row)
        out.block_tables[:rows, : decodes.tables.shape[1]] = decodes.tables
        first, sample = len(out.context_lens), rows
        for number, each in enumerate(prefills):
            end = rows + len(each.token_ids)
            positions = np.arange(each.start, each.start + end - rows)
            out.token_ids[rows:end] = each.token_ids
            out.positions[rows:end] = positions
            out.slots[rows:end] = self._slots(each.table, positions)
            out.block_tables[first + number, : len(each.table)] = each.table
            if each.samples:
                out.sample_rows[sample], out.sample_table_rows[sample] = end - 1, each.table_row
                sample += 1
            spans.append(Span(rows, end - rows, each.start + end - rows))
            rows = end
        _write(out.tiles, query_tiles(spans, first, self.tile_rows) if self.tile_rows else out.tiles[:0], 0)
        return spans

    def batch(
        self,
        decodes: Decodes,
        prefills: Sequence[Prefill],
        last_tokens: torch.Tensor | None = None,  # (table rows + 1,) int64
        device: torch.device | str = "cpu",
    ) -> ForwardBatch:
        """A batch of exactly these requests, in memory of its own."""
        shape = self.shape_of(decodes, prefills)
        words = np.zeros(shape.words, np.int32)
        spans = self.pack(shape.split(words), decodes, prefills)
        return shape.split(torch.from_numpy(words).to(device), spans, last_tokens, all_rows=not spans)

    def _slots(
        self,
        tables: Ints,  # (requests, blocks), or of one request (blocks,)
        positions: Any,  # (tokens,)
        *rows: Any,  # (tokens,) the request of each token, if there are several
    ) -> Any:
        return tables[(*rows, positions // self.block_size)] * self.block_size + positions % self.block_size


def query_tiles(spans: Sequence[Span], first: int, rows: int) -> Ints:
    """Cut requests into tiles of at most `rows` rows, longest context first: the last programs to start are short.

    Args:
        spans: of the requests.
        first: the first one's place among the block tables.
        rows: of a tile.

    Returns:
        (tiles, 4): request, first row, end of the request's rows, position of the first row.
    """
    tiles = [np.empty((0, 4), np.int32)]
    for request, (row, tokens, context) in enumerate(spans, first):
        starts = np.arange(row, row + tokens, rows, dtype=np.int32)
        tile = np.empty((len(starts), 4), np.int32)
        tile[:, 0], tile[:, 1], tile[:, 2], tile[:, 3] = request, starts, row + tokens, context - tokens - row + starts
        tiles.append(tile)
    flat = np.concatenate(tiles)
    return flat[np.argsort(-flat[:, 3], kind="stable")]


def _write(
    section: Ints,  # (room,)
    values: np.ndarray[Any, Any],  # (values,), at most as many
    padding: int,
) -> None:
    section[: len(values)] = values
    section[len(values) :] = padding


@dataclass(slots=True)
class KVCache:
    """The paged KV cache of all layers, in one allocation so that swapping a block moves one strided slice.

    K and V of a layer are beside each other, so that one gather by block table fetches both; within a block the token
    comes before the head, so that a token is written as one row, and gathered blocks read as one long sequence.
    Slots that no token was written to may hold anything, NaN included.
    """

    data: torch.Tensor  # (layers, 2, num_blocks, block_size, kv_heads, head_dim)
    layers: tuple[torch.Tensor, ...] = field(init=False)  # (2, num_blocks, block_size, kv_heads, head_dim) each: views

    def __post_init__(self) -> None:
        self.layers = self.data.unbind(0)

    @classmethod
    def allocate(
        cls,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        pinned: bool = False,
    ) -> KVCache:
        """Reserve room for `num_blocks * block_size` tokens, uninitialised; `pinned` host memory a GPU can reach."""
        shape = (config.num_layers, 2, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        return cls(torch.empty(shape, dtype=dtype, device=device, pin_memory=pinned))

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.data.shape[3]


def build_batch(
    requests: Sequence[tuple[Sequence[int], int, Sequence[int]]],
    num_decodes: int,
    block_size: int,
    tile_rows: int = 0,
    device: torch.device | str = "cpu",
) -> ForwardBatch:
    """Make a batch of one's own, of which each request's last row is sampled. `Llama.batch` does it for its cache.

    Args:
        requests: token ids to run, KV tokens already cached, and block ids, of each.
        num_decodes: the first so many run one token each; they are attended to together.
        block_size: of the cache.
        tile_rows: of the data plane, see `ops.tile_rows`.
        device: of the cache.

    Raises:
        ValueError: a decode does not have one token, or a request's blocks do not hold its tokens.
    """
    for row, (ids, start, blocks) in enumerate(requests):
        if row < num_decodes and len(ids) != 1:
            raise ValueError(f"request {row} is a decode and has {len(ids)} tokens to run, not 1")
        if start + len(ids) > len(blocks) * block_size:
            raise ValueError(f"request {row}: {start + len(ids)} tokens do not fit into {len(blocks)} blocks")
    return Packing(block_size, tile_rows, no_table_row=0).batch(*split_requests(requests, num_decodes), device=device)


def split_requests(
    requests: Sequence[tuple[Sequence[int], int, Sequence[int]]], num_decodes: int
) -> tuple[Decodes, list[Prefill]]:
    """The decodes and the prefills of requests as in `build_batch`; each decode has a table row, its place."""
    tables = np.zeros((len(requests), max(len(blocks) for _, _, blocks in requests)), np.int32)
    for table, (_, _, blocks) in zip(tables, requests, strict=True):
        table[: len(blocks)] = blocks
    decodes = Decodes(
        token_ids=np.array([ids[0] for ids, _, _ in requests[:num_decodes]], np.int32),
        contexts=np.array([start for _, start, _ in requests[:num_decodes]], np.int32),
        tables=tables[:num_decodes],
        table_rows=np.arange(num_decodes, dtype=np.int32),
    )
    chunks = zip(requests[num_decodes:], tables[num_decodes:], strict=True)
    return decodes, [Prefill(ids, start, table, samples=True) for (ids, start, _), table in chunks]
