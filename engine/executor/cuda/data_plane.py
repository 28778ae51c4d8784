"""Runs steps on a GPU, launched ahead of the steps whose tokens they work on.

One compute stream runs the steps in order. A step's integers are packed into pinned memory and copied over in one go.
Its newest tokens stay on the GPU, where the next step finds them, and reach the host a step late. Swapped blocks are
copied on a stream of their own: the copies of a step begin once the compute of the step before has ended, and compute
waits for those copies that `CopyOrder` names.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field

import torch

from engine.config import ServingConfig
from engine.copy_order import CopyOrder
from engine.executor.backend import CompletedStep
from engine.executor.batch import KVCache
from engine.executor.batch_state import RunningBatch, StepWork
from engine.executor.cuda.graphs import Graphs
from engine.executor.kernels import ops
from engine.executor.kernels.gpu_timer import timing_event
from engine.step import Step
from traces.errors import TandemError

SLOTS = 3  # steps whose pinned memory is in use: two in flight, one being packed
LAUNCH_NS = 1_000_000  # a host that takes longer was interrupted while it launched, and the device may have begun


@dataclass(slots=True)
class _Slot:
    """The memory of one step in flight, which copies still read or write, and the times when it ran."""

    words: torch.Tensor  # (words,) int32, pinned: the batch
    tokens: torch.Tensor  # (max_seqs,) int64, pinned: the tokens it sampled
    pairs: torch.Tensor  # (copies, 2) int64, pinned: blocks to swap
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
        self._in_flight: deque[tuple[int, _Slot, StepWork]] = deque()  # steps by index
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
        if step.swapped_out or step.swapped_in:
            self._launch_copies(step, slot)
        self._wait_for_copies(step)
        if step.kind != "swap":
            self._launch_compute(work, slot)
            slot.end.record()
        self._in_flight.append((step.index, slot, work))

    def complete(self) -> CompletedStep:
        """Waits for the oldest step's tokens."""
        step, slot, work = self._in_flight.popleft()
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
        return CompletedStep(step, begin_ns + waited_ns, device_ns, shown)

    def _launch_compute(self, work: StepWork, slot: _Slot) -> None:
        graphs = self._graphs
        shape = graphs.shapes.holding(graphs.packing.shape_of(work.decodes, work.prefills))
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
                    blocks = [pair for copies in swaps.values() for pair in zip(*copies, strict=True)]
                    pairs = slot.pairs[written : written + len(blocks)]
                    pairs[:] = torch.tensor(blocks)
                    ops.copy_blocks(source, target, pairs)
                    written += len(blocks)
            slot.end.record()
            slot.copied = timing_event()
            slot.copied.record()
        self._copied[step.index] = slot.copied

    def _wait_for_copies(self, step: Step) -> None:
        needed = self._copies.needs(step)
        if needed is not None:
            self._graphs.stream.wait_event(self._copied[needed])
            self._copied = {index: event for index, event in self._copied.items() if index > needed}
