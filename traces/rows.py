"""The rows of trace files: their columns, and the request or the header that a row of any format holds.

In JSONL, Tandem's own, Mooncake's, and vLLM's `timed_trace`, they are the lines.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path
from typing import IO, Any

import numpy as np

from traces.errors import TandemError
from traces.request import TraceRequest

SCHEMA_VERSION = 3
_READABLE = (1, 2, 3)  # version 1 knew no SLOs, version 2 no output ids

Row = dict[str, Any]

COLUMNS = [field.name for field in fields(TraceRequest)][1:]  # the id is the place in the file
ID_BYTES = {"prompt_token_ids": 4, "hash_ids": 8, "output_ids": 8}  # columns that hold lists of ids: of an id
FIELD_OF = {name: name for name in COLUMNS} | {  # a column of a file, and the field of `TraceRequest` that it fills
    "arrival_s": "arrival_ns",
    "timestamp": "arrival_ns",
    "input_length": "prompt_len",
    "output_length": "output_len",
    "ttft_slo_ms": "ttft_slo_ns",
    "e2e_slo_ms": "e2e_slo_ns",
}
_UNIT_NS = {"arrival_s": 10**9, "timestamp": 10**6, "ttft_slo_ms": 10**6, "e2e_slo_ms": 10**6}
_LATEST_NS = 9e18  # inside int64


@contextmanager
def errors_at(place: object) -> Iterator[None]:
    """Errors of the block say where they are."""
    try:
        yield
    except TandemError as error:
        raise TandemError(f"{place}: {error}") from None


def request_of(position: int, row: Mapping[str, Any]) -> TraceRequest:
    """The request of a row, whose id is its position. Raises TandemError if it is not valid."""
    values: dict[str, Any] = {}
    for column, value in row.items():
        name = FIELD_OF.get(column)
        if name is None or value is None:
            continue
        if name in values:
            raise TandemError(f"{column} gives {name} a second time: keep one of the two")
        values[name] = _nanoseconds(column, value) if column in _UNIT_NS else value
    values |= {name: _ids(name, values[name]) for name in ID_BYTES if name in values}
    if "prompt_token_ids" in values:
        values.setdefault("prompt_len", len(values["prompt_token_ids"]))
    for name in ("arrival_ns", "prompt_len", "output_len"):
        if name not in values:
            raise TandemError(f"no {name}: give {' or '.join(c for c, field in FIELD_OF.items() if field == name)}")
    values.setdefault("max_tokens", values["output_len"])
    return TraceRequest(id=position, **values)


def _nanoseconds(column: str, value: Any) -> int:
    unit_ns = _UNIT_NS[column]
    if type(value) not in (int, float) or not 0 <= value <= _LATEST_NS / unit_ns:
        raise TandemError(f"{column} is {value!r:.60}: it must be a number from 0 to {_LATEST_NS / unit_ns:.0e}")
    nanoseconds: int = round(value * unit_ns)
    return nanoseconds


def _ids(name: str, value: Any) -> array[int]:
    """Ids as a C array: 4 or 8 bytes an id, and no Python object for each."""
    if isinstance(value, list) and set(map(type, value)) <= {int}:
        with suppress(OverflowError):
            value = array("i" if ID_BYTES[name] == 4 else "q", value)
    if not isinstance(value, array) or (np.asarray(value) < 0).any():
        raise TandemError(f"{name} must be a list of integers from 0 to {2 ** (8 * ID_BYTES[name] - 1) - 1}")
    return value


def written_value(request: TraceRequest, name: str) -> Any:
    """A field as files have it: a block size only where it is the size of something."""
    return None if name == "hash_block_size" and request.hash_ids is None else getattr(request, name)


def write_header(meta: Mapping[str, Any]) -> str:
    """The first line of JSONL, and the schema metadata of Parquet."""
    return json.dumps({"tandem_trace": SCHEMA_VERSION, "meta": meta})


def read_header(header: Row) -> dict[str, Any]:
    """The `meta` of a header. Raises TandemError if it is of another version."""
    version, meta = header["tandem_trace"], header.get("meta", {})
    if version not in _READABLE:
        raise TandemError(f"trace schema version {version!r:.60}: this Tandem reads versions up to {SCHEMA_VERSION}")
    if not isinstance(meta, dict):
        raise TandemError(f"meta is {meta!r:.60}: it must be a JSON object")
    return meta


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
