"""Measures how many KV blocks a GPU's memory holds, and allocates them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from engine.config import MEMORY_FRACTION, ServingConfig
from engine.executor.batch import KVCache
from engine.executor.batch_state import table_width
from engine.executor.cuda.graphs import Graphs
from engine.executor.model import Llama
from traces.errors import TandemError


@dataclass(frozen=True, slots=True)
class GpuMemory:
    """The use of the GPU's memory, in bytes."""

    usable: int  # the share of it that may be used
    used: int  # by all that is loaded
    step: int  # by the largest step
    graphs: int
    block: int  # by a KV block

    @property
    def room(self) -> int:
        """Bytes left for KV blocks."""
        return self.usable - self.used - self.step - self.graphs

    @classmethod
    def measure(cls, model: Llama, config: ServingConfig, device: torch.device) -> GpuMemory:
        """Run the largest step and capture a few graphs over a cache of one block.

        Raises:
            TandemError: the largest step does not fit.
        """
        try:
            cache = allocate(model, 1, config.block_size, device)
            graphs = Graphs(model, cache, config)
            torch.cuda.empty_cache()
            reserved = torch.cuda.memory_reserved(device)
            torch.cuda.reset_peak_memory_stats(device)
            graphs.run_largest()
            step = torch.cuda.max_memory_reserved(device) - reserved
            captured = _measure_graphs(graphs)
        except torch.OutOfMemoryError as error:
            raise TandemError(
                f"{torch.cuda.get_device_name(device)}: a step of {config.max_batched_tokens} tokens does not fit "
                f"beside the weights: lower --max-batched-tokens or --max-seqs ({str(error).splitlines()[0]})"
            ) from error
        del graphs
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return cls(int(MEMORY_FRACTION * total), total - free, step, captured, cache.data.nbytes)

    def blocks(self, config: ServingConfig, device_name: str) -> int:
        """KV blocks that fit, or as many as the limits can use if that is fewer.

        Raises:
            TandemError: one request of the longest length does not fit.
        """
        longest = table_width(config)
        if self.room < longest * self.block:
            gib = {name: f"{getattr(self, name) / 2**30:.1f} GiB" for name in ("usable", "used", "step", "graphs")}
            raise TandemError(
                f"{device_name}: of {gib['usable']} that may be used, weights and all else loaded take {gib['used']}, "
                f"a full step {gib['step']}, CUDA graphs {gib['graphs']}, and one request of {config.max_model_len} "
                f"tokens {longest * self.block / 2**30:.1f} GiB of KV cache: "
                "lower --max-batched-tokens, --max-seqs or --max-model-len"
            )
        return min(self.room // self.block, config.max_seqs * longest)


def allocate(model: Llama, blocks: int, block_size: int, device: torch.device) -> KVCache:
    """A KV cache on the GPU, or in host memory that the GPU can reach."""
    return KVCache.allocate(model.config, blocks, block_size, model.dtype, device, pinned=device.type == "cpu")


def _measure_graphs(graphs: Graphs) -> int:
    """Memory that all graphs will take: the largest's, which the others use again, and a little for each."""
    torch.cuda.empty_cache()
    first, second, *others = graphs.shapes.captured
    free = [torch.cuda.mem_get_info()[0]]
    for shape in (first, second):
        graphs.capture([shape])
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info()[0])
    return free[0] - free[1] + (free[1] - free[2]) * (1 + len(others))
