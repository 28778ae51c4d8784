"""Paged attention for requests of one row, with split KV (Flash-Decoding, Dao et al. 2023).

Two kernels. Once a step, `_schedule` cuts the requests into pieces of about equal length on the GPU; in each layer
`_decode` attends to them. Both grids depend on the batch size alone, so that a CUDA graph holds while contexts grow.

`_schedule`, grid (requests,): a request is split when it is longer than a fair share of all KV tokens; the shares are
so few that the pieces fill the memory's bandwidth and no more. Long pieces come first, so that none is left to begin
when the others have ended. Pieces never outnumber requests + shares, the capacity. Those that are left over have no
work.

`_decode`, grid (kv_heads, capacity), one program for a KV head of a piece; KV heads come first in launch order, so
that programs which run side by side read side by side. The query heads of the KV head fill the rows of one tile that
tensor cores multiply. A request in one piece is finished by its program. Of a request in more, each program leaves its
part in scratch memory and counts itself; the last one to count, whichever that is, adds the parts up in their order,
so that the result does not depend on it, and sets the counter back. A second launch would cost more than the sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from engine.executor.kernels.online_softmax import softmax_scale, weigh
from engine.executor.kernels.paging import load_tokens, token_offsets
from engine.executor.kernels.pdl import await_inputs, pdl_options
from engine.executor.kernels.tuning import Tiles

_ROWS = tl.constexpr(16)  # the fewest that tensor cores multiply
_LENGTHS = tl.constexpr(256)  # context lengths read at a time


@triton.jit(do_not_specialize=["context_lens", "requests", "shares", "capacity"])
def _schedule(
    pieces: tl.tensor,  # (capacity, 4) int32: request, which piece, of how many (0: no work), context
    arrived: tl.tensor,  # (requests, KV_HEADS) int32
    context_lens: tl.tensor,  # (requests,) int32
    requests: tl.tensor,  # ()
    shares: tl.tensor,  # ()
    capacity: tl.tensor,  # ()
    CHUNK: tl.constexpr,
    KV_HEADS: tl.constexpr,
    PADDED_HEADS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    await_inputs(PDL)
    request = tl.program_id(0)
    all_tokens = 0
    for start in range(0, requests, _LENGTHS):
        i = start + tl.arange(0, _LENGTHS)
        all_tokens += tl.sum(tl.load(context_lens + i, mask=i < requests, other=0))
    length = tl.maximum(tl.cdiv(tl.cdiv(all_tokens, shares), CHUNK), 1) * CHUNK

    context = tl.load(context_lens + request)
    count = tl.maximum(tl.cdiv(context, length), 1)
    size = tl.cdiv(context, count)
    before = 0
    used = 0
    for start in range(0, requests, _LENGTHS):
        i = start + tl.arange(0, _LENGTHS)
        contexts = tl.load(context_lens + i, mask=i < requests, other=0)
        counts = tl.where(i < requests, tl.maximum(tl.cdiv(contexts, length), 1), 0)
        sizes = tl.cdiv(contexts, tl.maximum(counts, 1))
        before += tl.sum(tl.where((sizes > size) | ((sizes == size) & (i < request)), counts, 0))
        used += tl.sum(counts)

    for start in range(0, count, 32):
        i = start + tl.arange(0, 32)
        piece = pieces + 4 * (before + i)
        tl.store(piece, request, mask=i < count)
        tl.store(piece + 1, i, mask=i < count)
        tl.store(piece + 2, count, mask=i < count)
        tl.store(piece + 3, context, mask=i < count)
    for start in range(used + 32 * request, capacity, 32 * requests):
        i = start + tl.arange(0, 32)
        tl.store(pieces + 4 * i + 2, 0, mask=i < capacity)
    head = tl.arange(0, PADDED_HEADS)
    tl.store(arrived + request * KV_HEADS + head, 0, mask=head < KV_HEADS)


@triton.jit
def _attend(
    q: tl.tensor,  # (_ROWS, DIM)
    keys: tl.tensor,  # (num_blocks, BLOCK_SIZE, HEAD_DIM), a KV head's K, strided
    values: tl.tensor,  # (num_blocks, BLOCK_SIZE, HEAD_DIM), its V
    table: tl.tensor,  # (blocks,) int32
    begin: tl.tensor,  # ()
    end: tl.tensor,  # ()
    block_stride: tl.tensor,  # (), elements from a block to the next
    slot_stride: tl.tensor,  # (), elements from a token to the next
    scale: tl.tensor,  # (), from `softmax_scale`
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    N: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the attention to the tokens from `begin` to `end`, and log2 of the sum of its weights."""
    acc = tl.zeros((_ROWS, DIM), tl.float32)
    total = tl.zeros((_ROWS,), tl.float32)
    top = tl.full((_ROWS,), float("-inf"), tl.float32)
    n = tl.arange(0, N)
    offsets = token_offsets(table, begin + n, end, block_stride, slot_stride, BLOCK_SIZE)
    for start in range(begin, end, N):
        tokens = start + n
        inside = tokens < end
        offsets_ahead = token_offsets(table, tokens + N, end, block_stride, slot_stride, BLOCK_SIZE)
        k = load_tokens(keys, offsets, inside, HEAD_DIM, DIM, True)
        scores = tl.dot(q, k.T, input_precision="ieee")
        scores = tl.where(inside[None, :], scores, float("-inf"))
        weights, acc, total, top = weigh(acc, total, top, scores, scale)
        v = load_tokens(values, offsets, inside, HEAD_DIM, DIM, True)
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
        offsets = offsets_ahead
    total = tl.where(total == 0.0, 1.0, total)  # a request without tokens, which pads a batch: zeros
    return acc / total[:, None], top + tl.log2(total)


