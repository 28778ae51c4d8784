"""A LLaMA model's weights: from a Hugging Face folder or a GGUF file, or random ones of the right shape.

Knows how weights are named and stored; does not know how they are used. Tensors are read one at a time, straight into
the fused matrices, so that loading needs little more memory than the model.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import dequantize
from safetensors import SafetensorError, safe_open

from engine.model.config import ModelConfig, first_line, open_gguf, read_json
from traces.errors import TandemError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(slots=True)
class LayerWeights:
    """One decoder layer; matrices are (out, in). q, k, v are one matrix of stacked rows, and so are gate and up."""

    input_norm: torch.Tensor  # (hidden,)
    qkv: torch.Tensor  # ((heads + 2 * kv_heads) * head_dim, hidden)
    o: torch.Tensor  # (hidden, heads * head_dim)
    post_norm: torch.Tensor  # (hidden,)
    gate_up: torch.Tensor  # (2 * intermediate, hidden)
    down: torch.Tensor  # (hidden, intermediate)
    qkv_bias: torch.Tensor | None = None  # ((heads + 2 * kv_heads) * head_dim,)
    o_bias: torch.Tensor | None = None  # (hidden,)
    gate_up_bias: torch.Tensor | None = None  # (2 * intermediate,)
    down_bias: torch.Tensor | None = None  # (hidden,)


@dataclass(slots=True)
class Weights:
    """A whole model."""

    embedding: torch.Tensor  # (vocab, hidden)
    layers: list[LayerWeights]
    final_norm: torch.Tensor  # (hidden,)
    head: torch.Tensor  # (vocab, hidden); the embedding itself when they are tied


_NAMES = {  # ours: the Hugging Face and the GGUF name of each tensor stacked in it
    "embedding": [("model.embed_tokens", "token_embd")],
    "input_norm": [("input_layernorm", "attn_norm")],
    "qkv": [("self_attn.q_proj", "attn_q"), ("self_attn.k_proj", "attn_k"), ("self_attn.v_proj", "attn_v")],
    "o": [("self_attn.o_proj", "attn_output")],
    "post_norm": [("post_attention_layernorm", "ffn_norm")],
    "gate_up": [("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up")],
    "down": [("mlp.down_proj", "ffn_down")],
    "final_norm": [("model.norm", "output_norm")],
    "head": [("lm_head", "output")],
}
_IGNORED = ("lm_head.", "output.", "rope_freqs.")  # the copy of a tied head; the divisors that the config holds


class _Part(NamedTuple):
    """A tensor of a checkpoint, under its two names; one or more, stacked, make a tensor of ours."""

    hf: str
    gguf: str
    shape: tuple[int, ...]


_Make = Callable[[list[_Part]], torch.Tensor]
_Readers = dict[str, Callable[[], torch.Tensor]]


class _Checkpoint(NamedTuple):
    """Readers of a checkpoint's tensors, by name. A reader is taken out when it is used."""

    path: Path
    is_gguf: bool
    readers: _Readers

    def read(self, part: _Part) -> torch.Tensor:
        name = part.gguf if self.is_gguf else part.hf
        if name not in self.readers:
            raise TandemError(f"{self.path}: has no tensor {name}; the file is incomplete or its config is another's")
        try:
            tensor = self.readers.pop(name)()
        except (RuntimeError, OSError, ValueError, NotImplementedError) as error:
            raise TandemError(f"{self.path}: cannot read tensor {name} ({first_line(error)})") from None
        if tensor.shape != part.shape:
            shapes = f"{tuple(tensor.shape)}, where the config says {part.shape}"
            raise TandemError(f"{self.path}: tensor {name} is {shapes}; file and config are of different models")
        return tensor


