"""The LLaMA forward pass over a flat batch and a paged KV cache (Touvron et al. 2023), written once over `ops`.

Knows layers and their order; does not know how an operation is computed, nor what a request or a step is.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from engine.executor.batch import ForwardBatch, KVCache
from engine.executor.reference import ops as reference
from engine.executor.weights import LayerWeights, Weights
from engine.model_config import ModelConfig

Mark = Callable[[str], None]
"""Called after each group of operations with its name; a profiler reads a clock there."""


class _Pass(NamedTuple):
    """What every layer of one forward pass shares."""

    prefill_rows: int
    prefills: Any  # the plans are the data plane's own
    decodes: Any
    rotation: Any
    slots: torch.Tensor
    mark: Mark


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

    @torch.inference_mode()
    def forward(self, batch: ForwardBatch, cache: KVCache, mark: Mark | None = None) -> torch.Tensor:
        """Run one step: write the batch's K and V into the cache, return the next token ids (samples,).

        Groups marked: plan, embed, then for each layer norm, qkv, rope_and_cache, attention_prefill (if there are
        prefills), attention_decode (if there are decodes), o, norm, gate_up, silu, down; at the end head.
        """
        mark = mark or _no_mark
        tokens: torch.Tensor = self.ops.greedy(self.logits(batch, cache, mark))
        mark("head")
        return tokens

    @torch.inference_mode()
    def logits(self, batch: ForwardBatch, cache: KVCache, mark: Mark | None = None) -> torch.Tensor:
        """Run one step like `forward`, but return the logits (samples, vocab)."""
        ops, weights, eps = self.ops, self.weights, self.config.rms_norm_eps
        step = self._plan(batch, cache, mark or _no_mark)
        update = F.embedding(batch.token_ids, weights.embedding)  # (tokens, hidden), what the last block adds
        hidden = torch.zeros_like(update)  # to the residual stream
        step.mark("embed")
        for layer, kv in zip(weights.layers, cache.layers, strict=True):
            x = ops.add_rms_norm(hidden, update, layer.input_norm, eps)
            step.mark("norm")
            update = self._attention(x, layer, kv, step)
            x = ops.add_rms_norm(hidden, update, layer.post_norm, eps)
            step.mark("norm")
            update = self._mlp(x, layer, step.mark)
        rows = batch.sample_rows
        x = ops.add_rms_norm(hidden[rows], update[rows], weights.final_norm, eps)
        logits: torch.Tensor = ops.linear(x, weights.head, None)
        return logits

    def _plan(self, batch: ForwardBatch, cache: KVCache, mark: Mark) -> _Pass:
        ops, block_size, requests = self.ops, cache.block_size, len(batch.context_lens)
        prefills = requests - batch.num_decodes
        step = _Pass(
            prefill_rows=batch.query_start[prefills],
            prefills=ops.plan_attention(batch, 0, prefills, block_size),
            decodes=ops.plan_attention(batch, prefills, requests, block_size),
            rotation=ops.rotation(batch.positions, self.inv_freq),
            slots=batch.slots,
            mark=mark,
        )
        mark("plan")
        return step

    def _attention(self, x: torch.Tensor, layer: LayerWeights, kv: torch.Tensor, step: _Pass) -> torch.Tensor:
        ops, tokens = self.ops, len(x)
        qkv = ops.linear(x, layer.qkv, layer.qkv_bias)
        step.mark("qkv")
        q = ops.rope_and_cache(qkv.view(tokens, -1, self.config.head_dim), step.rotation, step.slots, kv)
        step.mark("rope_and_cache")
        attended = self._attend(q, kv, step)
        update: torch.Tensor = ops.linear(attended.view(tokens, -1), layer.o, layer.o_bias)
        step.mark("o")
        return update

    def _attend(self, q: torch.Tensor, kv: torch.Tensor, step: _Pass) -> torch.Tensor:
        """Prefills and decodes apart, since they cost differently."""
        parts: list[torch.Tensor] = []
        if step.prefill_rows > 0:
            parts.append(self.ops.attention(q[: step.prefill_rows], kv, step.prefills))
            step.mark("attention_prefill")
        if step.prefill_rows < len(q):
            parts.append(self.ops.attention(q[step.prefill_rows :], kv, step.decodes))
            step.mark("attention_decode")
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _mlp(self, x: torch.Tensor, layer: LayerWeights, mark: Mark) -> torch.Tensor:
        ops = self.ops
        gate_up = ops.linear(x, layer.gate_up, layer.gate_up_bias)
        mark("gate_up")
        inner = ops.silu_and_mul(gate_up)
        mark("silu")
        update: torch.Tensor = ops.linear(inner, layer.down, layer.down_bias)
        mark("down")
        return update


def _inv_freq(config: ModelConfig) -> torch.Tensor:
    """The rotary frequencies, radians per token, float32 (head_dim / 2,)."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    return 1.0 / config.rope_theta**exponents / torch.tensor(config.rope_divisors())


def _no_mark(name: str) -> None:
    pass
