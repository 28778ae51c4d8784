"""Vidur's profiles of dense operations: a .csv for a model, a row for each number of tokens and degree of parallelism.

Milliseconds of the operations of ONE layer and of the embedding, measured with Sarathi-Serve's layers
(github.com/microsoft/vidur, `data/profiling/compute`). No attention and no head.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import fmean

from engine.model.config import ModelConfig
from sim.sources.importers.source import Measured, check_shape, dense_points, provenance, read_rows
from traces.errors import TandemError

PUBLISHED = ("microsoft/vidur", "7d47513", "MIT")
LLAMA_3_8B = "98c26488298e324e89db7349e213f75c856ae83dc6b17548a68636d2cb5efff0"
LLAMA_2_7B = "2cfacca979f32e83257753cf6fd815a71af8ba9a7a9d0643b18d9f54e8a37688"
# their operation -> ours, and how often it runs: in each layer, and once a step (a final norm is like any other)
OPS = {
    "attn_pre_proj": ("qkv", 1, 0),
    "attn_post_proj": ("o", 1, 0),
    "mlp_up_proj": ("gate_up", 1, 0),
    "mlp_down_proj": ("down", 1, 0),
    "input_layernorm": ("small", 1, 1),
    "post_attention_layernorm": ("small", 1, 0),
    "attn_rope": ("small", 1, 0),
    "mlp_act": ("small", 1, 0),
    "add": ("small", 1, 0),
    "emb": ("small", 0, 1),
}
SHAPE = {
    "n_head": "num_heads",
    "n_kv_head": "num_kv_heads",
    "n_embd": "hidden_size",
    "n_expanded_embd": "intermediate_size",
}
TP = "num_tensor_parallel_workers"


def recognizes(source: Path) -> bool:
    """Whether `source` is in this format."""
    if source.suffix != ".csv" or not source.is_file():
        return False
    with source.open(encoding="utf-8", errors="replace") as file:
        return "time_stats." in file.readline()


def read(source: Path, model: ModelConfig) -> Measured:
    """Read a file. Raises TandemError if it is damaged, or of another model."""
    columns = {theirs: f"time_stats.{theirs}.median" for theirs in OPS}
    found = [row for row in read_rows(source, ["num_tokens", TP, *SHAPE], [*columns.values()]) if row[TP] == 1]
    if not found:
        raise TandemError(f"{source}: no rows of {TP} 1")
    check_shape(source, {ours: found[0][theirs] for theirs, ours in SHAPE.items()}, model)
    times: defaultdict[tuple[str, int], list[float]] = defaultdict(list)
    for row in found:
        for theirs, column in columns.items():
            times[theirs, row["num_tokens"]].append(1000 * row[column])
    points = dense_points(source, OPS, {key: fmean(repeats) for key, repeats in times.items()}, model.num_layers)
    about = provenance(source, *PUBLISHED, LLAMA_3_8B, LLAMA_2_7B)
    about |= {"engine": "Sarathi-Serve", "dtype": "float16", "device": None}
    rules = {"dense": "the final norm counts here and costs what another does; form factor of the GPU not stated"}
    return Measured(source, about, {"dense": points}, rules)
