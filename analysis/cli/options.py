"""The command line's options, each said once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar, cast, get_args, get_origin, get_type_hints

import typer
from typer.models import OptionInfo

from analysis.cli.help import HelpfulCommand, HelpfulGroup
from analysis.jobs.limits import OF_CPU, OF_GPU, OF_PROFILE
from analysis.jobs.options import A_MODEL, INPUT, JSON, LIMITS, MODEL, OUTPUT, OVERWRITE, SEED, Limits, Loading, Output
from engine.config import ServingConfig
from traces.errors import TandemError
from traces.trace import shipped_traces

Command = TypeVar("Command", bound=Callable[..., Any])
Read = TypeVar("Read")
KINDS = {Path: "PATH", int: "INT", float: "FLOAT", str: "TEXT"}
"""Types of values -> how a help calls them, where it has no better word."""
GROUP_OF = {Limits: LIMITS, Loading: MODEL, Output: OUTPUT}
"""Where options stand that do not say so themselves."""

MEMORY_DECIDES = {"num_blocks": "as many as memory holds"}
OF_CONFIG = {each.name: "off" if each.default is False else str(each.default) for each in fields(ServingConfig)}
OF_A_GPU = OF_CONFIG | MEMORY_DECIDES | {name: str(limit) for name, limit in OF_GPU.items()}
OF_A_GPU |= {"max_model_len": "the model's positions"}
SHORT = {"max_model_len": "the model's positions, or fewer if memory is short"}
OF_A_PROFILE = OF_A_GPU | {name: f"the profile's, else {(OF_A_GPU | SHORT)[name]}" for name in OF_PROFILE}
OF_MACHINE = OF_A_GPU | SHORT | {"block_size": "64 on a GPU, 16 on a CPU"}
OF_MACHINE |= {name: f"{OF_GPU[name]} on a GPU, {OF_CPU[name]} on a CPU" for name in ("max_seqs", "pipeline_depth")}
OF_SERVER = OF_MACHINE | {name: f"{OF_MACHINE[name]}; of a simulator, {OF_A_PROFILE[name]}" for name in OF_PROFILE}
"""Words for limits that are not given, by what a command runs on."""


def option(text: str, *names: str, default: str = "", group: str | None = None, **more: Any) -> Any:
    """An option.

    Args:
        text: its help.
        names: as in `typer.Option`.
        default: words for a default that does not speak for itself, such as None.
        group: of `analysis.cli.help.GROUPS`.
        more: as in `typer.Option`.
    """
    return typer.Option(*names, help=text, show_default=default or True, rich_help_panel=group, **more)


def argument(text: str, metavar: str) -> Any:
    """An argument; `metavar` is its place in the usage."""
    return typer.Argument(help=text, metavar=metavar)


Out = Annotated[Path, option("Folder to write.", "--out", "-o", group=OUTPUT)]
OutTrace = Annotated[Path, option("Trace to write: .parquet or .jsonl.", "--out", "-o", group=OUTPUT)]
Overwrite = Annotated[bool, option(OVERWRITE, "--overwrite", group=OUTPUT)]
AsJson = Annotated[bool, option(JSON, "--json", group=OUTPUT)]
A_TRACE = f"Trace: .parquet, .jsonl or .csv, or one that ships: {' or '.join(shipped_traces())}."
TracePath = Annotated[Path, option(A_TRACE, "--trace", "-t", group=INPUT, metavar="TRACE")]
TraceFile = Annotated[Path, argument(A_TRACE, "TRACE")]
A_PROFILE = "Latency profile: a folder, or a name that `tandem profile list` shows."
ProfilePath = Annotated[Path, option(A_PROFILE, "--profile", "-p", group=INPUT, metavar="PROFILE")]
Model = Annotated[str, option(A_MODEL, "--model", "-m", group=MODEL, metavar="MODEL")]
SHAPE = "Shape of the model: a name, such as llama-3-8b, or a Hugging Face folder."
ModelShape = Annotated[str, option(SHAPE, "--model", "-m", group=MODEL, metavar="MODEL")]
Requests = Annotated[int, option("Number of requests.", "--requests", "-n", min=1)]
Seed = Annotated[int, option(SEED)]
BlockSize = Annotated[int, option("Tokens per KV block.", min=1, group=LIMITS)]
KEY = "API key that clients send as a bearer token; better given by the environment."
ApiKey = Annotated[str | None, option(KEY, envvar="TANDEM_API_KEY", default="no key", metavar="KEY")]


class Commands(typer.Typer):
    """An app, whose commands are described by `analysis.cli.help`.

    A command's parameter that is a group of `analysis.jobs.options` is an option for each of its values. These come
    after the command's own, group by group. `but` adapts a group to the command.
    """

    def __init__(self, **more: Any) -> None:
        names = {"help_option_names": ["-h", "--help"]}
        super().__init__(cls=HelpfulGroup, rich_markup_mode=None, add_completion=False, context_settings=names, **more)

    def command(self, name: str | None = None, **more: Any) -> Callable[[Command], Command]:
        """As in `typer.Typer`."""
        register = super().command(name, cls=HelpfulCommand, **more)
        return lambda command: register(with_groups(command))


class Adapted(NamedTuple):
    """A group's options, as a command has them.

    Attributes:
        omitted: fields that make no sense for the command.
        words: for defaults that are None.
        defaults: that are not the group's.
    """

    omitted: Sequence[str]
    words: Mapping[str, str]
    defaults: Mapping[str, Any]


def but(*omitted: str, words: Mapping[str, str] = OF_MACHINE, **defaults: Any) -> Adapted:
    """For a group's annotation, as in `Adapted`."""
    return Adapted(omitted, words, defaults)


