"""Output of the commands: results on standard output, progress and notes on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from analysis.jobs.options import AS_THE_FILE_SAYS, TraceReading
from analysis.report.console_progress import ConsoleProgress
from analysis.report.tables import TextTable, print_tables
from engine.records.run_folder import RunRecords
from traces.trace import Trace, from_first_arrival

Result = TypeVar("Result")

UNBOUNDED = 100_000  # columns

progress = ConsoleProgress(Console(stderr=True))


def print_json(result: object) -> None:
    """Print it for machines."""
    print(json.dumps(result, indent=2))


def standard_output() -> Console:
    """The console of results. A file or a pipe has no width: nothing is wrapped there."""
    console = Console()
    if not sys.stdout.isatty():  # whatever COLUMNS says: readline hands it down from a program that calls this one
        console.width = UNBOUNDED
    return console


def print_result(result: Result, as_json: bool, tables: Callable[[Result], Iterable[TextTable]]) -> None:
    """Print a result for machines or for people.

    Args:
        result: JSON values.
        as_json: which of the two.
        tables: makes the tables of a result.
    """
    if as_json:
        print_json(result)
    else:
        print_tables(tables(result), standard_output())


def print_run(run: RunRecords, as_json: bool, title: str) -> int:
    """Print a run's summary. Requests that are missing come before any number.

    Args:
        run: with a summary.
        as_json: print all of the summary for machines, and the missing requests to standard error.
        title: of the run.

    Returns:
        The exit status: 1 if no request completed, else 0.
    """
    from analysis.jobs.limits import limits_of_run
    from analysis.metrics.summary import asked_for
    from analysis.report.caveats import beyond_sentence, completed_sentences
    from analysis.report.run_summary import run_tables

    summary = run.summary
    beyond = beyond_sentence(summary.get("profile_lookups"))
    for sentence in filter(None, (*completed_sentences(summary, asked_for(run)), beyond)):
        if as_json:
            progress.note(f"note: {sentence}")
        else:
            ConsoleProgress(standard_output()).note(sentence)
    limits, caches = limits_of_run(run.manifest), run.manifest["system"].get("prefix_caching", False)
    print_result(summary, as_json, lambda found: run_tables(found, title, limits, caches))
    return 0 if summary["completed"] else 1


def read_noted(path: Path, reading: TraceReading = AS_THE_FILE_SAYS) -> Trace:
    """Read a trace to serve it, and say its notes. Raises TandemError as `read_trace`."""
    trace = from_first_arrival(reading.read(path))
    say_notes(trace)
    return trace


def say_notes(trace: Trace) -> None:
    """Say the trace's notes, which concern its figures."""
    for note in trace.notes:
        progress.note(f"note: {note}")
