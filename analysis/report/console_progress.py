"""A job's progress on a console."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Column

BAR_WIDTH = 20
NUMBERS = (MofNCompleteColumn, TimeElapsedColumn, TimeRemainingColumn)  # which never wrap


@dataclass(frozen=True, slots=True)
class ConsoleProgress:
    """An `analysis.jobs.progress.Progress`.

    Attributes:
        console: where it is shown; standard error by rule.
    """

    console: Console

    def note(self, text: str) -> None:
        """As in `Progress`."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def status(self, what: str) -> AbstractContextManager[object]:
        """As in `Progress`."""
        return self.console.status(what)

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """As in `Progress`."""
        label, bar = TextColumn("{task.description}", table_column=Column(overflow="fold")), BarColumn(BAR_WIDTH)
        numbers = (each(table_column=Column(no_wrap=True)) for each in NUMBERS)
        with Bars(label, bar, *numbers, console=self.console, refresh_per_second=2) as bars:
            task = bars.add_task(what, total=total)
            yield lambda done: bars.update(task, completed=done)
