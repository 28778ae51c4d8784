"""Each connection takes a file descriptor, and a process may have so many."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress

RESERVED = 64  # for the process itself: libraries, pipes, and connections that are closing
FEW = 1024  # connections that a server of some size has


def raise_descriptor_limit() -> int:
    """Raise the limit of this process as far as its user may; returns how many connections it leaves room for."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(OSError, ValueError):  # some systems have a lower limit beside these, and the old one stays
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return most_connections()


def most_connections() -> int:
    """Connections that fit under the limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else max(1, soft - RESERVED)
