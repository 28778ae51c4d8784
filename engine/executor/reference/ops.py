"""The operations of a LLaMA forward pass in plain PyTorch, for any device.

Another data plane is a module with these names and signatures. Nothing here knows layers, weights' names or steps.

Shapes: `tokens` rows of a flat batch, `requests` of 1 or more rows each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from engine.executor.batch import ForwardBatch


def pack(weight: torch.Tensor) -> torch.Tensor:
    """Return a matrix (out, in) in the layout that `linear` multiplies fastest; the original is no longer needed.

    On a CPU that is oneDNN's blocked layout: in float32 about twice as fast as the plain one at 1 to 64 tokens, and,
    unlike it, never slower for fewer tokens.
    """
    plain = weight.device.type == "cpu" and weight.dtype == torch.float32 and not weight.is_mkldnn
    if not (plain and torch._C._has_mkldnn):
        return weight
    packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Multiply `x` (tokens, in) by a packed `weight` (out, in) and add `bias` (out,): (tokens, out)."""
    if not weight.is_mkldnn:
        return F.linear(x, weight, bias)
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def add_rms_norm(hidden: torch.Tensor, update: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Add `update` to `hidden` in place, both (tokens, hidden), and return the RMS norm of the sum.

    Root Mean Square Layer Normalization (Zhang and Sennrich 2019); the mean is taken in float32.
    """
    hidden += update
    return F.rms_norm(hidden, weight.shape, weight, eps)


def rotation(positions: torch.Tensor, inv_freq: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Prepare the rotary embedding of a pass: cosines and signed sines, float32 (tokens, 1, head_dim) each.

    `positions` is (tokens,), `inv_freq` (head_dim / 2,) in radians per token.
    """
    angles = (positions[:, None].float() * inv_freq)[:, None]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rope_and_cache(
    qkv: torch.Tensor, turn: tuple[torch.Tensor, torch.Tensor], slots: torch.Tensor, kv: torch.Tensor
) -> torch.Tensor:
    """Rotate queries and keys, write keys and values to the cache, return the queries (tokens, heads, head_dim).

    RoFormer (Su et al. 2021), in the layout where element i turns with element i + head_dim / 2.

    Args:
        qkv: (tokens, heads + 2 * kv_heads, head_dim).
        turn: what `rotation` returned for these tokens.
        slots: (tokens,) where each token goes.
        kv: a layer's cache (2, num_blocks, block_size, kv_heads, head_dim), written in place.
    """
    kv_heads, head_dim = kv.shape[-2:]
    heads = qkv.shape[1] - 2 * kv_heads
    cos, sin = turn
    q_and_k = qkv[:, :-kv_heads].float()
    rotated = torch.addcmul(q_and_k * cos, q_and_k.roll(head_dim // 2, dims=-1), sin).to(qkv.dtype)
    keys, values = kv.view(2, -1, kv_heads, head_dim).unbind(0)
    keys.index_copy_(0, slots, rotated[:, heads:])
    values.index_copy_(0, slots, qkv[:, -kv_heads:])
    return rotated[:, :heads]


@dataclass(slots=True)
class AttentionPlan:
    """What `attention` needs to know of some consecutive requests, the same in every layer."""

    rows: list[int]  # (requests,) rows of each
    context_lens: list[int]  # (requests,)
    blocks: list[torch.Tensor]  # (requests,) of (blocks,) int32, no padding
    masks: list[torch.Tensor | None]  # (requests,) of (rows, context) bool, True where attended; None: see `attention`


def plan_attention(batch: ForwardBatch, first: int, last: int, block_size: int) -> AttentionPlan:
    """Prepare attention for the requests `first` to `last` (exclusive) of a batch."""
    rows = [batch.query_start[i + 1] - batch.query_start[i] for i in range(first, last)]
    contexts = batch.context_lens[first:last]
    device = batch.block_tables.device
    return AttentionPlan(
        rows=rows,
        context_lens=contexts,
        blocks=[batch.block_tables[first + i, : -(-n // block_size)] for i, n in enumerate(contexts)],
        masks=[_chunk_mask(m, n, device) for m, n in zip(rows, contexts, strict=True)],
    )


def attention(q: torch.Tensor, kv: torch.Tensor, plan: AttentionPlan) -> torch.Tensor:
    """Attend from each request's rows to its part of the cache: (tokens, heads, head_dim), as `q`.

    Paged attention (Kwon et al. 2023), one request after the other: its blocks are gathered, slots past its context
    are cut off unread, and row i of m sees the first n - m + i + 1 of n tokens. One request's time does not depend on
    the others of its batch, and for one row is close to linear in n.

    Args:
        q: (tokens, heads, head_dim), the rows of the plan's requests.
        kv: a layer's cache (2, num_blocks, block_size, kv_heads, head_dim), these rows' K and V already written.
        plan: from `plan_attention`.
    """
    kv_heads, head_dim = kv.shape[-2:]
    results = []
    requests = zip(torch.split(q, plan.rows), plan.context_lens, plan.blocks, plan.masks, strict=True)
    for rows, context, blocks, mask in requests:
        gathered = kv.index_select(1, blocks).view(2, 1, -1, kv_heads, head_dim)[:, :, :context]
        keys, values = gathered.transpose(2, 3).unbind(0)  # (1, kv_heads, context, head_dim) each
        queries = rows.transpose(0, 1)[None]  # (1, heads, rows, head_dim)
        causal = mask is None and len(rows) > 1  # a whole prompt: the mask that the kernel knows, at half the work
        result = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=causal, enable_gqa=True
        )
        results.append(result[0].transpose(0, 1))
    return torch.cat(results)


def silu_and_mul(gate_up: torch.Tensor) -> torch.Tensor:
    """Return SiLU(gate) * up (tokens, inner) of `gate_up` (tokens, 2 * inner): SwiGLU (Shazeer 2020)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def greedy(logits: torch.Tensor) -> torch.Tensor:
    """Return the likeliest token of each row of (samples, vocab): (samples,) int64."""
    return logits.argmax(dim=-1)


def _chunk_mask(rows: int, context: int, device: torch.device) -> torch.Tensor | None:
    """The causal mask of a later chunk; a whole prompt and a single row need none."""
    if rows in (1, context):
        return None
    return torch.ones(rows, context, dtype=torch.bool, device=device).tril_(context - rows)
