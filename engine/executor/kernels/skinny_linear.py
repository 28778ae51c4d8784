"""Matrix products of few rows, which are bound by reading the weights.

Grid: (out / COLUMNS,), one program for some rows of the weight matrix and all of x. The weights are the left operand,
so that the many fill the 64 rows that tensor cores multiply at once, and the few rows of x their 16 or more columns.
Deep pipelines of large tiles keep the memory busy. K is not split: that gained at most 4 % of one product (64 rows of
`down` of an 8B model, which is left to cuBLAS), for scratch memory and counters.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.executor.kernels.pdl import await_inputs, pdl_options
from engine.executor.kernels.tuning import Skinny


@triton.jit(do_not_specialize=["M"])
def _skinny_linear(
    out: tl.tensor,  # (M, N)
    x: tl.tensor,  # (M, K)
    weight: tl.tensor,  # (N, K)
    M: tl.tensor,  # ()
    N: tl.tensor,  # ()
    K: tl.tensor,  # (), a multiple of DEPTH
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    await_inputs(PDL)
    m, k = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.minimum(n, N - 1).to(tl.int64)  # past the last one, the last again: no mask in the loop
    weights = weight + rows[:, None] * K + k[None, :]
    inputs = x + m[None, :] * K + k[:, None]
    acc = tl.zeros((COLUMNS, ROWS), tl.float32)
    for start in range(0, K, DEPTH):
        w = tl.load(weights + start, eviction_policy="evict_first")  # read once: the L2 cache is for others
        acc = tl.dot(w, tl.load(inputs + start, mask=(m < M)[None, :], other=0.0), acc)
    exists = (n < N)[:, None] & (m < M)[None, :]
    tl.store(out + m[None, :] * N + n[:, None], acc.to(out.dtype.element_ty), mask=exists)


def skinny_linear(
    x: torch.Tensor,  # (tokens, in), contiguous
    weight: torch.Tensor,  # (out, in), contiguous
    shape: Skinny,
) -> torch.Tensor:
    """Return x times the transposed weight: (tokens, out).

    Args:
        x: at most `shape.rows` tokens; `in` is a multiple of `shape.depth`.
        weight: elements of 2 bytes, like x.
        shape: how the work is cut.
    """
    (tokens, depth), columns = x.shape, len(weight)
    out = torch.empty(tokens, columns, dtype=x.dtype, device=x.device)
    _skinny_linear[(triton.cdiv(columns, shape.columns),)](
        out, x, weight, tokens, columns, depth,
        ROWS=shape.rows, COLUMNS=shape.columns, DEPTH=shape.depth,
        num_warps=shape.warps, num_stages=shape.stages, **pdl_options(x.device),
    )  # fmt: skip
    return out