def load_weights(path: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> Weights:
    """Load a Hugging Face folder (safetensors or PyTorch files, sharded or not) or a `.gguf` file (dequantized).

    Raises:
        TandemError: no weights there, a file is corrupt or cut off, or a tensor is missing, unexpected or misshapen.
    """
    checkpoint = _open_gguf(path, config) if path.suffix == ".gguf" else _open_folder(path)
    weights = _build(config, partial(_load, checkpoint=checkpoint, dtype=dtype, device=device))
    left = [name for name in checkpoint.readers if not name.startswith(_IGNORED) and not name.endswith("inv_freq")]
    if left:
        raise TandemError(f"{path}: has tensor {left[0]}, which LLaMA has not; Tandem cannot run this model")
    return weights


def dummy_weights(config: ModelConfig, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> Weights:
    """Make weights uniform in +-1e-3, for timing a model whose weights are not at hand."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(parts: list[_Part]) -> torch.Tensor:
        return torch.empty(_stacked(parts), dtype=dtype, device=device).uniform_(-1e-3, 1e-3, generator=generator)

    return _build(config, draw)


def _build(config: ModelConfig, make: _Make) -> Weights:
    vocab = (config.vocab_size, config.hidden_size)
    embedding = make(_parts("embedding", [vocab]))
    return Weights(
        embedding=embedding,
        layers=[_build_layer(config, layer, make) for layer in range(config.num_layers)],
        final_norm=make(_parts("final_norm", [vocab[1:]])),
        head=embedding if config.tie_word_embeddings else make(_parts("head", [vocab])),
    )


def _build_layer(config: ModelConfig, layer: int, make: _Make) -> LayerWeights:
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    matrices = {  # outputs of each part, inputs, has a bias
        "qkv": ([q, kv, kv], hidden, config.attention_bias),
        "o": ([hidden], q, config.attention_bias),
        "gate_up": ([inner, inner], hidden, config.mlp_bias),
        "down": ([hidden], inner, config.mlp_bias),
    }
    made = {name: make(_parts(name, [(hidden,)], layer)) for name in ("input_norm", "post_norm")}
    for name, (outputs, inputs, has_bias) in matrices.items():
        made[name] = make(_parts(name, [(out, inputs) for out in outputs], layer))
        if has_bias:
            made[f"{name}_bias"] = make(_parts(name, [(out,) for out in outputs], layer, kind="bias"))
    return LayerWeights(**made)


def _parts(ours: str, shapes: Sequence[tuple[int, ...]], layer: int | None = None, kind: str = "weight") -> list[_Part]:
    hf_prefix, gguf_prefix = ("", "") if layer is None else (f"model.layers.{layer}.", f"blk.{layer}.")
    return [
        _Part(f"{hf_prefix}{hf}.{kind}", f"{gguf_prefix}{gguf}.{kind}", shape)
        for (hf, gguf), shape in zip(_NAMES[ours], shapes, strict=True)
    ]


def _stacked(parts: list[_Part]) -> tuple[int, ...]:
    return (sum(part.shape[0] for part in parts), *parts[0].shape[1:])


def _load(parts: list[_Part], checkpoint: _Checkpoint, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    tensor = torch.empty(_stacked(parts), dtype=dtype, device=device)
    for rows, part in zip(torch.split(tensor, [part.shape[0] for part in parts]), parts, strict=True):
        rows.copy_(checkpoint.read(part))
    return tensor


def _open_folder(folder: Path) -> _Checkpoint:
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        shards = sorted(set(read_json(index).get("weight_map", {}).values())) if index.exists() else [name]
        if index.exists() or (folder / name).exists():
            readers = [_open_shard(folder / shard).items() for shard in shards]
            return _Checkpoint(folder, False, dict(chain.from_iterable(readers)))
    raise TandemError(f"{folder}: no model.safetensors or pytorch_model.bin (or their index) in it")


def _open_shard(file: Path) -> _Readers:
    try:
        if file.suffix == ".safetensors":
            shard: Any = safe_open(file, framework="pt")
            names: list[str] = shard.keys()
            return {name: partial(shard.get_tensor, name) for name in names}
        tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        return {name: partial(torch.Tensor.detach, tensor) for name, tensor in tensors.items()}
    except (SafetensorError, RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise TandemError(f"{file}: missing, corrupt or cut off ({first_line(error)}); download it again") from None


def _open_gguf(path: Path, config: ModelConfig) -> _Checkpoint:
    heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads}
    tensors = open_gguf(path).tensors
    return _Checkpoint(
        path, True, {each.name: partial(_read_gguf, each, heads.get(each.name.split(".")[-2])) for each in tensors}
    )


def _read_gguf(tensor: Any, heads: int | None) -> torch.Tensor:
    """Dequantize to float32, with the rows of Q and K back in the order that `rope_and_cache` turns.

    llama.cpp turns neighbours (2i, 2i + 1), so its converter interleaves the halves of each head.
    """
    values: torch.Tensor = torch.from_numpy(np.require(dequantize(tensor.data, tensor.tensor_type), requirements="W"))
    if heads is None:
        return values
    return values.view(heads, -1, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
