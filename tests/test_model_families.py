"""Which model folders and GGUF files are read as which model: transformers, given the same files, is the oracle."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from test_weights import LLAMA, TEXT, logits, save_bin, save_gguf
from tiny_models import KINDS, PagedPool, load_llama, tiny_model
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from analysis.jobs.limits import gpu_limits
from analysis.jobs.options import Limits
from engine.config import ServingConfig
from engine.executor.cpu.machine import Cpu
from engine.executor.cuda.machine import Cuda
from engine.executor.executor import Executor
from engine.executor.model import _inv_freq
from engine.executor.weights import load_weights
from engine.model.config import ModelConfig, load_model_config
from traces.errors import TandemError

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = {"rope_type": "linear", "factor": 2.0}


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@torch.no_grad()
def theirs(folder: Path) -> torch.Tensor:
    """Transformers' logits (length, vocab) of the model in a folder."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(torch.tensor([TEXT])).logits[0]


def assert_read_alike(folder: Path) -> None:
    torch.testing.assert_close(logits(folder), theirs(folder), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["MHA, tied", "biases", "Mistral", "Qwen2"])
def test_greedy_tokens_are_those_that_transformers_generates(kind: str, tmp_path: Path) -> None:
    model = tiny_model(**KINDS[kind])
    model.save_pretrained(tmp_path)
    expected = model.generate(torch.tensor([TEXT]), do_sample=False, max_new_tokens=16, eos_token_id=None)[0].tolist()
    llama = load_llama(tmp_path)
    pool = PagedPool(llama, 4, 8)
    sequence = pool.sequence(list(TEXT), new_tokens=16)
    step = pool.batch([(sequence, len(TEXT))], [], all_rows=False)
    for _ in range(16):
        sequence.token_ids += llama.forward(step, pool.cache).tolist()
        step = pool.batch([], [sequence], all_rows=False)
    assert sequence.token_ids == expected


# -- config.json -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": 5e5},
        {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_scaling": {"type": "linear", "factor": 2}, "rope_theta": 5e5},
        {"rope_scaling": LLAMA3 | {"rope_theta": 7e5}, "rope_theta": 5e5},
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}},
        {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 64}, "original_max_position_embeddings": 32},
        {"rope_scaling": {}, "rope_parameters": LINEAR, "rope_theta": 5e5},
        {"rope_scaling": None, "rope_parameters": LLAMA3},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 5e5},
        {"rope_theta": 5e5},
        {},
    ],
    ids=str,
)
def test_rotary_frequencies_are_those_of_transformers(fields: dict[str, Any]) -> None:
    config = LLAMA | {"hidden_size": 128, "max_position_embeddings": 256} | fields
    expected = LlamaRotaryEmbedding(LlamaConfig.from_dict(json.loads(json.dumps(config)))).inv_freq
    torch.testing.assert_close(_inv_freq(ModelConfig.from_hf(config, "m")), expected)


@pytest.mark.parametrize(
    ("rope", "message"),
    [
        ({"factor": 2.0}, "rope_scaling.factor is 2.0; of which scaling"),
        ({"type": "linear", "rope_type": "default", "factor": 2.0}, "rope_scaling.type is 'linear'; rope_type beside"),
        (LINEAR | {"attention_factor": 1.2}, "rope_scaling.attention_factor is 1.2"),
        (LINEAR | {"mscale": 2}, "rope_scaling.mscale is 2"),
        ({"full_attention": LINEAR}, "rope_scaling.full_attention is "),
        (LLAMA3 | {"low_freq_factor": 4.0}, "rope_scaling.high_freq_factor must be above low_freq_factor"),
        (LLAMA3 | {"original_max_position_embeddings": 0}, "rope_scaling.original_max_position_embeddings must be"),
    ],
)
def test_scaling_that_is_not_supported_is_refused_and_not_ignored(rope: dict[str, Any], message: str) -> None:
    with pytest.raises(TandemError, match=f"^m: {message}"):
        ModelConfig.from_hf(LLAMA | {"rope_scaling": rope}, "m")


@pytest.mark.parametrize(
    "fields",
    [
        {"architectures": ["LLaMAForCausalLM"]},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": []},
        {"architectures": None},
        {"architectures": ["LlamaForCausalLM"], "model_type": None},
        {"model_type": "LLaMA"},
    ],
    ids=str,
)
def test_a_family_is_known_by_either_name_in_any_spelling(fields: dict[str, Any]) -> None:
    assert ModelConfig.from_hf(LLAMA | fields, "m") == ModelConfig.from_hf(LLAMA, "m")


