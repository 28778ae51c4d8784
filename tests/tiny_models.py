"""Random little LLaMA models, and paged sequences to feed them: what the executor's tests share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from engine.executor.batch import ForwardBatch, KVCache
from engine.executor.model import Llama
from engine.executor.runner import Rows, build_batch
from engine.executor.weights import load_weights
from engine.model_config import load_model_config

NO_BLOCK = 2**31 - 1

torch.set_num_threads(1)  # on tensors this small a second thread is only waited for


def tiny_model(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A transformers model with weights wide enough that logits are of order 1, norms and biases included."""
    fields = {
        "vocab_size": 101,
        "hidden_size": 66,
        "intermediate_size": 91,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 256,
        "eos_token_id": 2,
    }
    model = LlamaForCausalLM(LlamaConfig(**(fields | changes))).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.normal_(1, 0.2, generator=generator)
    return model


def load_llama(path: Path, dtype: torch.dtype = torch.float32) -> Llama:
    config = load_model_config(path)
    return Llama(config, load_weights(path, config, dtype, "cpu"))


@dataclass
class Sequence:
    """A request as the tests drive it: its tokens, the blocks it owns, and how many tokens are in the cache."""

    token_ids: list[int]
    blocks: list[int]
    prompt_len: int
    cached: int = 0


@dataclass
class PagedPool:
    """A KV cache full of NaN, whose blocks are handed out in shuffled order."""

    llama: Llama
    num_blocks: int
    block_size: int
    dtype: torch.dtype = torch.float32
    cache: KVCache = field(init=False)

    def __post_init__(self) -> None:
        self.cache = KVCache.allocate(self.llama.config, self.num_blocks, self.block_size, self.dtype, "cpu")
        self.cache.data.fill_(torch.nan)
        self.free = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(1)).tolist()

    def sequence(self, token_ids: list[int], new_tokens: int = 0) -> Sequence:
        """Take the blocks for a text and what it will grow by."""
        blocks = -(-(len(token_ids) + new_tokens) // self.block_size)
        return Sequence(token_ids, [self.free.pop() for _ in range(blocks)], len(token_ids))

    def release(self, sequence: Sequence) -> None:
        self.free.extend(sequence.blocks)

    def batch(self, prefills: list[tuple[Sequence, int]], decodes: list[Sequence], all_rows: bool) -> ForwardBatch:
        """The next tokens of some sequences, which count as cached from now on.

        Samples every row, or the last row of each sequence. Block tables are padded with what must not be read.
        """
        parts = [*prefills, *((sequence, 1) for sequence in decodes)]
        rows = [Rows(one.token_ids[one.cached : one.cached + n], one.cached, one.blocks, True) for one, n in parts]
        batch = build_batch(rows, len(decodes), self.block_size)
        for table, (sequence, count) in zip(batch.block_tables, parts, strict=True):
            sequence.cached += count
            table[-(-sequence.cached // self.block_size) :] = NO_BLOCK
        if all_rows:
            batch.sample_rows = torch.arange(len(batch.token_ids))
        return batch
