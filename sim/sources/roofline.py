"""A profile from a data sheet: each operation takes the longer of its arithmetic and its memory traffic.

A floor, not a prediction: no kernel reaches both ceilings, and a host that takes no time does not exist. Good for
trying things out before anything was measured; a profile made here says so in its `source`.
(Williams, Waterman, Patterson: Roofline, CACM 2009.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from engine.config import MEMORY_FRACTION
from engine.model.config import ModelConfig
from sim.profile.format import HOST_TERMS, Profile, Row
from traces.errors import TandemError

DATA_SHEETS = Path(__file__).parent / "hardware"
BYTES = 2  # fp16
TOKENS = [2**power for power in range(14)]
LENGTHS = [0, *(2**power for power in range(4, 18))]


def roofline_profile(hardware: str, model: ModelConfig, block_size: int = 16) -> Profile:
    """A profile of `model` in fp16 on a card of `sim/sources/hardware`.

    Raises:
        TandemError: no such card, or the model does not fit it.
    """
    sheet = data_sheet(hardware)
    usable, weights = int(MEMORY_FRACTION * sheet["memory_gib"] * 2**30), BYTES * model.num_parameters
    if weights > usable:
        raise TandemError(f"{model.name} needs {weights / 1e9:.0f} GB for weights alone: too big for {sheet['device']}")
    floor = Floor.of(sheet, model)

    def row(time_us: float) -> Row:
        return {"time_us": time_us, "spread": 0.0}

    dense = [
        {"op": op, "tokens": m} | row(model.num_layers * floor.gemm_us(m, n, k))
        for op, (n, k) in gemm_shapes(model).items()
        for m in TOKENS
    ]
    prefill = [{"chunk": c, "context": x} | row(floor.prefill_us(c, x)) for c in TOKENS for x in LENGTHS]
    decode = [
        {"sequences": n, "kv_tokens": n * x, "unevenness": 1.0} | row(floor.decode_us(n, n * x))
        for n in TOKENS[:11]
        for x in LENGTHS[1:]
    ]
    head = [{"samples": n} | row(floor.gemm_us(n, model.vocab_size, model.hidden_size)) for n in TOKENS[:11]]
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


@dataclass(frozen=True, slots=True)
class Floor:
    """The least that a model's operations can take on a card, in microseconds."""

    flops_per_us: float
    bytes_per_us: float
    model: ModelConfig
    item: int  # bytes of a number

    @classmethod
    def of(cls, sheet: Mapping[str, Any], model: ModelConfig, item: int = BYTES) -> Floor:
        """By a card's data sheet."""
        return cls(sheet["tflops"] * 1e6, sheet["memory_gb_per_s"] * 1e3, model, item)

    def us(self, flops: float, traffic: float) -> float:
        """The longer of arithmetic and traffic (bytes)."""
        return max(flops / self.flops_per_us, traffic / self.bytes_per_us)

    def gemm_us(self, m: int, n: int, k: int) -> float:
        """(m, k) x (k, n)."""
        return self.us(2.0 * m * k * n, self.item * (k * n + m * k + m * n))

    def prefill_us(self, chunk: int, context: int) -> float:
        """Attention of a chunk over `context` earlier tokens, in all layers."""
        return self._attention_us(chunk, chunk * (context + (chunk + 1) / 2), context + chunk)

    def decode_us(self, sequences: int, kv_tokens: int) -> float:
        """Attention of decodes to `kv_tokens` in all, in all layers."""
        return self._attention_us(sequences, kv_tokens, kv_tokens)

    def _attention_us(self, queries: int, pairs: float, cached: float) -> float:
        width, kv_width = _widths(self.model)
        traffic = self.item * (2 * queries * width + cached * kv_width)
        return self.us(4.0 * self.model.num_layers * pairs * width, self.model.num_layers * traffic)


def gemm_shapes(model: ModelConfig) -> dict[str, tuple[int, int]]:
    """(n, k) of a layer's matrices: features out and in."""
    width, kv_width = _widths(model)
    return {
        "qkv": (width + kv_width, model.hidden_size),
        "o": (model.hidden_size, width),
        "gate_up": (2 * model.intermediate_size, model.hidden_size),
        "down": (model.hidden_size, model.intermediate_size),
    }


def small_kernels(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Numbers that the kernels of a layer move per token that do little but move memory: both norms with their
    residual, rotary embedding and the write to the cache, activation."""
    width, kv_width = _widths(model)
    norm, rotated = 4 * model.hidden_size, width + kv_width // 2
    return {
        "norm": (norm, norm),
        "rope_and_cache": (2 * rotated, 2 * kv_width),
        "silu": (3 * model.intermediate_size,),
    }


def _widths(model: ModelConfig) -> tuple[int, int]:
    """Numbers of a token's queries, and of its keys and values."""
    return model.num_heads * model.head_dim, 2 * model.num_kv_heads * model.head_dim


def data_sheet(hardware: str) -> dict[str, Any]:
    """A card's device name, rates and memory. Raises TandemError if there is no such card in `sim/sources/hardware`."""
    path = DATA_SHEETS / f"{hardware}.yaml"
    if not path.exists():
        raise TandemError(f"no data sheet for '{hardware}': choose {', '.join(known_hardware())}")
    return dict(yaml.safe_load(path.read_text()))


def sheet_of(device: str) -> dict[str, Any]:
    """The data sheet of a device, by its name. Raises TandemError if `sim/sources/hardware` has none."""
    sheets = [data_sheet(hardware) for hardware in known_hardware()]
    found = next((sheet for sheet in sheets if sheet["device"] == device), None)
    if found is None:
        raise TandemError(
            f"no data sheet of {device} in sim/sources/hardware: it has {', '.join(s['device'] for s in sheets)}"
        )
    return found


def known_hardware() -> list[str]:
    """The cards of `sim/sources/hardware`."""
    return sorted(each.stem for each in DATA_SHEETS.glob("*.yaml"))
