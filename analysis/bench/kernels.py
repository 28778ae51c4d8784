"""Times each kernel against what the machine can do: a large matrix product, a large read, a large copy.

`python -m analysis.bench.kernels` prints a table; `--tune` times tile shapes instead, for `tuning.py`;
`--json` prints either for machines. Inputs are random, and larger than the L2 cache or taken in turns.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from engine.executor.batch import Span, query_tiles
from engine.executor.kernels import ops
from engine.executor.kernels.copy_blocks import copy_blocks
from engine.executor.kernels.gpu_timer import time_us
from engine.executor.kernels.paged_decode import cut, paged_decode
from engine.executor.kernels.paged_prefill import paged_prefill
from engine.executor.kernels.tuning import Tiles, Tuning, tuning

MOST_SAMPLES = 256  # a step samples one token a sequence
HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INNER, VOCAB = 32, 8, 128, 4096, 14336, 128256  # Llama-3-8B
PRODUCTS = {  # name: columns, depth
    "qkv": ((HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN),
    "o": (HIDDEN, HEADS * HEAD_DIM),
    "gate_up": (2 * INNER, HIDDEN),
    "down": (HIDDEN, INNER),
    "head": (VOCAB, HIDDEN),
}
COLD_BYTES = 1 << 29  # several times any L2 cache


@dataclass(frozen=True, slots=True)
class KernelTiming:
    """One measurement. `rate` is in TFLOP/s for products and attention over prompts, in GB/s for the rest."""

    kernel: str
    shape: str
    time_us: float
    rate: float
    unit: str
    share: float  # of the ceiling with that unit


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the machine reaches: TFLOP/s of cuBLAS, GB/s of a read, of a copy (read and write), and over the bus."""

    product: float
    read: float
    copy: float
    bus: float


@triton.jit
def _read(out: tl.tensor, data: tl.tensor, BLOCK: tl.constexpr) -> None:
    """Sum BLOCK * 8 elements: nothing but a read."""
    at = data + tl.program_id(0).to(tl.int64) * (8 * BLOCK) + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(8):
        total += tl.load(at + i * BLOCK)
    tl.store(out + tl.program_id(0), tl.sum(total))


