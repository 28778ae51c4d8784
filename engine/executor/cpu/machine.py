"""The executor's machine without a GPU: plain PyTorch on some of the processors, caches in memory."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import torch

from engine.config import ServingConfig
from engine.executor.backend import ThreadedDataPlane
from engine.executor.batch import KVCache
from engine.executor.batch_state import RunningBatch
from engine.executor.cpu import ops
from engine.executor.cpu.runner import Runner
from engine.executor.machine import Machine
from engine.executor.model import Llama
from engine.model.config import ModelConfig
from traces.errors import TandemError

MEMORY_FRACTION = 0.5  # of the memory that is free once the model is loaded: the machine is somebody's laptop


class Cpu(Machine):
    """Some of the processors."""

    kernels = "reference (PyTorch)"
    ops = ops
    device = torch.device("cpu")
    default_block_size = 16

    def __init__(self, threads: int | None) -> None:
        # One core is left to the serving loop and the rest of the machine: OpenMP threads wait for the slowest.
        self.threads = threads or max(1, len(os.sched_getaffinity(0)) - 1)
        self.name = f"{_cpu_name()}, {self.threads} threads"
        # Only the data plane's thread computes in parallel: a second OpenMP pool in a process, even an idle one, makes
        # libgomp stop spinning at the end of each parallel region, and a step of many short ones half as slow again.
        torch.set_num_threads(1)

    def default_dtype(self, model: ModelConfig) -> str:
        """As in `Machine`: float32, which CPUs multiply fastest."""
        return "float32"

    def free_bytes(self) -> int:
        """As in `Machine`: what other programs leave."""
        return int(psutil.virtual_memory().available)

    def measure_blocks(self, model: Llama, config: ServingConfig) -> int:
        """As in `Machine`: a share of the free memory."""
        block_bytes = config.block_size * model.config.kv_bytes_per_token(model.dtype.itemsize)
        room = int(MEMORY_FRACTION * self.free_bytes()) // block_bytes - config.num_cpu_blocks
        longest = -(-config.max_model_len // config.block_size)
        if room < longest:
            raise TandemError(
                f"memory holds {max(room, 0)} KV blocks, one request of {config.max_model_len} tokens needs {longest}: "
                "lower --max-model-len or --cpu-blocks"
            )
        return min(room, config.max_seqs * longest)

    def caches(self, model: Llama, config: ServingConfig) -> tuple[KVCache, KVCache]:
        """As in `Machine`."""

        def allocate(blocks: int) -> KVCache:
            return KVCache.allocate(model.config, blocks, config.block_size, model.dtype, "cpu")

        try:
            return allocate(config.num_blocks), allocate(config.num_cpu_blocks)
        except RuntimeError as error:
            blocks = config.num_blocks + config.num_cpu_blocks
            raise TandemError(f"no memory for {blocks} KV blocks: lower --kv-blocks or --cpu-blocks") from error

    def prepare(self, model: Llama, config: ServingConfig) -> None:
        """As in `Machine`: nothing takes seconds here."""

    def data_plane(self, model: Llama, config: ServingConfig, running: RunningBatch) -> ThreadedDataPlane:
        """As in `Machine`."""
        return ThreadedDataPlane(Runner(model, self.caches(model, config), running, self.threads))

    def copy_us(self, source: KVCache, target: KVCache, pairs: torch.Tensor) -> float:
        """As in `Machine`."""
        start = time.perf_counter_ns()
        ops.copy_blocks(source.data, target.data, pairs)
        return (time.perf_counter_ns() - start) / 1e3


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
