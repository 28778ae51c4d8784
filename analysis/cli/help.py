"""The help of commands: plain text, as wide as the terminal up to 80 columns. No word is cut."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import cleandoc
from textwrap import TextWrapper
from typing import Any

from typer.core import TyperCommand, TyperGroup

from analysis.jobs.options import GROUPS, OTHERS

NAMES_MOST = 26  # columns; text stands below names that are longer

Entry = tuple[str, str]  # what a user writes, and what it means


class HelpfulCommand(TyperCommand):
    """A command that `help_lines` describes."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Write all of the help; `formatter` knows the terminal's width."""
        formatter.write("\n".join(help_lines(self, ctx, formatter.width)))


class HelpfulGroup(TyperGroup):
    """A group of commands that `help_lines` describes. Called without a command, it shows its help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """As in `HelpfulCommand`."""
        formatter.write("\n".join(help_lines(self, ctx, formatter.width)))

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the options before the command."""
        return super().parse_args(ctx, args if args or self.invoke_without_command else ["--help"])


def help_lines(command: Any, ctx: Any, width: int) -> Iterator[str]:
    """The help of a command or a group.

    Args:
        command: with parameters as `analysis.cli.options.described` leaves them.
        ctx: its click context.
        width: columns, at most, of lines that can be broken between words.
    """
    params = command.get_params(ctx)
    arguments = [each for each in params if each.param_type_name == "argument"]
    usage = [ctx.command_path, "[OPTIONS]", *(each.metavar for each in arguments)]
    commands = getattr(command, "commands", {})
    yield from _filled(" ".join([*usage, *(["COMMAND ..."] if commands else [])]), width, "Usage: ", 7)
    yield from _paragraphs(command.help, width)
    yield from _section("Arguments", [(each.metavar, each.help) for each in arguments], width)
    for group in GROUPS:
        of_group = [each for each in params if each not in arguments and _group(each) == group]
        yield from _section(group, [(_names(each), each.help) for each in of_group], width)
    yield from _section("Commands", [(name, _summary(each.help)) for name, each in commands.items()], width)
    yield from _paragraphs(command.epilog, width, "")


def _group(option: Any) -> str:
    return getattr(option, "rich_help_panel", None) or OTHERS  # older versions of click have a --help without


def _names(option: Any) -> str:
    """All names of an option, and the place of its value: `-o, --out PATH`."""
    names = [", ".join(sorted(names, key=len)) for names in (option.opts, option.secondary_opts) if names]
    return " / ".join(names) + (f" {option.metavar}" if option.metavar else "")


def _summary(text: str | None) -> str:
    """The first paragraph."""
    return cleandoc(text or "").split("\n\n")[0]


def _section(title: str, entries: list[Entry], width: int) -> Iterator[str]:
    if not entries:
        return
    yield from ("", f"{title}:")
    column = 4 + max((len(name) for name, _ in entries if len(name) <= NAMES_MOST), default=NAMES_MOST)
    for name, text in entries:
        beside = len(name) + 4 <= column
        if not beside:
            yield f"  {name}"
        yield from _filled(text, width, f"  {name}".ljust(column) if beside else " " * column, column)


def _paragraphs(text: str | None, width: int, indent: str = "  ") -> Iterator[str]:
    """Text between empty lines, each filled. Indented lines are examples, and stay as they are."""
    for paragraph in filter(None, cleandoc(text or "").split("\n\n")):
        yield ""
        yield from (
            paragraph.split("\n") if paragraph.startswith(" ") else _filled(paragraph, width, indent, len(indent))
        )


def _filled(text: str, width: int, start: str, column: int) -> list[str]:
    """Lines of a text; all but the first begin at a column."""
    fill = TextWrapper(width, start, " " * column, break_long_words=False, break_on_hyphens=False)
    return fill.wrap(" ".join(text.split()))
