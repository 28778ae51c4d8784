"""The executor's forward pass against transformers' LlamaForCausalLM, on random models of every kind it runs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import KINDS, PagedPool, load_llama, tiny_model
from transformers import LlamaForCausalLM

from engine.executor.cpu import ops as cpu_ops
from engine.executor.model import Llama
from engine.executor.reference import ops


def reload(model: LlamaForCausalLM, folder: Path, dtype: torch.dtype = torch.float32) -> Llama:
    model.save_pretrained(folder)
    return load_llama(folder, dtype)


def random_tokens(lengths: list[int], seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(101) for _ in range(length)] for length in lengths]


@torch.no_grad()
def expected_logits(model: LlamaForCausalLM, texts: list[list[int]]) -> list[torch.Tensor]:
    """Transformers' logits (length, vocab) of each text, all at once and alone."""
    return [model(torch.tensor([text])).logits[0] for text in texts]


def run_mixed(llama: Llama, texts: list[list[int]], chunks: list[list[int]], block_size: int) -> list[torch.Tensor]:
    """The same logits from paged steps: text i starts at step i and runs `chunks[i]` rows a step, then decodes.

    So steps hold whole prompts, first and later chunks, and decodes side by side.
    """
    pool = PagedPool(llama, sum(len(text) // block_size + 1 for text in texts), block_size)
    sequences = [pool.sequence(text) for text in texts]
    plans = [iter(plan + [1] * (len(text) - sum(plan))) for text, plan in zip(texts, chunks, strict=True)]
    logits: list[list[torch.Tensor]] = [[] for _ in texts]
    step = 0
    while any(sequence.cached < len(sequence.token_ids) for sequence in sequences):
        started = range(min(step + 1, len(texts)))
        running = [i for i in started if sequences[i].cached < len(texts[i])]
        rows = {i: next(plans[i]) for i in running}
        prefills = [i for i in running if rows[i] > 1 or sequences[i].cached == 0]
        decodes = [i for i in running if i not in prefills]
        batch = pool.batch([(sequences[i], rows[i]) for i in prefills], [sequences[i] for i in decodes], all_rows=True)
        got = llama.logits(batch, pool.cache).split([rows[i] for i in decodes + prefills])
        for i, part in zip(decodes + prefills, got, strict=True):
            logits[i].append(part)
        step += 1
    return [torch.cat(parts) for parts in logits]


def assert_all_close(got: list[torch.Tensor], expected: list[torch.Tensor], atol: float = 1e-4) -> None:
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


@pytest.mark.parametrize("block_size", [1, 16, 32])
@pytest.mark.parametrize("kind", KINDS)
def test_logits_equal_transformers(kind: str, block_size: int, tmp_path: Path) -> None:
    """Whole prompts, chunks and decodes in one batch, over shuffled blocks of a cache that was full of NaN."""
    model = tiny_model(seed=len(kind), **KINDS[kind])
    texts = random_tokens([70, 35, 33, 5, 90])
    chunks = [[64], [3, 7, 20], [1, 31], [4], [16, 16, 16, 16, 16]]
    got = run_mixed(reload(model, tmp_path), texts, chunks, block_size)
    assert_all_close(got, expected_logits(model, texts))


@pytest.fixture(scope="module")
def gqa(tmp_path_factory: pytest.TempPathFactory) -> tuple[LlamaForCausalLM, Llama]:
    model = tiny_model()
    return model, reload(model, tmp_path_factory.mktemp("gqa"))


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_chunking_never_changes_logits(gqa: tuple[LlamaForCausalLM, Llama], data: st.DataObject) -> None:
    model, llama = gqa
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    chunks = [_draw_chunks(data, length) for length in lengths]
    texts = random_tokens(lengths, seed=sum(lengths))
    got = run_mixed(llama, texts, chunks, data.draw(st.sampled_from([1, 3, 16])))
    assert_all_close(got, expected_logits(model, texts))


def _draw_chunks(data: st.DataObject, length: int) -> list[int]:
    chunks: list[int] = []
    while sum(chunks) < length and data.draw(st.booleans()):
        chunks.append(data.draw(st.integers(1, length - sum(chunks))))
    return chunks


def test_forward_returns_the_likeliest_tokens_of_the_sampled_rows(gqa: tuple[LlamaForCausalLM, Llama]) -> None:
    model, llama = gqa
    texts = random_tokens([20, 9])
    pool = PagedPool(llama, 4, 16)
    batch = pool.batch([(pool.sequence(text), len(text)) for text in texts], [], all_rows=False)
    expected = [logits[-1].argmax().item() for logits in expected_logits(model, texts)]
    assert llama.forward(batch, pool.cache).tolist() == expected


def test_an_unfinished_chunk_samples_nothing(gqa: tuple[LlamaForCausalLM, Llama]) -> None:
    model, llama = gqa
    text = random_tokens([30])[0]
    pool = PagedPool(llama, 2, 16)
    sequence = pool.sequence(text)
    first = pool.batch([(sequence, 20)], [], all_rows=False)
    first.sample_rows = first.sample_rows[:0]
    assert llama.forward(first, pool.cache).shape == (0,)
    rest = pool.batch([(sequence, 10)], [], all_rows=False)
    assert llama.forward(rest, pool.cache).item() == expected_logits(model, [text])[0][-1].argmax().item()


def test_only_the_batch_own_slots_are_written(gqa: tuple[LlamaForCausalLM, Llama]) -> None:
    _, llama = gqa
    pool = PagedPool(llama, 5, 16)
    batch = pool.batch([(pool.sequence(random_tokens([20])[0]), 20)], [], all_rows=False)
    llama.forward(batch, pool.cache)
    written = ~pool.cache.data.isnan().flatten(2, 3).all(-1).all(-1)  # (layers, 2, slots)
    assert written.nonzero()[:, 2].unique().tolist() == sorted(batch.slots.tolist())
    assert not pool.cache.data.flatten(2, 3)[:, :, batch.slots].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    """Within four times the error that transformers makes in the same precision, which is never zero."""
    model = tiny_model()
    texts = random_tokens([60])
    llama = reload(model, tmp_path, dtype)
    exact = expected_logits(model, texts)[0]
    theirs = (expected_logits(model.to(dtype), texts)[0].float() - exact).abs().max()
    pool = PagedPool(llama, 5, 16, dtype)
    sequence = pool.sequence(texts[0])
    parts = [llama.logits(pool.batch([(sequence, rows)], [], all_rows=True), pool.cache) for rows in (40, 20)]
    assert 0 < (torch.cat(parts).float() - exact).abs().max() < 4 * theirs


def test_marks_follow_every_group_of_operations(gqa: tuple[LlamaForCausalLM, Llama]) -> None:
    _, llama = gqa
    pool = PagedPool(llama, 4, 16)
    decoding = pool.sequence(random_tokens([9])[0])
    names: list[str] = []
    llama.forward(pool.batch([(decoding, 8)], [], all_rows=False), pool.cache)
    mixed = pool.batch([(pool.sequence(random_tokens([5])[0]), 5)], [decoding], all_rows=False)
    llama.forward(mixed, pool.cache, names.append)
    attention = ["norm", "qkv", "rope_and_cache", "attention_decode", "attention_prefill", "o"]
    layer = [*attention, "norm", "gate_up", "silu", "down"]
    assert names == ["plan", "embed", *layer, *layer, "head"]


def test_packed_products_are_the_plain_ones_and_a_pytorch_without_the_operators_multiplies_plainly(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(size, generator=generator) for size in ((3, 48), (64, 48), (64,)))
    expected = ops.linear(x, weight, bias)
    torch.testing.assert_close(cpu_ops.linear(x, cpu_ops.pack(weight), bias), expected)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(cpu_ops, "_ONE_DNN", cpu_ops._one_dnn())
    assert cpu_ops.pack(weight) is weight and torch.equal(cpu_ops.linear(x, weight, bias), expected)
