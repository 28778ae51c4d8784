"""Flash attention over the paged cache for requests of several rows: prompts, chunks of prompts, ragged lengths.

Grid: (heads of a group, tiles, kv_heads), one program for a head and a tile of query rows. The tiles of all requests
are one flat list made on the host, longest first, so that there is no empty program and the last programs to start are
the shortest. KV heads come last in launch order: what runs side by side shares one head's keys and values, which stay
in the L2 cache where those of all heads would not, from some 10,000 tokens on.

A program walks its request's tokens from 0, earlier chunks included. Up to the tile's first row every row sees every
key, so nothing is masked there; only from there to the tile's last row, the diagonal, is there a mask. Where blocks
are as long as a tile of keys, a GPU with a copy engine for tensors fetches them with it (`BULK`): one thread asks for a
tile, where else every thread works out addresses.

FlashAttention-2 (Dao 2023) over paged attention (Kwon et al. 2023).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.executor.kernels.online_softmax import softmax_scale, weigh
from engine.executor.kernels.paging import load_block, load_tokens, token_offsets
from engine.executor.kernels.pdl import await_inputs, pdl_options
from engine.executor.kernels.tuning import Tiles


@triton.jit
def _attend(
    acc: tl.tensor,  # (M, DIM), this and the next two as in `weigh`
    total: tl.tensor,  # (M,)
    top: tl.tensor,  # (M,)
    q: tl.tensor,  # (M, DIM)
    keys: tl.tensor,  # (num_blocks, BLOCK_SIZE, HEAD_DIM), a KV head's K, strided
    values: tl.tensor,  # (num_blocks, BLOCK_SIZE, HEAD_DIM), its V
    blocks: tl.tensor,  # (2, num_blocks, block_size, kv_heads, head_dim), if BULK, a descriptor; else unused
    kv_head: tl.tensor,  # ()
    table: tl.tensor,  # (blocks,) int32
    begin: tl.tensor,  # (), a multiple of N
    end: tl.tensor,  # ()
    position: tl.tensor,  # (), of the tile's first row
    block_stride: tl.tensor,  # (), elements from a block to the next
    slot_stride: tl.tensor,  # (), elements from a token to the next
    scale: tl.tensor,  # (), from `softmax_scale`
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,  # if BULK, a multiple of N
    N: tl.constexpr,
    MASKED: tl.constexpr,
    BULK: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Attend to the tokens from `begin` to `end`; without MASKED, all rows to all tokens, whole tiles of them."""
    M: tl.constexpr = q.shape[0]
    DIM: tl.constexpr = q.shape[1]
    n = tl.arange(0, N)
    if BULK:
        block = tl.load(table + begin // BLOCK_SIZE)
    else:
        offsets = token_offsets(table, begin + n, end, block_stride, slot_stride, BLOCK_SIZE)
    for start in range(begin, end, N):
        tokens = start + n
        inside = tokens < end
        if BULK:
            block_ahead = tl.load(table + (start + N) // BLOCK_SIZE, mask=start + N < end, other=0)
            k = load_block(blocks, 0, block, start % BLOCK_SIZE, kv_head, N, DIM)
        else:
            offsets_ahead = token_offsets(table, tokens + N, end, block_stride, slot_stride, BLOCK_SIZE)
            k = load_tokens(keys, offsets, inside, HEAD_DIM, DIM, MASKED)
        scores = tl.dot(q, k.T, input_precision="ieee")
        if MASKED:
            seen = tokens[None, :] <= position + tl.arange(0, M)[:, None]
            scores = tl.where(seen & inside[None, :], scores, float("-inf"))
        weights, acc, total, top = weigh(acc, total, top, scores, scale)
        if BULK:
            v = load_block(blocks, 1, block, start % BLOCK_SIZE, kv_head, N, DIM)
            if MASKED:
                v = tl.where(inside[:, None], v, 0.0)
            block = block_ahead
        else:
            v = load_tokens(values, offsets, inside, HEAD_DIM, DIM, MASKED)
            offsets = offsets_ahead
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return acc, total, top


@triton.jit(do_not_specialize=["tables", "table_stride"])
def _prefill(
    out: tl.tensor,  # (tokens, heads, HEAD_DIM)
    q: tl.tensor,  # (tokens, heads, HEAD_DIM)
    kv: tl.tensor,  # (2, num_blocks, BLOCK_SIZE, kv_heads, HEAD_DIM)
    blocks: tl.tensor,  # (2, num_blocks, BLOCK_SIZE, kv_heads, HEAD_DIM), if BULK, a descriptor of kv
    tiles: tl.tensor,  # (tiles, 4) int32: request, row, end, position
    tables: tl.tensor,  # (requests, blocks) int32
    table_stride: tl.tensor,  # (), elements from a request to the next
    q_stride: tl.tensor,  # (), elements from a token to the next
    out_stride: tl.tensor,  # (), likewise
    plane_stride: tl.tensor,  # (), elements from K to V
    block_stride: tl.tensor,  # (), elements from a block to the next
    slot_stride: tl.tensor,  # (), elements from a token to the next
    head_stride: tl.tensor,  # (), elements from a KV head to the next
    scale: tl.tensor,  # (), from `softmax_scale`
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    BULK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    await_inputs(PDL)
    kv_head = tl.program_id(2)
    head = kv_head * GROUP + tl.program_id(0)
    tile = tiles + 4 * tl.program_id(1)
    request, row, last, position = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    table = tables + request.to(tl.int64) * table_stride
    keys = kv + kv_head * head_stride
    values = keys + plane_stride
    rows = row + tl.arange(0, M)
    d = tl.arange(0, DIM)
    exists = (rows < last)[:, None] & (d < HEAD_DIM)[None, :]
    columns = head * HEAD_DIM + d
    q_tile = tl.load(q + rows.to(tl.int64)[:, None] * q_stride + columns[None, :], mask=exists, other=0.0)

    acc = tl.zeros((M, DIM), tl.float32)
    total = tl.zeros((M,), tl.float32)
    top = tl.full((M,), float("-inf"), tl.float32)
    diagonal = (position + 1) // N * N
    end = position + tl.minimum(last - row, M)
    acc, total, top = _attend(
        acc, total, top, q_tile, keys, values, blocks, kv_head, table, 0, diagonal, position,
        block_stride, slot_stride, scale, HEAD_DIM, BLOCK_SIZE, N, False, BULK,
    )  # fmt: skip
    acc, total, top = _attend(
        acc, total, top, q_tile, keys, values, blocks, kv_head, table, diagonal, end, position,
        block_stride, slot_stride, scale, HEAD_DIM, BLOCK_SIZE, N, True, BULK,
    )  # fmt: skip
    result = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(out + rows.to(tl.int64)[:, None] * out_stride + columns[None, :], result, mask=exists)


def paged_prefill(
    out: torch.Tensor,  # (tokens, heads, head_dim)
    q: torch.Tensor,  # (tokens, heads, head_dim)
    kv: torch.Tensor,  # (2, num_blocks, block_size, kv_heads, head_dim)
    tiles: torch.Tensor,  # (tiles, 4) int32
    tables: torch.Tensor,  # (requests, blocks) int32
    shape: Tiles,
) -> None:
    """Attend from every row of `tiles` to its request's tokens up to its own.

    Args:
        out: written.
        q: rows of any stride.
        kv: a layer's cache, these rows' K and V already written.
        tiles: request, first row, end of the request's rows, position of the first row.
        tables: the padding of a row is never read.
        shape: of the tiles.
    """
    heads, head_dim = q.shape[1:]
    block_size, kv_heads = kv.shape[2:4]
    dim = triton.next_power_of_2(head_dim)
    bulk = shape.bulk and block_size % shape.tokens == 0
    blocks = TensorDescriptor.from_tensor(kv, [1, 1, shape.tokens, 1, dim]) if bulk else kv
    group = heads // kv_heads
    _prefill[(group, len(tiles), kv_heads)](
        out, q, kv, blocks, tiles, tables, tables.stride(0), q.stride(0), out.stride(0), *kv.stride()[:4],
        softmax_scale(head_dim), GROUP=group, HEAD_DIM=head_dim, DIM=dim, BLOCK_SIZE=block_size,
        M=shape.rows, N=shape.tokens, BULK=bulk, num_warps=shape.warps, num_stages=shape.stages,
        **pdl_options(q.device),
    )  # fmt: skip