@pytest.mark.parametrize("kind", ["gemma2", "qwen3", "mixtral", "phi3", "llava", "qwen2_moe"])
def test_another_architecture_is_named(kind: str) -> None:
    with pytest.raises(TandemError, match=f"^m: model_type is '{kind}'; Tandem runs models of llama, mistral, qwen2"):
        ModelConfig.from_hf(LLAMA | {"model_type": kind}, "m")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is"),
        ({"model_type": "mistral", "architectures": ["LlamaForCausalLM"]}, "architectures is"),
        ({"model_type": "mistral", "attention_bias": True}, "attention_bias is True; mistral has no such flag"),
        ({"model_type": "qwen2", "mlp_bias": True}, "mlp_bias is True; qwen2 has no such flag"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype is 'float8_e4m3fn'"),
    ],
)
def test_a_config_that_says_two_things_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(TandemError, match=f"^m: {message}"):
        ModelConfig.from_hf(LLAMA | fields, "m")


@pytest.mark.parametrize("family", [LlamaConfig, MistralConfig, Qwen2Config])
def test_fields_that_are_left_out_have_the_defaults_of_transformers(family: Any) -> None:
    given = {name: value for name, value in LLAMA.items() if name != "model_type"}
    given |= {"hidden_size": 64, "num_attention_heads": 32}
    config, expected = ModelConfig.from_hf(given | {"model_type": family.model_type}, "m"), family(**given)
    assert config.num_kv_heads == expected.num_key_value_heads
    assert config.max_position_embeddings == expected.max_position_embeddings
    assert config.sliding_window == expected.sliding_window if family is not LlamaConfig else True
    assert (config.rms_norm_eps, config.rope_theta) == (expected.rms_norm_eps, expected.rope_parameters["rope_theta"])


