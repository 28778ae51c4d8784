"""A profile from a data sheet: each operation takes the longer of its arithmetic and its memory traffic.

A floor, not a prediction: no kernel reaches both ceilings, and a host that takes no time does not exist. Good for
trying things out before anything was measured; a profile made here says so in its `source`.
(Williams, Waterman, Patterson: Roofline, CACM 2009.)
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from engine.config import MEMORY_FRACTION
from engine.model_config import ModelConfig
from sim.profile import HOST_TERMS, Profile, Row
from traces.errors import TandemError

DATA_SHEETS = Path(__file__).parent / "hardware"
BYTES = 2  # fp16
TOKENS = [2**power for power in range(14)]
LENGTHS = [0, *(2**power for power in range(4, 18))]


def roofline_profile(hardware: str, model: ModelConfig, block_size: int = 16) -> Profile:
    """A profile of `model` in fp16 on a card of `sim/hardware`.

    Raises:
        TandemError: no such card, or the model does not fit it.
    """
    sheet = data_sheet(hardware)
    usable, weights = int(MEMORY_FRACTION * sheet["memory_gib"] * 2**30), BYTES * model.num_parameters
    if weights > usable:
        raise TandemError(f"{model.name} needs {weights / 1e9:.0f} GB for weights alone: too big for {sheet['device']}")
    flops_per_us, bytes_per_us = sheet["tflops"] * 1e6, sheet["memory_gb_per_s"] * 1e3

    def row(flops: float, traffic: float) -> Row:
        return {"time_us": max(flops / flops_per_us, traffic / bytes_per_us), "spread": 0.0}

    width, kv_width = model.num_heads * model.head_dim, 2 * model.num_kv_heads * model.head_dim
    gemms = {
        "qkv": (model.hidden_size, width + kv_width),
        "o": (width, model.hidden_size),
        "gate_up": (model.hidden_size, 2 * model.intermediate_size),
        "down": (model.intermediate_size, model.hidden_size),
    }

    def gemm(m: int, k: int, n: int, count: int) -> Row:
        return row(2.0 * count * m * k * n, count * BYTES * (k * n + m * k + m * n))

    def attention(queries: int, pairs: float, cached: float) -> Row:
        traffic = BYTES * (2 * queries * width + cached * kv_width)
        return row(4.0 * model.num_layers * pairs * width, model.num_layers * traffic)

    dense = [{"op": op, "tokens": m} | gemm(m, k, n, model.num_layers) for op, (k, n) in gemms.items() for m in TOKENS]
    prefill = [{"chunk": c, "context": x} | attention(c, c * (x + (c + 1) / 2), x + c) for c in TOKENS for x in LENGTHS]
    decode = [
        {"sequences": n, "kv_tokens": n * x, "unevenness": 1.0} | attention(n, n * x, n * x)
        for n in TOKENS[:11]
        for x in LENGTHS[1:]
    ]
    head = [{"samples": n} | gemm(n, model.hidden_size, model.vocab_size, 1) for n in TOKENS[:11]]
    block_bytes = block_size * model.kv_bytes_per_token(BYTES)
    swap = [
        {"direction": direction, "blocks": n, "time_us": n * block_bytes / (sheet["bus_gb_per_s"] * 1e3), "spread": 0.0}
        for direction in ("out", "in")
        for n in TOKENS[:9]
    ]
    host = [{"term": term, "kind": "any", "sequences": 1, "time_us": 0.0, "spread": 0.0} for term in HOST_TERMS]
    meta = {
        "device": sheet["device"],
        "model": asdict(model),
        "dtype": "float16",
        "source": "roofline of the data sheet: a floor, nothing was measured",
        "data_sheet": sheet,
        "memory": {
            "usable": usable,
            "weights": weights,
            "block": block_size * model.kv_bytes_per_token(BYTES),
        },
        "block_size": block_size,
    }
    tables = {"dense": dense, "prefill_attention": prefill, "decode_attention": decode, "head": head, "host": host}
    return Profile(meta, tables | {"swap": swap})


def data_sheet(hardware: str) -> dict[str, Any]:
    """A card's device name, rates and memory. Raises TandemError if there is no such card in `sim/hardware`."""
    path = DATA_SHEETS / f"{hardware}.yaml"
    if not path.exists():
        raise TandemError(f"no data sheet for '{hardware}': choose {', '.join(known_hardware())}")
    return dict(yaml.safe_load(path.read_text()))


def known_hardware() -> list[str]:
    """The cards of `sim/hardware`."""
    return sorted(each.stem for each in DATA_SHEETS.glob("*.yaml"))
