"""A profile from a data sheet: each operation takes the longer of its arithmetic and its memory traffic.

A floor, not a prediction: no kernel reaches both ceilings, and a host that takes no time does not exist. Good for
trying things out before anything was measured; a profile made here says so in its `source`.
(Williams, Waterman, Patterson: Roofline, CACM 2009.)
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path

from engine.config import MEMORY_FRACTION
from engine.model.config import ModelConfig
from sim.profile.format import HOST_TERMS, Points, Profile, read_yaml, rows_of
from sim.profile.meta import DataSheet, MemoryFacts, ProfileMeta
from traces.errors import TandemError

DATA_SHEETS = Path(__file__).parent / "hardware"
BYTES = 2  # fp16
TOKENS = [2**power for power in range(14)]
LENGTHS = [0, *(2**power for power in range(4, 18))]
SEQUENCES = TOKENS[:11]


def roofline_profile(hardware: str, model: ModelConfig, block_size: int = 16) -> Profile:
    """A profile of `model` in fp16 on a GPU of `sim/sources/hardware`.

    Raises:
        TandemError: no such GPU, or the model does not fit it.
    """
    sheet = data_sheet(hardware)
    memory = memory_facts(sheet, model, BYTES, block_size)
    if memory.weights > memory.usable:
        raise TandemError(
            f"{model.name} needs {memory.weights / 1e9:.0f} GB for weights alone: too big for {sheet.device}"
        )
    floor = Floor(sheet, model)
    points: dict[str, Points] = {
        "dense": {
            (op, m): model.num_layers * floor.gemm_us(m, *shape)
            for (op, shape), m in product(gemm_shapes(model).items(), TOKENS)
        },
        "prefill_attention": {(c, x): floor.prefill_us(c, x) for c, x in product(TOKENS, LENGTHS)},
        "decode_attention": {(n, n * x, 1.0): floor.decode_us(n, n * x) for n, x in product(SEQUENCES, LENGTHS[1:])},
        "head": {(n,): floor.gemm_us(n, model.vocab_size, model.hidden_size) for n in SEQUENCES},
        "host": {(term, "any", 1): 0.0 for term in HOST_TERMS},
        "swap": {
            (way, n): n * memory.block / (sheet.bus_gb_per_s * 1e3) for way, n in product(("out", "in"), TOKENS[:9])
        },
    }
    said = "roofline of the data sheet: a floor, nothing was measured"
    meta = ProfileMeta(sheet.device, model, "float16", said, data_sheet=sheet, memory=memory, block_size=block_size)
    return Profile(meta, {table: rows_of(table, of_table) for table, of_table in points.items()})


def memory_facts(sheet: DataSheet, model: ModelConfig, item: int, block_size: int) -> MemoryFacts:
    """Bytes on a GPU, by its data sheet, of a model whose numbers take `item` bytes."""
    usable = int(MEMORY_FRACTION * sheet.memory_gib * 2**30)
    return MemoryFacts(usable, item * model.num_parameters, block_size * model.kv_bytes_per_token(item))


@dataclass(frozen=True, slots=True)
class Floor:
    """The least that a model's operations can take on a GPU, in microseconds."""

    sheet: DataSheet
    model: ModelConfig
    item: int = BYTES  # of a number

    def us(self, flops: float, traffic: float) -> float:
        """The longer of arithmetic and traffic (bytes)."""
        return max(flops / (self.sheet.tflops * 1e6), traffic / (self.sheet.memory_gb_per_s * 1e3))

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
    return {"norm": (norm, norm), "rope_and_cache": (2 * rotated, 2 * kv_width), "silu": (3 * model.intermediate_size,)}


def _widths(model: ModelConfig) -> tuple[int, int]:
    """Numbers of a token's queries, and of its keys and values."""
    return model.num_heads * model.head_dim, 2 * model.num_kv_heads * model.head_dim


def data_sheet(hardware: str) -> DataSheet:
    """A GPU's data sheet. Raises TandemError if there is none in `sim/sources/hardware`."""
    sheets = data_sheets()
    if hardware not in sheets:
        raise TandemError(f"no data sheet for '{hardware}': choose {', '.join(sheets)}")
    return sheets[hardware]


def sheet_of(device: str) -> DataSheet:
    """The data sheet of a device, by its name. Raises TandemError if `sim/sources/hardware` has none."""
    sheets = {sheet.device: sheet for sheet in data_sheets().values()}
    if device not in sheets:
        raise TandemError(f"no data sheet of {device} in sim/sources/hardware: it has {', '.join(sheets)}")
    return sheets[device]


def data_sheets() -> dict[str, DataSheet]:
    """The GPUs of `sim/sources/hardware`, by the names of their files."""
    return {path.stem: DataSheet(**read_yaml(path)) for path in sorted(DATA_SHEETS.glob("*.yaml"))}
