"""Errors a user can mend. The command line prints one line and exits with status 2, or 1 for `UnmetError`."""

from __future__ import annotations


class TandemError(Exception):
    """Bad input. The message is one line: the fault, its place, and the remedy."""


class UnmetError(TandemError):
    """The input was right, but a condition was not met: exit status 1."""


def reason(error: Exception) -> str:
    """The message of an error, on one line: those of libraries may have several."""
    return " ".join((getattr(error, "strerror", None) or str(error)).split())
