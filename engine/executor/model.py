"""The LLaMA forward pass over a flat batch and a paged KV cache (Touvron et al. 2023), written once over `ops`.

Knows layers and their order; does not know how an operation is computed, and knows no request and no step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch

from engine.executor.batch import ForwardBatch, KVCache, build_batch
from engine.executor.reference import ops as reference
from engine.executor.weights import LayerWeights, Weights
from engine.model.config import ModelConfig

Probe = Callable[[str], None]
"""Called after each group of operations with its name; a profiler reads a clock there."""


class _ForwardPass(NamedTuple):
    """The data that every layer of one forward pass shares."""

    attention: dict[str, Any]  # plans, which are the data plane's own, by the name of their group
    rotation: Any
    slots: torch.Tensor  # (tokens,) int32
    probe: Probe


class Llama:
    """A LLaMA model that a data plane runs.

    Args:
        config: the model's shape.
        weights: taken over: each matrix is repacked in place for `ops`, one at a time. (A tied head is packed too; the
            embedding, which is looked up by row, stays beside it as it is.)
        ops: the data plane, a module like `engine.executor.reference.ops`.
    """

    def __init__(self, config: ModelConfig, weights: Weights, ops: ModuleType = reference) -> None:
        self.config = config
        self.weights = weights
        self.ops = ops
        self.inv_freq = _inv_freq(config).to(weights.embedding.device)
        for layer in weights.layers:
            for matrix in ("qkv", "o", "gate_up", "down"):
                setattr(layer, matrix, ops.pack(getattr(layer, matrix)))
        weights.head = ops.pack(weights.head)

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and cache."""
        return self.weights.embedding.dtype

    def batch(
        self, requests: Sequence[tuple[Sequence[int], int, Sequence[int]]], num_decodes: int, cache: KVCache
    ) -> ForwardBatch:
        """Make a batch of one's own over `cache`; arguments and errors are those of `build_batch`."""
        tile_rows, device = self.ops.tile_rows(cache.data), cache.data.device
        return build_batch(requests, num_decodes, cache.block_size, tile_rows, device)

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, cache: KVCache, probe: Probe | None = None) -> torch.Tensor:
        """Run one step: write the batch's K and V into the cache, return the next token ids (samples,) int64.

        Groups probed: plan, embed, then for each layer norm, qkv, rope_and_cache, attention_decode (if there are
        decodes), attention_prefill (if there are prefills), o, norm, gate_up, silu, down; at the end head.
        """
        probe = probe or (lambda _: None)
        tokens: torch.Tensor = self.ops.greedy(self.logits(batch, cache, probe))
        if batch.last_tokens is not None:
            batch.last_tokens.index_copy_(0, batch.sample_table_rows.long(), tokens)
        probe("head")
        return tokens

    @torch.inference_mode()
    def logits(self, batch: ForwardBatch, cache: KVCache, probe: Probe | None = None) -> torch.Tensor:
        """Run one step like `forward`, but return the logits (samples, vocab)."""
        ops, weights, eps = self.ops, self.weights, self.config.rms_norm_eps
        step = self._plan(batch, cache, probe or (lambda _: None))
        update = ops.embed(batch.token_ids, batch.last_tokens, weights.embedding)  # of the block before, not yet added
        hidden = torch.zeros_like(update)  # (tokens, hidden), the residual stream
        step.probe("embed")
        for layer, kv in zip(weights.layers, cache.layers, strict=True):
            x = ops.add_rms_norm(hidden, update, layer.input_norm, eps)
            step.probe("norm")
            update = self._attention(x, layer, kv, step)
            x = ops.add_rms_norm(hidden, update, layer.post_norm, eps)
            step.probe("norm")
            update = self._mlp(x, layer, step.probe)
        if not batch.all_rows:
            hidden, update = (each.index_select(0, batch.sample_rows) for each in (hidden, update))
        x = ops.add_rms_norm(hidden, update, weights.final_norm, eps)
        logits: torch.Tensor = ops.linear(x, weights.head, None)
        return logits

    def _plan(self, batch: ForwardBatch, cache: KVCache, probe: Probe) -> _ForwardPass:
        """Decodes and prefills apart, since they cost differently; padding of the first may lie on the second's rows,
        so the first goes first."""
        plans = {
            "attention_decode": self.ops.plan_decodes(batch, cache.data) if batch.num_decodes else None,
            "attention_prefill": self.ops.plan_prefills(batch, cache.data) if len(batch.prefills) else None,
        }
        step = _ForwardPass(
            attention={name: plan for name, plan in plans.items() if plan is not None},
            rotation=self.ops.rotation(batch.positions, self.inv_freq),
            slots=batch.slots,
            probe=probe,
        )
        probe("plan")
        return step

    def _attention(
        self,
        x: torch.Tensor,  # (tokens, hidden)
        layer: LayerWeights,
        kv: torch.Tensor,  # (2, num_blocks, block_size, kv_heads, head_dim)
        step: _ForwardPass,
    ) -> torch.Tensor:
        ops, tokens = self.ops, len(x)
        qkv = ops.linear(x, layer.qkv, layer.qkv_bias)
        step.probe("qkv")
        q = ops.rope_and_cache(qkv.view(tokens, -1, self.config.head_dim), step.rotation, step.slots, kv)
        step.probe("rope_and_cache")
        attended = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for name, plan in step.attention.items():
            ops.attention(attended, q, kv, plan)
            step.probe(name)
        update: torch.Tensor = ops.linear(attended.view(tokens, -1), layer.o, layer.o_bias)
        step.probe("o")
        return update

    def _mlp(
        self,
        x: torch.Tensor,  # (tokens, hidden)
        layer: LayerWeights,
        probe: Probe,
    ) -> torch.Tensor:
        ops = self.ops
        gate_up = ops.linear(x, layer.gate_up, layer.gate_up_bias)
        probe("gate_up")
        inner = ops.silu_and_mul(gate_up)
        probe("silu")
        update: torch.Tensor = ops.linear(inner, layer.down, layer.down_bias)
        probe("down")
        return update


def _inv_freq(config: ModelConfig) -> torch.Tensor:
    """The rotary frequencies, radians per token, float32 (head_dim / 2,)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return 1.0 / config.rope_theta**exponents / torch.tensor(config.rope_divisors())
