"""A model's weights: from a Hugging Face folder or a GGUF file, or random ones of the right shape.

Knows how weights are named and stored; does not know how they are used. Tensors are read one at a time, straight into
the fused matrices, so that loading needs little more memory than the model.
"""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple
from zipfile import is_zipfile

import numpy as np
import torch
from gguf import GGMLQuantizationType, dequantize
from safetensors import safe_open

from engine.model.config import ModelConfig
from engine.model.families import FAMILIES
from engine.model.files import check_file, first_line, read_json, shown
from engine.model.gguf_file import GgufFile, GgufTensor
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
_IGNORED = ("rope_freqs.",)  # the divisors that the config holds
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # of safetensors


class _Part(NamedTuple):
    """A tensor of a checkpoint, under its two names; one or more, stacked, make a tensor of ours."""

    hf: str
    gguf: str
    shape: tuple[int, ...]


class _Stored(NamedTuple):
    """A tensor in a checkpoint: its shape, its type or what stands for that in the file, and how to read it."""

    shape: tuple[int, ...]
    dtype: Any
    read: Callable[[], torch.Tensor]


_Make = Callable[[list[_Part]], torch.Tensor]
_Tensors = dict[str, _Stored]


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """A checkpoint's tensors, by name. One is taken out when it is read."""

    path: Path
    is_gguf: bool
    tensors: _Tensors

    def name_of(self, part: _Part) -> str:
        return part.gguf if self.is_gguf else part.hf

    def check(self, part: _Part) -> None:
        """Raises TandemError unless the tensor is there, as the config says, in a type that can be read."""
        name = self.name_of(part)
        if name not in self.tensors:
            raise TandemError(f"{self.path}: has no tensor {name}; the file is incomplete or its config is another's")
        shape, dtype, _ = self.tensors[name]
        if shape != part.shape:
            shapes = f"{shape}, where the config says {part.shape}"
            raise TandemError(f"{self.path}: tensor {name} is {shapes}; file and config are of different models")
        if dtype not in _FLOATS.values():
            kinds = ", ".join(str(each).removeprefix("torch.") for each in _FLOATS.values())
            raise TandemError(f"{self.path}: tensor {name} is of type {dtype}; Tandem reads {kinds}")

    def read(self, part: _Part) -> torch.Tensor:
        name = self.name_of(part)
        try:
            return self.tensors.pop(name).read()
        except Exception as error:  # of many classes: those of torch, safetensors, gguf and the file system
            raise TandemError(f"{self.path}: cannot read tensor {name} ({first_line(error)})") from None


