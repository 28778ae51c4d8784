"""The operations of a LLaMA forward pass on an NVIDIA GPU: names and signatures of `engine.executor.reference.ops`.

Matrix products of many rows are cuBLAS's, the rest are this package's kernels. Nothing here knows layers, weights'
names or steps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.executor.batch import ForwardBatch
from engine.executor.kernels.argmax import greedy
from engine.executor.kernels.copy_blocks import copy_blocks
from engine.executor.kernels.embed import embed
from engine.executor.kernels.paged_decode import Pieces, cut, paged_decode
from engine.executor.kernels.paged_prefill import paged_prefill
from engine.executor.kernels.rms_norm import add_rms_norm
from engine.executor.kernels.rope_cache import rope_and_cache, rotation
from engine.executor.kernels.silu_mul import silu_and_mul
from engine.executor.kernels.skinny_linear import skinny_linear
from engine.executor.kernels.tuning import Tuning, skinny, tuning
from engine.executor.reference.ops import pack

# Operations that other modules define; the rest are below.
__all__ = ["add_rms_norm", "copy_blocks", "embed", "greedy", "pack", "rope_and_cache", "rotation", "silu_and_mul"]


def linear(
    x: torch.Tensor,  # (tokens, in)
    weight: torch.Tensor,  # (out, in)
    bias: torch.Tensor | None,  # (out,)
) -> torch.Tensor:
    """Return x times the transposed weight, plus bias: (tokens, out)."""
    shape = skinny(x, weight) if bias is None else None
    return F.linear(x, weight, bias) if shape is None else skinny_linear(x, weight, shape)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """A batch's decodes or prefills as `attention` works through them, the same in every layer."""

    block_tables: torch.Tensor  # (requests, blocks) int32
    work: Pieces | torch.Tensor  # of decodes; of prefills: (tiles, 4) int32, from `Packing`
    tuned: Tuning


def tile_rows(
    cache: torch.Tensor,  # (layers, 2, num_blocks, block_size, kv_heads, head_dim)
) -> int:
    """Query rows of the tiles that a batch lists for this data plane."""
    return _tuning(cache).prefill.rows


def plan_decodes(
    batch: ForwardBatch,
    cache: torch.Tensor,  # (layers, 2, num_blocks, block_size, kv_heads, head_dim)
) -> AttentionPlan:
    """Prepare attention for a batch's decodes."""
    tuned = _tuning(cache)
    pieces = cut(batch.context_lens, cache.shape[4], tuned.programs, tuned.chunk)
    return AttentionPlan(batch.block_tables, pieces, tuned)


def plan_prefills(
    batch: ForwardBatch,
    cache: torch.Tensor,  # (layers, 2, num_blocks, block_size, kv_heads, head_dim)
) -> AttentionPlan:
    """Prepare attention for a batch's prefills and chunks."""
    return AttentionPlan(batch.block_tables, batch.tiles, _tuning(cache))


def attention(
    out: torch.Tensor,  # (tokens, heads, head_dim)
    q: torch.Tensor,  # (tokens, heads, head_dim)
    kv: torch.Tensor,  # (2, num_blocks, block_size, kv_heads, head_dim)
    plan: AttentionPlan,
) -> None:
    """Attend from each request's rows to its part of the cache.

    Args:
        out: the token rows of the plan's requests are written.
        q: queries, rows of any stride.
        kv: a layer's cache, these token rows' K and V already written.
        plan: from `plan_decodes` or `plan_prefills`.
    """
    if isinstance(plan.work, Pieces):
        rows = len(plan.work.arrived)
        paged_decode(out[:rows], q[:rows], kv, plan.block_tables, plan.work, plan.tuned.decode)
    else:
        paged_prefill(out, q, kv, plan.work, plan.block_tables, plan.tuned.prefill)


def _tuning(
    cache: torch.Tensor,  # (layers, 2, num_blocks, block_size, kv_heads, head_dim)
) -> Tuning:
    return tuning(cache.device, cache.element_size(), cache.shape[5], cache.shape[3])