def with_groups(command: Command) -> Command:
    """A command with an option for each value of its groups, and with a help that says every default."""
    own, groups = [], {}
    for each in signature(command, eval_str=True).parameters.values():
        kind, *adapted = get_args(each.annotation) or [each.annotation]
        if isinstance(kind, type) and is_dataclass(kind):
            groups[each.name] = kind, [*_options(kind, *(adapted or [but()]))]
        else:
            own.append(each)

    @wraps(command)
    def with_options(**options: Any) -> Any:
        made = {name: kind(**{each.name: options.pop(each.name) for each in of}) for name, (kind, of) in groups.items()}
        return command(**made, **options)

    shown = [described(each) for each in (*own, *(each for _, of in groups.values() for each in of))]
    with_options.__signature__ = Signature(shown)  # type: ignore[attr-defined]
    with_options.__annotations__ = {each.name: each.annotation for each in shown}
    return cast(Command, with_options)


def _options(group: Any, adapted: Adapted) -> Iterator[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    for field in fields(group):
        if get_origin(hints[field.name]) is Annotated and field.name not in adapted.omitted:
            kind, told = get_args(hints[field.name])
            more = {"group": told.group or GROUP_OF.get(group), "metavar": told.metavar or None, "min": told.least}
            names = told.names or [f"--{field.name.replace('_', '-')}"]
            default = adapted.defaults.get(field.name, field.default)
            words = adapted.words.get(field.name, told.default) if default is None else ""
            shown = option(told.help, *names, default=words, **more)
            yield Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, shown])


def described(parameter: Parameter) -> Parameter:
    """A parameter whose help ends with its default, and which names the place of its value."""
    kind, *told = get_args(parameter.annotation) or [parameter.annotation]
    if not told or not isinstance(told[0], OptionInfo):
        return parameter
    shown = copy(told[0])
    shown.help = f"{shown.help} [{'; '.join(_facts(shown, parameter.default))}]"
    shown.metavar, shown.show_default = shown.metavar or _metavar(kind), False
    if kind is bool and shown.default is ...:  # it has no name yet
        shown.param_decls = (f"--{parameter.name.replace('_', '-')}",)  # and no --no- beside it
    return parameter.replace(annotation=Annotated[kind, shown])


def _facts(option: OptionInfo, default: Any) -> Iterator[str]:
    """What an option's value is and may be, as its help ends."""
    if default is Parameter.empty:
        yield "required"
    else:
        said = {True: "on", False: "off"}[default] if isinstance(default, bool) else default
        yield f"default: {option.show_default if isinstance(option.show_default, str) else said}"
    if option.min is not None:
        yield f"at least {option.min}" if option.max is None else f"{option.min} to {option.max}"
    if option.envvar:
        yield f"environment: {option.envvar}"


def _metavar(kind: Any) -> str | None:
    """Of a type, an optional one and a list; None for a flag, which has no value."""
    return next((metavar for each, metavar in KINDS.items() if kind is each or each in get_args(kind)), None)


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
