"""Traces as JSONL, one object a line: Tandem's own, Mooncake's, and vLLM's `timed_trace`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from traces.errors import TandemError
from traces.request import TraceRequest
from traces.rows import COLUMNS, Row, errors_at, read_header, write_header, written_value


def read_jsonl(path: Path, meta: dict[str, Any], notes: list[str]) -> Iterator[tuple[str, Row]]:
    """Yields the place and the content of every row; fills `meta` from the header, which files from elsewhere lack."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            with errors_at(place):
                row = json_object(line)
                if number == 1 and "tandem_trace" in row:
                    meta.update(read_header(row))
                    continue
            yield place, row


def json_object(line: bytes) -> Row:
    """The object on a line. Raises TandemError if there is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TandemError(f"not a whole JSON object ({error}): cut short or damaged?") from None
    if not isinstance(row, dict):
        raise TandemError("not a JSON object: a trace has one request, in braces, a line")
    return row


def write_jsonl(file: IO[bytes], requests: Sequence[TraceRequest], meta: Mapping[str, Any]) -> None:
    """Writes a header and a line for each request."""
    file.write(f"{write_header(meta)}\n".encode())
    for request in requests:
        row = {name: value for name in COLUMNS if (value := written_value(request, name)) is not None}
        file.write(f"{json.dumps(row, default=lambda ids: np.asarray(ids).tolist())}\n".encode())
