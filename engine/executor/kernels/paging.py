"""Loads of tokens from a paged cache, shared by the attention kernels.

A layer's cache is (2, num_blocks, block_size, kv_heads, head_dim) with any strides but the last, which is 1.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def token_offsets(
    table: tl.tensor,  # (blocks,) int32, block ids of one request
    tokens: tl.tensor,  # (N,) positions in the request
    end: tl.tensor,  # (), the table's entries for tokens from here on may be anything
    block_stride: tl.tensor,  # (), elements from a block to the next
    slot_stride: tl.tensor,  # (), elements from a token to the next
    BLOCK_SIZE: tl.constexpr,
) -> tl.tensor:
    """Return where the tokens' K (or V) begin, in elements: (N,) int64; from `end` on, where some other token's does.

    A loop over tokens asks for these one iteration ahead: loads whose addresses are at hand when an iteration begins
    are pipelined; those that first wait for a table are not, or half as deep.
    """
    block = tl.load(table + tokens // BLOCK_SIZE, mask=tokens < end, other=0)
    return block.to(tl.int64) * block_stride + tokens % BLOCK_SIZE * slot_stride


@triton.jit
def load_tokens(
    base: tl.tensor,  # (num_blocks, BLOCK_SIZE, HEAD_DIM), a KV head's K or V, strided
    offsets: tl.tensor,  # (N,) int64, from `token_offsets`
    inside: tl.tensor,  # (N,) bool
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Load a tile (N, DIM): zeros past HEAD_DIM, and for tokens that do not exist, whose slots may hold NaN."""
    d = tl.arange(0, DIM)
    at = base + offsets[:, None] + d[None, :]
    if MASKED:
        tile = tl.load(at, mask=inside[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    elif DIM == HEAD_DIM:
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=(d < HEAD_DIM)[None, :], other=0.0)
    return tile


@triton.jit
def load_block(
    blocks: tl.tensor,  # (2, num_blocks, block_size, kv_heads, head_dim), a descriptor with boxes (1, 1, N, 1, DIM)
    plane: tl.constexpr,  # 0: K, 1: V
    block: tl.tensor,  # ()
    slot: tl.tensor,  # ()
    kv_head: tl.tensor,  # ()
    N: tl.constexpr,
    DIM: tl.constexpr,
) -> tl.tensor:
    """Load N tokens of one block, from `slot` on, by the copy engine: a tile (N, DIM), zeros past the head's size."""
    return blocks.load([plane, block, slot, kv_head, 0]).reshape((N, DIM))
