"""A loaded model on this machine, with which `tandem run` serves and which `tandem profile` measures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from engine.backend import drive
from engine.config import ServingConfig
from engine.events import EventQueue
from engine.executor.backend import DataPlane, ExecutorBackend, no_collections
from engine.executor.batch import KVCache
from engine.executor.batch_state import RunningBatch
from engine.executor.cpu.machine import Cpu
from engine.executor.cpu.runner import Runner
from engine.executor.machine import Machine
from engine.executor.model import Llama
from engine.executor.tokenizer import model_path
from engine.executor.weights import DTYPES, dummy_weights, load_weights
from engine.instance import Instance
from engine.model.config import load_model_config
from engine.records.recorder import Recorder
from engine.request import unknown_token
from traces.errors import TandemError
from traces.request import TraceRequest

if TYPE_CHECKING:
    from engine.executor.cuda.meter import CudaMeter


class Executor:
    """A model, ready to serve.

    Attributes:
        model: the model's shape.
        dtype: of weights and cache.
        device: the machine, as manifests and profiles name it.
        kernels: which data plane computes.
        block_size: tokens of a KV block, where nobody says otherwise.
    """

    def __init__(
        self,
        model: str,
        dtype: str = "auto",
        threads: int | None = None,
        load_format: str = "auto",
        device: str = "auto",
    ) -> None:
        """Load a model.

        Args:
            model: a Hugging Face folder, a `.gguf` file, `smollm2`, or with `dummy` a shape's name too.
            dtype: of `DTYPES`; `auto`: float32 on a CPU; on a GPU bfloat16 if the model says so, else float16.
            threads: of a CPU.
            load_format: `auto` for the weights at `model`, `dummy` for random ones.
            device: `cpu`, `cuda`, or `auto`: a GPU if there is one.

        Raises:
            TandemError: no such model, dtype, format or device, damaged weights, or weights that do not fit.
        """
        if load_format not in ("auto", "dummy"):
            raise TandemError(f"unknown load format '{load_format}': choose auto or dummy")
        if dtype not in ("auto", *DTYPES):
            raise TandemError(f"unknown dtype '{dtype}': choose auto, {', '.join(DTYPES)}")
        self.machine = _machine(device, threads)
        path = Path(model) if load_format == "dummy" and model != "smollm2" else model_path(model)
        self.model = load_model_config(path)
        if load_format == "auto" and not path.exists():
            raise TandemError(f"{model} is a shape without weights: add --load-format dummy, or give a model's path")
        self.dtype = self.machine.default_dtype(self.model) if dtype == "auto" else dtype
        self.device, self.kernels = self.machine.name, self.machine.kernels
        self.block_size = self.machine.default_block_size
        load = dummy_weights if load_format == "dummy" else lambda *args: load_weights(path, *args)
        needed = self.model.num_parameters * DTYPES[self.dtype].itemsize
        try:
            if load_format == "dummy" and needed > self.machine.free_bytes():  # files are as large as they are
                raise torch.OutOfMemoryError
            weights = load(self.model, DTYPES[self.dtype], self.machine.device)
        except torch.OutOfMemoryError as error:
            raise TandemError(
                f"{self.model.name} needs {needed / 2**30:.1f} GiB for its weights in {self.dtype}, more than "
                f"{self.device} has free: free its memory, or choose a smaller model or dtype"
            ) from error
        self.llama = Llama(self.model, weights, self.machine.ops)

    def measure_blocks(self, config: ServingConfig) -> int:
        """KV blocks for runs within `config`, as `Machine` says."""
        return self.machine.measure_blocks(self.llama, config)

    def prepare(self, config: ServingConfig) -> None:
        """Get ready for runs within `config`, if that takes seconds; raises TandemError if memory does not suffice."""
        self.machine.prepare(self.llama, config)

    def measure_swap(self, config: ServingConfig) -> list[tuple[str, int, list[float]]]:
        """Times of copies between the tiers, as `Machine` says."""
        return self.machine.measure_swap(self.llama, config)

    @property
    def captures(self) -> bool:
        """Whether steps are captured as graphs, and so measured whole, by `meter`."""
        return not isinstance(self.machine, Cpu)

    def meter(self, config: ServingConfig) -> CudaMeter:
        """A meter of whole steps on a GPU. Raises TandemError if memory does not suffice."""
        from engine.executor.cuda.machine import Cuda
        from engine.executor.cuda.meter import CudaMeter  # imports Triton, which a machine without a GPU may lack

        assert isinstance(self.machine, Cuda)
        return CudaMeter(self.machine, self.llama, config)

    def caches(self, config: ServingConfig) -> tuple[KVCache, KVCache]:
        """Both tiers of a KV cache, for `runner`. Raises TandemError if memory does not hold them."""
        return self.machine.caches(self.llama, config)

    def runner(
        self, requests: Sequence[TraceRequest], caches: tuple[KVCache, KVCache], config: ServingConfig
    ) -> Runner:
        """Runs steps on a CPU, one at a time, on the calling thread."""
        assert isinstance(self.machine, Cpu), "a GPU is measured by `meter`"
        return Runner(self.llama, caches, self._running(requests, config, "trace"), self.machine.threads)

    def _running(self, requests: Sequence[TraceRequest], config: ServingConfig, stop_rule: str) -> RunningBatch:
        stop_tokens = self.model.eos_token_ids if stop_rule == "model" else None
        return RunningBatch(requests, stop_tokens, self.model.vocab_size, config)

    def session(
        self, requests: Sequence[TraceRequest], config: ServingConfig, stop_rule: str = "trace"
    ) -> tuple[RunningBatch, DataPlane]:
        """The running batch and the data plane of one run; requests may be added to the batch while it runs.

        Raises:
            TandemError: `config` allows requests that are longer than the model's sliding window.
        """
        self.model.check_window(config.max_model_len)
        running = self._running(requests, config, stop_rule)
        return running, self.machine.data_plane(self.llama, config, running)

    def serve(
        self,
        requests: Sequence[TraceRequest],
        config: ServingConfig,
        recorder: Recorder,
        stop_rule: str = "trace",
        check: bool = False,
    ) -> RunningBatch:
        """Serve requests on the machine's own time; returns the running batch, which holds the outputs.

        A request with a token that the model lacks is rejected.

        Args:
            stop_rule: as in `engine.records.manifest.compose`.
            check: whether `engine.checks.step_checker` looks at every step before it runs.

        Raises:
            IntegrityError: `check` is set, and a step breaks an invariant.
            PolicyError: as `Instance.serve`.
        """
        running, data_plane = self.session(requests, config, stop_rule)
        events = EventQueue.from_trace(requests, lambda source: unknown_token(source, self.model.vocab_size))
        with no_collections(), ExecutorBackend(data_plane, events) as backend:
            drive(Instance.assemble(config, backend, recorder, check).serve())
        return running


def _machine(device: str, threads: int | None) -> Machine:
    if device not in ("auto", "cpu", "cuda"):
        raise TandemError(f"unknown device '{device}': choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise TandemError("no CUDA device is visible to torch: use --device cpu, or mend the driver")
    if device == "cpu" or not torch.cuda.is_available():
        return Cpu(threads)
    from engine.executor.cuda.machine import Cuda  # imports Triton, which a machine without a GPU may lack

    return Cuda()