# -- sliding windows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "window"),
    [
        ({"model_type": "mistral"}, 4096),
        ({"model_type": "mistral", "sliding_window": None}, None),
        ({"model_type": "mistral", "sliding_window": 9}, 9),
        ({"model_type": "qwen2", "sliding_window": 9}, None),
        ({"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True}, None),  # from layer 28 on
        ({"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True, "max_window_layers": 0}, 9),
        (
            {"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True}
            | {"max_window_layers": 0, "layer_types": ["full_attention"]},
            None,
        ),
        (
            {"model_type": "qwen2", "sliding_window": 9, "use_sliding_window": True}
            | {"layer_types": ["sliding_attention"]},
            9,
        ),
    ],
    ids=str,
)
def test_a_window_is_one_where_transformers_has_one(fields: dict[str, Any], window: int | None) -> None:
    config = {**LLAMA, "num_key_value_heads": 2, **fields}
    assert ModelConfig.from_hf(config, "m").sliding_window == window
    theirs = {"mistral": MistralConfig, "qwen2": Qwen2Config}[config.pop("model_type")](**config)
    slides = "sliding_attention" in getattr(theirs, "layer_types", ["sliding_attention"])
    assert (theirs.sliding_window if slides else None) == window


def test_within_the_window_logits_are_transformers_own(tmp_path: Path) -> None:
    tiny_model(**KINDS["Mistral"] | {"sliding_window": len(TEXT)}).save_pretrained(tmp_path)
    assert load_model_config(tmp_path).sliding_window == len(TEXT)
    assert_read_alike(tmp_path)


def test_requests_beyond_the_window_are_not_served(tmp_path: Path) -> None:
    tiny_model(**KINDS["Mistral"] | {"sliding_window": 100}).save_pretrained(tmp_path)
    model = load_model_config(tmp_path)
    assert gpu_limits(model, Limits()).config.max_model_len == 100
    message = "attends to the last 100 tokens alone.* requests to 101 tokens are too long"
    with pytest.raises(TandemError, match=message):
        gpu_limits(model, Limits(max_model_len=101, allow_long_context=True))
    config = ServingConfig(num_blocks=20, block_size=16, max_seqs=1, max_batched_tokens=64, max_model_len=101)
    with pytest.raises(TandemError, match=message):
        Executor(str(tmp_path), device="cpu", threads=1).session([], config)


# -- weights -----------------------------------------------------------------------------------------------


def own_head(model: Any) -> dict[str, torch.Tensor]:
    return model.state_dict() | {"lm_head.weight": 2 * model.state_dict()["lm_head.weight"]}


def without(name: str, model: Any) -> dict[str, torch.Tensor]:
    return {each: tensor for each, tensor in model.state_dict().items() if each != name}


TIED = {
    "both, equal": lambda model: model.state_dict(),
    "both, of which the head is another": own_head,
    "the head alone": lambda model: without("model.embed_tokens.weight", model),
    "the embedding alone": lambda model: without("lm_head.weight", model),
    "a model without a head": lambda model: model.model.state_dict(),
}


@pytest.mark.parametrize("stored", TIED)
def test_a_tied_model_is_read_as_transformers_reads_it(stored: str, tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    model.config.save_pretrained(tmp_path)
    torch.save(TIED[stored](model), tmp_path / "pytorch_model.bin")
    assert_read_alike(tmp_path)


def test_an_untied_model_without_a_head_is_not_run(tmp_path: Path) -> None:
    tiny_model().model.save_pretrained(tmp_path)
    with pytest.raises(TandemError, match=r"has no tensor lm_head.weight"):
        load_weights(tmp_path, load_model_config(tmp_path), torch.float32, "cpu")


def test_pickles_from_before_pytorch_1_6_are_read(tmp_path: Path) -> None:
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_read_alike(tmp_path)


class Runs:
    def __reduce__(self) -> Any:
        return print, ("a pickle ran",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_runs_nothing(zipped: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    tiny_model().config.save_pretrained(tmp_path)
    torch.save({"x": Runs()}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(TandemError, match=r"pytorch_model.bin: corrupt") as error:
        load_weights(tmp_path, load_model_config(tmp_path), torch.float32, "cpu")
    assert "\n" not in str(error.value) and "a pickle ran" not in capfd.readouterr().out


def test_a_whole_file_goes_before_an_index_that_is_left_from_another(tmp_path: Path) -> None:
    tiny_model(seed=1).save_pretrained(tmp_path, max_shard_size="100KB")
    tiny_model(seed=2).save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "model.safetensors").rename(tmp_path / "model.safetensors")
    save_bin(tiny_model(seed=3), tmp_path, shards=2)
    assert_read_alike(tmp_path)


@pytest.mark.parametrize("kind", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn], ids=str)
def test_weights_that_are_no_floats_are_refused(kind: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    changed = model.state_dict() | {"model.norm.weight": torch.ones(66).to(kind)}
    torch.save(changed, tmp_path / "pytorch_model.bin")
    with pytest.raises(TandemError, match=r"tensor model.norm.weight is of type .*; Tandem reads float64"):
        load_weights(tmp_path, load_model_config(tmp_path), torch.float32, "cpu")


# -- GGUF --------------------------------------------------------------------------------------------------


def gguf_config(folder: Path, change: Any, **fields: Any) -> ModelConfig:
    save_gguf(tiny_model(**fields), folder / "tiny.gguf", change=change)
    return load_model_config(folder / "tiny.gguf")


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_a_gguf_factor_without_a_type_scales_linearly(key: str, tmp_path: Path) -> None:
    """As in llama.cpp, whose default type is linear and which falls back to the older key."""
    config = gguf_config(tmp_path, lambda writer: writer.add_float32(f"llama.{key}", 4.0))
    assert config.rope_divisors()[0] == 4.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN), "llama.rope.scaling.type is 'yarn'"),
        (lambda w: w.add_rope_scaling_attn_factors(1.5), "llama.rope.scaling.attn_factor is 1.5"),
        (lambda w: w.add_sliding_window(64), "llama.attention.sliding_window is 64"),
        (lambda w: w.add_value_length(32), "llama.attention.value_length is 32"),
        (lambda w: w.add_expert_count(8), "llama.expert_count is 8"),
        (lambda w: w.add_uint32("split.count", 3), "is a part of a model; join the parts"),
        (lambda w: w.add_string("tokenizer.ggml.eot_token_id", "x"), "eot_token_id.* must be a token id"),
    ],
)
def test_gguf_metadata_that_is_not_supported_is_refused_by_its_key(change: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TandemError, match=f"tiny.gguf: {message}".replace(": eot", ": .*eot")):
        gguf_config(tmp_path, change)


def test_ends_of_text_turn_and_message_all_stop(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter) -> None:
        writer.add_eot_token_id(5)
        writer.add_eom_token_id(7)

    assert gguf_config(tmp_path, change).eos_token_ids == (2, 5, 7)


# -- dtypes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "dtype"),
    [
        ({"torch_dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "torch.bfloat16"}, "bfloat16"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "float16"),
        ({}, None),
    ],
)
def test_the_dtype_of_a_config_is_known_and_is_no_part_of_the_shape(fields: dict[str, Any], dtype: str | None) -> None:
    config = ModelConfig.from_hf(LLAMA | fields, "m")
    assert config.dtype == dtype
    assert config == ModelConfig.from_hf(LLAMA, "m") and "dtype" not in config.to_dict()


@pytest.mark.parametrize(
    ("model", "dtype"),
    [("llama-3-8b", "float16"), ("llama-2-7b", "float16"), ("qwen2.5-7b", "bfloat16"), ("mistral-7b", "bfloat16")],
)
def test_a_gpu_computes_in_bfloat16_if_the_model_says_so_and_a_cpu_in_float32(model: str, dtype: str) -> None:
    """The presets of LLaMA say float16: the profiles that ship were measured so."""
    config = load_model_config(model)
    assert Cuda.default_dtype(Cuda.__new__(Cuda), config) == dtype
    assert Cpu(1).default_dtype(config) == "float32"


def test_dummy_weights_that_memory_does_not_hold_are_refused_before_any_is_made(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"num_hidden_layers": 2**31 - 1, "hidden_size": 2**20}))
    with pytest.raises(TandemError, match="GiB for its weights in float32, more than"):
        Executor(str(tmp_path), device="cpu", threads=1, load_format="dummy")


@pytest.mark.parametrize("kind", ["biases", "Mistral", "Qwen2"])
def test_a_shape_comes_back_from_records(kind: str) -> None:
    config = ModelConfig.from_hf(tiny_model(**KINDS[kind]).config.to_dict(), "m")
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_records_of_llama_are_as_they_were_before_other_families() -> None:
    assert list(load_model_config("llama-3-8b").to_dict())[-2:] == ["mlp_bias", "eos_token_ids"]


# -- files that claim more than they hold ------------------------------------------------------------------


def header(fields: bytes, tensors: int = 0, count: int = 1, tail: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, count) + fields + tail


def key(name: str, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name.encode() + struct.pack("<I", kind) + value


HUGE = {
    "an array of 2^40 bytes": header(key("a", 9, struct.pack("<IQ", 0, 2**40))),
    "an array of 2^60 texts": header(key("a", 9, struct.pack("<IQ", 8, 2**60))),
    "an array of arrays": header(key("a", 9, struct.pack("<IQ", 9, 1) * 100_000)),
    "text of 2^63 bytes": header(key("a", 8, struct.pack("<Q", 2**63))),
    "2^60 fields": header(b"", count=2**60),
    "2^60 tensors": header(b"", tensors=2**60, count=0),
    "a tensor of 2^60 rows": header(
        b"", 1, 0, struct.pack("<Q", 1) + b"t" + struct.pack("<IQQIQ", 2, 32, 2**60, 0, 0) + bytes(64)
    ),
    "a tensor at 2^63": header(b"", 1, 0, struct.pack("<Q", 1) + b"t" + struct.pack("<IQIQ", 1, 1, 0, 2**63)),
}


@pytest.mark.parametrize("claim", HUGE)
def test_a_gguf_file_that_claims_more_than_it_holds_is_corrupt(claim: str, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(HUGE[claim])
    with pytest.raises(TandemError, match=r"m.gguf: corrupt or cut off GGUF file") as error:
        load_model_config(tmp_path / "m.gguf")
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "value", ["x", "32", {}, [], True, -1, 0, 1.5, 1e300, 10**400, float("nan"), {"a": [{"b": 1}]}], ids=repr
)
@pytest.mark.parametrize(
    "field", ["vocab_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "max_position_embeddings"]
)
def test_a_count_of_another_type_or_size_is_named_with_file_field_and_value(
    field: str, value: Any, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {field: value}))
    with pytest.raises(TandemError, match=rf"config.json: {field} must be .*, not .*; see the model's config") as error:
        load_model_config(tmp_path)
    assert str(error.value).isprintable() and len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rope_scaling", "x"),
        ("rope_scaling", []),
        ("rope_parameters", False),
        ("rope_theta", "x"),
        ("rope_theta", 1e300),
        ("rms_norm_eps", True),
        ("rms_norm_eps", 1e300),
        ("tie_word_embeddings", "no"),
        ("attention_bias", 1),
        ("eos_token_id", {}),
        ("eos_token_id", [2, None]),
        ("eos_token_id", -1),
        ("architectures", [1]),
        ("model_type", 5),
        ("torch_dtype", 16),
    ],
)
def test_so_is_any_other_field(field: str, value: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {field: value}))
    with pytest.raises(TandemError, match=rf"config.json: {field} must be .*, not .*; see the model's config"):
        load_model_config(tmp_path)


@pytest.mark.parametrize("files", [["a"], {}, None, {"t": ["a"]}, {"t": 5}, {"t": "../a.bin"}, {"t": "/etc/hosts"}])
def test_an_index_whose_map_is_no_map_of_files_is_named(files: Any, tmp_path: Path) -> None:
    tiny_model().config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    with pytest.raises(TandemError, match=r"index.json: weight_map "):
        load_weights(tmp_path, load_model_config(tmp_path), torch.float32, "cpu")


def test_a_byte_order_mark_before_json_is_read_over(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA), encoding="utf-8-sig")
    assert load_model_config(tmp_path).vocab_size == 8
