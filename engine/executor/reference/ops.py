"""The operations of a LLaMA forward pass in plain PyTorch, for any device.

Another data plane is a module with these names and signatures. Nothing here knows layers, weights' names or steps.

Shapes: `tokens` rows of a flat batch, `requests` of 1 or more rows each.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.executor.batch import ForwardBatch, Span


def pack(
    weight: torch.Tensor,  # (out, in)
) -> torch.Tensor:
    """Return a matrix in the layout that `linear` multiplies fastest: as it is."""
    return weight


def linear(
    x: torch.Tensor,  # (tokens, in)
    weight: torch.Tensor,  # (out, in)
    bias: torch.Tensor | None,  # (out,)
) -> torch.Tensor:
    """Return x times the transposed weight, plus bias: (tokens, out)."""
    return F.linear(x, weight, bias)


def embed(
    token_ids: torch.Tensor,  # (tokens,) int32
    last_tokens: torch.Tensor | None,  # (table rows + 1,) int64
    weight: torch.Tensor,  # (vocab, hidden)
) -> torch.Tensor:
    """Look up embeddings: (tokens, hidden). An id below 0 stands for `last_tokens[-1 - id]`.

    Where that is below 0 too, 0 is looked up: the request has failed, and a step was launched before that was known.
    """
    if last_tokens is not None:
        known = last_tokens[(-1 - token_ids).clamp(min=0)].clamp(min=0)
        token_ids = torch.where(token_ids < 0, known, token_ids)
    return F.embedding(token_ids, weight)


def add_rms_norm(
    hidden: torch.Tensor,  # (tokens, hidden)
    update: torch.Tensor,  # (tokens, hidden)
    weight: torch.Tensor,  # (hidden,)
    eps: float,
) -> torch.Tensor:
    """Add `update` to `hidden` in place, and return the RMS norm of the sum: (tokens, hidden).

    Root Mean Square Layer Normalization (Zhang and Sennrich 2019); the mean is taken in float32.
    """
    hidden += update
    return F.rms_norm(hidden, weight.shape, weight, eps)


def rotation(
    positions: torch.Tensor,  # (tokens,) int32
    inv_freq: torch.Tensor,  # (head_dim / 2,) radians per token
) -> tuple[torch.Tensor, torch.Tensor]:
    """Prepare the rotary embedding of a pass: cosines and signed sines, float32 (tokens, 1, head_dim) each."""
    angles = (positions[:, None].float() * inv_freq)[:, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rope_and_cache(
    qkv: torch.Tensor,  # (tokens, heads + 2 * kv_heads, head_dim)
    turn: tuple[torch.Tensor, torch.Tensor],  # (tokens, 1, head_dim) float32 each
    slots: torch.Tensor,  # (tokens,) int32
    kv: torch.Tensor,  # (2, num_blocks, block_size, kv_heads, head_dim)
) -> torch.Tensor:
    """Rotate queries and keys, write keys and values to the cache, return the queries (tokens, heads, head_dim).

    RoFormer (Su et al. 2021), in the layout where element i turns with element i + head_dim / 2.

    Args:
        qkv: the projections.
        turn: from `rotation` of these tokens.
        slots: where each token goes.
        kv: a layer's cache, written in place.
    """
    kv_heads, head_dim = kv.shape[-2:]
    heads = qkv.shape[1] - 2 * kv_heads
    cos, sin = turn
    q_and_k = qkv[:, :-kv_heads].float()
    rotated = torch.addcmul(q_and_k * cos, q_and_k.roll(head_dim // 2, dims=-1), sin).to(qkv.dtype)
    keys, values = kv.view(2, -1, kv_heads, head_dim).unbind(0)
    slots = slots.long()
    keys.index_copy_(0, slots, rotated[:, heads:])
    values.index_copy_(0, slots, qkv[:, -kv_heads:])
    return rotated[:, :heads]


@dataclass(slots=True)
class AttentionPlan:
    """A batch's decodes or prefills as `attention` works through them, the same in every layer."""

    spans: list[Span]  # (requests,)
    blocks: list[torch.Tensor]  # (requests,) of (blocks,) int32, no padding
    masks: list[torch.Tensor | None]  # (requests,) of (rows, context) bool, True where attended; None: see `attention`


