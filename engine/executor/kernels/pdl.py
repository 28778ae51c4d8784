"""Programmatic dependent launch: a kernel is set up while the one before it still runs, and waits for it by itself.

A decode step is some 300 short kernels, between which a GPU would otherwise drain and fill again. Hopper and later can
place a kernel's programs as soon as every program of the kernel before has begun. All kernels of this package begin
with `await_inputs`; nothing but constants (weights) may be touched before it.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def await_inputs(PDL: tl.constexpr) -> None:
    """Let the next kernel be set up, and wait until this one's inputs are written and its outputs may be written.

    All earlier kernels have ended then, not only the last: that one has waited for its own predecessor.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


@cache
def pdl_options(device: torch.device) -> dict[str, bool]:
    """Return the launch options of a kernel that begins with `await_inputs(PDL)`."""
    able = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"PDL": able, "launch_pdl": able}
