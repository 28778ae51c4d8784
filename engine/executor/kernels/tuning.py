"""Tile shapes per GPU, measured offline by `tandem bench kernels --tune`; nothing is tuned while serving.

Knows GPUs, element sizes and head_dims; does not know the kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of an attention kernel."""

    rows: int  # query rows of a program
    tokens: int  # KV tokens of an iteration
    warps: int
    stages: int  # iterations whose loads are in flight, and the one at work
    bulk: bool = False  # prefill: fetch KV by the copy engine, where `tokens` divides the block size


@dataclass(frozen=True, slots=True)
class Skinny:
    """The tiles of a matrix product of few rows."""

    rows: int  # of x, at most: a power of 2 from 16
    columns: int  # of the output, of a program
    depth: int  # of an iteration, which divides the depth of the product
    warps: int
    stages: int


@dataclass(frozen=True, slots=True)
class Tuning:
    """The tiles of attention on a GPU, for one element size and head_dim."""

    prefill: Tiles
    decode: Tiles
    programs: int  # that fill the memory's bandwidth in decode
    chunk: int = 64  # requests are split at multiples of so many KV tokens, for decode


_PROGRAMS_PER_PROCESSOR = 4
_DEFAULT = (8, 0)  # fits into the 100 KB of shared memory of 8.6 and 8.9 too

_PREFILL = {  # compute capability: (bytes of an element, largest head_dim)
    (8, 0): {
        (2, 64): Tiles(128, 64, 4, 3),
        (2, 128): Tiles(128, 64, 8, 3),
        (2, 256): Tiles(64, 32, 4, 2),
        (4, 64): Tiles(32, 32, 4, 2),
        (4, 128): Tiles(32, 32, 4, 2),
        (4, 256): Tiles(32, 16, 4, 2),
    },
    (9, 0): {
        (2, 64): Tiles(64, 64, 4, 3),
        (2, 128): Tiles(128, 128, 8, 3),
        (2, 256): Tiles(128, 64, 8, 2),
    },
}
_PREFILL_IN_BULK = {  # likewise, for blocks that `tokens` divides
    (9, 0): {
        (2, 64): Tiles(64, 64, 4, 3, bulk=True),
        (2, 128): Tiles(64, 64, 4, 3, bulk=True),
        (2, 256): Tiles(128, 64, 8, 2, bulk=True),
    },
}
_DECODE = {
    (8, 0): {
        (2, 64): Tiles(16, 64, 2, 3),
        (2, 128): Tiles(16, 32, 2, 3),
        (2, 256): Tiles(16, 32, 4, 2),
        (4, 64): Tiles(16, 32, 4, 2),
        (4, 128): Tiles(16, 32, 4, 2),
        (4, 256): Tiles(16, 16, 4, 2),
    },
}
_SKINNY = {  # for elements of 2 bytes; fewest rows first, widest first
    (9, 0): (
        Skinny(16, 64, 128, 4, 6),
        Skinny(16, 32, 256, 4, 6),
        Skinny(32, 128, 128, 8, 4),
        Skinny(32, 64, 128, 4, 5),
        Skinny(32, 32, 256, 8, 5),
        Skinny(64, 128, 128, 8, 3),
        Skinny(64, 64, 128, 4, 5),
    ),
}
_BUSY = 0.7  # of the processors: with fewer programs, a product of few rows is cuBLAS's


def skinny(
    x: torch.Tensor,  # (tokens, in), contiguous
    weight: torch.Tensor,  # (out, in), contiguous
) -> Skinny | None:
    """Look up how to multiply x by the transposed weight; None: with cuBLAS."""
    if x.device.type != "cuda" or x.itemsize != 2:
        return None
    gpu = torch.cuda.get_device_properties(x.device)
    for shape in _SKINNY.get((gpu.major, gpu.minor), ()):
        fits = len(x) <= shape.rows and x.shape[1] % shape.depth == 0
        if fits and len(weight) >= _BUSY * gpu.multi_processor_count * shape.columns:
            return shape
    return None


def tuning(device: torch.device, itemsize: int, head_dim: int, block_size: int) -> Tuning:
    """Look up the tiles of a GPU; of one that is not in the table, those of the default.

    Args:
        device: of the tensors; a CPU, where Triton's interpreter runs, is given the default too.
        itemsize: bytes of an element.
        head_dim: at most 256.
        block_size: tokens of a KV block.
    """
    gpu = device.type == "cuda"
    capability = torch.cuda.get_device_capability(device) if gpu else _DEFAULT
    processors = torch.cuda.get_device_properties(device).multi_processor_count if gpu else 1
    shape = (itemsize, max(64, triton.next_power_of_2(head_dim)))
    prefill = _PREFILL.get(capability, {}).get(shape) or _PREFILL[_DEFAULT][shape]
    bulk = _PREFILL_IN_BULK.get(capability, {}).get(shape)
    if bulk and block_size % bulk.tokens == 0:
        prefill = bulk
    decode = _DECODE.get(capability, {}).get(shape) or _DECODE[_DEFAULT][shape]
    return Tuning(prefill, decode, processors * _PROGRAMS_PER_PROCESSOR)
