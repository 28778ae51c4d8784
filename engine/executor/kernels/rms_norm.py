"""RMSNorm fused with the residual add.

Grid: (tokens,), one program a row, which it holds in registers: the row is read once, and written twice, as the new
residual stream and normed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.executor.kernels.pdl import await_inputs, pdl_options


@triton.jit
def _add_rms_norm(
    out: tl.tensor,  # (tokens, WIDTH)
    hidden: tl.tensor,  # (tokens, WIDTH)
    update: tl.tensor,  # (tokens, WIDTH)
    weight: tl.tensor,  # (WIDTH,)
    eps: tl.tensor,  # ()
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    await_inputs(PDL)
    row = tl.program_id(0).to(tl.int64) * WIDTH
    i = tl.arange(0, PADDED)
    exists = i < WIDTH
    old = tl.load(hidden + row + i, mask=exists, other=0.0).to(tl.float32)
    new = (old + tl.load(update + row + i, mask=exists, other=0.0).to(tl.float32)).to(hidden.dtype.element_ty)
    tl.store(hidden + row + i, new, mask=exists)
    x = new.to(tl.float32)  # rounded: what is normed is what the next layer adds to
    scale = tl.rsqrt(tl.sum(x * x) / WIDTH + eps)
    normed = x * scale * tl.load(weight + i, mask=exists, other=0.0).to(tl.float32)
    tl.store(out + row + i, normed.to(out.dtype.element_ty), mask=exists)


def add_rms_norm(
    hidden: torch.Tensor,  # (tokens, hidden), contiguous
    update: torch.Tensor,  # (tokens, hidden), contiguous
    weight: torch.Tensor,  # (hidden,)
    eps: float,
) -> torch.Tensor:
    """Add `update` to `hidden` in place, and return the RMS norm of the sum: (tokens, hidden).

    Root Mean Square Layer Normalization (Zhang and Sennrich 2019).
    """
    out = torch.empty_like(hidden)
    padded = triton.next_power_of_2(hidden.shape[1])
    _add_rms_norm[(len(hidden),)](
        out, hidden, update, weight, eps,
        WIDTH=hidden.shape[1], PADDED=padded, num_warps=min(16, max(1, padded // 512)), **pdl_options(hidden.device),
    )  # fmt: skip
    return out
