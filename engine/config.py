"""One frozen config: everything that decides what a run does, given its workload."""

from __future__ import annotations

from dataclasses import dataclass

from traces.errors import TandemError

MEMORY_FRACTION = 0.9  # of a GPU's memory, for all that a run takes

WHOLE, FIRST_CHUNK = "whole", "first_chunk"
PLANNED, COMPLETED = "planned", "completed"
PROMPTS, VLLM = "prompts", "vllm"
RULES = {"admit": (WHOLE, FIRST_CHUNK), "release": (PLANNED, COMPLETED), "prefix_rules": (PROMPTS, VLLM)}
"""Options of a run that name a rule -> the rules; the first is the default."""


@dataclass(frozen=True, slots=True)
class ServingConfig:
    """What the scheduler and the serving loop need to know; the core of a manifest's `system`.

    Attributes:
        num_blocks: KV blocks on the device.
        block_size: tokens per KV block.
        max_seqs: requests that may hold KV blocks at once.
        max_batched_tokens: token budget of one step, prefill and decode together.
        max_model_len: longest prompt + output that is served; longer requests are rejected.
        scheduler: a policy's name, or `module:Class`, and its parameters: `name:key=value:key=value`.
        pipeline_depth: steps in flight at once, 1 or 2.
        num_cpu_blocks: KV blocks in host memory, for what preemption swaps out.
        prefix_caching: whether full KV blocks of equal prompt prefixes are computed once and shared.
        admit: what must fit into free blocks before a request is admitted. `whole`: all its known tokens, prompt and
            output so far, as in vLLM. `first_chunk`: the chunk that runs first; prompts then evict each other.
        release: when a request that ends by `max_tokens` gives back its row and its blocks. `planned`: as its last
            token is planned. `completed`: once that token is known, as in vLLM with two steps in flight.
        prefix_rules: what prefix caching shares. `prompts`: blocks of prompts, from the step after the one that
            computes them. `vllm`: from that very step, blocks of outputs too, and of equal blocks all are kept.

    Raises:
        TandemError: a value is out of range, or two of them contradict each other.
    """

    num_blocks: int
    block_size: int = 16
    max_seqs: int = 32
    max_batched_tokens: int = 2048
    max_model_len: int = 2048
    scheduler: str = "chunked_prefill"
    pipeline_depth: int = 1
    num_cpu_blocks: int = 0
    prefix_caching: bool = False
    admit: str = WHOLE
    release: str = PLANNED
    prefix_rules: str = PROMPTS

    def __post_init__(self) -> None:
        for name in ("num_blocks", "block_size", "max_seqs", "max_batched_tokens", "max_model_len"):
            if getattr(self, name) < 1:
                raise TandemError(f"{name} is {getattr(self, name)}: give a number of 1 or more")
        for name, rules in RULES.items():
            if getattr(self, name) not in rules:
                raise TandemError(f"{name} is '{getattr(self, name)}': choose {' or '.join(rules)}")
        if self.num_cpu_blocks < 0:
            raise TandemError(f"num_cpu_blocks is {self.num_cpu_blocks}: give 0 for none, or more")
        if self.pipeline_depth not in (1, 2):
            raise TandemError(f"pipeline_depth is {self.pipeline_depth}: the loop overlaps 1 or 2 steps")
        if self.max_batched_tokens < self.max_seqs:
            raise TandemError(
                f"max_batched_tokens ({self.max_batched_tokens}) is below max_seqs ({self.max_seqs}): "
                "a step could not run one token for each sequence; raise the one or lower the other"
            )