def tile_rows(
    cache: torch.Tensor,  # (layers, 2, num_blocks, block_size, kv_heads, head_dim)
) -> int:
    """Query rows of the tiles that a batch lists for this data plane: it needs none."""
    return 0


def plan_decodes(
    batch: ForwardBatch,
    cache: torch.Tensor,  # (layers, 2, num_blocks, block_size, kv_heads, head_dim)
) -> AttentionPlan:
    """Prepare attention for a batch's decodes."""
    spans = [Span(row, 1, context) for row, context in enumerate(batch.context_lens.tolist())]
    return _plan(spans, batch.block_tables[: batch.num_decodes], cache)


def plan_prefills(
    batch: ForwardBatch,
    cache: torch.Tensor,  # (layers, 2, num_blocks, block_size, kv_heads, head_dim)
) -> AttentionPlan:
    """Prepare attention for a batch's prefills and chunks."""
    return _plan(batch.prefills, batch.block_tables[batch.num_decodes :], cache)


def _plan(
    spans: Sequence[Span],
    tables: torch.Tensor,  # (requests, blocks) int32
    cache: torch.Tensor,  # (layers, 2, num_blocks, block_size, kv_heads, head_dim)
) -> AttentionPlan:
    block_size, device = cache.shape[3], tables.device
    blocks = [table[: -(-span.context // block_size)] for table, span in zip(tables, spans, strict=True)]
    return AttentionPlan(list(spans), blocks, [_chunk_mask(span.tokens, span.context, device) for span in spans])


def attention(
    out: torch.Tensor,  # (tokens, heads, head_dim)
    q: torch.Tensor,  # (tokens, heads, head_dim)
    kv: torch.Tensor,  # (2, num_blocks, block_size, kv_heads, head_dim)
    plan: AttentionPlan,
) -> None:
    """Attend from each request's rows to its part of the cache.

    Paged attention (Kwon et al. 2023), one request after the other: its blocks are gathered, slots past its context
    are cut off unread, and row i of m sees the first n - m + i + 1 of n tokens. One request's time does not depend on
    the others of its batch, and for one row is close to linear in n.

    Args:
        out: the token rows of the plan's requests are written.
        q: queries.
        kv: a layer's cache, these token rows' K and V already written.
        plan: from `plan_decodes` or `plan_prefills`.
    """
    kv_heads, head_dim = kv.shape[-2:]
    for (row, tokens, context), blocks, mask in zip(plan.spans, plan.blocks, plan.masks, strict=True):
        gathered = kv.index_select(1, blocks).view(2, 1, -1, kv_heads, head_dim)[:, :, :context]
        keys, values = gathered.transpose(2, 3).unbind(0)  # (1, kv_heads, context, head_dim) each
        queries = q[row : row + tokens].transpose(0, 1)[None]  # (1, heads, rows, head_dim)
        causal = mask is None and tokens > 1  # a whole prompt: the mask that the kernel knows, at half the work
        result = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=True
        )
        out[row : row + tokens] = result[0].transpose(0, 1)


def silu_and_mul(
    gate_up: torch.Tensor,  # (tokens, 2 * inner)
) -> torch.Tensor:
    """Return SiLU(gate) * up (tokens, inner): SwiGLU (Shazeer 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def greedy(
    logits: torch.Tensor,  # (samples, vocab)
) -> torch.Tensor:
    """Return the likeliest token of each row: (samples,) int64, of equals the first; -1 if a logit is NaN."""
    best, tokens = logits.max(dim=-1)
    return tokens.masked_fill_(best.isnan(), -1)


def _chunk_mask(rows: int, context: int, device: torch.device) -> torch.Tensor | None:
    """The causal mask of a later chunk; a whole prompt and a single row need none."""
    if rows in (1, context):
        return None
    return torch.ones(rows, context, dtype=torch.bool, device=device).tril_(context - rows)


def copy_blocks(
    source: torch.Tensor,  # (layers, 2, num_blocks, block_size, kv_heads, head_dim)
    target: torch.Tensor,  # (layers, 2, num_blocks, block_size, kv_heads, head_dim)
    pairs: torch.Tensor,  # (blocks, 2) int64: from, to
) -> None:
    """Copy KV blocks from one cache to another."""
    target[:, :, pairs[:, 1]] = source[:, :, pairs[:, 0]]