@triton.jit
def _add_up(
    out: tl.tensor,  # (GROUP, HEAD_DIM), the group's heads of the request
    parts: tl.tensor,  # (count, PART, HEAD_DIM) float32, from the group's first head on
    sums: tl.tensor,  # (count, PART) float32, likewise
    count: tl.tensor,  # ()
    PART: tl.constexpr,  # heads in a part, those of other groups included
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    STEP: tl.constexpr,
) -> None:
    """Add up the parts of a request, each weighted by its share of the softmax's sum; `STEP` parts at a time."""
    i, g, d = tl.arange(0, STEP), tl.arange(0, PADDED_GROUP), tl.arange(0, DIM)
    acc = tl.zeros((PADDED_GROUP, DIM), tl.float32)
    total = tl.zeros((PADDED_GROUP,), tl.float32)
    top = tl.full((PADDED_GROUP,), -1e30, tl.float32)
    for start in range(0, count, STEP):
        row = (start + i)[:, None] * PART + g[None, :]
        exists = (start + i < count)[:, None] & (g < GROUP)[None, :]
        logs = tl.load(sums + row, mask=exists, other=-1e30, cache_modifier=".cg")
        at = parts + row[:, :, None] * HEAD_DIM + d[None, None, :]
        part = tl.load(at, mask=exists[:, :, None] & (d < HEAD_DIM)[None, None, :], other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(logs, 0))
        weights = tl.exp2(logs - new_top[None, :])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink[:, None] + tl.sum(part * weights[:, :, None], 0)
        top = new_top
    at = out + g[:, None] * HEAD_DIM + d[None, :]
    exists = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["tables", "table_stride"])
