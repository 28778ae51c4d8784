"""The help of every command, as a newcomer reads it: nothing is cut, and every option says its default."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from analysis.cli.main import app
from analysis.cli.options import OF_MACHINE
from engine.executor.cpu.machine import Cpu
from engine.executor.cuda.machine import Cuda

TANDEM = Path(sys.executable).with_name("tandem")
ACTIONS = {"--help", "--version"}  # options without a value


def contexts(command: Any, name: str, parent: Any = None) -> Iterator[Any]:
    """A click context of a command, and of all below it."""
    context = command.context_class(command, info_name=name, parent=parent, **command.context_settings)
    yield context
    for below, each in getattr(command, "commands", {}).items():
        yield from contexts(each, below, context)


EVERY = {context.command_path: context for context in contexts(get_command(app), "tandem")}


@pytest.fixture(params=EVERY)
def context(request) -> Any:
    return EVERY[request.param]


def help_at(context: Any, width: int, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", str(width))
    return context.get_help()


def options_of(context: Any) -> Iterator[Any]:
    return (each for each in context.command.get_params(context) if each.param_type_name == "option")


def joined(text: str) -> str:
    return " ".join(text.split())


def test_commands_are_found():
    assert {"tandem simulate", "tandem profile list", "tandem bench kernels", "tandem policies"} < EVERY.keys()


@pytest.mark.parametrize("width", [60, 80])
def test_no_line_is_longer_than_the_terminal_and_no_word_is_cut(context, width, monkeypatch):
    shown, examples = help_at(context, width, monkeypatch), context.command.epilog or ""
    assert "…" not in shown and "<" not in shown
    prose = [line for line in shown.splitlines() if line not in examples.splitlines()]
    assert max(map(len, prose)) <= width
    assert max(map(len, examples.splitlines()), default=0) <= 80 or not examples.startswith("  ")
    for option in options_of(context):
        assert {*option.opts, *option.secondary_opts} <= {word.strip(",") for word in shown.split()}
        assert joined(option.help) in joined(shown)


def test_a_line_is_broken_only_where_the_next_word_has_no_room(context, monkeypatch):
    lines = help_at(context, 80, monkeypatch).splitlines()
    description = lines[2 : next(place for place, line in enumerate(lines) if line.endswith(":"))]
    for line, after in pairwise(description):
        if line and after:
            assert len(line) + 1 + len(after.split()[0]) > 78, line


def test_every_option_says_its_default_or_that_it_is_required(context):
    for option in options_of(context):
        if not ACTIONS & {*option.opts}:
            facts = re.search(r" \[(required|default: \S.*)\]$", option.help)
            assert facts and not re.search(r"\b(None|True|False)\b", facts[1]), option.help


def test_what_a_value_is_called_is_said_but_of_flags_which_have_none(context):
    for option in options_of(context):
        flag = option.is_flag or ACTIONS & {*option.opts}
        assert (option.metavar is None) == bool(flag), option.opts
        assert flag or "bool" not in option.metavar


def test_texts_are_sentences(context):
    texts = [(name, each) for option in options_of(context) for name, each in [(option.name, option.help)]]
    for name, text in [*texts, (context.command_path, context.command.help)]:
        first = text.partition(" [")[0]
        assert first[0].isupper() and first.rstrip().endswith("."), name


def test_a_limit_that_the_machine_decides_is_what_the_help_says():
    sizes = Cuda.default_block_size, Cpu.default_block_size
    assert OF_MACHINE["block_size"] == f"{sizes[0]} on a GPU, {sizes[1]} on a CPU"


@pytest.mark.parametrize("asked", ["-h", "--help"])
def test_a_pipe_and_a_terminal_get_the_same_help(asked):
    environment = os.environ | {"COLUMNS": "80", "TERM": "xterm"}
    command = [TANDEM, "trace", "assign", asked]
    piped = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
    ours, its = pty.openpty()
    subprocess.run(command, stdout=its, check=True, env=environment)
    os.close(its)
    assert os.read(ours, 100_000).decode().replace("\r\n", "\n") == piped
    assert "--class CLASS" in piped and max(map(len, piped.splitlines())) <= 80


def test_the_version_is_the_packages():
    shown = subprocess.run([TANDEM, "--version"], capture_output=True, text=True, check=True).stdout
    assert shown == f"{version('tandem-llm')}\n"
