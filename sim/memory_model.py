"""How many KV blocks a GPU holds, term by term. Nothing is measured here.

Memory is taken as by `engine.executor.cuda.memory`.

The terms follow from what the executor allocates (`engine.executor.cuda`, `engine.executor.model`). Three belong to the
driver and to libraries: the context, the workspace and what a node of a graph takes. Those are what others saw.
"""

from __future__ import annotations

from dataclasses import dataclass

from engine.config import MEMORY_FRACTION, ServingConfig
from engine.model.config import ModelConfig
from engine.model.graph_sizes import GraphSizes
from sim.profile.format import Profile
from traces.errors import TandemError

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
CONTEXT_BYTES = 512 * 2**20  # of a process with kernels loaded (torch 2.11 on an A100: JBjoernskov/Twin4Build #134)
WORKSPACE_BYTES = 32 * 2**20  # cuBLAS's, as torch sizes it on Hopper; a few MiB on other GPUs
NODE_BYTES = 10 * 2**10  # of a kernel in an instantiated graph (NVIDIA/cccl #3768)
LAYER_NODES, OTHER_NODES = 10, 10  # kernels of a captured step: in each layer, and around them
MEMORY_LIMITS = ("max_seqs", "max_batched_tokens", "max_model_len")  # of a config, beside its KV blocks
TILE_ROWS = 64  # query rows of the smallest tile of a chunk


