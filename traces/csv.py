"""Traces as CSV, or with tabs between the cells: read only."""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from traces.columns import DATED, FIELD_OF, ID_BYTES, UNIT_OF, Batch, Placed, Row
from traces.errors import TandemError
from traces.rows import errors_at

_BATCH_ROWS = 8192
_UNREAD = np.empty(0)
_DATE = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(?:\.\d{1,9})?(?:\+00:00)?"
_DATES, _NUMBERS = (re.compile(rf"{one}(?:\n{one})*", re.ASCII) for one in (_DATE, r"\d+(?:\.\d*)?"))
_FLOATS = DATED | {column for column, field in FIELD_OF.items() if column in UNIT_OF and UNIT_OF[column] != "ns"}


def read_csv(path: Path, file: IO[bytes], meta: dict[str, Any]) -> Iterator[Batch]:
    """Yields the rows of a file."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        first = text.readline()
        delimiter = "\t" if "\t" in first else ","
        header = [name.strip() for name in next(csv.reader([first], delimiter=delimiter), [])]
        with errors_at(path):
            _check_header(header)
        reader, line = csv.reader(text, delimiter=delimiter), 1
        while batch := list(islice(reader, _BATCH_ROWS)):
            yield Batch(partial(_rows, path, header, batch, line), _columns(header, batch))
            line = 1 + reader.line_num
    except (csv.Error, UnicodeDecodeError) as error:
        raise TandemError(f"{path}: not a CSV trace ({error})") from error


def _rows(path: Path, header: Sequence[str], batch: Sequence[Sequence[str]], line: int) -> Iterator[Placed]:
    """The rows after a line."""
    for cells in batch:
        line += 1 + sum(cell.count("\n") for cell in cells)
        if cells:
            place = f"{path}:{line}"
            with errors_at(place):
                yield place, _row(header, cells)


def _columns(header: Sequence[str], batch: Sequence[Sequence[str]]) -> dict[str, npt.NDArray[Any]] | None:
    if any(len(cells) != len(header) for cells in batch):
        return None
    columns = dict(zip(header, zip(*batch, strict=True), strict=True))
    try:
        return {name: _array(name, column) if name in FIELD_OF else _UNREAD for name, column in columns.items()}
    except (ValueError, OverflowError):
        return None


def _array(name: str, column: Sequence[str]) -> npt.NDArray[Any]:
    """A column's numbers or dates. Raises ValueError where they must be read one by one."""
    lines = "\n".join(column)
    if name in DATED and _DATES.fullmatch(lines) and min(column) >= "1970" and max(column) < "2262":
        return np.array(lines.replace("+00:00", "").split("\n"), "M8[ns]")
    if _NUMBERS.fullmatch(lines) is None:
        raise ValueError(f"{name} has other values than numbers")
    return np.array([*map(float, column)]) if name in _FLOATS else np.array([*map(int, column)], np.int64)


def _check_header(header: Sequence[str]) -> None:
    fields = {FIELD_OF[name] for name in header if name in FIELD_OF}
    if not {"prompt_len", "output_len"} <= fields:
        raise TandemError(
            "not a known CSV trace: its first line must name columns such as TIMESTAMP,ContextTokens,GeneratedTokens "
            "or arrival_s,prompt_len,output_len (docs/traces.md has all)"
        )
    if twice := [name for name, count in Counter(header).items() if count > 1 and name in FIELD_OF]:
        raise TandemError(f"the first line names {twice[0]} twice: keep one of the two")


def _row(header: Sequence[str], cells: Sequence[str]) -> Row:
    if len(cells) != len(header):
        wanted = ",".join(name for name in header if name in FIELD_OF)
        raise TandemError(f"not a row of {wanted} ({len(cells)} cells, not {len(header)})")
    row: Row = {}
    for name, cell in zip(header, cells, strict=True):
        try:
            row[name] = _value(name, cell.strip()) if name in FIELD_OF else cell
        except ValueError as error:
            wanted = ",".join(name for name in header if name in FIELD_OF)
            raise TandemError(f"not a row of {wanted} ({error})") from None
    return row


def _value(name: str, cell: str) -> Any:
    """A cell's value. Raises ValueError if it has none."""
    if not cell:
        return None
    if FIELD_OF[name] in ID_BYTES:
        return json.loads(cell)
    if FIELD_OF[name] == "client" or (name in DATED and "-" in cell[1:] and ":" in cell):
        return cell
    if "_" in cell:  # which Python would take for a number's
        raise ValueError(f"{name} is {cell!r:.60}")
    return float(cell) if name in _FLOATS else int(cell)
