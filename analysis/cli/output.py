"""Output of the commands: results on standard output, progress and notes on standard error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from analysis.jobs.options import AS_THE_FILE_SAYS, TraceReading
from analysis.report.console_progress import ConsoleProgress
from analysis.report.tables import TextTable, print_tables
from engine.records.run_folder import RunRecords
from traces.trace import Trace, from_first_arrival

Result = TypeVar("Result")

progress = ConsoleProgress(Console(stderr=True))


def print_json(result: object) -> None:
    """Print it for machines."""
    print(json.dumps(result, indent=2))


def print_result(
    result: Result, as_json: bool, tables: Callable[[Result], Iterable[TextTable]], width: int = 120
) -> None:
    """Print a result for machines or for people.

    Args:
        result: JSON values.
        as_json: which of the two.
        tables: makes the tables of a result.
        width: a table is cut off at no less than this, so that a pipe gets all of it.
    """
    if as_json:
        print_json(result)
        return
    wide = Console()
    wide.width = max(wide.width, width)
    print_tables(tables(result), wide)


def facts_table(facts: Mapping[str, Any], title: str, note: str = "") -> list[TextTable]:
    """A table of names and values, those that are known."""
    known = [(name, value) for name, value in facts.items() if value is not None]
    rows = [(name, f"{value:,.3f}" if isinstance(value, float) else str(value)) for name, value in known]
    return [TextTable(title, note, ("", "value"), rows)]


def print_run(run: RunRecords, as_json: bool, title: str, names: Iterable[str]) -> int:
    """Print a run's summary. Requests that are missing come before any number.

    Args:
        run: with a summary.
        as_json: print all of the summary for machines, and the missing requests to standard error.
        title: of the table.
        names: of the values that a person is shown.

    Returns:
        The exit status: 1 if no request completed, else 0.
    """
    from analysis.metrics.summary import asked_for
    from analysis.report.caveats import beyond_sentence, completed_sentences, p99_sentence

    summary = run.summary
    beyond = beyond_sentence(summary.get("profile_lookups"))
    for sentence in filter(None, (*completed_sentences(summary, asked_for(run)), beyond)):
        if as_json:
            progress.note(f"note: {sentence}")
        else:
            ConsoleProgress(Console()).note(sentence)
    shown, note = {name: summary.get(name) for name in names}, p99_sentence(summary["completed"])
    print_result(summary, as_json, lambda _: facts_table(shown, title, note))
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
