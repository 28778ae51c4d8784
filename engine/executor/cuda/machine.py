"""The executor's machine with an NVIDIA GPU: Triton kernels in CUDA graphs, launched ahead of what they work on.

One compute stream runs the steps in order. A step's integers are packed into pinned memory and copied over in one go;
its newest tokens stay on the GPU, where the next step finds them, and reach the host a step late. Swapped blocks are
copied on a stream of their own: the copies of a step begin once the compute of the step before has ended, and compute
waits for those copies that `CopyOrder` names.
"""

from __future__ import annotations

import gc
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch

from engine.config import MEMORY_FRACTION, ServingConfig
from engine.copy_order import CopyOrder
from engine.executor import backend
from engine.executor.batch import Decodes, KVCache, Packing, Shape, Span
from engine.executor.batch_state import RunningBatch, Work, table_width
from engine.executor.cuda.shapes import Shapes
from engine.executor.kernels import ops
from engine.executor.kernels.gpu_timer import timing_event
from engine.executor.model import Llama
from engine.step import Copies, Step
from traces.errors import TandemError

SLOTS = 3  # steps whose pinned memory is in use: two in flight, one being packed
LAUNCH_NS = 1_000_000  # a host that takes longer was interrupted while it launched, and the device may have begun
SWAP_BLOCKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SWAP_REPEATS = 5


