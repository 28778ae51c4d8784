"""The shape of a model, on which the simulator, the profiles and the executor must agree.

Reads a preset, a Hugging Face folder or a GGUF file. Knows nothing of torch: a simulation needs a model's shape, not
its weights.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from engine.model.families import Family, family_of
from engine.model.fields import Fields
from engine.model.files import read_json
from engine.model.gguf_file import GgufFile
from engine.model.rope import MOST_FACTOR, RopeScaling, read_rope
from traces.errors import TandemError

PRESETS = Path(__file__).parent / "presets"
DTYPES = ("float64", "float32", "float16", "bfloat16")
_ONLY = {  # fields that make a model another one, and the values under which they do not
    "hidden_act": (None, "silu", "swish"),
    "quantization_config": (None,),
    "num_local_experts": (None,),
}
_GGUF_STOPS = tuple(f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))  # of text, turn and message
_GGUF_BF16 = 30  # of `gguf.GGMLQuantizationType`


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """One model's shape and constants; every count is at least 1, and `head_dim` is even.

    Attributes:
        attention_bias: whether q, k, v and o have biases.
        qkv_bias: whether q, k and v have biases, and o has none.
        sliding_window: tokens that a token attends to, its own included. Longer requests cannot be served.
        dtype: of `DTYPES`, in which the model is published. It is no part of the shape.
    """

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
    qkv_bias: bool = False
    sliding_window: int | None = None
    dtype: str | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise TandemError(f"{self.name}: {self.num_heads} heads cannot share {self.num_kv_heads} KV heads equally")
        if self.head_dim % 2:
            raise TandemError(f"{self.name}: head_dim is {self.head_dim}; rotary embeddings need an even one")

    @classmethod
    def from_hf(cls, config: dict[str, Any], name: str) -> ModelConfig:
        """Read the contents of a Hugging Face `config.json`, as transformers 4 or 5 writes it.

        Raises:
            TandemError: the model is of no family that runs, or a field is missing or makes no sense.
        """
        return cls._read(Fields(config, name), name)

    @classmethod
    def _read(cls, fields: Fields, name: str) -> ModelConfig:
        family = family_of(fields)
        _refuse_other_models(fields, family)
        hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
        kv_heads = heads if family.kv_heads is None or "num_key_value_heads" in fields.values else family.kv_heads
        positions = fields.count("max_position_embeddings", default=family.positions)
        rope_theta, rope_scaling = read_rope(fields, positions)
        return cls(
            name=name,
            vocab_size=fields.count("vocab_size"),
            hidden_size=hidden,
            intermediate_size=fields.count("intermediate_size"),
            num_layers=fields.count("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=fields.count("num_key_value_heads", default=kv_heads),
            head_dim=fields.count("head_dim", default=hidden // heads),
            max_position_embeddings=positions,
            rms_norm_eps=fields.number("rms_norm_eps", most=1.0, default=1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            tie_word_embeddings=fields.flag("tie_word_embeddings"),
            attention_bias=fields.flag("attention_bias"),
            mlp_bias=fields.flag("mlp_bias"),
            eos_token_ids=fields.token_ids("eos_token_id"),
            qkv_bias=family.has_qkv_bias,
            sliding_window=family.window(fields),
            dtype=_dtype(fields),
        )

    @classmethod
    def from_hf_folder(cls, folder: Path) -> ModelConfig:
        """Read `config.json` of a Hugging Face folder, and the further stop tokens of its `generation_config.json`."""
        path, generation = folder / "config.json", folder / "generation_config.json"
        config = cls._read(Fields(read_json(path), str(path)), folder.resolve().name)
        more = Fields(read_json(generation), str(generation)) if generation.exists() else Fields({}, "")
        stops = (*config.eos_token_ids, *more.token_ids("eos_token_id"))
        return replace(config, eos_token_ids=tuple(dict.fromkeys(stops)))

    @classmethod
    def from_gguf(cls, path: Path) -> ModelConfig:
        """Read the metadata of a GGUF file.

        GGUF has no key for LLaMA 3's frequency scaling, only its result, a tensor of divisors: the parameters are
        found again from it and checked against it.
        """
        file = GgufFile.open(path)
        fields = _gguf_fields(file)
        if family_of(fields).gguf_interleaves is None:
            raise fields.refusal("model_type", "llama.cpp has no such architecture")
        config = cls._read(fields, path.stem)
        if file.fields.get(fields.keys["value_length"], config.head_dim) != config.head_dim:
            raise fields.refusal("value_length", "Tandem runs models whose keys and values are of one length")
        has_bias = {name: f"blk.0.attn_{name}.bias" in file.tensors for name in ("q", "output")}
        config = replace(config, qkv_bias=config.qkv_bias or (has_bias["q"] and not has_bias["output"]))
        return _with_divisors(config, file) if "rope_freqs.weight" in file.tensors else config

    @classmethod
    def from_dict(cls, shape: dict[str, Any]) -> ModelConfig:
        """Read the result of `to_dict`, also by way of JSON or YAML."""
        scaling = shape["rope_scaling"]
        rope_scaling = RopeScaling(**scaling) if scaling else None
        return cls(**shape | {"rope_scaling": rope_scaling, "eos_token_ids": tuple(shape["eos_token_ids"])})

    def to_dict(self) -> dict[str, Any]:
        """The shape, by field. A field that has its default is left out, as in records from before there was one."""
        defaults = {each.name: each.default for each in fields(self) if each.default is not MISSING}
        known = asdict(self) | {"dtype": None}
        return {name: value for name, value in known.items() if name not in defaults or value != defaults[name]}

    @property
    def longest_request(self) -> int:
        """Tokens of the longest request within the positions and the sliding window."""
        return min(self.max_position_embeddings, self.sliding_window or self.max_position_embeddings)

    def check_window(self, longest: int) -> None:
        """Raises TandemError if requests of so many tokens are longer than the sliding window."""
        if self.sliding_window is not None and longest > self.sliding_window:
            raise TandemError(
                f"{self.name} attends to the last {self.sliding_window:,} tokens alone, which Tandem does not do: "
                f"requests to {longest:,} tokens are too long; lower --max-model-len"
            )

    @property
    def num_parameters(self) -> int:
        """Trained numbers in the model; a tied head counts once."""
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        attention = (2 * self.hidden_size) * (query + kv) + self.attention_bias * self.hidden_size
        attention += (self.attention_bias or self.qkv_bias) * (query + 2 * kv)
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


def _refuse_other_models(fields: Fields, family: Family) -> None:
    for name, values in _ONLY.items():
        if fields.get(name) not in values:
            raise fields.refusal(name, "Tandem runs unquantized, dense models with SiLU only")
    for name in ("attention_bias", "mlp_bias"):
        if fields.flag(name) and not family.reads_biases:
            raise fields.refusal(name, f"{family.model_type} has no such flag")


def _dtype(fields: Fields) -> str | None:
    """Of a config of transformers 5 or, with the older name, 4."""
    name = "torch_dtype" if fields.get("dtype") is None else "dtype"
    dtype = (fields.text(name) or "").removeprefix("torch.")
    if dtype not in ("", *DTYPES):
        raise fields.refusal(name, f"Tandem reads {', '.join(DTYPES)}")
    return dtype or None


def _meant(value: Any) -> Any:
    """The number that was stored as float32, as GGUF does: 1e-05, not 9.99999975e-06. Other values stay."""
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _with_divisors(config: ModelConfig, file: GgufFile) -> ModelConfig:
    """The config with the scaling of `rope_freqs.weight`."""
    tensor = file.tensors["rope_freqs.weight"]
    if (tensor.kind, tensor.shape) == (0, (config.head_dim // 2,)):
        divisors: list[float] = file.bytes_of(tensor).view(np.float32).tolist()
        if 0.999 < max(divisors) < MOST_FACTOR:
            config = replace(config, rope_scaling=RopeScaling("llama3", factor=_meant(max(divisors))))
            if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(config.rope_divisors(), divisors, strict=True)):
                return config
    raise TandemError(f"{file.path}: tensor rope_freqs.weight is not LLaMA 3's scaling; use the model's HF folder")


_GGUF_KEYS = {  # Hugging Face's names, and GGUF's behind the architecture's
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "value_length": "attention.value_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "sliding_window": "attention.sliding_window",
    "num_local_experts": "expert_count",
    "rope_theta": "rope.freq_base",
    "rope_type": "rope.scaling.type",
    "factor": "rope.scaling.factor",
    "attention_factor": "rope.scaling.attn_factor",
    "partial_rotary_factor": "rope.dimension_count",
}
_OLD_FACTOR = "rope.scale_linear"


def _gguf_fields(file: GgufFile) -> Fields:
    """A GGUF file's metadata under Hugging Face's names. A number that is 0, as llama.cpp writes it, is not there."""
    architecture, tensors = file.fields.get("general.architecture"), file.tensors
    keys = {name: f"{architecture}.{key}" for name, key in _GGUF_KEYS.items()}
    keys |= {"model_type": "general.architecture", "eos_token_id": ", ".join(_GGUF_STOPS)}
    values = {name: _meant(file.fields.get(key)) or None for name, key in keys.items()}
    kinds = {tensor.kind for tensor in tensors.values()}
    stops = [file.fields[key] for key in _GGUF_STOPS if key in file.fields]
    values |= _gguf_rope(values, _meant(file.fields.get(f"{architecture}.{_OLD_FACTOR}")))
    return Fields(
        values
        | {
            "use_sliding_window": values["sliding_window"] is not None,
            "max_window_layers": 0,
            "vocab_size": tensors["token_embd.weight"].shape[0] if "token_embd.weight" in tensors else None,
            "tie_word_embeddings": "output.weight" not in tensors,
            "attention_bias": "blk.0.attn_output.bias" in tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in tensors,
            "eos_token_id": stops,
            "dtype": "bfloat16" if _GGUF_BF16 in kinds else None,
        },
        str(file.path),
        keys | {"vocab_size": "tensor token_embd.weight: its number of rows"},
    )


def _gguf_rope(values: dict[str, Any], old_factor: Any) -> dict[str, Any]:
    """The rotary fields as transformers has them. A factor without a type scales linearly, as in llama.cpp."""
    rope = {name: values.pop(name) for name in ("rope_theta", "rope_type", "factor", "attention_factor")}
    rope["factor"] = rope["factor"] or old_factor
    if rope["rope_type"] is None and rope["factor"] not in (None, 1):
        rope["rope_type"] = "linear"
    if rope["attention_factor"] == 1:
        rope["attention_factor"] = None
    hidden, heads, turned = (values[name] for name in ("hidden_size", "num_attention_heads", "partial_rotary_factor"))
    whole = values["head_dim"] or (hidden // heads if type(hidden) is type(heads) is int else None)
    return {"rope_parameters": rope, "partial_rotary_factor": None if turned == whole else turned}
