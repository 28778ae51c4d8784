"""Errors a user can mend. The command line prints one line and exits with status 2, or 1 for `UnmetError`."""

from __future__ import annotations

from pathlib import Path


class TandemError(Exception):
    """Bad input. The message is one line: the fault, its place, and the remedy."""


class UnmetError(TandemError):
    """The input was right, but a condition was not met: exit status 1."""


def check_no_pipe(path: Path) -> Path:
    """The path. Raises TandemError if a pipe or a device is there: to open one may take for ever."""
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise TandemError(f"{path} is a pipe or a device: write its content to a file first, and give that")
    return path


def reason(error: Exception) -> str:
    """The message of an error, on one line: those of libraries may have several, or advice to programmers."""
    if isinstance(error, RecursionError):
        return "its brackets are nested too deep"
    if isinstance(error, ValueError) and "integer string conversion" in str(error):
        return "a number has too many digits"
    return " ".join((getattr(error, "strerror", None) or str(error)).split())