def _decode(
    out: tl.tensor,  # (requests, heads, HEAD_DIM)
    q: tl.tensor,  # (requests, heads, HEAD_DIM)
    kv: tl.tensor,  # (2, num_blocks, BLOCK_SIZE, KV_HEADS, HEAD_DIM)
    tables: tl.tensor,  # (requests, blocks) int32
    pieces: tl.tensor,  # (capacity, 4) int32, from `_schedule`
    arrived: tl.tensor,  # (requests, KV_HEADS) int32
    parts: tl.tensor,  # (capacity, KV_HEADS, GROUP, HEAD_DIM) float32
    sums: tl.tensor,  # (capacity, KV_HEADS, GROUP) float32
    table_stride: tl.tensor,  # (), elements from a request to the next
    q_stride: tl.tensor,  # (), elements from a token to the next
    out_stride: tl.tensor,  # (), likewise
    plane_stride: tl.tensor,  # (), elements from K to V
    block_stride: tl.tensor,  # (), elements from a block to the next
    slot_stride: tl.tensor,  # (), elements from a token to the next
    head_stride: tl.tensor,  # (), elements from a KV head to the next
    scale: tl.tensor,  # (), from `softmax_scale`
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PADDED_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    N: tl.constexpr,
    STEP: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    await_inputs(PDL)
    kv_head = tl.program_id(0)
    piece = tl.program_id(1)
    at = pieces + 4 * piece
    request, index, count, context = tl.load(at), tl.load(at + 1), tl.load(at + 2), tl.load(at + 3)
    if count == 0:
        return
    length = tl.cdiv(tl.cdiv(context, count), N) * N
    begin = index * length
    g, d = tl.arange(0, _ROWS), tl.arange(0, DIM)
    exists = (g < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
    elements = g[:, None] * HEAD_DIM + d[None, :]
    first = kv_head * GROUP * HEAD_DIM
    q_tile = tl.load(q + request.to(tl.int64) * q_stride + first + elements, mask=exists, other=0.0)
    keys = kv + kv_head * head_stride
    result, log_sum = _attend(
        q_tile, keys, keys + plane_stride, tables + request.to(tl.int64) * table_stride,
        begin, tl.minimum(begin + length, context), block_stride, slot_stride, scale, HEAD_DIM, DIM, BLOCK_SIZE, N,
    )  # fmt: skip
    row = out + request.to(tl.int64) * out_stride + first
    if count == 1:
        tl.store(row + elements, result.to(out.dtype.element_ty), mask=exists)
    else:
        head = (piece * KV_HEADS + kv_head) * GROUP
        tl.store(parts + head * HEAD_DIM + elements, result, mask=exists)
        tl.store(sums + head + g, log_sum, mask=g < GROUP)
        tl.debug_barrier()  # every thread's part is written before one thread counts the program
        counter = arrived + request * KV_HEADS + kv_head
        if tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == count - 1:
            head -= index * KV_HEADS * GROUP
            _add_up(
                row, parts + head * HEAD_DIM, sums + head, count, KV_HEADS * GROUP, GROUP, PADDED_GROUP,
                HEAD_DIM, DIM, STEP,
            )  # fmt: skip
            tl.store(counter, 0)


@dataclass(frozen=True, slots=True)
class Pieces:
    """The requests of a step, cut into pieces; the same for all layers, one after the other."""

    pieces: torch.Tensor  # (capacity, 4) int32, as `_schedule` makes them
    arrived: torch.Tensor  # (requests, kv_heads) int32, zeros between launches


def cut(
    context_lens: torch.Tensor,  # (requests,) int32
    kv_heads: int,
    programs: int,
    chunk: int,
) -> Pieces:
    """Cut requests into pieces, on the GPU.

    Args:
        context_lens: KV tokens of each; 0 in rows that pad a batch.
        kv_heads: of the model.
        programs: that fill the GPU's memory bandwidth.
        chunk: requests are cut at multiples of so many tokens; a multiple of `Tiles.tokens`.
    """
    requests, device = len(context_lens), context_lens.device
    shares = max(1, programs // kv_heads)
    capacity = requests + shares
    pieces = torch.empty(capacity, 4, dtype=torch.int32, device=device)
    arrived = torch.empty(requests, kv_heads, dtype=torch.int32, device=device)
    _schedule[(requests,)](
        pieces, arrived, context_lens, requests, shares, capacity,
        CHUNK=chunk, KV_HEADS=kv_heads, PADDED_HEADS=triton.next_power_of_2(kv_heads), num_warps=1,
        **pdl_options(device),
    )  # fmt: skip
    return Pieces(pieces, arrived)


def paged_decode(
    out: torch.Tensor,  # (requests, heads, head_dim)
    q: torch.Tensor,  # (requests, heads, head_dim)
    kv: torch.Tensor,  # (2, num_blocks, block_size, kv_heads, head_dim)
    tables: torch.Tensor,  # (requests, blocks) int32
    cut: Pieces,
    shape: Tiles,
) -> None:
    """Attend from one row of each request to all its tokens.

    Args:
        out: written.
        q: rows of any stride; at most 16 heads to a KV head.
        kv: a layer's cache, these rows' K and V already written.
        tables: the padding of a row is never read.
        cut: from `cut`.
        shape: `tokens` of an iteration; the rows are always 16.
    """
    heads, head_dim = q.shape[1:]
    block_size, kv_heads = kv.shape[2:4]
    group, dim = heads // kv_heads, triton.next_power_of_2(head_dim)
    padded_group = triton.next_power_of_2(group)
    parts = torch.empty(len(cut.pieces), heads, head_dim, dtype=torch.float32, device=q.device)
    sums = torch.empty(len(cut.pieces), heads, dtype=torch.float32, device=q.device)
    _decode[(kv_heads, len(cut.pieces))](
        out, q, kv, tables, cut.pieces, cut.arrived, parts, sums,
        tables.stride(0), q.stride(0), out.stride(0), *kv.stride()[:4], softmax_scale(head_dim),
        KV_HEADS=kv_heads, GROUP=group, PADDED_GROUP=padded_group, HEAD_DIM=head_dim, DIM=dim, BLOCK_SIZE=block_size,
        N=shape.tokens, STEP=max(2, 8192 // (padded_group * dim)), num_warps=shape.warps, num_stages=shape.stages,
        **pdl_options(q.device),
    )  # fmt: skip
