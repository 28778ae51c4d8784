"""What commands say: results on standard output, progress and notes on standard error."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from rich.console import Console
from rich.table import Table

from analysis.report.console_progress import ConsoleProgress
from analysis.report.tables import TextTable, print_tables
from engine.records.run_folder import RunRecords
from traces.trace import Trace

Result = TypeVar("Result")

console = Console(stderr=True)
progress = ConsoleProgress(console)


def print_json(result: object) -> None:
    """Print it for machines."""
    print(json.dumps(result, indent=2))


def print_result(
    result: Result, as_json: bool, tables: Callable[[Result], Iterable[TextTable]], width: int = 0
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


def print_run(run: RunRecords, as_json: bool, title: str, names: Iterable[str]) -> int:
    """Print a run's summary: what is missing before any number.

    Args:
        run: with a summary.
        as_json: print all of the summary for machines; what is missing goes to standard error then.
        title: of the table.
        names: what a person is shown of the summary; what is None is left out.

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
            Console().print(sentence, highlight=False, soft_wrap=True)
    if as_json:
        print_json(summary)
        return 0 if summary["completed"] else 1
    print_facts({name: summary[name] for name in names if summary.get(name) is not None}, False, title)
    if note := p99_sentence(summary["completed"]):
        Console().print(note, highlight=False)
    return 0 if summary["completed"] else 1


def print_facts(facts: Mapping[str, Any], as_json: bool, title: str) -> None:
    """Print names and values, as one JSON object or a table of a line each."""
    if as_json:
        print_json(facts)
        return
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    for name, value in facts.items():
        table.add_row(name, f"{value:,.3f}" if isinstance(value, float) else str(value))
    Console().print(table)


def say_notes(trace: Trace) -> None:
    """Say what whoever reads the trace's figures should know of it."""
    for note in trace.notes:
        progress.note(f"note: {note}")