@dataclass(frozen=True, slots=True)
class Memory:
    """A GPU's memory, in bytes.

    Attributes:
        usable: the share of it that a run may use.
        context: CUDA's context with the kernels loaded, and cuBLAS's workspace.
        weights: of the model.
        buffers: a step's packed integers and newest tokens, rotary frequencies.
        step: what the largest step holds at once.
        graphs: what the largest captured step holds at once, which all graphs share, and the nodes of all of them.
        block: a KV block.
        most: KV blocks that the limits can use.
    """

    usable: int
    context: int
    weights: int
    buffers: int
    step: int
    graphs: int
    block: int
    most: int

    @property
    def room(self) -> int:
        """What is left for KV blocks; below 0 if nothing is."""
        return self.usable - self.context - self.weights - self.buffers - self.step - self.graphs

    @property
    def blocks(self) -> int:
        """KV blocks, no more than the limits can use."""
        return min(self.room // self.block, self.most)

    @classmethod
    def of(cls, memory_gib: float, model: ModelConfig, dtype: str, config: ServingConfig) -> Memory:
        """The terms for runs within `config`, whose own number of blocks does not matter.

        Args:
            memory_gib: of the GPU, as a process sees it.

        Raises:
            TandemError: no such dtype.
        """
        if dtype not in DTYPE_BYTES:
            raise TandemError(f"unknown dtype '{dtype}': choose {', '.join(DTYPE_BYTES)}")
        item, rows = DTYPE_BYTES[dtype], config.max_batched_tokens
        sizes = GraphSizes.within(config.max_seqs, rows)
        captured = max(*sizes.decode, *sizes.mixed)
        nodes = (len(sizes.decode) + len(sizes.mixed)) * (LAYER_NODES * model.num_layers + OTHER_NODES)
        longest = -(-config.max_model_len // config.block_size)
        return cls(
            usable=int(MEMORY_FRACTION * memory_gib * 2**30),
            context=CONTEXT_BYTES + WORKSPACE_BYTES,
            weights=item * model.num_parameters,
            buffers=_buffer_bytes(model, config, longest),
            step=step_bytes(model, item, rows, config.max_seqs),
            graphs=step_bytes(model, item, captured, min(captured, config.max_seqs)) + nodes * NODE_BYTES,
            block=config.block_size * model.kv_bytes_per_token(item),
            most=config.max_seqs * longest,
        )


def step_bytes(model: ModelConfig, item: int, rows: int, samples: int) -> int:
    """What torch's allocator has taken once a step over `rows` tokens is done: all that was ever alive at once.

    In a layer's MLP these are alive: the residual stream, its normed copy, the update of the attention before and the
    one that is made, gate and up, and their product. Of the attention before, what is not used again stays taken: qkv,
    and what was attended. The logits lie where gate and up were, if they fit.
    """
    width, kv_width = model.num_heads * model.head_dim, 2 * model.num_kv_heads * model.head_dim
    gate_up = 2 * model.intermediate_size * item * rows
    tensors = 4 * model.hidden_size + (width + kv_width) + width + model.intermediate_size
    rotation = 4 * model.head_dim * rows  # float32
    logits = samples * model.vocab_size * item
    return rows * tensors * item + gate_up + rotation + (logits if logits > gate_up else 0)


def _buffer_bytes(model: ModelConfig, config: ServingConfig, longest: int) -> int:
    rows, seqs = config.max_batched_tokens, config.max_seqs
    tiles = rows // TILE_ROWS + seqs
    words = 3 * rows + 3 * seqs + 4 * tiles + 2 * seqs * longest
    return 4 * words + 8 * (seqs + 1) + 2 * model.head_dim


def gpu_blocks(profile: Profile, config: ServingConfig) -> int:
    """KV blocks for a simulation within `config`: those that were measured with the profile, where they hold, else what
    the memory of its GPU holds.

    Raises:
        TandemError: not even one request of the longest length fits, or the profile says nothing of its GPU.
    """
    if (measured := measured_blocks(profile, config)) is not None:
        return measured
    if (memory_gib := _gpu_gib(profile)) is None:
        raise TandemError("the profile does not say what memory its GPU has: give --kv-blocks")
    memory = Memory.of(memory_gib, profile.model, profile.meta.dtype, config)
    check_fits(memory, profile.name, config)
    return memory.blocks


def measured_blocks(profile: Profile, config: ServingConfig) -> int | None:
    """The KV blocks that were measured with a profile, as many bytes of them where `config` has other blocks, and no
    more than its limits can use.

    Returns:
        None if none were measured, or `config` is beyond the limits that they were measured within, and what the GPU's
        memory holds then is known.
    """
    found = profile.meta.kv_blocks
    if found is None or (beyond_measured(profile, config) and _gpu_gib(profile) is not None):
        return None
    measured_size = profile.meta.block_size or config.block_size
    longest = -(-config.max_model_len // config.block_size)
    return min(found * measured_size // config.block_size, config.max_seqs * longest)


def beyond_measured(profile: Profile, config: ServingConfig) -> bool:
    """Whether a limit that takes memory is above the one that a profile was measured within."""
    limits = profile.meta.limits
    return limits is not None and any(getattr(config, name) > getattr(limits, name) for name in MEMORY_LIMITS)


def _gpu_gib(profile: Profile) -> float | None:
    """The memory of a profile's GPU, by its data sheet or as it was measured; None where neither says."""
    if profile.meta.data_sheet:
        return profile.meta.data_sheet.memory_gib
    return profile.meta.memory.usable / MEMORY_FRACTION / 2**30 if profile.meta.memory else None


def check_fits(memory: Memory, what: str, config: ServingConfig) -> None:
    """Raises TandemError unless one request of the longest length fits."""
    needed = -(-config.max_model_len // config.block_size) * memory.block
    if memory.room >= needed:
        return
    gib = {name: f"{getattr(memory, name) / 2**30:.1f} GiB" for name in ("usable", "weights", "step", "graphs")}
    raise TandemError(
        f"{what}: of {gib['usable']} that may be used, weights take {gib['weights']}, a full step {gib['step']}, "
        f"graphs {gib['graphs']}, and one request of {config.max_model_len} tokens {needed / 2**30:.1f} GiB of KV "
        "cache: lower --max-batched-tokens, --max-seqs or --max-model-len, or choose a smaller model"
    )
