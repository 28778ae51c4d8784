"""Dates of traces, in nanoseconds since 1970. A date without a zone is taken as UTC."""

from __future__ import annotations

import re

import numpy as np

from traces.errors import TandemError

_DATE = re.compile(
    r"(?P<day>(?P<year>\d{4})-\d\d-\d\d)(?:[ T](?P<time>\d\d:\d\d(?::\d\d(?:\.\d{1,9})?)?)"
    r" ?(?:Z|UTC|(?P<sign>[+-])(?P<hours>\d\d):?(?P<minutes>\d\d)?)?)?",
    re.ASCII,
)
_YEARS = range(1970, 2262)  # whose nanoseconds fit 63 bits
_NS_PER_MINUTE = 60 * 10**9


class Instant(int):
    """Nanoseconds since 1970, and not since the start of a trace."""


def read_date(text: str) -> Instant:
    """A date such as `2023-11-16 18:17:03.9799600` or `2024-05-10T00:00:00+02:00`.

    Raises:
        TandemError: it is none, or before 1970, or after 2261.
    """
    parts = _DATE.fullmatch(text.strip())
    if parts is None or int(parts["year"]) not in _YEARS:
        raise TandemError(f"{text!r:.60} is no date: write 2024-05-10 18:17:03.25+00:00, from 1970 to 2261")
    try:
        local_ns = np.datetime64(f"{parts['day']}T{parts['time'] or '00:00'}", "ns").astype(np.int64)
    except ValueError:
        raise TandemError(f"{text!r:.60} is no date: there is no such day or time") from None
    ahead = 60 * int(parts["hours"] or 0) + int(parts["minutes"] or 0)
    return Instant(int(local_ns) - (-ahead if parts["sign"] == "-" else ahead) * _NS_PER_MINUTE)
