"""The shape of a LLaMA model, on which the simulator, the profiles and the executor must agree.

Reads a preset, a Hugging Face folder or a GGUF file. Knows nothing of torch: a simulation needs a model's shape, not
its weights.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from traces.errors import TandemError

PRESETS = Path(__file__).parent / "presets"
_PLAIN_LLAMA = {  # config keys that make a model another one, and the value under which it stays LLaMA
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "quantization_config": None,
    "sliding_window": None,
    "partial_rotary_factor": 1.0,
    "num_local_experts": None,
}
_GGUF_STOPS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """The stretching of rotary frequencies, for a longer context.

    `linear` divides every frequency by `factor` (Chen et al. 2023, position interpolation). `llama3` divides only the
    low ones, with a smooth passage between `low_freq_factor` and `high_freq_factor` (The Llama 3 Herd of Models, 2024).
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192

    def divisor(self, inv_freq: float) -> float:
        """The divisor of one frequency (radians per token)."""
        if self.kind == "linear":
            return self.factor
        turns = self.original_max_position_embeddings * inv_freq / (2 * math.pi)
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        smooth = min(max(smooth, 0.0), 1.0)
        return 1.0 / (smooth + (1.0 - smooth) / self.factor)


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One LLaMA model's shape and constants; every count is at least 1, and `head_dim` is even."""

    name: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    eos_token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise TandemError(f"{self.name}: {self.num_heads} heads cannot share {self.num_kv_heads} KV heads equally")
        if self.head_dim % 2:
            raise TandemError(f"{self.name}: head_dim is {self.head_dim}; rotary embeddings need an even one")

    @classmethod
    def from_hf(cls, config: dict[str, Any], name: str) -> ModelConfig:
        """Read the contents of a Hugging Face `config.json`, as transformers 4 or 5 writes it.

        Raises:
            TandemError: the model is not plain LLaMA, or a field is missing or makes no sense.
        """
        _refuse_other_models(config, name)
        rope = _rope_fields(config)
        hidden = _count(config, "hidden_size", name)
        heads = _count(config, "num_attention_heads", name)
        return cls(
            name=name,
            vocab_size=_count(config, "vocab_size", name),
            hidden_size=hidden,
            intermediate_size=_count(config, "intermediate_size", name),
            num_layers=_count(config, "num_hidden_layers", name),
            num_heads=heads,
            num_kv_heads=_count(config, "num_key_value_heads", name, default=heads),
            head_dim=_count(config, "head_dim", name, default=hidden // heads),
            max_position_embeddings=_count(config, "max_position_embeddings", name, default=2048),
            rms_norm_eps=_positive(config, "rms_norm_eps", name, default=1e-6),
            rope_theta=_positive(rope, "rope_theta", name, default=10000.0),
            rope_scaling=_rope_scaling(rope, name),
            tie_word_embeddings=bool(config.get("tie_word_embeddings")),
            attention_bias=bool(config.get("attention_bias")),
            mlp_bias=bool(config.get("mlp_bias")),
            eos_token_ids=_token_ids(config.get("eos_token_id")),
        )

    @classmethod
    def from_hf_folder(cls, folder: Path) -> ModelConfig:
        """Read `config.json` of a Hugging Face folder, and the further stop tokens of its `generation_config.json`."""
        config = cls.from_hf(read_json(folder / "config.json"), folder.resolve().name)
        generation = folder / "generation_config.json"
        stops = _token_ids(read_json(generation).get("eos_token_id")) if generation.exists() else ()
        return replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + stops)))

    @classmethod
    def from_gguf(cls, path: Path) -> ModelConfig:
        """Read the metadata of a GGUF file.

        GGUF has no key for LLaMA 3's frequency scaling, only its result, a tensor of divisors: the parameters are
        found again from it and checked against it.
        """
        reader = open_gguf(path)
        config = cls.from_hf(_gguf_fields(reader), path.stem)
        divisors = next((t.data.tolist() for t in reader.tensors if t.name == "rope_freqs.weight"), None)
        if divisors is None:
            return config
        config = replace(config, rope_scaling=RopeScaling("llama3", factor=_meant(max(divisors))))
        if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(config.rope_divisors(), divisors, strict=True)):
            raise TandemError(f"{path}: tensor rope_freqs.weight is not LLaMA 3's scaling; use the model's HF folder")
        return config

    @classmethod
    def from_dict(cls, shape: dict[str, Any]) -> ModelConfig:
        """Read the result of `dataclasses.asdict`, also by way of JSON or YAML."""
        scaling = shape["rope_scaling"]
        rope_scaling = RopeScaling(**scaling) if scaling else None
        return cls(**shape | {"rope_scaling": rope_scaling, "eos_token_ids": tuple(shape["eos_token_ids"])})

    @property
    def num_parameters(self) -> int:
        """Trained numbers in the model; a tied head counts once."""
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = (2 * self.hidden_size) * (query + kv) + self.attention_bias * (query + 2 * kv + self.hidden_size)
        mlp = 3 * self.hidden_size * self.intermediate_size
        mlp += self.mlp_bias * (2 * self.intermediate_size + self.hidden_size)
        embeddings = (1 if self.tie_word_embeddings else 2) * self.vocab_size * self.hidden_size
        return self.num_layers * (attention + mlp + 2 * self.hidden_size) + embeddings + self.hidden_size

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes that one token takes in the KV cache, all layers together."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * dtype_bytes

    def rope_divisors(self) -> tuple[float, ...]:
        """The divisors of the `head_dim / 2` rotary frequencies `theta ** (-2i / head_dim)`."""
        if self.rope_scaling is None:
            return (1.0,) * (self.head_dim // 2)
        frequencies = (self.rope_theta ** (-2 * i / self.head_dim) for i in range(self.head_dim // 2))
        return tuple(self.rope_scaling.divisor(frequency) for frequency in frequencies)


def load_model_config(name_or_path: str | Path) -> ModelConfig:
    """Find a model's shape by preset name, Hugging Face folder or `.gguf` file.

    Raises:
        TandemError: there is no such model, or it is not one that Tandem runs.
    """
    path = Path(name_or_path)
    if path.is_dir():
        return ModelConfig.from_hf_folder(path)
    if path.is_file() and path.suffix == ".gguf":
        return ModelConfig.from_gguf(path)
    presets = {file.stem: file for file in PRESETS.glob("*.yaml")}
    if preset := presets.get(str(name_or_path)):
        return ModelConfig.from_hf(yaml.safe_load(preset.read_text(encoding="utf-8")), preset.stem)
    raise TandemError(f"{name_or_path}: not a Hugging Face folder, a .gguf file or one of {', '.join(sorted(presets))}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises TandemError with the file and the line if it is missing or broken."""
    try:
        contents = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise TandemError(f"{path}:{error.lineno}: not valid JSON ({error.msg}); download the file again") from None
    except (OSError, UnicodeDecodeError) as error:
        raise TandemError(f"{path}: cannot be read ({error}); a Hugging Face folder has this file") from None
    if not isinstance(contents, dict):
        raise TandemError(f"{path}: holds a JSON {type(contents).__name__}, not an object; download the file again")
    return contents


def open_gguf(path: Path) -> Any:
    """Open a GGUF file as a `gguf.GGUFReader`, or say that it is broken."""
    from gguf import GGUFReader  # takes longer to import than the rest of the control plane together

    try:
        return GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise TandemError(f"{path}: corrupt or cut off GGUF file ({first_line(error)}); download it again") from None


def first_line(error: BaseException) -> str:
    """The first line of a library's error, for an error of ours."""
    return (str(error) or type(error).__name__).splitlines()[0]


def _refuse_other_models(config: dict[str, Any], name: str) -> None:
    for key, llama in _PLAIN_LLAMA.items():
        value = config.get(key)
        if value is not None and value != llama:
            raise TandemError(
                f"{name}: {key} is {value!r}; Tandem runs unquantized models of LLaMA's architecture only"
            )
    if config.get("model_type") is None and config.get("architectures") is None:
        raise TandemError(f"{name}: the model's config names no model_type; add the original config.json's")


def _count(config: dict[str, Any], key: str, name: str, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    if type(value) is not int or value < 1:
        raise TandemError(f"{name}: {key} must be a whole number of at least 1, not {value!r}; see the model's config")
    return value


def _positive(config: dict[str, Any], key: str, name: str, default: float | None = None) -> float:
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise TandemError(f"{name}: {key} must be a number above 0, not {value!r}; see the model's config")
    return float(value)


def _rope_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The rotary fields as transformers 5 writes them; version 4 has `rope_scaling` and, beside it, `rope_theta`."""
    beside = {"rope_theta": config.get("rope_theta")}
    return beside | (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})


def _rope_scaling(rope: dict[str, Any], name: str) -> RopeScaling | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise TandemError(
            f"{name}: partial_rotary_factor is {rope['partial_rotary_factor']}; Tandem rotates whole heads"
        )
    if kind in ("default", "none"):
        return None
    if kind == "linear":
        return RopeScaling("linear", _positive(rope, "factor", name))
    if kind != "llama3":
        raise TandemError(f"{name}: RoPE scaling {kind!r} is not supported; Tandem knows none, linear and llama3")
    return RopeScaling(
        "llama3",
        factor=_positive(rope, "factor", name),
        low_freq_factor=_positive(rope, "low_freq_factor", name),
        high_freq_factor=_positive(rope, "high_freq_factor", name),
        original_max_position_embeddings=_count(rope, "original_max_position_embeddings", name),
    )


def _token_ids(value: int | list[int] | None) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, list) else () if value is None else (value,)


def _meant(number: float) -> float:
    """The number that was stored as float32, as GGUF does: 1e-05, not 9.99999975e-06."""
    return float(f"{number:.6g}")


def _gguf_fields(reader: Any) -> dict[str, Any]:
    """A GGUF file's metadata under Hugging Face's names."""

    def value(key: str, default: Any = None) -> Any:
        field = reader.get_field(key)
        contents = default if field is None else field.contents()
        return _meant(contents) if isinstance(contents, float) else contents

    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    return {
        "model_type": value("general.architecture"),
        "num_local_experts": value("llama.expert_count") or None,
        "vocab_size": shapes.get("token_embd.weight", [None])[-1],
        "hidden_size": value("llama.embedding_length"),
        "intermediate_size": value("llama.feed_forward_length"),
        "num_hidden_layers": value("llama.block_count"),
        "num_attention_heads": value("llama.attention.head_count"),
        "num_key_value_heads": value("llama.attention.head_count_kv"),
        "head_dim": value("llama.attention.key_length"),
        "max_position_embeddings": value("llama.context_length"),
        "rms_norm_eps": value("llama.attention.layer_norm_rms_epsilon"),
        "rope_parameters": {
            "rope_theta": value("llama.rope.freq_base", 10000.0),
            "rope_type": value("llama.rope.scaling.type", "default"),
            "factor": value("llama.rope.scaling.factor"),
        },
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_up.bias" in shapes,
        "eos_token_id": [value(key) for key in _GGUF_STOPS if value(key) is not None],
    }
