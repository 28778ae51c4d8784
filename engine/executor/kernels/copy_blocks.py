"""Copies KV blocks, of all layers at once: within the GPU, or to and from pinned memory of the host.

Grid: as many programs as a bus needs to be full, and no more: they share the blocks' pieces (a block is one piece for
K and one for V in each layer) among them, and leave the other processors to the compute stream that a swap runs beside.
The host's pinned memory is read and written directly, so that a swap of many blocks is one launch, without staging.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_PROGRAMS = 32
_ELEMENTS = 4096  # of an iteration


@triton.jit(do_not_specialize=["pairs", "pieces", "source_stride", "target_stride"])
def _copy_blocks(
    source: tl.tensor,  # (layers, 2, num_blocks, block_size, kv_heads, head_dim)
    target: tl.tensor,  # likewise, with its own number of blocks
    pairs: tl.tensor,  # (blocks, 2) int64: from, to
    pieces: tl.tensor,  # ()
    source_stride: tl.tensor,  # (), elements from a plane to the next
    target_stride: tl.tensor,  # (), likewise
    PLANES: tl.constexpr,
    PIECE: tl.constexpr,
    ELEMENTS: tl.constexpr,
) -> None:
    i = tl.arange(0, ELEMENTS)
    for piece in range(tl.program_id(0), pieces, tl.num_programs(0)):
        pair = pairs + piece // PLANES * 2
        plane = piece % PLANES
        read = source + plane * source_stride.to(tl.int64) + tl.load(pair) * PIECE
        write = target + plane * target_stride.to(tl.int64) + tl.load(pair + 1) * PIECE
        for start in range(0, PIECE, ELEMENTS):
            exists = start + i < PIECE
            tl.store(write + start + i, tl.load(read + start + i, mask=exists, other=0.0), mask=exists)


def copy_blocks(
    source: torch.Tensor,  # (layers, 2, num_blocks, block_size, kv_heads, head_dim)
    target: torch.Tensor,  # (layers, 2, num_blocks, block_size, kv_heads, head_dim)
    pairs: torch.Tensor,  # (blocks, 2) int64: from, to
) -> None:
    """Copy blocks from one cache to another, or within one where none is both read and written.

    All three are contiguous, and on the GPU or in pinned memory. The caches may differ in their number of blocks.
    """
    planes, piece = source.shape[0] * 2, source[0, 0, 0].numel()
    pieces = len(pairs) * planes
    _copy_blocks[(min(pieces, _PROGRAMS),)](
        source, target, pairs, pieces, source.stride(1), target.stride(1),
        PLANES=planes, PIECE=piece, ELEMENTS=min(_ELEMENTS, triton.next_power_of_2(piece)),
    )  # fmt: skip
