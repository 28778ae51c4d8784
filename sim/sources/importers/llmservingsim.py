"""LLMServingSim's profiles: a folder with dense.csv, attention.csv, per_sequence.csv and meta.yaml, skew.csv if any.

CUDA-kernel times in microseconds of the operations of ONE layer, and of the embedding, the final norm, the head and
the sampler, measured in vLLM (github.com/casys-kaist/LLMServingSim, `profiler/`).
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from statistics import median
from typing import Any

from engine.model.config import ModelConfig
from sim.profile.format import Points, read_yaml
from sim.sources.importers.points import errors
from sim.sources.importers.source import Measured, check_shape, dense_points, provenance, read_rows
from traces.errors import TandemError

PUBLISHED = ("casys-kaist/LLMServingSim", "5daddb2", "MIT")
DIGEST = "4f5b0623f1fa27033752cc54807a4089c39205c7132a0bb196520249d9d9140a"
FILES = ("dense.csv", "attention.csv", "per_sequence.csv", "meta.yaml")
# their operation -> ours, and how often it runs: in each layer, and once a step
OPS = {
    "qkv_proj": ("qkv", 1, 0),
    "o_proj": ("o", 1, 0),
    "gate_up_proj": ("gate_up", 1, 0),
    "down_proj": ("down", 1, 0),
    "layernorm": ("small", 2, 0),
    "rotary_emb": ("small", 1, 0),
    "act_fn": ("small", 1, 0),
    "embedding": ("small", 0, 1),
    "final_layernorm": ("small", 0, 1),
}
RULES = {
    "dense": "the final norm counts here, by tokens, as the engine runs it",
    "mixed_decode_attention": "the median over chunks and their contexts of what decodes add to them",
}
HEAD = ("lm_head", "sampler")
ATTENTION = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
Shape = tuple[int, int]  # of a batch with imbalance: sequences, and how many of them are long


def recognizes(source: Path) -> bool:
    """Whether `source` is in this format."""
    return all((source / name).is_file() for name in FILES)


def read(source: Path, model: ModelConfig) -> Measured:
    """Read a folder. Raises TandemError if it is damaged, or of another model."""
    described = _description(source / "meta.yaml", model)
    prefill, decode, mixed = _attention(source / "attention.csv", model.num_layers)
    about = provenance(source / "dense.csv", *PUBLISHED, DIGEST) | described
    found = read_rows(source / "dense.csv", ["tokens"], ["time_us"], ["layer"])
    times = {(row["layer"], row["tokens"]): row["time_us"] for row in found}
    dense = dense_points(source / "dense.csv", OPS, times, model.num_layers)
    head = _head(source / "per_sequence.csv")
    tables = {"dense": dense, "head": head, "prefill_attention": prefill, "decode_attention": decode}
    tables |= {"mixed_decode_attention": _beside(prefill, mixed)} if mixed else {}
    measured = Measured(source, about, tables, RULES.copy())
    if (source / "skew.csv").exists():
        _add_imbalance(measured, source / "skew.csv")
    return measured


def _description(path: Path, model: ModelConfig) -> dict[str, Any]:
    """What was measured, by a meta.yaml. Raises TandemError if that was another model, or more than one GPU at once."""
    meta = read_yaml(path)
    try:
        shape = meta["engine_effective"]["hf_overrides"]
        described = {
            "engine": f"vLLM {meta['vllm_version']}",
            "dtype": {"bf16": "bfloat16", "fp16": "float16"}.get(meta["variant"], meta["variant"]),
            "device": meta["gpu"],
            "model": meta["model"],
            "measured": str(meta.get("profiled_at", "unknown")),
        }
        found = {name: shape[name] for name in ("intermediate_size", "vocab_size")}
        found |= {"num_heads": shape["num_attention_heads"], "num_kv_heads": shape["num_key_value_heads"]}
    except (KeyError, TypeError) as error:
        raise TandemError(f"{path}: no entry {error}: it is no meta.yaml of LLMServingSim's profiler") from error
    check_shape(path, found, model)
    if meta.get("tp_degrees", [1]) != [1]:
        raise TandemError(f"{path}: measured at tensor-parallel degrees {meta['tp_degrees']}; Tandem imports 1")
    return described


def _head(path: Path) -> Points:
    found = read_rows(path, ["sequences"], ["time_us"], ["layer"])
    times = {name: {row["sequences"]: row["time_us"] for row in found if row["layer"] == name} for name in HEAD}
    if not all(times.values()) or len({tuple(sorted(line)) for line in times.values()}) > 1:
        raise TandemError(f"{path}: needs {' and '.join(HEAD)}, for the same numbers of sequences")
    return {(count,): sum(times[name][count] for name in HEAD) for count in times["lm_head"]}


def _attention(path: Path, layers: int) -> tuple[Points, Points, Points]:
    """Prefill and decode, each alone in its step, and both in one: by chunk, context, sequences and KV tokens.

    A decode attends to its own token beside `kv_decode` earlier ones.
    """
    prefill: Points = {}
    decode: Points = {}
    mixed: Points = {}
    for row in read_rows(path, ATTENTION, ["time_us"]):
        chunk, context, sequences, cached = (row[name] for name in ATTENTION)
        if not sequences:
            prefill[chunk, context] = layers * row["time_us"]
        elif not chunk:
            decode[sequences, sequences * (cached + 1), 1.0] = layers * row["time_us"]
        else:
            mixed[chunk, context, sequences, sequences * (cached + 1)] = layers * row["time_us"]
    if not prefill or not decode:
        raise TandemError(f"{path}: needs rows with prefill_chunk 0, and rows with n_decode 0")
    return prefill, decode, mixed


def _beside(prefill: Points, mixed: Points) -> Points:
    """What decodes add to a chunk in the same launch, where the chunk was measured alone too."""
    added: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
    for (*chunk, sequences, kv_tokens), time_us in mixed.items():
        if tuple(chunk) in prefill:
            added[sequences, kv_tokens].append(time_us - prefill[tuple(chunk)])
    return {key: max(0.0, median(times)) for key, times in added.items()}


def _add_imbalance(measured: Measured, path: Path) -> None:
    """By sequences, how much longer decodes take per unit of imbalance, from batches of short and long contexts.

    Times there are sums over repeats (of 3), so that they are used as ratios only.
    """
    found = read_rows(path, ["n", "nb", "kvs", "kv_big"], ["t_mean_us", "t_skew_us"], ["regime"])
    samples: dict[Shape, list[tuple[float, float]]] = {}  # excess imbalance and excess time
    for row in found:
        if row["regime"] == "pure":
            excess = _imbalance(row["n"], row["nb"], row["kvs"] + 1, row["kv_big"] + 1) - 1
            samples.setdefault((row["n"], row["nb"]), []).append((excess, row["t_skew_us"] / row["t_mean_us"] - 1))
    measured.imbalance = {count: _slope(samples, count, None) for count in sorted({n for n, _ in samples})}
    measured.rules["decode_attention"] = (
        "level 2 by a line through level 1 for each number of sequences, fitted to batches of two lengths; "
        "held out: each number of long ones among so many; `without`: level 1 alone"
    )
    pairs = [(_slope(samples, of[0], of), *sample) for of, batch in samples.items() for sample in batch]
    found_errors = errors((1 + slope * excess) / (1 + gain) - 1 for slope, excess, gain in pairs)
    measured.checks["imbalance"] = found_errors | {"without": errors(1 / (1 + gain) - 1 for _, _, gain in pairs)}


def _imbalance(count: int, many: int, short: int, long: int) -> float:
    mean = (many * long + (count - many) * short) / count
    return (many * long**2 + (count - many) * short**2) / count / mean**2


def _slope(samples: dict[Shape, list[tuple[float, float]]], count: int, left_out: Shape | None) -> float:
    """Least squares through 0, at least 0: longer contexts in one batch do not make it faster."""
    used = [each for of, batch in samples.items() if of[0] == count and of != left_out for each in batch]
    squares = sum(excess**2 for excess, _ in used)
    return max(0.0, sum(excess * gain for excess, gain in used) / squares) if squares else 0.0
