"""Captures forward passes as CUDA graphs and replays them. Knows batches and their shapes; does not know steps."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence

import torch

from engine.config import ServingConfig
from engine.executor.batch import Decodes, KVCache, Packing, Shape, Span
from engine.executor.cuda.shapes import Shapes
from engine.executor.model import Llama


class Graphs:
    """Forward passes of one model over one cache, captured for batches of many shapes.

    Attributes:
        cache: the KV cache.
        packing: how batches are packed.
        shapes: of the batches.
        stream: the compute stream.
    """

    def __init__(self, model: Llama, cache: KVCache, config: ServingConfig) -> None:
        self.cache = cache
        self.packing = Packing(cache.block_size, model.ops.tile_rows(cache.data), config.max_seqs)
        self._model = model
        self.shapes = Shapes(config, self.packing.tile_rows)
        device = cache.data.device
        self._inbox = torch.empty(self.shapes.largest.words, dtype=torch.int32, device=device)  # (words,)
        self._last_tokens = torch.zeros(config.max_seqs + 1, dtype=torch.int64, device=device)  # (table rows + 1,)
        self._captured: dict[Shape, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}  # and its tokens (samples,)
        self._pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(self, shapes: Iterable[Shape]) -> None:
        """Capture passes, each after a run that compiles its kernels. Padding alone runs, so no cache is written."""
        gc.freeze()  # torch collects garbage before each capture, and there is much to look through
        with torch.cuda.stream(self.stream):
            for shape in shapes:
                self._run_padding(shape)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=self._pool, stream=self.stream):
                    tokens = self._forward(shape, [Span(0, 0, 0)] * shape.prefills)
                self._captured[shape] = graph, tokens
            self.stream.synchronize()
        gc.unfreeze()

    def run_largest(self) -> None:
        """Run the largest step that the limits allow, as padding: it takes the most memory and compiles its kernels."""
        with torch.cuda.stream(self.stream):
            self._run_padding(self.shapes.largest)
            self.stream.synchronize()

    def _run_padding(self, shape: Shape) -> None:
        words = torch.empty(shape.words, dtype=torch.int32)
        self.packing.pack(shape.split(words.numpy()), Decodes.none(), [])
        self._inbox[: shape.words].copy_(words)
        self._forward(shape, [Span(0, 0, 0)] * shape.prefills)

    def has(self, shape: Shape) -> bool:
        """Whether batches of this shape are captured."""
        return shape in self._captured

    def run(
        self,
        shape: Shape,
        words: torch.Tensor,  # (shape.words,) int32, pinned
        spans: Sequence[Span],
    ) -> torch.Tensor:
        """Launch a packed batch on the current stream.

        Args:
            shape: from `shapes`.
            words: the batch's buffer.
            spans: of its prefills.

        Returns:
            The tokens (samples,) int64, valid until the next launch.
        """
        self._inbox[: shape.words].copy_(words, non_blocking=True)
        if not self.has(shape):
            return self._forward(shape, spans)
        graph, tokens = self._captured[shape]
        graph.replay()
        return tokens

    def _forward(self, shape: Shape, spans: Sequence[Span]) -> torch.Tensor:
        batch = shape.split(self._inbox, spans, self._last_tokens, all_rows=not shape.prefills)
        return self._model.forward(batch, self.cache)
