"""Rotary embedding of queries and keys, fused with the write of keys and values to the paged cache.

`_angles`, grid (tokens / 16,), once a step: the cosines and sines of all tokens, so that no layer computes them again.

`_rope_and_cache`, grid (tokens, heads / HEADS), heads of queries, keys and values counted through: a program turns
`HEADS` heads of one token. Queries stay in their row, so that they are read and written once and need no memory of
their own; keys and values go to the token's slot.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.executor.kernels.pdl import await_inputs, pdl_options

_TOKENS = tl.constexpr(16)  # of a program of `_angles`


@triton.jit(do_not_specialize=["positions", "tokens"])
def _angles(
    turns: tl.tensor,  # (tokens, 2, HALF) float32
    positions: tl.tensor,  # (tokens,) int32
    inv_freq: tl.tensor,  # (HALF,) float32
    tokens: tl.tensor,  # ()
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    await_inputs(PDL)
    token = tl.program_id(0) * _TOKENS + tl.arange(0, _TOKENS)
    d = tl.arange(0, PADDED_HALF)
    position = tl.load(positions + token, mask=token < tokens, other=0).to(tl.float32)
    angles = position[:, None] * tl.load(inv_freq + d, mask=d < HALF, other=0.0)[None, :]
    at = turns + token.to(tl.int64)[:, None] * (2 * HALF) + d[None, :]
    exists = (token < tokens)[:, None] & (d < HALF)[None, :]
    tl.store(at, tl.cos(angles), mask=exists)
    tl.store(at + HALF, tl.sin(angles), mask=exists)


@triton.jit(do_not_specialize=["slots"])
def _rope_and_cache(
    qkv: tl.tensor,  # (tokens, Q_HEADS + 2 * KV_HEADS, 2 * HALF)
    turns: tl.tensor,  # (tokens, 2, HALF) float32
    slots: tl.tensor,  # (tokens,) int32
    kv: tl.tensor,  # (2, num_blocks, BLOCK_SIZE, KV_HEADS, 2 * HALF)
    qkv_stride: tl.tensor,  # (), elements from a token to the next
    plane_stride: tl.tensor,  # (), elements from K to V
    block_stride: tl.tensor,  # (), elements from a block to the next
    slot_stride: tl.tensor,  # (), elements from a token to the next
    head_stride: tl.tensor,  # (), elements from a KV head to the next
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PADDED_HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    await_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, PADDED_HALF)
    exists = (head < Q_HEADS + 2 * KV_HEADS)[:, None] & (d < HALF)[None, :]
    row = qkv + token * qkv_stride + head[:, None] * (2 * HALF) + d[None, :]
    left = tl.load(row, mask=exists, other=0.0).to(tl.float32)
    right = tl.load(row + HALF, mask=exists, other=0.0).to(tl.float32)
    cos = tl.load(turns + token * (2 * HALF) + d, mask=d < HALF, other=0.0)[None, :]
    sin = tl.load(turns + token * (2 * HALF) + HALF + d, mask=d < HALF, other=0.0)[None, :]
    turned = (head < Q_HEADS + KV_HEADS)[:, None]
    new_left = tl.where(turned, left * cos - right * sin, left).to(qkv.dtype.element_ty)
    new_right = tl.where(turned, right * cos + left * sin, right).to(qkv.dtype.element_ty)

    is_query = (head < Q_HEADS)[:, None]
    tl.store(row, new_left, mask=exists & is_query)
    tl.store(row + HALF, new_right, mask=exists & is_query)
    slot = tl.load(slots + token).to(tl.int64)
    offset = slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * slot_stride
    kv_head = head - Q_HEADS
    offsets = offset + kv_head // KV_HEADS * plane_stride + kv_head % KV_HEADS * head_stride
    cached = kv + offsets[:, None] + d[None, :]
    written = exists & (head >= Q_HEADS)[:, None] & (slot >= 0)
    tl.store(cached, new_left, mask=written)
    tl.store(cached + HALF, new_right, mask=written)


def rotation(
    positions: torch.Tensor,  # (tokens,) int32
    inv_freq: torch.Tensor,  # (head_dim / 2,) radians per token
) -> torch.Tensor:
    """Prepare the rotary embedding of a step: cosines and sines, float32 (tokens, 2, head_dim / 2)."""
    tokens, half = len(positions), len(inv_freq)
    turns = torch.empty(tokens, 2, half, dtype=torch.float32, device=positions.device)
    grid = (triton.cdiv(tokens, _TOKENS.value),)
    padded = triton.next_power_of_2(half)
    _angles[grid](turns, positions, inv_freq, tokens, HALF=half, PADDED_HALF=padded, **pdl_options(turns.device))
    return turns


def rope_and_cache(
    qkv: torch.Tensor,  # (tokens, heads + 2 * kv_heads, head_dim)
    turns: torch.Tensor,  # (tokens, 2, head_dim / 2) float32
    slots: torch.Tensor,  # (tokens,) int32
    kv: torch.Tensor,  # (2, num_blocks, block_size, kv_heads, head_dim)
    heads: int = 8,
) -> torch.Tensor:
    """Rotate queries and keys, write keys and values to the cache; the queries (tokens, heads, head_dim) are a view.

    RoFormer (Su et al. 2021), in the layout where element i turns with element i + head_dim / 2.

    Args:
        qkv: the projections; queries are overwritten.
        turns: from `rotation`.
        slots: where each token goes; negative: nowhere.
        kv: a layer's cache, written in place.
        heads: of a program, a power of 2.
    """
    tokens, all_heads, head_dim = qkv.shape
    block_size, kv_heads = kv.shape[2:4]
    _rope_and_cache[(tokens, triton.cdiv(all_heads, heads))](
        qkv, turns, slots, kv, qkv.stride(0), *kv.stride()[:4],
        Q_HEADS=all_heads - 2 * kv_heads, KV_HEADS=kv_heads, HALF=head_dim // 2,
        PADDED_HALF=triton.next_power_of_2(head_dim // 2), BLOCK_SIZE=block_size, HEADS=heads, num_warps=1,
        **pdl_options(qkv.device),
    )  # fmt: skip
    return qkv[:, : all_heads - 2 * kv_heads]
