"""The executor's machine with an NVIDIA GPU: Triton kernels in CUDA graphs."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from engine.config import ServingConfig
from engine.executor.batch import KVCache
from engine.executor.batch_state import RunningBatch
from engine.executor.cuda.data_plane import CudaDataPlane
from engine.executor.cuda.graphs import Graphs
from engine.executor.cuda.memory import GpuMemory, allocate
from engine.executor.kernels import ops
from engine.executor.kernels.gpu_timer import timing_event
from engine.executor.machine import Machine
from engine.executor.model import Llama
from engine.model.config import ModelConfig
from traces.errors import TandemError


class _Prepared(NamedTuple):
    """Caches and graphs, and the limits they were made for."""

    model: Llama
    limits: ServingConfig
    graphs: Graphs
    swap_cache: KVCache


class Cuda(Machine):
    """The current CUDA device."""

    kernels = "Triton"
    ops = ops
    default_block_size = 64  # prefill fetches blocks of this size by the copy engine

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.device)
        if torch.cuda.get_device_capability(self.device) < (8, 0):
            raise TandemError(f"{self.name} is older than compute capability 8.0: use --device cpu")
        self._prepared: _Prepared | None = None

    def default_dtype(self, model: ModelConfig) -> str:
        """As in `Machine`: bfloat16 if the model is published in it, since its numbers may exceed float16."""
        return "bfloat16" if model.dtype == "bfloat16" else "float16"

    def free_bytes(self) -> int:
        """As in `Machine`: what the driver says."""
        return int(torch.cuda.mem_get_info(self.device)[0])

    def measure_blocks(self, model: Llama, config: ServingConfig) -> int:
        """As in `Machine`: the GPU's memory less the largest step and the captured graphs."""
        self._prepared = None
        return GpuMemory.measure(model, config, self.device).blocks(config, self.name)

    def data_plane(self, model: Llama, config: ServingConfig, running: RunningBatch) -> CudaDataPlane:
        """As in `Machine`; caches and graphs are kept for the next run within the same limits."""
        graphs, swap_cache = self.prepare(model, config)
        return CudaDataPlane(graphs, swap_cache, config, running)

    def caches(self, model: Llama, config: ServingConfig) -> tuple[KVCache, KVCache]:
        """As in `Machine`."""
        graphs, swap_cache = self.prepare(model, config)
        return graphs.cache, swap_cache

    def prepare(self, model: Llama, config: ServingConfig) -> tuple[Graphs, KVCache]:
        """Allocate the caches and capture the graphs for runs within the limits of `config`.

        Raises:
            TandemError: memory does not hold them.
        """
        limits = replace(config, scheduler="", pipeline_depth=1, prefix_caching=False)
        ready = self._prepared
        if ready and ready.model is model and ready.limits == limits:
            return ready.graphs, ready.swap_cache
        self._prepared = ready = None
        try:
            cache = allocate(model, config.num_blocks, config.block_size, self.device)
            swap_cache = allocate(model, config.num_cpu_blocks, config.block_size, torch.device("cpu"))
            graphs = Graphs(model, cache, config)
            graphs.run_largest()
            torch.cuda.empty_cache()
            graphs.capture(graphs.shapes.captured)
            if config.num_cpu_blocks:
                _compile_copies(cache, swap_cache)
        except (torch.OutOfMemoryError, torch.AcceleratorError) as error:
            raise TandemError(
                f"no memory for {config.num_blocks} KV blocks on the GPU and {config.num_cpu_blocks} in host memory: "
                f"lower --kv-blocks or --cpu-blocks ({str(error).splitlines()[0]})"
            ) from error
        self._prepared = _Prepared(model, limits, graphs, swap_cache)
        return graphs, swap_cache

    def copy_us(self, source: KVCache, target: KVCache, pairs: torch.Tensor) -> float:
        """As in `Machine`, by the GPU's clock."""
        begin, end = timing_event(), timing_event()
        begin.record()
        ops.copy_blocks(source.data, target.data, pairs)
        end.record()
        end.synchronize()
        return 1e3 * float(begin.elapsed_time(end))


def _compile_copies(cache: KVCache, swap_cache: KVCache) -> None:
    first = torch.zeros(1, 2, dtype=torch.int64, pin_memory=True)
    for source, target in ((cache, swap_cache), (swap_cache, cache)):
        ops.copy_blocks(source.data, target.data, first)
    torch.cuda.synchronize()
