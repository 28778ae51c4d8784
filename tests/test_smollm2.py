"""SmolLM2-135M with real weights and real prompts: the executor writes what transformers writes, token for token."""

from __future__ import annotations

from collections import deque
from itertools import islice
from typing import Any

import pytest
import torch
from tiny_models import PagedPool, Sequence, assert_same, load_llama
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from engine.executor.model import Llama
from engine.executor.tokenizer import load_tokenizer, smollm2_path
from traces.sharegpt import conversations, sharegpt_path

PROMPTS, NEW_TOKENS, LONGEST_PROMPT = 32, 64, 128
TIE = 1e-4  # two logits this close may change places with the order of a sum


@pytest.fixture(scope="module")
def oracle() -> LlamaForCausalLM:
    """Transformers' model, loaded by transformers' own GGUF code."""
    path = smollm2_path()
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(smollm2_path())


@pytest.fixture(scope="module")
def prompts(tokenizer: Any) -> list[list[int]]:
    """The first turns of the first conversations of ShareGPT that are short enough."""
    turns = (turns[0] for turns in conversations(sharegpt_path(), warn=print) if turns and len(turns[0]) < 500)
    encoded = (tokenizer(turn)["input_ids"] for turn in turns)
    return list(islice((ids for ids in encoded if 4 <= len(ids) <= LONGEST_PROMPT), PROMPTS))


@pytest.fixture(scope="module")
def llama() -> Llama:
    return load_llama(smollm2_path())


@pytest.fixture(scope="module")
def outputs(llama: Llama, prompts: list[list[int]]) -> list[list[int]]:
    return serve(llama, prompts)


def serve(llama: Llama, prompts: list[list[int]], chunk: int = 48, most_running: int = 12) -> list[list[int]]:
    """Greedy continuations, continuously batched: each step runs the next chunk of a prompt beside all decodes."""
    pool = PagedPool(llama, num_blocks=(most_running + 1) * (LONGEST_PROMPT + NEW_TOKENS) // 16, block_size=16)
    waiting, started, running = deque(prompts), list[Sequence](), list[Sequence]()
    filling: Sequence | None = None
    while waiting or filling or running:
        if waiting and not filling and len(running) < most_running:
            filling = pool.sequence(list(waiting.popleft()), new_tokens=NEW_TOKENS)
            started.append(filling)
        prefills = [(filling, min(chunk, filling.prompt_len - filling.cached))] if filling else []
        tokens = llama.forward(pool.batch(prefills, running, all_rows=False), pool.cache).tolist()
        running = running + [sequence for sequence, _ in prefills]
        for sequence, token in zip(running, tokens, strict=True):
            if sequence.cached == len(sequence.token_ids):  # else it is in the middle of its prompt
                sequence.token_ids.append(token)
        if filling and filling.cached < filling.prompt_len:
            running.remove(filling)
        else:
            filling = None
        for sequence in [one for one in running if len(one.token_ids) == one.prompt_len + NEW_TOKENS]:
            pool.release(sequence)
            running.remove(sequence)
    return [sequence.token_ids[sequence.prompt_len :] for sequence in started]


@torch.no_grad()
def transformers_choices(oracle: LlamaForCausalLM, prompt: list[int], output: list[int]) -> list[int]:
    """The tokens that transformers chooses after the prompt and each beginning of the output, up to the first tie.

    While the output so far is what it chose itself, that is its own greedy continuation; so one pass over the whole
    text compares the two to the end.
    """
    logits = oracle(torch.tensor([prompt + output[:-1]]), logits_to_keep=len(output)).logits[0]
    best = logits.topk(2)
    ties = (best.values[:, 0] - best.values[:, 1] <= TIE).nonzero().flatten().tolist()
    return best.indices[: min([*ties, len(output)]), 0].tolist()


def test_gguf_weights_are_transformers_own(oracle: LlamaForCausalLM, llama: Llama) -> None:
    assert_same(llama.weights, oracle)


def test_batched_and_mixed_tokens_equal_transformers(
    oracle: LlamaForCausalLM,
    prompts: list[list[int]],
    outputs: list[list[int]],
) -> None:
    compared = 0
    for prompt, output in zip(prompts, outputs, strict=True):
        choices = transformers_choices(oracle, prompt, output)
        assert output[: len(choices)] == choices
        compared += len(choices) == NEW_TOKENS
    print(f"{compared} of {PROMPTS} continuations compared in full, the others up to a tie")
    assert compared >= 24


def test_tokens_equal_those_that_transformers_generates_one_by_one(
    oracle: LlamaForCausalLM, prompts: list[list[int]], outputs: list[list[int]]
) -> None:
    """The same, with transformers' own generation loop and KV cache; a few prompts, since it takes long."""
    for prompt, output in list(zip(prompts, outputs, strict=True))[::16]:
        generated = oracle.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0
        )
        untied = len(transformers_choices(oracle, prompt, output))
        assert generated[0, len(prompt) :][:untied].tolist() == output[:untied]
