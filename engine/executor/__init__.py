"""The real data plane: a LLaMA model over a paged KV cache. The only part of `engine` that imports torch."""
