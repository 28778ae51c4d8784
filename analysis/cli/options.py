"""The command line's options, each said once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, TypeVar, cast, get_args, get_origin, get_type_hints

import typer

from analysis.jobs.options import A_MODEL
from traces.errors import TandemError

Command = TypeVar("Command", bound=Callable[..., Any])
Read = TypeVar("Read")


def option(text: str, *names: str, **more: Any) -> Any:
    """An option with its help; `more` as in `typer.Option`."""
    return typer.Option(*names, help=text, **more)


Out = Annotated[Path, option("Where to write.", "--out", "-o")]
Overwrite = Annotated[bool, option("Replace what --out holds.", "--overwrite")]
TracePath = Annotated[Path, option("A trace: .parquet, .jsonl or .csv.", "--trace", "-t")]
TraceFile = Annotated[Path, typer.Argument(help="A trace.")]
A_PROFILE = "A latency profile's folder, or one that ships: see tandem profile list."
ProfilePath = Annotated[Path, option(A_PROFILE, "--profile", "-p")]
Model = Annotated[str, option(A_MODEL, "--model", "-m")]
ModelShape = Annotated[str, option("The model's shape: llama-3-8b, …", "--model", "-m")]
AsJson = Annotated[bool, option("Print JSON to standard output instead of a table.", "--json")]
Requests = Annotated[int, option("How many requests.", "--requests", "-n", min=1)]
Seed = Annotated[int, option("Of the sample and the arrivals.")]
BlockSize = Annotated[int, option("Tokens per KV block.", min=1)]
ApiKey = Annotated[str | None, option("The server's key; better given by the environment.", envvar="TANDEM_API_KEY")]


class Commands(typer.Typer):
    """An app. A command's parameter that is a group of `analysis.jobs.options` is an option for each of its values.

    These come after the command's own, group by group. `but` adapts a group to the command.
    """

    def command(self, name: str | None = None, **more: Any) -> Callable[[Command], Command]:
        """As in `typer.Typer`."""
        register = super().command(name, **more)
        return lambda command: register(with_groups(command))


def but(*omitted: str, **defaults: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """For a group's annotation: fields that make no sense for the command, and defaults that are not the group's."""
    return omitted, defaults


def with_groups(command: Command) -> Command:
    """A command, with an option for each value of its groups."""
    own, groups = [], {}
    for each in signature(command, eval_str=True).parameters.values():
        kind, *adapted = get_args(each.annotation) or [each.annotation]
        if isinstance(kind, type) and is_dataclass(kind):
            groups[each.name] = kind, [*_options(kind, *(*adapted, but())[0])]
        else:
            own.append(each)

    @wraps(command)
    def with_options(**options: Any) -> Any:
        made = {name: kind(**{each.name: options.pop(each.name) for each in of}) for name, (kind, of) in groups.items()}
        return command(**made, **options)

    shown = [*own, *(each for _, of in groups.values() for each in of)]
    with_options.__signature__ = Signature(shown)  # type: ignore[attr-defined]
    with_options.__annotations__ = {each.name: each.annotation for each in shown}
    return cast(Command, with_options)


def _options(group: Any, omitted: Sequence[str], defaults: Mapping[str, Any]) -> Iterator[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        if get_origin(hints[field.name]) is Annotated and field.name not in omitted:
            kind, (text, names, least) = get_args(hints[field.name])
            names = names or [f"--{field.name.replace('_', '-')}"]
            default = typer.Option(defaults.get(field.name, field.default), *names, help=text, min=least)
            yield Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=kind)


# -- items of an option -----------------------------------------------------------------------------------------


def listed(option: str, text: str, read: Callable[[str], Read], example: str) -> tuple[Read, ...]:
    """The items of an option, which commas separate, each once.

    Args:
        option: its name, for the error.
        text: the user's.
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
