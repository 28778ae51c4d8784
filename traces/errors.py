"""The errors a user can mend. The command line prints one line and exits with status 2."""

from __future__ import annotations


class TandemError(Exception):
    """Bad input: the message is one line that says what is wrong, where, and what to do."""
