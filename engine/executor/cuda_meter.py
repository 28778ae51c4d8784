"""Times a GPU's steps as they run when serving, and its operations alone: what a profiler asks."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from engine.config import MEMORY_FRACTION, ServingConfig
from engine.executor.batch import Decodes, Prefill, Shape
from engine.executor.cuda import Cuda, CudaDataPlane
from engine.executor.kernels.timing import time_us
from engine.executor.model import Llama
from engine.executor.running import RunningBatch
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
            for previous, step in pairwise([None, *steps]):
                assert step is not None
                plane.launch(step)
                if previous is not None:
                    times.append(plane.complete().device_ns / 1000)
            times.append(plane.complete().device_ns / 1000)
        return times

    def padding_us(self, kind: str, rows: int, count: int, rests: int = 0) -> list[float]:
        """Run the captured step (`decode` or `mixed`) of so many rows on padding alone: it attends to nothing.

        Args:
            kind, rows: which.
            count: how often.
            rests: decode steps of medium size that run after each, and are not timed.
        """
        graphs, shapes = self._graphs, self._graphs.shapes
        shape, rest = shapes.of(kind, rows), shapes.of("decode", shapes.sizes.decode[len(shapes.sizes.decode) // 2])
        words, rest_words = self._padding(shape), self._padding(rest)
        tokens = torch.empty(shape.samples, dtype=torch.int64, pin_memory=True)
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2 * count)]  # type: ignore[no-untyped-call]
        with torch.cuda.stream(graphs.stream):
            for begin, end in zip(marks[::2], marks[1::2], strict=True):
                begin.record()
                tokens.copy_(graphs.run(shape, words, []), non_blocking=True)
                end.record()
                for _ in range(rests):
                    graphs.run(rest, rest_words, [])
            graphs.stream.synchronize()
        return [1e3 * begin.elapsed_time(end) for begin, end in zip(marks[::2], marks[1::2], strict=True)]

    def _padding(self, shape: Shape) -> torch.Tensor:
        """A batch of padding whose tokens are random: a GPU at its power limit is faster on rows that are alike."""
        words = torch.empty(shape.words, dtype=torch.int32, pin_memory=True)
        sections = shape.split(words.numpy())
        self._graphs.packing.pack(sections, Decodes.none(), [])
        sections.token_ids[:] = np.random.default_rng(0).integers(self._model.config.vocab_size, size=shape.tokens)
        return words

    @torch.inference_mode()
    def attention_us(self, chunk: int, context: int) -> float:
        """Time that a prefill chunk's attention adds to a step, in all layers: beyond padding's, if it is captured."""
        packing, cache = self._graphs.packing, self._graphs.cache
        table = np.arange(-(-(chunk + context) // cache.block_size), dtype=np.int32)
        prefill = Prefill([0] * chunk, context, table, samples=True)
        exact = packing.shape_of(0, [prefill], len(table))
        shape = self._graphs.shapes.holding(exact)
        padding = self._attention_us(shape, []) if shape.tiles > exact.tiles else 0.0
        return max(0.0, self._attention_us(shape, [prefill]) - padding)

    def _attention_us(self, shape: Shape, prefills: list[Prefill]) -> float:
        config, cache, ops = self._model.config, self._graphs.cache, self._model.ops
        words = np.zeros(shape.words, np.int32)
        spans = self._graphs.packing.pack(shape.split(words), Decodes.none(), prefills)
        batch = shape.split(torch.from_numpy(words).to(cache.data.device)).batch(spans, None, all_rows=False)
        size = (shape.tokens, config.num_heads, config.head_dim)
        q = torch.randn(size, dtype=self._model.dtype, device=cache.data.device)
        out, plan = torch.empty_like(q), ops.plan_prefills(batch, cache.data)
        calls = [partial(ops.attention, out, q, kv, plan) for kv in cache.layers]
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

        hidden, update, attended = (
            rows(config.hidden_size),
            rows(config.hidden_size),
            rows(config.num_heads * config.head_dim),
        )
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
        """What the GPU says of itself: driver, clocks, power, temperature, and why it may be slow.

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
