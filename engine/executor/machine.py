"""The machine that computes for an executor."""

from __future__ import annotations

from abc import ABC, abstractmethod
from types import ModuleType
from typing import Any

import torch

from engine.config import ServingConfig
from engine.executor.backend import DataPlane
from engine.executor.batch import KVCache
from engine.executor.batch_state import RunningBatch
from engine.executor.model import Llama
from engine.model.config import ModelConfig

SWAP_BLOCKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SWAP_REPEATS = 5


class Machine(ABC):
    """Holds tensors, measures its memory and its copies, and runs steps.

    Attributes:
        name: as manifests and profiles call it.
        kernels: the implementation that computes.
        ops: the data plane's operations.
        device: where tensors live.
        default_block_size: tokens of a KV block.
    """

    name: str
    kernels: str
    ops: ModuleType
    device: torch.device
    default_block_size: int

    @abstractmethod
    def default_dtype(self, model: ModelConfig) -> str:
        """The type of weights and cache, if the user names none."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Memory that a model may take."""

    @abstractmethod
    def measure_blocks(self, model: Llama, config: ServingConfig) -> int:
        """KV blocks that fit beside the model within `config`, or as many as its limits can use if that is fewer.

        Raises:
            TandemError: not even one request of the longest length fits.
        """

    @abstractmethod
    def prepare(self, model: Llama, config: ServingConfig) -> Any:
        """Do the slow work ahead of a run. Raises TandemError if memory does not hold the caches."""

    @abstractmethod
    def data_plane(self, model: Llama, config: ServingConfig, running: RunningBatch) -> DataPlane:
        """A data plane for one run."""

    @abstractmethod
    def caches(self, model: Llama, config: ServingConfig) -> tuple[KVCache, KVCache]:
        """Both tiers of a run's KV cache. Raises TandemError if memory does not hold them."""

    @abstractmethod
    def copy_us(self, source: KVCache, target: KVCache, pairs: torch.Tensor) -> float:
        """Copy blocks from one tier to the other, `pairs` (blocks, 2) int64: from, to; returns the time in µs."""

    def measure_swap(self, model: Llama, config: ServingConfig) -> list[tuple[str, int, list[float]]]:
        """Times of copies between the tiers: the direction, `out` or `in`, the number of blocks, µs of each repeat."""
        near, far = self.caches(model, config)
        most = min(config.num_blocks, config.num_cpu_blocks)
        pairs = torch.arange(most, device=self.device).repeat(2, 1).T.contiguous()  # (blocks, 2)
        return [
            (direction, count, [self.copy_us(source, target, pairs[:count]) for _ in range(SWAP_REPEATS)])
            for count in sorted({min(count, most) for count in SWAP_BLOCKS})
            for direction, source, target in (("out", near, far), ("in", far, near))
        ]
