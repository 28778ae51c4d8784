"""Random little models, and paged sequences to feed them: what the executor's tests share."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from engine.executor.batch import ForwardBatch, KVCache
from engine.executor.cpu import ops
from engine.executor.model import Llama
from engine.executor.weights import Weights, load_weights
from engine.model.config import load_model_config

NO_BLOCK = 2**31 - 1

torch.set_num_threads(1)  # on tensors this small a second thread is only waited for

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS: dict[str, dict[str, object]] = {
    "MHA, tied": {"num_attention_heads": 3, "num_key_value_heads": 3, "tie_word_embeddings": True},
    "MQA of 2": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 128},
    "GQA of 3, odd hidden": {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 117},
    "GQA of 4, head_dim 80": {"num_attention_heads": 8, "num_key_value_heads": 2, "hidden_size": 64, "head_dim": 80},
    "GQA of 5, head_dim 96": {"num_attention_heads": 10, "num_key_value_heads": 2, "hidden_size": 50, "head_dim": 96},
    "MQA of 6": {"num_attention_heads": 6, "num_key_value_heads": 1},
    "GQA of 7, odd hidden": {"num_attention_heads": 7, "num_key_value_heads": 1, "hidden_size": 77, "head_dim": 80},
    "GQA of 8, tied": {
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "hidden_size": 96,
        "tie_word_embeddings": True,
    },
    "head_dim from hidden size": {"hidden_size": 120, "num_attention_heads": 6, "head_dim": None},
    "linear RoPE": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
    "llama3 RoPE": {"rope_parameters": LLAMA3},
    "theta 500000, eps 1e-3": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "rms_norm_eps": 1e-3,
    },
    "biases": {"attention_bias": True, "mlp_bias": True},
    "Mistral": {"family": MistralConfig, "sliding_window": None},
    "Qwen2": {"family": Qwen2Config, "hidden_size": 256, "num_attention_heads": 4, "head_dim": None},
    "Qwen2, tied": {"family": Qwen2Config, "tie_word_embeddings": True},
}


def save_number_tokenizer(folder: Path, vocab_size: int = 101) -> None:
    """A tokenizer whose words are the token ids in digits: of a text, the ids can be read off."""
    tokenizer = Tokenizer(models.WordLevel({str(token): token for token in range(vocab_size)}, unk_token="0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def tiny_model(seed: int = 0, family: type[PreTrainedConfig] = LlamaConfig, **changes: object) -> LlamaForCausalLM:
    """A transformers model with weights wide enough that logits are of order 1, norms and biases included.

    Its class is LLaMA's, or that of another family: their modules have the same names.
    """
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
    given = {name: value for name, value in (fields | changes).items() if (name, value) != ("head_dim", None)}
    model: LlamaForCausalLM = AutoModelForCausalLM.from_config(family(**given)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.normal_(1, 0.2, generator=generator)
    return model


def tensors(weights: Weights) -> list[torch.Tensor]:
    ours = [weights.embedding, weights.final_norm, weights.head]
    for layer in weights.layers:
        ours += [tensor for name in layer.__slots__ if (tensor := getattr(layer, name)) is not None]
    return ours


def theirs(model: LlamaForCausalLM) -> list[torch.Tensor]:
    """The same tensors from transformers' model, stacked as ours are."""
    stacked = [model.model.embed_tokens.weight, model.model.norm.weight, model.lm_head.weight]
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        q_k_v, gate_up = [attention.q_proj, attention.k_proj, attention.v_proj], [mlp.gate_proj, mlp.up_proj]
        matrices = [q_k_v, [attention.o_proj], gate_up, [mlp.down_proj]]
        weights = [torch.cat([part.weight for part in parts]) for parts in matrices]
        biases = [torch.cat([part.bias for part in parts]) for parts in matrices if parts[0].bias is not None]
        norms = [layer.input_layernorm.weight, layer.post_attention_layernorm.weight]
        stacked += [norms[0], *weights[:2], norms[1], *weights[2:], *biases]
    return stacked


def assert_same(weights: Weights, model: LlamaForCausalLM) -> None:
    for ours, expected in zip(tensors(weights), theirs(model), strict=True):
        assert torch.equal(ours.to_dense() if ours.is_mkldnn else ours, expected)


def load_llama(path: Path, dtype: torch.dtype = torch.float32) -> Llama:
    config = load_model_config(path)
    return Llama(config, load_weights(path, config, dtype, "cpu"), ops)


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
        """The next tokens of some sequences, decodes first, which count as cached from now on.

        Samples every row, or the last row of each sequence. Block tables are padded with what must not be read.
        """
        parts = [*((sequence, 1) for sequence in decodes), *prefills]
        rows = [(one.token_ids[one.cached : one.cached + n], one.cached, one.blocks) for one, n in parts]
        batch = self.llama.batch(rows, len(decodes), self.cache)
        for table, (sequence, count) in zip(batch.block_tables, parts, strict=True):
            sequence.cached += count
            table[-(-sequence.cached // self.block_size) :] = NO_BLOCK
        if all_rows:
            batch.all_rows = True
        return batch
