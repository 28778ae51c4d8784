"""The way in which a job tells of its progress. A job knows no console."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Event, Thread
from typing import Protocol

from engine.records.recorder import Recorder

REFRESH_S = 0.5


class Progress(Protocol):
    """Is told of a job's progress. `analysis.report.console_progress` shows it on a console; this one tells nobody."""

    def note(self, text: str) -> None:
        """Say a line."""
        return None

    def status(self, what: str) -> AbstractContextManager[object]:
        """Say what is being done, within the context."""
        return nullcontext()

    def bar(self, what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """Show how much of `total` is done, within the context. It yields the function that takes that number."""
        return nullcontext(lambda _: None)


class Silent(Progress):
    """A `Progress` that nobody watches."""


@contextmanager
def following(progress: Progress, what: str, recorder: Recorder, total: int) -> Iterator[None]:
    """A bar that counts a recorder's ended requests. It runs on its own thread, so the serving loop need not."""
    over = Event()
    with progress.bar(what, total) as show:

        def follow() -> None:
            while not over.wait(REFRESH_S):
                show(recorder.ended)

        thread = Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            show(recorder.ended)
