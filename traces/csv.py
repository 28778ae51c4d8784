"""Published traces as CSV, read only: the Azure LLM inference traces and BurstGPT."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from traces.errors import TandemError
from traces.rows import Row, errors_at

_Layout = tuple[str, str, str]  # the names of the columns that are read: time, prompt and output length

_AZURE: _Layout = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURSTGPT: _Layout = ("Timestamp", "Request tokens", "Response tokens")


def read_csv(path: Path, meta: dict[str, Any], notes: list[str]) -> Iterator[tuple[str, Row]]:
    """Yields the place and the content of every row with output tokens; dates count from the first."""
    rows: dict[str, Row] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            with errors_at(path):
                layout = _layout(reader.fieldnames or ())
            for cells in reader:
                place = f"{path}:{reader.line_num}"
                with errors_at(place):
                    rows[place] = _row(cells, layout)
    except (csv.Error, UnicodeDecodeError) as error:
        raise TandemError(f"{path}: not a CSV trace ({error})") from error
    kept = {place: row for place, row in rows.items() if row["output_len"]}
    if dropped := len(rows) - len(kept):
        notes.append(f"{dropped} requests without output tokens were dropped")
    if layout == _AZURE:
        first_ns = min((row["arrival_ns"] for row in kept.values()), default=0)
        for row in kept.values():
            row["arrival_ns"] -= first_ns
    yield from kept.items()


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
        raise TandemError(f"no {layout[0]}")
    return {"arrival_ns": int(date.astype(np.int64)), **lengths}