def load_weights(path: Path, config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> Weights:
    """Load a Hugging Face folder (safetensors or PyTorch files, sharded or not) or a `.gguf` file (dequantized).

    Where a config ties the head to the embedding, and the files have both, they are tied only if they are equal. So
    does transformers.

    Raises:
        TandemError: no weights there, a file is corrupt or cut off, or a tensor is missing, unexpected or misshapen.
    """
    checkpoint = _open_gguf(path, config) if path.suffix == ".gguf" else _open_folder(path, config.tie_word_embeddings)
    load = partial(_load, checkpoint=checkpoint, dtype=dtype, device=device)
    weights = _build(config, load)
    if config.tie_word_embeddings and _HEAD in checkpoint.tensors:
        head = load(_parts("head", [(config.vocab_size, config.hidden_size)]))
        if not torch.equal(head, weights.embedding):
            weights = replace(weights, head=head)
    left = [name for name in checkpoint.tensors if not name.startswith(_IGNORED) and not name.endswith("inv_freq")]
    if left:
        raise TandemError(
            f"{path}: has tensor {shown(left[0])}, which its architecture has not; Tandem cannot run this model"
        )
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
        "qkv": ([q, kv, kv], hidden, config.attention_bias or config.qkv_bias),
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
    for part in parts:
        checkpoint.check(part)  # before there is memory for what a wrong config says
    tensor = torch.empty(_stacked(parts), dtype=dtype, device=device)
    for rows, part in zip(torch.split(tensor, [part.shape[0] for part in parts]), parts, strict=True):
        rows.copy_(checkpoint.read(part))
    return tensor


_HEAD, _EMBEDDING = (_parts(name, [()])[0].hf for name in ("head", "embedding"))


def _open_folder(folder: Path, tied: bool) -> _Checkpoint:
    """The files that transformers would take: a whole file goes before an index, safetensors before PyTorch's."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).exists() or index.exists():
            shards = [name] if (folder / name).exists() else _shards(index)
            tensors = dict(chain.from_iterable(_open_shard(folder / shard).items() for shard in shards))
            return _Checkpoint(folder, False, _with_usual_names(tensors, tied))
    raise TandemError(f"{folder}: no model.safetensors or pytorch_model.bin (or their index) in it")


def _shards(index: Path) -> list[str]:
    files = read_json(index).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise TandemError(f"{index}: weight_map must be an object that names tensors' files; download the file again")
    for tensor, file in files.items():
        if not isinstance(file, str) or Path(file).name != file:
            wrong = f"weight_map has {reprlib.repr(file)} for tensor {reprlib.repr(tensor)}"
            raise TandemError(f"{index}: {wrong}, not the name of a file beside it; download the file again")
    return sorted(set(files.values()))


def _with_usual_names(tensors: _Tensors, tied: bool) -> _Tensors:
    """As saved with a head: without one, names lack `model.`. If they are tied, a lone head is the embedding too."""
    if _EMBEDDING.removeprefix("model.") in tensors:
        tensors = {name if name == _HEAD else f"model.{name}": tensor for name, tensor in tensors.items()}
    if tied and _HEAD in tensors and _EMBEDDING not in tensors:
        tensors[_EMBEDDING] = tensors[_HEAD]
    return tensors


def _open_shard(file: Path) -> _Tensors:
    check_file(file)
    try:
        return _open_safetensors(file) if file.suffix == ".safetensors" else _open_bin(file)
    except UnpicklingError:  # its message is a page
        raise TandemError(f"{file}: corrupt, or it holds more than tensors; download it again") from None
    except Exception as error:  # of many classes
        raise TandemError(f"{file}: corrupt or cut off ({first_line(error)}); download it again") from None


def _open_safetensors(file: Path) -> _Tensors:
    shard: Any = safe_open(file, framework="pt")
    stored = {}
    names: list[str] = shard.keys()
    for name in names:
        found = shard.get_slice(name)
        dtype = found.get_dtype()
        stored[name] = _Stored(tuple(found.get_shape()), _FLOATS.get(dtype, dtype), partial(shard.get_tensor, name))
    return stored


def _open_bin(file: Path) -> _Tensors:
    """Pickles of tensors, and of nothing that could run. Before PyTorch 1.6 they were no zip files, and cannot be
    mapped into memory."""
    tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
    stored = {}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout is not torch.strided:
            raise ValueError(f"it has a {type(tensor).__name__} under {reprlib.repr(name)}, where tensors have names")
        stored[name] = _Stored(tuple(tensor.shape), tensor.dtype, tensor.detach)
    return stored


def _open_gguf(path: Path, config: ModelConfig) -> _Checkpoint:
    file = GgufFile.open(path)
    interleaves = FAMILIES[file.fields["general.architecture"].lower()].gguf_interleaves
    heads = {".attn_q.": config.num_heads, ".attn_k.": config.num_kv_heads} if interleaves else {}
    tensors = {}
    for name, tensor in file.tensors.items():
        interleaved = next((count for part, count in heads.items() if part in name), None)
        tensors[name] = _Stored(tensor.shape, torch.float32, partial(_read_gguf, file, tensor, interleaved))
    return _Checkpoint(path, True, tensors)


def _read_gguf(file: GgufFile, tensor: GgufTensor, heads: int | None) -> torch.Tensor:
    """Dequantize to float32, with the rows of Q and K back in the order that `rope_and_cache` turns.

    llama.cpp turns neighbours (2i, 2i + 1) in LLaMA, so its converter interleaves the halves of each head.
    """
    dequantized = dequantize(file.bytes_of(tensor), GGMLQuantizationType(tensor.kind))
    values: torch.Tensor = torch.from_numpy(np.require(dequantized, requirements="W"))
    if heads is None:
        return values
    return values.view(heads, -1, 2, *values.shape[1:]).transpose(1, 2).reshape(values.shape)
