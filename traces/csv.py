"""Published traces as CSV, read only: the Azure LLM inference traces and BurstGPT."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from traces.errors import TandemError
from traces.rows import Row, errors_at


class _Layout(NamedTuple):
    """The names of the columns that are read."""

    time: str
    prompt_len: str
    output_len: str


_AZURE = _Layout("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURSTGPT = _Layout("Timestamp", "Request tokens", "Response tokens")


def read_csv(path: Path, meta: dict[str, Any], notes: list[str]) -> Iterator[tuple[str, Row]]:
    """Yields the place and the content of every row with output tokens; dates count from the first."""
    rows: dict[str, Row] = {}
    dropped = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            with errors_at(path):
                layout = _layout(reader.fieldnames or ())
            for cells in reader:
                place = f"{path}:{reader.line_num}"
                with errors_at(place):
                    row = _row(cells, layout)
                if row["output_len"] == 0:
                    dropped += 1
                else:
                    rows[place] = row
    except (csv.Error, UnicodeDecodeError) as error:
        raise TandemError(f"{path}: not a CSV trace ({error})") from error
    if dropped:
        notes.append(f"{dropped} requests without output tokens were dropped")
    first_ns = min((row["arrival_ns"] for row in rows.values()), default=0) if layout == _AZURE else 0
    for place, row in rows.items():
        if first_ns:
            row["arrival_ns"] -= first_ns
        yield place, row


def _layout(header: Sequence[str]) -> _Layout:
    for layout in (_AZURE, _BURSTGPT):
        if set(layout) <= set(header):
            return layout
    raise TandemError(f"not a known CSV trace: its columns must be {','.join(_AZURE)} or {','.join(_BURSTGPT)}")


def _row(cells: Mapping[str, str | None], layout: _Layout) -> Row:
    """A row with a date's nanoseconds since 1970 or, in BurstGPT, seconds since the trace's start."""
    time, prompt_len, output_len = (cells[column] or "" for column in layout)
    try:
        lengths = {"prompt_len": int(prompt_len), "output_len": int(output_len)}
        if layout == _BURSTGPT:
            return {"arrival_s": float(time), **lengths}
        date = np.datetime64(time.removesuffix("+00:00"), "ns")
    except ValueError as error:
        raise TandemError(f"not a row of {','.join(layout)} ({error})") from None
    if np.isnat(date):
        raise TandemError(f"no {layout.time}")
    return {"arrival_ns": int(date.astype(np.int64)), **lengths}
