"""Times each kernel against the machine's ceilings: a large matrix product, a large read, a large copy.

Or times tile shapes, for `engine.executor.kernels.tuning`. Inputs are random, and larger than the L2 cache or taken in
turns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain, product
from operator import itemgetter

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from analysis.bench.common import Benchmark, Row
from analysis.jobs.progress import Progress
from analysis.report.tables import TextTable, percent
from engine.executor.batch import Span, query_tiles
from engine.executor.kernels import ops
from engine.executor.kernels.copy_blocks import copy_blocks
from engine.executor.kernels.gpu_timer import time_us
from engine.executor.kernels.paged_decode import cut, paged_decode
from engine.executor.kernels.paged_prefill import paged_prefill
from engine.executor.kernels.tuning import Tiles, Tuning, tuning
from engine.executor.weights import DTYPES
from engine.records import manifest
from traces.errors import TandemError

MOST_SAMPLES = 256  # a step samples one token a sequence
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, VOCAB = 32, 8, 128, 4096, 14336, 128256  # Llama-3-8B
PRODUCTS = {  # name: columns, depth
    "qkv": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    "o": (HIDDEN, HEADS * HEAD_DIM),
    "gate_up": (2 * INNER, HIDDEN),
    "down": (HIDDEN, INNER),
    "head": (VOCAB, HIDDEN),
}
HOW = "medians of CUDA-graph replays, random inputs; share: of the rate of a matrix product, a read, a copy or the bus"
COLD_BYTES = 1 << 29  # several times any L2 cache


Timing = tuple[str, str, float, int, str]
"""Kernel, shape, microseconds; bytes that it moves, or operations of `PRODUCT`; and the ceiling that bounds it."""
PRODUCT, READ, COPY, BUS = "matrix product", "read", "copy", "bus"


@triton.jit
def _read(out: tl.tensor, data: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Sum BLOCK * 8 elements: nothing but a read."""
    at = data + tl.program_id(0).to(tl.int64) * (8 * BLOCK) + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(8):
        total += tl.load(at + i * BLOCK)
    tl.store(out + tl.program_id(0), tl.sum(total))


