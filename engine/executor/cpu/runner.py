"""Runs Steps on a LLaMA model one at a time, in the calling thread: the data plane of a machine without a GPU."""

from __future__ import annotations

import torch

from engine.backend import Shown
from engine.executor.batch import KVCache, Packing
from engine.executor.batch_state import RunningBatch
from engine.executor.model import Llama, Probe
from engine.step import Step


class Runner:
    """Implements `engine.executor.backend.Runs`."""

    def __init__(self, model: Llama, caches: tuple[KVCache, KVCache], running: RunningBatch, threads: int) -> None:
        """`caches` are the two tiers: the one that is computed on, and the one that is swapped to."""
        self._model = model
        self._cache, self._swap_cache = caches
        self._running = running
        self._threads = threads
        self._packing = Packing(self._cache.block_size, model.ops.tile_rows(self._cache.data), running.table_rows)
        self._last_tokens = torch.zeros(running.table_rows + 1, dtype=torch.int64)  # (table rows + 1,)

    def prepare_thread(self) -> None:
        """Torch counts threads per calling thread."""
        torch.set_num_threads(self._threads)

    def run(self, step: Step, probe: Probe | None = None) -> Shown:
        """Apply the delta, copy swapped blocks, and run one forward pass."""
        work = self._running.apply(step)
        self._swap(step)
        if step.kind == "swap":
            return Shown()
        batch = self._packing.batch(work.decodes, work.prefills, self._last_tokens)
        return self._running.note(work, self._model.forward(batch, self._cache, probe).tolist())

    def _swap(self, step: Step) -> None:
        for swaps, source, target in (
            (step.swapped_out, self._cache, self._swap_cache),
            (step.swapped_in, self._swap_cache, self._cache),
        ):
            for copies in swaps.values():
                self._model.ops.copy_blocks(source.data, target.data, torch.tensor(copies).T)
