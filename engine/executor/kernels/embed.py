"""Looks up the embeddings of a batch's tokens, of those too that only the GPU knows so far.

Grid: (tokens, hidden / COLUMNS): a program copies a part of one row. A token that the last step made is read where that
step noted it, so that a step can be launched before the host has seen the tokens of the step before.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from engine.executor.kernels.pdl import await_inputs, pdl_options

_COLUMNS = 2048  # of a program


@triton.jit(do_not_specialize=["token_ids", "last_tokens"])
def _embed(
    out: tl.tensor,  # (tokens, HIDDEN)
    token_ids: tl.tensor,  # (tokens,) int32
    last_tokens: tl.tensor,  # (table rows + 1,) int64
    weight: tl.tensor,  # (vocab, HIDDEN)
    HIDDEN: tl.constexpr,
    COLUMNS: tl.constexpr,
    PDL: tl.constexpr,
) -> None:
    await_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(token_ids + row).to(tl.int64)
    if token < 0:
        token = tl.maximum(tl.load(last_tokens - 1 - token).to(tl.int64), 0)  # -1 if its logits were NaN
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    exists = column < HIDDEN
    tl.store(out + row * HIDDEN + column, tl.load(weight + token * HIDDEN + column, mask=exists), mask=exists)


def embed(
    token_ids: torch.Tensor,  # (tokens,) int32
    last_tokens: torch.Tensor | None,  # (table rows + 1,) int64; None if no id is below 0
    weight: torch.Tensor,  # (vocab, hidden), contiguous
) -> torch.Tensor:
    """Look up embeddings: (tokens, hidden). An id below 0 stands for `last_tokens[-1 - id]`.

    Where that is below 0 too, 0 is looked up: the request has failed, and a step was launched before that was known.
    """
    tokens, hidden = len(token_ids), weight.shape[1]
    out = torch.empty(tokens, hidden, dtype=weight.dtype, device=weight.device)
    columns = min(_COLUMNS, triton.next_power_of_2(hidden))
    known = token_ids if last_tokens is None else last_tokens
    _embed[(tokens, triton.cdiv(hidden, columns))](
        out, token_ids, known, weight, HIDDEN=hidden, COLUMNS=columns, **pdl_options(out.device)
    )
    return out
