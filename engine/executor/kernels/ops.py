"""The operations of a LLaMA forward pass on an NVIDIA GPU: names and signatures of `engine.executor.reference.ops`.

Matrix products are cuBLAS's, the rest are this package's kernels. Nothing here knows layers, weights' names or steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.executor.batch import ForwardBatch
from engine.executor.kernels.argmax import greedy
from engine.executor.kernels.paged_decode import Pieces, cut, paged_decode
from engine.executor.kernels.paged_prefill import paged_prefill, query_tiles
from engine.executor.kernels.rms_norm import add_rms_norm
from engine.executor.kernels.rope_cache import rope_and_cache, rotation
from engine.executor.kernels.silu_mul import silu_and_mul
from engine.executor.kernels.tuning import tuning

__all__ = [
    "AttentionPlan",
    "add_rms_norm",
    "attention",
    "greedy",
    "linear",
    "pack",
    "plan_attention",
    "rope_and_cache",
    "rotation",
    "silu_and_mul",
]


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Return a matrix (out, in) in the layout that `linear` multiplies fastest: as it is."""
    return weight


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply `x` (tokens, in) by `weight` (out, in) and add `bias` (out,): (tokens, out)."""
    return F.linear(x, weight, bias)


@dataclass(slots=True)
class AttentionPlan:
    """What `attention` needs to know of some consecutive requests, the same in every layer.

    The first layer's call adds the work list, which depends on the model's heads.
    """

    query_start: list[int]  # (requests + 1,) first row of each, from 0
    context_lens: list[int]  # (requests,)
    block_tables: torch.Tensor  # (requests, blocks) int32
    decodes: bool  # one row each
    pieces: Pieces | None = None  # decodes
    tiles: torch.Tensor | None = None  # others: from `query_tiles`


def plan_attention(batch: ForwardBatch, first: int, last: int, block_size: int) -> AttentionPlan:
    """Prepare attention for the requests `first` to `last` (exclusive) of a batch: only decodes, or only others."""
    start = batch.query_start[first]
    return AttentionPlan(
        query_start=[row - start for row in batch.query_start[first : last + 1]],
        context_lens=batch.context_lens[first:last],
        block_tables=batch.block_tables[first:last],
        decodes=first >= len(batch.context_lens) - batch.num_decodes,
    )


def attention(q: torch.Tensor, kv: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """Attend from each request's rows to its part of the cache: (tokens, heads, head_dim), contiguous.

    Args:
        q: (tokens, heads, head_dim), the rows of the plan's requests, of any stride.
        kv: a layer's cache (2, num_blocks, block_size, kv_heads, head_dim), these rows' K and V already written.
        plan: from `plan_attention`.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    tuned = tuning(q.device, q.element_size(), q.shape[2], kv.shape[2])
    if plan.decodes:
        if plan.pieces is None:
            context_lens = torch.tensor(plan.context_lens, dtype=torch.int32, device=q.device)
            plan.pieces = cut(context_lens, kv.shape[3], tuned.programs, tuned.chunk)
        paged_decode(out, q, kv, plan.block_tables, plan.pieces, tuned.decode)
    else:
        if plan.tiles is None:
            plan.tiles = query_tiles(plan.query_start, plan.context_lens, tuned.prefill.rows).to(q.device)
        paged_prefill(out, q, kv, plan.tiles, plan.block_tables, tuned.prefill)
    return out
