"""AIConfigurator's database: a folder with gemm_perf, context_attention_perf and generation_attention_perf (.parquet).

Milliseconds of single operations by shape, of no model in particular
(github.com/ai-dynamo/aiconfigurator, `src/aiconfigurator/systems/data`). No small kernels and no sampling.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from engine.model.config import ModelConfig
from sim.profile.format import Points, Row
from sim.sources.importers.source import Line, Measured, provenance, read_rows
from sim.sources.roofline import gemm_shapes
from traces.errors import TandemError

PUBLISHED = ("ai-dynamo/aiconfigurator", "095f58a", "Apache-2.0")
DIGEST = "13694b42a4da49569177ae8e0daf77258609cf0c52426abc11f5e3195b872770"
GEMM = "gemm_perf.parquet"
PREFILL, DECODE = "context_attention_perf.parquet", "generation_attention_perf.parquet"
FILES = (GEMM, PREFILL, DECODE)
DTYPES = ("bfloat16", "float16")


def recognizes(source: Path) -> bool:
    """Whether `source` is in this format."""
    return all((source / name).is_file() for name in FILES)


def read(source: Path, model: ModelConfig) -> Measured:
    """Look up the operations of `model`. Raises TandemError if files are damaged, or its shape is not covered."""
    gemms = Gemms(source / GEMM)
    products = {op: gemms.times_ms(*shape) for op, shape in gemm_shapes(model).items()}
    head, head_rule = gemms.times_ms(model.vocab_size, model.hidden_size)
    layers_us = 1000 * model.num_layers  # of a millisecond in one layer
    tables: dict[str, Points] = {
        "dense": {(op, m): layers_us * time for op, (line, _) in products.items() for m, time in line.items()},
        "head": {(m,): 1000 * time for m, time in head.items()},
        # `step` tokens are cached before the one that is made, to which it attends too
        "decode_attention": {
            (row["batch_size"], row["batch_size"] * (row["step"] + 1), 1.0): layers_us * row["latency"]
            for row in _attention(source / DECODE, model)
        },
        "prefill_attention": {
            (row["isl"], row["step"]): layers_us * row["latency"]
            for row in _attention(source / PREFILL, model)
            if row["batch_size"] == 1
        },
    }
    rules = {"dense": "; ".join(rule for _, rule in products.values() if rule), "head": head_rule}
    about = provenance(source / GEMM, *PUBLISHED, DIGEST)
    about |= {"engine": gemms.engine, "dtype": gemms.dtype, "device": gemms.device}
    return Measured(source, about, tables, rules, frozenset({"small", "sampling"}))


class Gemms:
    """Times of matrix products by shape, and between the shapes that were measured."""

    def __init__(self, path: Path) -> None:
        texts = ["gemm_dtype", "framework", "version", "device"]
        found = [row for row in read_rows(path, ["m", "n", "k"], ["latency"], texts) if row["gemm_dtype"] in DTYPES]
        if not found:
            raise TandemError(f"{path}: no rows of gemm_dtype {' or '.join(DTYPES)}")
        self.dtype, self.device = found[0]["gemm_dtype"], found[0]["device"]
        self.engine = f"{found[0]['framework']} {found[0]['version']}".replace("VLLM", "vLLM")
        self._path = path
        self._shapes: defaultdict[tuple[int, int], Line] = defaultdict(dict)
        for row in found:
            if row["gemm_dtype"] == self.dtype:
                self._shapes[row["n"], row["k"]][row["m"]] = row["latency"]

    def times_ms(self, n: int, k: int) -> tuple[Line, str]:
        """Milliseconds by m of (m, k) x (k, n): as measured, or from the nearest n or k, and then by which rule."""
        if (n, k) in self._shapes:
            return self._shapes[n, k], ""
        by_n = {of_n: line for (of_n, of_k), line in self._shapes.items() if of_k == k}
        by_k = {of_k: line for (of_n, of_k), line in self._shapes.items() if of_n == n}
        for axis, size, lines in (("n", n, by_n), ("k", k, by_k)):
            if lines and min(lines) < size:
                line, rule = _between(axis, size, lines)
                return line, f"GEMM of n {n}, k {k}: {rule}"
        raise TandemError(f"{self._path}: nothing near a GEMM of n {n}, k {k}")


def _between(axis: str, size: int, lines: dict[int, Line]) -> tuple[Line, str]:
    low = max(each for each in lines if each < size)
    high = min((each for each in lines if each > size), default=None)
    if high is None:
        return {m: time * size / low for m, time in lines[low].items()}, f"{axis} {low}'s times {size / low:.3f}"
    weight = (size - low) / (high - low)
    shared = lines[low].keys() & lines[high].keys()
    line = {m: (1 - weight) * lines[low][m] + weight * lines[high][m] for m in shared}
    return line, f"between {axis} {low} and {high}"


def _attention(path: Path, model: ModelConfig) -> list[Row]:
    shape = {"num_heads": model.num_heads, "num_key_value_heads": model.num_kv_heads, "head_dim": model.head_dim}
    found = read_rows(path, ["batch_size", "isl", "step", *shape], ["latency"], ["attn_dtype", "kv_cache_dtype"])
    fitting = [
        row
        for row in found
        if all(row[name] == size for name, size in shape.items())
        and row["attn_dtype"] in DTYPES
        and row["kv_cache_dtype"] == row["attn_dtype"]
    ]
    if not fitting:
        raise TandemError(f"{path}: no rows of {', '.join(f'{name} {size}' for name, size in shape.items())}")
    return fitting
