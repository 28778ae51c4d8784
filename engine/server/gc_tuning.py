"""When a server's processes look for garbage.

A stream holds some hundred objects. Python looks through those of all streams each time that there are a quarter more
than before: with a thousand streams everyone waits 60 ms for it, the more often the faster requests come and go.
"""

from __future__ import annotations

import gc

YOUNG, MIDDLE, FULL = 700, 10, 100  # Python's own but for the last: 700,000 new objects, a few thousand requests' worth
WORTHWHILE = 2  # collections of the middle generation since the last full one: a hundred requests


def hold_back() -> None:
    """Never look through loaded objects, and seldom through all others. For a process that is about to serve."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, MIDDLE, FULL)


def collect_now() -> None:
    """Nobody waits: collect, if there may be something."""
    if gc.get_count()[2] >= WORTHWHILE:
        gc.collect()