class Graphs:
    """Forward passes of one model over one cache, captured for batches of many shapes.

    Attributes:
        cache: the KV cache.
        packing: how batches are packed.
        shapes: of the batches.
    """

    def __init__(self, model: Llama, cache: KVCache, config: ServingConfig) -> None:
        self.cache = cache
        self.packing = Packing(cache.block_size, model.ops.tile_rows(cache.data), config.max_seqs)
        self._model = model
        self.shapes = Shapes.within(config, self.packing.tile_rows)
        device = cache.data.device
        self._inbox = torch.empty(self.shapes.largest.words, dtype=torch.int32, device=device)
        self._last_tokens = torch.zeros(config.max_seqs + 1, dtype=torch.int64, device=device)
        self._captured: dict[Shape, tuple[torch.cuda.CUDAGraph, torch.Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def capture(self, shapes: Iterable[Shape]) -> None:
        """Capture passes, each after a run that compiles what it needs. Padding alone runs: no cache is written."""
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

    def run(self, shape: Shape, words: torch.Tensor, spans: Sequence[Span]) -> torch.Tensor:
        """Launch a packed batch on the current stream.

        Args:
            shape: from `shapes`.
            words: the batch's buffer, in pinned memory.
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
        batch = shape.split(self._inbox).batch(spans, self._last_tokens, all_rows=not shape.prefills)
        return self._model.forward(batch, self.cache)


@dataclass(slots=True)
class _Slot:
    """What one step in flight needs of its own: memory that copies still read or write, and when it ran."""

    words: torch.Tensor  # pinned int32: the batch
    tokens: torch.Tensor  # pinned int64 (max_seqs,): what it sampled
    pairs: torch.Tensor  # pinned int64 (copies, 2): blocks to swap
    begin: torch.cuda.Event = field(default_factory=timing_event)
    end: torch.cuda.Event = field(default_factory=timing_event)
    copied: torch.cuda.Event = field(default_factory=timing_event)
    launched_ns: int = 0  # when a captured step had been launched; 0 of others, which begin while they are


class CudaDataPlane:
    """Implements `engine.executor.backend.DataPlane`: launches from the calling thread, never waiting for the GPU."""

    def __init__(self, graphs: Graphs, swap_cache: KVCache, config: ServingConfig, running: RunningBatch) -> None:
        self._graphs = graphs
        self._swap_cache = swap_cache
        self._running = running
        self._copies = CopyOrder()
        self._copy_stream = torch.cuda.Stream(graphs.cache.data.device)  # type: ignore[no-untyped-call]
        self._slots = [
            _Slot(
                torch.empty(graphs.shapes.largest.words, dtype=torch.int32, pin_memory=True),
                torch.empty(config.max_seqs, dtype=torch.int64, pin_memory=True),
                torch.empty(2 * config.num_cpu_blocks, 2, dtype=torch.int64, pin_memory=True),
            )
            for _ in range(SLOTS)
        ]
        self._in_flight: deque[tuple[int, _Slot, Work]] = deque()
        self._copied: dict[int, torch.cuda.Event] = {}  # by step, of copies that nobody is known to have waited for
        self._base, self._base_ns = timing_event(), 0

    def __enter__(self) -> CudaDataPlane:
        self._outer_stream = torch.cuda.current_stream()
        torch.cuda.set_stream(self._graphs.stream)
        self._base.record()
        self._base.synchronize()
        self._base_ns = time.perf_counter_ns()
        return self

    def __exit__(self, *_: object) -> None:
        torch.cuda.synchronize()
        torch.cuda.set_stream(self._outer_stream)

    def launch(self, step: Step) -> None:
        """Packs the step and puts its copies and its compute on their streams."""
        work = self._running.apply(step)
        slot = self._slots[step.index % SLOTS]
        slot.begin, slot.end = timing_event(), timing_event()
        swaps = bool(step.swapped_out or step.swapped_in)
        if swaps:
            self._launch_copies(step, slot)
        self._wait_for_copies(step)
        if step.kind != "swap":
            self._launch_compute(work, slot)
            slot.end.record()
        self._in_flight.append((step.index, slot, work))

    def complete(self) -> backend.Work:
        """Waits for the oldest step's tokens."""
        index, slot, work = self._in_flight.popleft()
        ended_before = slot.end.query()  # type: ignore[no-untyped-call]
        slot.end.synchronize()
        now_ns = time.perf_counter_ns()
        begin_ns = self._base_ns + round(1e6 * self._base.elapsed_time(slot.begin))
        # A device that was idle waits for the rest of the launch before it works.
        waited_ns = slot.launched_ns - begin_ns if begin_ns < slot.launched_ns < begin_ns + LAUNCH_NS else 0
        device_ns = round(1e6 * slot.begin.elapsed_time(slot.end)) - waited_ns
        if not ended_before:  # the two clocks drift apart by some 30 µs a second
            self._base, self._base_ns = slot.end, now_ns
        shown = self._running.note(work, slot.tokens[: len(work.samplers)].tolist())
        return backend.Work(index, begin_ns + waited_ns, device_ns, shown)

    def _launch_compute(self, work: Work, slot: _Slot) -> None:
        graphs = self._graphs
        exact = graphs.packing.shape_of(len(work.decodes.contexts), work.prefills, work.blocks)
        shape = graphs.shapes.holding(exact)
        spans = graphs.packing.pack(shape.split(slot.words.numpy()), work.decodes, work.prefills)
        slot.begin.record()  # not before: an idle GPU would count the packing as its own work
        try:
            tokens = graphs.run(shape, slot.words[: shape.words], spans)
        except torch.OutOfMemoryError as error:
            raise TandemError(
                f"out of GPU memory in a step of {shape.tokens} tokens: lower --kv-blocks or --max-batched-tokens "
                f"({str(error).splitlines()[0]})"
            ) from error
        slot.launched_ns = time.perf_counter_ns() if graphs.has(shape) else 0
        samples = len(work.samplers)
        slot.tokens[:samples].copy_(tokens[:samples], non_blocking=True)

    def _launch_copies(self, step: Step, slot: _Slot) -> None:
        """Copies begin once the compute of the steps before has ended, and end a step that has nothing but them."""
        self._copy_stream.wait_stream(self._graphs.stream)
        slot.copied.synchronize()  # the pairs of the slot's earlier step are read; always long ago
        gpu, cpu = self._graphs.cache.data, self._swap_cache.data
        with torch.cuda.stream(self._copy_stream):
            slot.begin.record()
            written = 0
            for swaps, source, target in ((step.swapped_out, gpu, cpu), (step.swapped_in, cpu, gpu)):
                if swaps:
                    pairs = slot.pairs[written : written + _fill(slot.pairs[written:], swaps.values())]
                    ops.copy_blocks(source, target, pairs)
                    written += len(pairs)
            slot.end.record()
            slot.copied = timing_event()
            slot.copied.record()
        self._copied[step.index] = slot.copied

    def _wait_for_copies(self, step: Step) -> None:
        needed = self._copies.needs(step)
        if needed is not None:
            self._graphs.stream.wait_event(self._copied[needed])
            self._copied = {index: event for index, event in self._copied.items() if index > needed}


def _fill(pairs: torch.Tensor, swaps: Iterable[Copies]) -> int:
    """Write the blocks of several requests one after the other; returns how many."""
    flat = [pair for copies in swaps for pair in zip(*copies, strict=True)]
    pairs[: len(flat)] = torch.tensor(flat)
    return len(flat)


class Cuda:
    """Implements `engine.executor.executor.Machine` on the current CUDA device."""

    kernels = "Triton"
    ops = ops
    default_dtype = "float16"
    default_block_size = 64  # prefill fetches blocks of this size by the copy engine

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.device)
        if torch.cuda.get_device_capability(self.device) < (8, 0):
            raise TandemError(f"{self.name} is older than compute capability 8.0: use --device cpu")
        self._prepared: tuple[Llama, ServingConfig, Graphs, KVCache] | None = None

    def measure_blocks(self, model: Llama, config: ServingConfig) -> int:
        """As in `Machine`: what the largest step and the captured graphs leave of the GPU's memory."""
        self._prepared = None
        sizes = _Memory.of(model, config, self.device)
        longest = table_width(config)
        if sizes.room < longest * sizes.block:
            gib = {name: f"{getattr(sizes, name) / 2**30:.1f} GiB" for name in ("usable", "used", "step", "graphs")}
            raise TandemError(
                f"{self.name}: of {gib['usable']} that may be used, weights and all else loaded take {gib['used']}, "
                f"a full step {gib['step']}, CUDA graphs {gib['graphs']}, and one request of {config.max_model_len} "
                f"tokens {longest * sizes.block / 2**30:.1f} GiB of KV cache: "
                "lower --max-batched-tokens, --max-seqs or --max-model-len"
            )
        return min(sizes.room // sizes.block, config.max_seqs * longest)

    def data_plane(self, model: Llama, config: ServingConfig, running: RunningBatch) -> CudaDataPlane:
        """As in `Machine`; caches and graphs are kept for the next run within the same limits."""
        graphs, swap_cache = self.prepare(model, config)
        return CudaDataPlane(graphs, swap_cache, config, running)

    def prepare(self, model: Llama, config: ServingConfig) -> tuple[Graphs, KVCache]:
        """Allocate the caches and capture the graphs for runs within the limits of `config`.

        Raises:
            TandemError: memory does not hold them.
        """
        limits = replace(config, scheduler="", pipeline_depth=1, prefix_caching=False)
        if self._prepared and self._prepared[0] is model and self._prepared[1] == limits:
            return self._prepared[2:]
        self._prepared = None
        try:
            cache = _allocate(model, config.num_blocks, config.block_size, self.device)
            swap_cache = _allocate(model, config.num_cpu_blocks, config.block_size, torch.device("cpu"))
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
        self._prepared = model, limits, graphs, swap_cache
        return graphs, swap_cache

    def measure_swap(self, model: Llama, config: ServingConfig) -> list[tuple[str, int, list[float]]]:
        """As in `Machine`."""
        graphs, swap_cache = self.prepare(model, config)
        most = min(config.num_blocks, config.num_cpu_blocks)
        pairs = torch.arange(most, device=self.device).repeat(2, 1).T.contiguous()
        return [
            (direction, count, [_time_us(source.data, target.data, pairs[:count]) for _ in range(SWAP_REPEATS)])
            for count in sorted({min(count, most) for count in SWAP_BLOCKS})
            for direction, source, target in (("out", graphs.cache, swap_cache), ("in", swap_cache, graphs.cache))
        ]


def _allocate(model: Llama, blocks: int, block_size: int, device: torch.device) -> KVCache:
    return KVCache.allocate(model.config, blocks, block_size, model.dtype, device, pinned=device.type == "cpu")


def _compile_copies(cache: KVCache, swap_cache: KVCache) -> None:
    first = torch.zeros(1, 2, dtype=torch.int64, pin_memory=True)
    for source, target in ((cache, swap_cache), (swap_cache, cache)):
        ops.copy_blocks(source.data, target.data, first)
    torch.cuda.synchronize()


def _time_us(source: torch.Tensor, target: torch.Tensor, pairs: torch.Tensor) -> float:
    begin, end = timing_event(), timing_event()
    begin.record()
    ops.copy_blocks(source, target, pairs)
    end.record()
    end.synchronize()
    return 1e3 * float(begin.elapsed_time(end))


@dataclass(frozen=True, slots=True)
class _Memory:
    """What takes the GPU's memory, in bytes."""

    usable: int  # the share of it that may be used
    used: int  # by what is loaded
    step: int  # by the largest step
    graphs: int
    block: int  # by a KV block

    @property
    def room(self) -> int:
        """What is left for KV blocks."""
        return self.usable - self.used - self.step - self.graphs

    @classmethod
    def of(cls, model: Llama, config: ServingConfig, device: torch.device) -> _Memory:
        """Measure, by running the largest step and capturing a few graphs over a cache of one block."""
        try:
            cache = _allocate(model, 1, config.block_size, device)
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
