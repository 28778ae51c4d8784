"""Times a GPU's steps as they run when serving, and its operations alone, for a profiler."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any, Protocol

import numpy as np
import torch

from engine.config import MEMORY_FRACTION, ServingConfig
from engine.executor.batch import Decodes, Prefill, Shape, Span, split_requests
from engine.executor.batch_state import RunningBatch
from engine.executor.cuda.data_plane import CudaDataPlane
from engine.executor.cuda.machine import Cuda
from engine.executor.kernels.gpu_timer import time_us, timing_event
from engine.executor.model import Llama
from engine.step import Step
from traces.errors import TandemError
from traces.request import TraceRequest

REPLAYS = 5
THROTTLED = {  # NVML's reasons why clocks are lower than they could be, but for an idle GPU and the power limit
    "hardware slowdown": 0x08,
    "thermal slowdown": 0x20 | 0x40,
    "power brake": 0x80,
}
POWER_LIMITED = 0x04


class BatchShape(Protocol):
    """The requests of a step: prefill chunks as (tokens, context), and decodes as contexts. Hashable."""

    @property
    def chunks(self) -> tuple[tuple[int, int], ...]:
        """Chunks of prefill."""

    @property
    def decodes(self) -> tuple[int, ...]:
        """Decodes."""


class CudaMeter:
    """Measures one model on one GPU, within the limits of a config."""

    def __init__(self, machine: Cuda, model: Llama, config: ServingConfig) -> None:
        """Captures the graphs for runs within `config`; raises TandemError if memory does not suffice."""
        self._model = model
        self._config = config
        self._graphs, self._swap_cache = machine.prepare(model, config)
        self._graphs.cache.data.normal_()  # time depends a little on what is multiplied
        gc.collect()
        gc.freeze()  # torch collects garbage before each of the many captures, and there is much to look through

    def steps_us(self, requests: Sequence[TraceRequest], steps: Sequence[Step]) -> list[float]:
        """Run steps one behind the other, two in flight; returns the device's time for each."""
        running = RunningBatch(requests, None, self._model.config.vocab_size, self._config)
        times = []
        with CudaDataPlane(self._graphs, self._swap_cache, self._config, running) as plane:
            for number, step in enumerate(steps):
                plane.launch(step)
                if number:
                    times.append(plane.complete().device_ns / 1000)
            times.append(plane.complete().device_ns / 1000)
        return times

    def stream_us(self, batches: Sequence[BatchShape]) -> list[float]:
        """Run captured steps of these batches one behind the other, the GPU never idle; returns each one's time."""
        graphs, packed = self._graphs, {batch: self._pack(batch) for batch in dict.fromkeys(batches)}
        events = [(timing_event(), timing_event()) for _ in batches]
        tokens = torch.empty(self._config.max_seqs, dtype=torch.int64, pin_memory=True)
        with torch.cuda.stream(graphs.stream):
            for (begin, end), batch in zip(events, batches, strict=True):
                shape, words, spans = packed[batch]
                begin.record()
                tokens[: shape.samples].copy_(graphs.run(shape, words, spans), non_blocking=True)
                end.record()
            graphs.stream.synchronize()
        return [1e3 * begin.elapsed_time(end) for begin, end in events]

    def _pack(self, batch: BatchShape) -> tuple[Shape, torch.Tensor, list[Span]]:
        """Its words in pinned memory. Tokens are random: at its power limit a GPU is faster on rows that are alike."""
        random = np.random.default_rng(0)
        decodes, prefills = _requests(batch, self._graphs.cache.block_size)
        shape = self._graphs.shapes.holding(self._graphs.packing.shape_of(decodes, prefills))
        words = torch.zeros(shape.words, dtype=torch.int32, pin_memory=True)
        sections = shape.split(words.numpy())
        spans = self._graphs.packing.pack(sections, decodes, prefills)
        sections.token_ids[:] = random.integers(self._model.config.vocab_size, size=shape.tokens)
        return shape, words, spans

    @torch.inference_mode()
    def attention_us(self, batch: BatchShape) -> float:
        """Time that a batch's attention adds to its step, in all layers: beyond that of padding, if it is captured."""
        shape, words, spans = self._pack(batch)
        time_us = self._attention_us(shape, words, spans)
        if self._graphs.has(shape):
            empty = torch.zeros_like(words)
            self._graphs.packing.pack(shape.split(empty.numpy()), Decodes.none(), [])
            time_us -= self._attention_us(shape, empty, [])
        return max(0.0, time_us)

    def _attention_us(
        self,
        shape: Shape,
        words: torch.Tensor,  # (shape.words,) int32, pinned
        spans: Sequence[Span],
    ) -> float:
        config, cache, ops = self._model.config, self._graphs.cache, self._model.ops
        batch = shape.split(words.to(cache.data.device), spans)
        size = (shape.tokens, config.num_heads, config.head_dim)
        q = torch.randn(size, dtype=self._model.dtype, device=cache.data.device)
        out = torch.empty_like(q)
        plans = [ops.plan_decodes(batch, cache.data)] if shape.decodes else []
        plans += [ops.plan_prefills(batch, cache.data)] if shape.prefills else []
        calls = [partial(ops.attention, out, q, kv, plan) for kv in cache.layers for plan in plans]
        return len(calls) * time_us(calls, REPLAYS)

    @torch.inference_mode()
    def operations_us(self, tokens: int) -> dict[str, float]:
        """Time of each operation of a pass over so many tokens, for all layers, launched in a graph of its own."""
        times = {name: len(calls) * time_us(calls, REPLAYS) for name, calls in self._operations(tokens).items()}
        torch.cuda.empty_cache()
        return times

    def _operations(self, tokens: int) -> dict[str, list[Callable[[], object]]]:
        model, ops, cache = self._model, self._model.ops, self._graphs.cache
        config, layers, weights = model.config, model.weights.layers, model.weights
        device = cache.data.device

        def rows(width: int) -> torch.Tensor:
            return torch.randn(tokens, width, dtype=model.dtype, device=device)

        hidden, update = rows(config.hidden_size), rows(config.hidden_size)
        attended = rows(config.num_heads * config.head_dim)
        gate_up, inner = rows(2 * config.intermediate_size), rows(config.intermediate_size)
        qkv = rows((config.num_heads + 2 * config.num_kv_heads) * config.head_dim).view(tokens, -1, config.head_dim)
        ids = torch.arange(tokens, dtype=torch.int32, device=device)
        slots = ids % (cache.data.shape[2] * cache.block_size)
        turn = ops.rotation(ids, model.inv_freq)
        norms = [norm for layer in layers for norm in (layer.input_norm, layer.post_norm)]
        return {
            "embed": [partial(ops.embed, ids % config.vocab_size, None, weights.embedding)],
            "norm": [partial(ops.add_rms_norm, hidden, update, norm, config.rms_norm_eps) for norm in norms],
            "qkv": [partial(ops.linear, hidden, layer.qkv, layer.qkv_bias) for layer in layers],
            "rope_and_cache": [partial(ops.rope_and_cache, qkv, turn, slots, kv) for kv in cache.layers],
            "o": [partial(ops.linear, attended, layer.o, layer.o_bias) for layer in layers],
            "gate_up": [partial(ops.linear, hidden, layer.gate_up, layer.gate_up_bias) for layer in layers],
            "silu": [partial(ops.silu_and_mul, gate_up) for _ in layers],
            "down": [partial(ops.linear, inner, layer.down, layer.down_bias) for layer in layers],
        }

    @torch.inference_mode()
    def head_us(self, samples: int) -> float:
        """Time of the final norm, the language-model head and sampling for so many rows."""
        model, weights = self._model, self._model.weights
        hidden, update = (
            torch.randn(samples, model.config.hidden_size, dtype=model.dtype, device=self._graphs.cache.data.device)
            for _ in range(2)
        )

        def head() -> torch.Tensor:
            x = model.ops.add_rms_norm(hidden, update, weights.final_norm, model.config.rms_norm_eps)
            tokens: torch.Tensor = model.ops.greedy(model.ops.linear(x, weights.head, None))
            return tokens

        return time_us([head] * 4, REPLAYS)

    def memory(self) -> dict[str, int]:
        """Bytes that may be used, that the weights take, and that a KV block takes."""
        config = self._model.config
        return {
            "usable": int(MEMORY_FRACTION * torch.cuda.mem_get_info()[1]),
            "weights": config.num_parameters * self._model.dtype.itemsize,
            "block": self._config.block_size * config.kv_bytes_per_token(self._model.dtype.itemsize),
        }

    def state(self, refuse_busy: bool = False) -> dict[str, Any]:
        """The GPU's driver, clocks, power and temperature, and the reasons why it may be slow.

        Raises:
            TandemError: another process computes on the GPU, if that is to be refused.
        """
        import pynvml

        pynvml.nvmlInit()
        try:
            gpu = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
            running = pynvml.nvmlDeviceGetComputeRunningProcesses(gpu)
            others = [each for each in running if each.pid != os.getpid()]
            if refuse_busy and others and len(running) > 1:  # one alone is this one, whatever a container calls it
                raise TandemError(
                    f"process {others[0].pid} computes on this GPU, and would be in every time: profile an idle one"
                )
            reasons = pynvml.nvmlDeviceGetCurrentClocksEventReasons(gpu)
            return {
                "driver": pynvml.nvmlSystemGetDriverVersion(),
                "sm_clock_mhz": pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_SM),
                "memory_clock_mhz": pynvml.nvmlDeviceGetClockInfo(gpu, pynvml.NVML_CLOCK_MEM),
                "power_limit_w": pynvml.nvmlDeviceGetEnforcedPowerLimit(gpu) / 1000,
                "power_w": pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
                "temperature_c": pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
                "power_limited": bool(reasons & POWER_LIMITED),
                "throttled": [name for name, bits in THROTTLED.items() if reasons & bits],
            }
        finally:
            pynvml.nvmlShutdown()


def _requests(batch: BatchShape, block_size: int) -> tuple[Decodes, list[Prefill]]:
    """A batch's requests, on consecutive blocks."""
    chunks = [*((1, context) for context in batch.decodes), *batch.chunks]
    ends = accumulate((-(-(tokens + context) // block_size) for tokens, context in chunks), initial=0)
    blocks = (range(begin, end) for begin, end in pairwise(ends))
    requests = [([0] * tokens, context, own) for (tokens, context), own in zip(chunks, blocks, strict=True)]
    return split_requests(requests, len(batch.decodes))
