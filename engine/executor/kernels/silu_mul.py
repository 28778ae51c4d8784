"""SiLU of the gate, times up: SwiGLU.

Grid: (tokens, inner / BLOCK). Elementwise, so that only memory counts: every thread loads 16 bytes of gate and up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.executor.kernels.pdl import await_inputs, pdl_options

_BLOCK = 1024


@triton.jit
def _silu_and_mul(
    out: tl.tensor,  # (tokens, INNER)
    gate_up: tl.tensor,  # (tokens, 2 * INNER)
    INNER: tl.constexpr,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    await_inputs(PDL)
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    exists = i < INNER
    row = gate_up + token * (2 * INNER) + i
    gate = tl.load(row, mask=exists, other=0.0).to(tl.float32)
    up = tl.load(row + INNER, mask=exists, other=0.0).to(tl.float32)
    result = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + token * INNER + i, result.to(out.dtype.element_ty), mask=exists)


def silu_and_mul(
    gate_up: torch.Tensor,  # (tokens, 2 * inner), contiguous
) -> torch.Tensor:
    """Return SiLU(gate) * up (tokens, inner): SwiGLU (Shazeer 2020)."""
    tokens, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(tokens, inner, dtype=gate_up.dtype, device=gate_up.device)
    grid = (tokens, triton.cdiv(inner, _BLOCK))
    _silu_and_mul[grid](out, gate_up, INNER=inner, BLOCK=_BLOCK, **pdl_options(out.device))
    return out
