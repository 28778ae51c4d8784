"""Greedy sampling: the likeliest token of each row of logits.

Grid: (samples, parts), one program for a part of a row, since one row alone must fill the GPU; then (samples,), over
the parts' winners. Ties go to the lowest token id in both, so that the result does not depend on how a row is cut.
A NaN is its part's winner, though no comparison finds it, and the row's token is -1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.executor.kernels.pdl import await_inputs, pdl_options

_PART = 4096  # tokens of a program


@triton.jit
def _argmax_of_parts(
    tokens: tl.tensor,  # (samples, parts) int32
    best: tl.tensor,  # (samples, parts) float32
    logits: tl.tensor,  # (samples, vocab)
    row_stride: tl.tensor,  # (), elements from a row to the next
    vocab: tl.tensor,  # ()
    PART: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    await_inputs(PDL)
    sample, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = part * PART + tl.arange(0, PART)
    row = tl.load(logits + sample * row_stride + token, mask=token < vocab, other=float("-inf")).to(tl.float32)
    value, index = tl.max(row, 0, return_indices=True)
    has_nan = tl.max((row != row).to(tl.int32), 0)  # noqa: PLR0124 (true of NaN alone)
    at = sample * tl.num_programs(1) + part
    tl.store(tokens + at, part * PART + index)
    tl.store(best + at, tl.where(has_nan > 0, float("nan"), value))


@triton.jit
def _argmax(
    out: tl.tensor,  # (samples,) int64
    tokens: tl.tensor,  # (samples, parts) int32
    best: tl.tensor,  # (samples, parts) float32
    parts: tl.tensor,  # ()
    PADDED: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    await_inputs(PDL)
    sample = tl.program_id(0)
    i = tl.arange(0, PADDED)
    values = tl.load(best + sample * parts + i, mask=i < parts, other=float("-inf"))
    is_nan = values != values  # noqa: PLR0124
    part = tl.argmax(tl.where(is_nan, float("-inf"), values), 0)
    token = tl.load(tokens + sample * parts + part).to(tl.int64)
    tl.store(out + sample, tl.where(tl.max(is_nan.to(tl.int32), 0) > 0, -1, token))


def greedy(
    logits: torch.Tensor,  # (samples, vocab)
) -> torch.Tensor:
    """Return the likeliest token of each row: (samples,) int64, of equals the first; -1 if a logit is NaN."""
    samples, vocab = logits.shape
    parts = triton.cdiv(vocab, _PART)
    tokens = torch.empty(samples, parts, dtype=torch.int32, device=logits.device)
    best = torch.empty(samples, parts, dtype=torch.float32, device=logits.device)
    out = torch.empty(samples, dtype=torch.int64, device=logits.device)
    pdl = pdl_options(logits.device)
    _argmax_of_parts[(samples, parts)](tokens, best, logits, logits.stride(0), vocab, PART=_PART, **pdl)
    _argmax[(samples,)](out, tokens, best, parts, PADDED=triton.next_power_of_2(parts), num_warps=1, **pdl)
    return out
