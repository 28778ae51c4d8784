"""The online softmax of flash attention (Dao et al. 2022), shared by the attention kernels."""

from __future__ import annotations

import math

import triton
import triton.language as tl


@triton.jit
def weigh(
    acc: tl.tensor,  # (M, DIM) float32, the weighted sum of V so far
    total: tl.tensor,  # (M,) float32, the sum of weights so far
    top: tl.tensor,  # (M,) float32, the largest score so far; the weights are relative to it
    scores: tl.tensor,  # (M, N) the next keys'
    scale: tl.tensor,  # (), from `softmax_scale`
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Return the weights of the next keys, and acc, total and top brought up to them, less the next keys' part in acc.

    Weights are powers of 2, which the hardware has; `softmax_scale` makes them the powers of e that they stand for.
    """
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    return weights, acc * shrink[:, None], total * shrink + tl.sum(weights, 1), new_top


def softmax_scale(head_dim: int) -> float:
    """The factor of scores in `weigh`."""
    return math.log2(math.e) / math.sqrt(head_dim)