def measure_ceilings(dtype: torch.dtype) -> Ceilings:
    """Measure the machine."""
    a, b = (torch.randn(8192, 8192, dtype=dtype, device="cuda") for _ in range(2))
    source = torch.randn(1 << 29, device="cuda")
    target = torch.empty_like(source)
    host = torch.zeros(1 << 26, pin_memory=True)
    sums = torch.empty(len(source) // 32768, device="cuda")
    return Ceilings(
        product=2 * 8192**3 / time_us([partial(torch.mm, a, b)]) / 1e6,
        read=source.nbytes / time_us([lambda: _read[(len(sums),)](sums, source, BLOCK=4096, num_warps=8)]) / 1e3,
        copy=2 * source.nbytes / time_us([lambda: torch.neg(source, out=target)]) / 1e3,
        bus=host.nbytes / time_us([lambda: host.copy_(source[: len(host)], non_blocking=True)]) / 1e3,
    )


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
PREFILLS = (  # requests, rows of each, context
    (1, 2048, 2048),
    (1, 8192, 8192),
    (1, 32768, 32768),
    (16, 1024, 1024),
    (128, 128, 128),
    (1, 2048, 16384),
)


def bench_attention(dtype: torch.dtype, block_size: int, ceilings: Ceilings) -> Iterator[KernelTiming]:
    """Decode against the read ceiling, prefill against the product's."""
    tuned = tuning(torch.device("cuda"), dtype.itemsize, HEAD_DIM, block_size)
    for requests, context in DECODES:
        paged = Paged(requests, context, dtype, block_size)
        rate = paged.bytes / (us := paged.decode(tuned)) / 1e3
        yield KernelTiming("paged_decode", f"{requests} x {context}", us, rate, "GB/s", rate / ceilings.read)
    for requests, rows, context in PREFILLS:
        us = Paged(requests, context, dtype, block_size).prefill(tuned.prefill, rows)
        rate = prefill_flops(requests, rows, context) / us / 1e6
        shape = f"{requests} x {rows} of {context}"
        yield KernelTiming("paged_prefill", shape, us, rate, "TFLOP/s", rate / ceilings.product)


def bench_bytes(tokens: int, dtype: torch.dtype, block_size: int, ceilings: Ceilings) -> Iterator[KernelTiming]:
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
        rate = moved / (us := time_us(calls)) / 1e3
        rows = samples if name == "greedy" else tokens
        yield KernelTiming(name, f"{rows} rows", us, rate, "GB/s", rate / ceilings.copy)


def bench_products(rows: int, dtype: torch.dtype, ceilings: Ceilings) -> Iterator[KernelTiming]:
    """The products of a step of so few rows, by `ops.linear` and by cuBLAS, against the read ceiling."""
    for name, (columns, depth) in PRODUCTS.items():
        x = torch.randn(rows, depth, dtype=dtype, device="cuda")
        turns = max(2, COLD_BYTES // (columns * depth * dtype.itemsize))
        weights = torch.randn(turns, columns, depth, dtype=dtype, device="cuda")
        for kernel, linear in (("linear", ops.linear), ("linear (cuBLAS)", F.linear)):
            calls: list[Callable[[], object]] = [partial(linear, x, weight, None) for weight in weights]
            rate = weights[0].nbytes / (us := time_us(calls)) / 1e3
            yield KernelTiming(kernel, f"{name}, {rows} rows", us, rate, "GB/s", rate / ceilings.read)


def bench_swap(dtype: torch.dtype, block_size: int, ceilings: Ceilings) -> Iterator[KernelTiming]:
    """Blocks of 32 layers to pinned memory and back, against the bus."""
    gpu = torch.randn(32, 2, 128, block_size, KV_HEADS, HEAD_DIM, dtype=dtype, device="cuda")
    host = torch.zeros(32, 2, 64, block_size, KV_HEADS, HEAD_DIM, dtype=dtype, pin_memory=True)
    pairs = torch.stack((torch.randperm(64), torch.randperm(64)), dim=1).cuda()
    for shape, source, target in (("out", gpu, host), ("in", host, gpu)):
        rate = host.nbytes / (us := time_us([partial(copy_blocks, source, target, pairs)])) / 1e3
        yield KernelTiming("copy_blocks", shape, us, rate, "GB/s", rate / ceilings.bus)


def tune(dtype: torch.dtype, block_size: int, head_dim: int) -> Iterator[KernelTiming]:
    """Time tile shapes, best first; what the GPU has no room for is left out."""
    many, long = Paged(64, 1024, dtype, block_size, head_dim), Paged(1, 8192, dtype, block_size, head_dim)
    tuned = tuning(torch.device("cuda"), dtype.itemsize, head_dim, block_size)
    timings = []
    for tokens, warps, stages in product((16, 32, 64, 128), (1, 2, 4, 8), (2, 3, 4)):
        tiles = Tiles(16, tokens, warps, stages)
        with suppress(OutOfResources):
            us = many.decode(replace(tuned, decode=tiles, chunk=max(tuned.chunk, tokens)))
            timings.append(KernelTiming("paged_decode", str(tiles), us, many.bytes / us / 1e3, "GB/s", 0.0))
    for rows, tokens, warps, stages, bulk in product((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4), (False, True)):
        tiles = Tiles(rows, tokens, warps, stages, bulk)
        with suppress(OutOfResources):
            rate = prefill_flops(1, 8192, 8192, head_dim) / (us := long.prefill(tiles, 8192)) / 1e6
            timings.append(KernelTiming("paged_prefill", str(tiles), us, rate, "TFLOP/s", 0.0))
    yield from sorted(timings, key=lambda timing: (timing.kernel, timing.time_us))


def bench(dtype: torch.dtype, block_size: int) -> Iterator[KernelTiming]:
    """Time every kernel on the shapes of Llama-3-8B; the ceilings come first."""
    ceilings = measure_ceilings(dtype)
    yield KernelTiming("matrix product", "8192 x 8192 x 8192", 0.0, ceilings.product, "TFLOP/s", 1.0)
    for name in ("read", "copy", "bus"):
        yield KernelTiming(name, "", 0.0, getattr(ceilings, name), "GB/s", 1.0)
    yield from bench_attention(dtype, block_size, ceilings)
    for tokens in (1, 64, 256, 16384):
        yield from bench_bytes(tokens, dtype, block_size, ceilings)
    for rows in (1, 16, 32, 64):
        yield from bench_products(rows, dtype, ceilings)
    yield from bench_swap(dtype, block_size, ceilings)


def main() -> None:
    """Print the timings as they come."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("float16", "bfloat16", "float32"), default="float16")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=HEAD_DIM, help="with --tune")
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    timings = tune(dtype, options.block_size, options.head_dim) if options.tune else bench(dtype, options.block_size)
    for each in timings:
        rate = f"{each.rate:8.1f} {each.unit:8} {each.share:6.1%}"
        row = f"{each.kernel:16} {each.shape:60} {each.time_us:10.1f} us {rate}"
        print(json.dumps(asdict(each)) if options.json else row, flush=True)


if __name__ == "__main__":
    main()