def measure_ceilings(dtype: torch.dtype) -> dict[str, float]:
    """The most that the machine reaches: TFLOP/s of cuBLAS, GB/s of a read, of a copy (both ways), and over the bus."""
    a, b = (torch.randn(8192, 8192, dtype=dtype, device="cuda") for _ in range(2))
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    host = torch.zeros(1 << 26, pin_memory=True)
    sums = torch.empty(len(source) // 32768, device="cuda")
    return {
        PRODUCT: 2 * 8192**3 / time_us([partial(torch.mm, a, b)]) / 1e6,
        READ: source.nbytes / time_us([lambda: _read[(len(sums),)](sums, source, BLOCK=4096, num_warps=8)]) / 1e3,
        COPY: 2 * source.nbytes / time_us([lambda: torch.neg(source, out=target)]) / 1e3,
        BUS: host.nbytes / time_us([lambda: host.copy_(source[: len(host)], non_blocking=True)]) / 1e3,
    }


class Paged:
    """Random requests of one length over a paged cache; several caches in turns where one would fit into the L2."""

    def __init__(
        self, requests: int, context: int, dtype: torch.dtype, block_size: int, head_dim: int = HEAD_DIM
    ) -> None:
        blocks = requests * -(-context // block_size)
        layer_bytes = 2 * blocks * block_size * KV_HEADS * head_dim * dtype.itemsize
        layers = max(1, min(32, COLD_BYTES // layer_bytes))
        shape = (layers, 2, blocks, block_size, KV_HEADS, head_dim)
        self.caches = torch.randn(shape, dtype=dtype, device="cuda").unbind(0)
        self.bytes = 2 * requests * context * KV_HEADS * head_dim * dtype.itemsize
        self.tables = torch.randperm(blocks, device="cuda").int().view(requests, -1)
        self.context_lens = torch.full((requests,), context, dtype=torch.int32, device="cuda")

    def decode(self, tuned: Tuning) -> float:
        """Time of attention from one row of each request, in µs."""
        q = self._queries(len(self.tables))
        out = torch.empty_like(q)
        pieces = cut(self.context_lens, KV_HEADS, tuned.programs, tuned.chunk)
        return time_us([partial(paged_decode, out, q, kv, self.tables, pieces, tuned.decode) for kv in self.caches])

    def prefill(self, tiles: Tiles, rows: int) -> float:
        """Time of attention from the last `rows` of each request, in µs."""
        requests = len(self.tables)
        q = self._queries(requests * rows)
        out = torch.empty_like(q)
        spans = [Span(i * rows, rows, context) for i, context in enumerate(self.context_lens.tolist())]
        listed = torch.from_numpy(query_tiles(spans, 0, tiles.rows)).cuda()
        return time_us([partial(paged_prefill, out, q, kv, listed, self.tables, tiles) for kv in self.caches[:4]])

    def _queries(self, rows: int) -> torch.Tensor:
        cache = self.caches[0]
        return torch.randn(rows, HEADS, cache.shape[-1], dtype=cache.dtype, device="cuda")


def prefill_flops(requests: int, rows: int, context: int, head_dim: int = HEAD_DIM) -> int:
    """Operations of the two products of causal attention; what the mask takes from tiles is not counted."""
    pairs = rows * context - rows * (rows - 1) // 2
    return 4 * requests * pairs * HEADS * head_dim


DECODES = ((1, 1024), (1, 65336), (8, 1024), (16, 1024), (64, 1024), (128, 512), (256, 1024))  # requests, context
# requests, rows of each, context
PREFILLS = ((1, 2048, 2048), (1, 8192, 8192), (1, 32768, 32768), (16, 1024, 1024), (128, 128, 128), (1, 2048, 16384))


def _attention(dtype: torch.dtype, block_size: int) -> Iterator[Timing]:
    """Decode against the read ceiling, prefill against the product's."""
    tuned = tuning(torch.device("cuda"), dtype.itemsize, HEAD_DIM, block_size)
    for requests, context in DECODES:
        paged = Paged(requests, context, dtype, block_size)
        yield "paged_decode", f"{requests} x {context}", paged.decode(tuned), paged.bytes, READ
    for requests, rows, context in PREFILLS:
        us = Paged(requests, context, dtype, block_size).prefill(tuned.prefill, rows)
        flops = prefill_flops(requests, rows, context)
        yield "paged_prefill", f"{requests} x {rows} of {context}", us, flops, PRODUCT


def _bytes(tokens: int, dtype: torch.dtype, block_size: int) -> Iterator[Timing]:
    """The kernels of a step of so many tokens that only move bytes, against the copy ceiling."""

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device="cuda")

    turns = max(1, min(16, (1 << 20) // (tokens * 64)))
    hidden, update, weight = randn(turns, tokens, HIDDEN), randn(tokens, HIDDEN), randn(HIDDEN)
    samples = min(tokens, MOST_SAMPLES)
    gate_up, logits = randn(turns, tokens, 2 * INNER), randn(turns, samples, VOCAB)
    qkv, kv = randn(turns, tokens, HEADS + 2 * KV_HEADS, HEAD_DIM), randn(2, 2048, block_size, KV_HEADS, HEAD_DIM)
    slots = torch.randperm(2048 * block_size, device="cuda")[:tokens]
    turn = ops.rotation(slots, torch.rand(HEAD_DIM // 2, device="cuda"))
    works: dict[str, tuple[int, list[Callable[[], object]]]] = {
        "add_rms_norm": (4 * update.nbytes, [partial(ops.add_rms_norm, x, update, weight, 1e-5) for x in hidden]),
        "rope_and_cache": (2 * qkv[0].nbytes, [partial(ops.rope_and_cache, x, turn, slots, kv) for x in qkv]),
        "silu_and_mul": (gate_up[0].nbytes * 3 // 2, [partial(ops.silu_and_mul, x) for x in gate_up]),
        "greedy": (logits[0].nbytes, [partial(ops.greedy, x) for x in logits]),
    }
    for name, (moved, calls) in works.items():
        rows = samples if name == "greedy" else tokens
        yield name, f"{rows} rows", time_us(calls), moved, COPY


def _products(rows: int, dtype: torch.dtype) -> Iterator[Timing]:
    """The products of a step of so few rows, by `ops.linear` and by cuBLAS, against the read ceiling."""
    for name, (columns, depth) in PRODUCTS.items():
        x = torch.randn(rows, depth, dtype=dtype, device="cuda")
        turns = max(2, COLD_BYTES // (columns * depth * dtype.itemsize))
        weights = torch.randn(turns, columns, depth, dtype=dtype, device="cuda")
        for kernel, linear in (("linear", ops.linear), ("linear (cuBLAS)", F.linear)):
            calls: list[Callable[[], object]] = [partial(linear, x, weight, None) for weight in weights]
            yield kernel, f"{name}, {rows} rows", time_us(calls), weights[0].nbytes, READ


def _swap(dtype: torch.dtype, block_size: int) -> Iterator[Timing]:
    """Blocks of 32 layers to pinned memory and back, against the bus."""
    gpu = torch.randn(32, 2, 128, block_size, KV_HEADS, HEAD_DIM, dtype=dtype, device="cuda")
    host = torch.zeros(32, 2, 64, block_size, KV_HEADS, HEAD_DIM, dtype=dtype, pin_memory=True)
    pairs = torch.stack((torch.randperm(64), torch.randperm(64)), dim=1).cuda()
    for shape, source, target in (("out", gpu, host), ("in", host, gpu)):
        yield "copy_blocks", shape, time_us([partial(copy_blocks, source, target, pairs)]), host.nbytes, BUS


def _tuned(dtype: torch.dtype, block_size: int, head_dim: int) -> Iterator[Timing]:
    """Time tile shapes, best first; what the GPU has no room for is left out."""
    many, long = Paged(64, 1024, dtype, block_size, head_dim), Paged(1, 8192, dtype, block_size, head_dim)
    tuned = tuning(torch.device("cuda"), dtype.itemsize, head_dim, block_size)
    timings: list[Timing] = []
    for tokens, warps, stages in product((16, 32, 64, 128), (1, 2, 4, 8), (2, 3, 4)):
        tiles = Tiles(16, tokens, warps, stages)
        with suppress(OutOfResources):
            us = many.decode(replace(tuned, decode=tiles, chunk=max(tuned.chunk, tokens)))
            timings.append(("paged_decode", str(tiles), us, many.bytes, READ))
    flops = prefill_flops(1, 8192, 8192, head_dim)
    for rows, tokens, warps, stages, bulk in product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4), (False, True)):
        tiles = Tiles(rows, tokens, warps, stages, bulk)
        with suppress(OutOfResources):
            timings.append(("paged_prefill", str(tiles), long.prefill(tiles, 8192), flops, PRODUCT))
    yield from sorted(timings, key=itemgetter(0, 2))


def _all_rows(dtype: torch.dtype, block_size: int) -> Iterator[Row]:
    """The ceilings, then every kernel on the shapes of Llama-3-8B."""
    ceilings = measure_ceilings(dtype)
    for name, rate in ceilings.items():
        yield _row(name, "8192 x 8192 x 8192" * (name == PRODUCT), 0.0, rate, name, 1.0)
    moving = (_bytes(tokens, dtype, block_size) for tokens in (1, 64, 256, 16384))
    products = (_products(rows, dtype) for rows in (1, 16, 32, 64))
    timings = (_attention(dtype, block_size), *moving, *products, _swap(dtype, block_size))
    yield from _rows(chain.from_iterable(timings), ceilings)


def _rows(timings: Iterable[Timing], ceilings: Mapping[str, float]) -> Iterator[Row]:
    for kernel, shape, us, work, bound in timings:
        rate = work / us / (1e6 if bound == PRODUCT else 1e3)
        yield _row(kernel, shape, us, rate, bound, rate / ceilings.get(bound, math.inf))


def _row(kernel: str, shape: str, us: float, rate: float, bound: str, share: float) -> Row:
    unit = "TFLOP/s" if bound == PRODUCT else "GB/s"
    return {"kernel": kernel, "shape": shape, "time_us": us, "rate": rate, "unit": unit, "share": share}


def kernels(dtype: str, block_size: int, head_dim: int, tune: bool, progress: Progress) -> Benchmark:
    """The benchmark of this machine's GPU.

    Args:
        dtype: of `engine.executor.weights.DTYPES`.
        block_size: tokens of a KV block.
        head_dim: of the heads whose tile shapes are timed.
        tune: time tile shapes instead.

    Raises:
        TandemError: there is no GPU, or no such dtype.
    """
    if dtype not in DTYPES:
        raise TandemError(f"unknown dtype '{dtype}': choose {', '.join(DTYPES)}")
    if not torch.cuda.is_available():
        raise TandemError("kernels run on a GPU, and there is none here")
    facts = {"dtype": dtype} | manifest.compose(device=torch.cuda.get_device_name(), backend="kernels")
    rows = _rows(_tuned(DTYPES[dtype], block_size, head_dim), {}) if tune else _all_rows(DTYPES[dtype], block_size)
    return Benchmark("kernels", HOW, facts, _numbered(rows, progress), _tables)


def _numbered(rows: Iterator[Row], progress: Progress) -> Iterator[Row]:
    with progress.status("bench kernels"):
        for number, row in enumerate(rows, start=1):
            name = f"{row['kernel']} {row['shape']}"
            progress.note(f"{name}: {row['time_us']:.1f} µs, {row['rate']:.1f} {row['unit']}")
            yield {"row": f"{number} {name}"} | row


def _tables(rows: Sequence[Row]) -> Iterator[TextTable]:
    cells = [
        (row["kernel"], row["shape"], f"{row['time_us']:.1f}", f"{row['rate']:.1f}", row["unit"], percent(row["share"]))
        for row in rows
    ]
    yield TextTable("Kernels", "", ("kernel", "shape", "µs", "rate", "unit", "of the ceiling"), cells, labels=2)
