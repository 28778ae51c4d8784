"""The errors a user can mend. The command line prints one line and exits with status 2, or 1 for what was not met."""

from __future__ import annotations


class TandemError(Exception):
    """Bad input: the message is one line that says what is wrong, where, and what to do."""


class UnmetError(TandemError):
    """Nothing was wrong with the input, but what was asked for was not met: exit status 1."""


def reason(error: Exception) -> str:
    """The message of an error, on one line: those of libraries may have several."""
    return " ".join((getattr(error, "strerror", None) or str(error)).split())
