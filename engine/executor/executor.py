"""A loaded model on this machine: what `tandem run` serves with and `tandem profile` measures.

The reference data plane (plain PyTorch on the CPU); the backend interface is in `backend.py`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch

from engine.backend import drive
from engine.config import ServingConfig
from engine.events import EventQueue
from engine.executor.backend import ExecutorBackend
from engine.executor.batch import KVCache
from engine.executor.model import Llama
from engine.executor.runner import Runner
from engine.executor.tokenizer import model_path
from engine.executor.weights import dummy_weights, load_weights
from engine.model_config import load_model_config
from engine.recorder import Recorder
from engine.scheduler import load_scheduler
from engine.serving_loop import serving_loop
from traces.errors import TandemError
from traces.request import TraceRequest

MEMORY_FRACTION = 0.5  # of what is free once the model is loaded: the machine is somebody's laptop
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Executor:
    """A model, ready to serve.

    Attributes:
        model: the model's shape.
        dtype: of weights and cache.
        device: the machine, as manifests and profiles name it.
        kernels: which data plane computes.
        threads: torch threads that a step runs on.
    """

    kernels = "reference (PyTorch)"

    def __init__(
        self, model: str, dtype: str = "float32", threads: int | None = None, load_format: str = "auto"
    ) -> None:
        """Load a model.

        Args:
            model: a Hugging Face folder, a `.gguf` file, `smollm2`, or with `dummy` a shape's name too.
            load_format: `auto` for the weights at `model`, `dummy` for random ones.

        Raises:
            TandemError: no such model, dtype or format, or damaged weights.
        """
        if dtype not in DTYPES:
            raise TandemError(f"unknown dtype '{dtype}': choose {', '.join(DTYPES)}")
        if load_format not in ("auto", "dummy"):
            raise TandemError(f"unknown load format '{load_format}': choose auto or dummy")
        path = Path(model) if load_format == "dummy" and model != "smollm2" else model_path(model)
        self.model = load_model_config(path)
        if load_format == "auto" and not path.exists():
            raise TandemError(f"{model} is a shape without weights: add --load-format dummy, or give a model's path")
        self.dtype = dtype
        # One core is left to the serving loop and the rest of the machine: OpenMP threads wait for the slowest.
        self.threads = threads or max(1, len(os.sched_getaffinity(0)) - 1)
        self.device = f"{_cpu_name()}, {self.threads} threads"
        # Only the data plane's thread computes in parallel: a second OpenMP pool in a process, even an idle one, makes
        # libgomp stop spinning at the end of each parallel region, and a step of many short ones half as slow again.
        torch.set_num_threads(1)
        load = dummy_weights if load_format == "dummy" else lambda *args: load_weights(path, *args)
        self.llama = Llama(self.model, load(self.model, DTYPES[dtype], "cpu"))

    def measure_blocks(self, block_size: int, max_seqs: int, max_model_len: int) -> int:
        """KV blocks that fit into free memory, or as many as the limits can use if that is fewer.

        Raises:
            TandemError: not even one request of the longest length fits.
        """
        block_bytes = block_size * self.model.kv_bytes_per_token(DTYPES[self.dtype].itemsize)
        room = int(MEMORY_FRACTION * psutil.virtual_memory().available) // block_bytes
        longest = -(-max_model_len // block_size)
        if room < longest:
            raise TandemError(
                f"memory holds {room} KV blocks, one request of {max_model_len} tokens needs {longest}: "
                "lower --max-model-len"
            )
        return min(room, max_seqs * longest)

    def cache(self, config: ServingConfig) -> KVCache:
        """A KV cache for a run. Raises TandemError if memory does not hold it."""
        try:
            return KVCache.allocate(self.model, config.num_blocks, config.block_size, DTYPES[self.dtype], "cpu")
        except RuntimeError as error:
            raise TandemError(f"no memory for {config.num_blocks} KV blocks: lower --kv-blocks") from error

    def runner(self, requests: Sequence[TraceRequest], cache: KVCache, stop_rule: str = "trace") -> Runner:
        """A data plane for one run; `stop_rule` as in `engine.manifest.workload`."""
        stop_tokens = self.model.eos_token_ids if stop_rule == "model" else None
        return Runner(self.llama, cache, requests, stop_tokens, self.threads)

    def serve(
        self, requests: Sequence[TraceRequest], config: ServingConfig, recorder: Recorder, stop_rule: str = "trace"
    ) -> Runner:
        """Serve requests on the machine's own time; returns the data plane, which holds the outputs."""
        runner = self.runner(requests, self.cache(config), stop_rule)
        with ExecutorBackend(runner, EventQueue.from_trace(requests)) as backend:
            drive(serving_loop(backend, load_scheduler(config), recorder))
        return runner


def _cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "CPU")
