"""Trace files: what a trace is, and how it is read and written.

Two formats are read and written, chosen by suffix: JSONL (one object a line, also Mooncake's and vLLM's `timed_trace`)
and Parquet. CSV is read only: the Azure LLM inference traces and BurstGPT. Every fault of a file is a `TandemError`
that names the line or row. This module knows nothing of models, tokenizers or schedulers.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import struct
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import numpy as np

from traces.errors import TandemError
from traces.request import TraceRequest
from traces.request_list import CompactRequests

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 3
_READABLE = (1, 2, 3)  # version 1 knew no SLOs, version 2 no output ids

# A column of a file, and the field of `TraceRequest` it fills.
_FIELD_OF = {
    "arrival_ns": "arrival_ns",
    "arrival_s": "arrival_ns",
    "timestamp": "arrival_ns",
    "prompt_len": "prompt_len",
    "input_length": "prompt_len",
    "output_len": "output_len",
    "output_length": "output_len",
    "max_tokens": "max_tokens",
    "prompt_token_ids": "prompt_token_ids",
    "hash_ids": "hash_ids",
    "hash_block_size": "hash_block_size",
    "output_ids": "output_ids",
    "predicted_length": "predicted_length",
    "priority": "priority",
    "client": "client",
    "cancel_ns": "cancel_ns",
    "ttft_slo_ns": "ttft_slo_ns",
    "ttft_slo_ms": "ttft_slo_ns",
    "e2e_slo_ns": "e2e_slo_ns",
    "e2e_slo_ms": "e2e_slo_ns",
}
_UNIT_NS = {"arrival_s": 10**9, "timestamp": 10**6, "ttft_slo_ms": 10**6, "e2e_slo_ms": 10**6}
_LATEST_NS = 9e18  # inside int64
_COLUMNS = list(dict.fromkeys(_FIELD_OF.values()))
_LONG_IDS = ("hash_ids", "output_ids")  # int64
_BATCH_ROWS = 4096

# (time, prompt tokens, output tokens)
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_BURSTGPT = ("Timestamp", "Request tokens", "Response tokens")

_Row = dict[str, Any]
_Function = TypeVar("_Function")


@dataclass(frozen=True, slots=True)
class Trace:
    """A workload: requests in arrival order, ids 0, 1, 2, ...

    Attributes:
        requests: at least one.
        meta: where the trace comes from, as JSON values; travels with the file, and is not part of the digest.
        notes: what reading it had to mend or leave out, one sentence each, for the user; not written to files.

    Raises:
        TandemError: there are no requests.
        ValueError: ids or arrivals are not in order.
    """

    requests: Sequence[TraceRequest]
    meta: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.requests:
            raise TandemError("the trace is empty: it needs at least one request")
        latest_ns = 0
        for position, request in enumerate(self.requests):
            if request.id != position:
                raise ValueError("request ids must be 0, 1, 2, ... in order")
            if request.arrival_ns < latest_ns:
                raise ValueError("requests must be in order of arrival")
            latest_ns = request.arrival_ns

    @property
    def digest(self) -> str:
        """SHA-256 of the requests, in hexadecimal: equal in every file format, whatever `meta` and `notes` say."""
        promised = any(request.ttft_slo_ns or request.e2e_slo_ns for request in self.requests)
        sha = hashlib.sha256(b"tandem-trace/2\n" if promised else b"tandem-trace/1\n")
        for request in self.requests:
            sha.update(_canonical_bytes(request))
            if promised:  # a trace without SLOs keeps the digest that it had before there were any
                sha.update(struct.pack("<2q", request.ttft_slo_ns or -1, request.e2e_slo_ns or -1))
            if request.output_ids is not None:  # likewise
                sha.update(b"output" + array("q", request.output_ids).tobytes())
        return sha.hexdigest()


def _canonical_bytes(request: TraceRequest) -> bytes:
    """Nine little-endian int64 (-1 where a value is absent), the client in UTF-8, the token ids as int32.

    Where hash ids come in place of token ids, the ninth number is -2 minus their number; then their block size and they
    themselves follow, as int64.
    """
    client = (request.client or "").encode()
    ids, hashes = request.prompt_token_ids, request.hash_ids
    if hashes is not None:
        number, content = -2 - len(hashes), struct.pack(f"<{len(hashes) + 1}q", request.hash_block_size, *hashes)
    else:
        number = -1 if ids is None else len(ids)
        content = np.asarray(() if ids is None else ids, dtype="<i4").tobytes()
    numbers = struct.pack(
        "<9q",
        request.arrival_ns,
        request.prompt_len,
        request.output_len,
        request.max_tokens,
        -1 if request.predicted_length is None else request.predicted_length,
        request.priority,
        -1 if request.cancel_ns is None else request.cancel_ns,
        -1 if request.client is None else len(client),
        number,
    )
    return numbers + client + content


def read_trace(path: str | Path) -> Trace:
    """Reads a .jsonl, .parquet or .csv trace.

    Arrivals are kept as given, but for Azure's dates, which count from the first. Requests out of order are sorted
    (those of equal arrival stay in file order), with a note.

    Raises:
        TandemError: the file is missing, damaged, empty, of another schema version, or has an invalid request.
    """
    path = Path(path)
    rows_of = _by_suffix(path, {".jsonl": _jsonl_rows, ".parquet": _parquet_rows, ".csv": _csv_rows})
    requests = CompactRequests()
    meta: dict[str, Any] = {}
    notes: list[str] = []
    unknown: set[str] = set()
    try:
        for place, row in rows_of(path, meta, notes):
            unknown |= row.keys() - _FIELD_OF.keys()
            with _at(place):
                requests.append(_request(len(requests), row))
    except OSError as error:
        raise TandemError(f"cannot read {path}: {_reason(error)}") from error
    if unknown:
        notes.append(f"ignored unknown columns: {', '.join(sorted(unknown))}")
    with _at(path):
        return Trace(_in_arrival_order(requests, notes), meta, notes)


def write_trace(path: str | Path, trace: Trace) -> None:
    """Writes a .jsonl or .parquet trace, whole or not at all.

    Raises:
        TandemError: the suffix is unknown, or the file cannot be written (no such folder, disk full).
    """
    path = Path(path)
    write = _by_suffix(path, {".jsonl": _write_jsonl, ".parquet": _write_parquet})
    with atomic_file(path) as file:
        write(file, trace)


@contextmanager
def atomic_file(path: Path) -> Iterator[IO[bytes]]:
    """A file that appears at `path`, replacing what was there, only if the block ends without an exception.

    Raises:
        TandemError: in place of any OSError, of the block too.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError):
            raise TandemError(f"cannot write {path}: {_reason(error)}; nothing was written") from error
        raise


def _reason(error: Exception) -> str:
    """What an error says, on one line: the libraries' errors may have several."""
    return " ".join((getattr(error, "strerror", None) or str(error)).split())


def _by_suffix(path: Path, functions: dict[str, _Function]) -> _Function:
    if path.suffix not in functions:
        raise TandemError(f"{path}: unknown suffix {path.suffix!r}: use {', '.join(functions)}")
    return functions[path.suffix]


@contextmanager
def _at(place: object) -> Iterator[None]:
    try:
        yield
    except TandemError as error:
        raise TandemError(f"{place}: {error}") from None


def _count_late(arrivals_ns: Sequence[int]) -> int:
    """How many arrivals are earlier than one listed before them."""
    return sum(arrival < latest for arrival, latest in zip(arrivals_ns, accumulate(arrivals_ns, max), strict=True))


def _in_arrival_order(requests: CompactRequests, notes: list[str]) -> Sequence[TraceRequest]:
    late = _count_late(requests.arrivals_ns)
    if not late:
        return requests
    notes.append(f"{late} of {len(requests)} arrivals were out of order: sorted")
    ordered = sorted(requests, key=lambda request: request.arrival_ns)
    return [replace(request, id=position) for position, request in enumerate(ordered)]


# From a row of any format to a request.


def _request(position: int, row: Mapping[str, Any]) -> TraceRequest:
    fields: dict[str, Any] = {}
    for column, value in row.items():
        name = _FIELD_OF.get(column)
        if name is None or value is None:
            continue
        if name in fields:
            raise TandemError(f"{column} gives {name} a second time: keep one of the two")
        fields[name] = _nanoseconds(column, value) if column in _UNIT_NS else value
    if "prompt_token_ids" in fields:
        fields["prompt_token_ids"] = _token_ids(fields["prompt_token_ids"])
        fields.setdefault("prompt_len", len(fields["prompt_token_ids"]))
    for name in _LONG_IDS:
        if name in fields:
            fields[name] = _hash_ids(name, fields[name])
    for name in ("arrival_ns", "prompt_len", "output_len"):
        if name not in fields:
            raise TandemError(f"no {name}: give {' or '.join(c for c, field in _FIELD_OF.items() if field == name)}")
    fields.setdefault("max_tokens", fields["output_len"])
    return TraceRequest(id=position, **fields)


def _nanoseconds(column: str, value: Any) -> int:
    unit_ns = _UNIT_NS[column]
    if type(value) not in (int, float) or not 0 <= value <= _LATEST_NS / unit_ns:
        raise TandemError(f"{column} is {value!r:.60}: it must be a number from 0 to {_LATEST_NS / unit_ns:.0e}")
    nanoseconds: int = round(value * unit_ns)
    return nanoseconds


def _token_ids(value: Any) -> array[int]:
    """Token ids as a C array of int32: 4 bytes a token, and no Python object for each."""
    if isinstance(value, list) and set(map(type, value)) <= {int}:
        with suppress(OverflowError):
            value = array("i", value)
    if not isinstance(value, array) or (np.asarray(value) < 0).any():
        raise TandemError("prompt_token_ids must be a list of integers from 0 to 2147483647")
    return value


def _hash_ids(name: str, value: Any) -> array[int]:
    """Ids as a C array of int64."""
    if isinstance(value, list) and set(map(type, value)) <= {int}:
        with suppress(OverflowError):
            value = array("q", value)
    if not isinstance(value, array) or (len(value) and min(value) < 0):
        raise TandemError(f"{name} must be a list of integers from 0 to 9223372036854775807")
    return value


# The header: the first line of JSONL, the schema metadata of Parquet. Files from elsewhere have none.


def _header(trace: Trace) -> str:
    return json.dumps({"tandem_trace": SCHEMA_VERSION, "meta": trace.meta})


def _meta_of(header: _Row) -> dict[str, Any]:
    version, meta = header["tandem_trace"], header.get("meta", {})
    if version not in _READABLE:
        raise TandemError(f"trace schema version {version!r:.60}: this Tandem reads versions up to {SCHEMA_VERSION}")
    if not isinstance(meta, dict):
        raise TandemError(f"meta is {meta!r:.60}: it must be a JSON object")
    return meta


# JSONL


def _jsonl_rows(path: Path, meta: dict[str, Any], notes: list[str]) -> Iterator[tuple[str, _Row]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            place = f"{path}:{number}"
            with _at(place):
                row = _json_object(line)
                if number == 1 and "tandem_trace" in row:
                    meta.update(_meta_of(row))
                    continue
            yield place, row


def _json_object(line: bytes) -> _Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TandemError(f"not a whole JSON object ({error}): cut short or damaged?") from None
    if not isinstance(row, dict):
        raise TandemError("not a JSON object: a trace has one request, in braces, a line")
    return row


def _write_jsonl(file: IO[bytes], trace: Trace) -> None:
    file.write(f"{_header(trace)}\n".encode())
    for request in trace.requests:
        file.write(f"{json.dumps(_json_row(request))}\n".encode())


def _json_row(request: TraceRequest) -> _Row:
    row = {name: value for name in _COLUMNS if (value := _value(request, name)) is not None}
    for name in ("prompt_token_ids", *_LONG_IDS):
        if name in row:
            row[name] = np.asarray(row[name]).tolist()
    return row


def _value(request: TraceRequest, name: str) -> Any:
    """A field as files have it: a block size only where it is the size of something."""
    return None if name == "hash_block_size" and request.hash_ids is None else getattr(request, name)


# Parquet


def _parquet_rows(path: Path, meta: dict[str, Any], notes: list[str]) -> Iterator[tuple[str, _Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with path.open("rb") as raw, pq.ParquetFile(raw) as file, _at(path):
            header = (file.schema_arrow.metadata or {}).get(b"tandem_trace")
            meta.update(_meta_of(_json_object(header)) if header else {})
            rows = chain.from_iterable(map(_batch_rows, file.iter_batches(_BATCH_ROWS)))
            for number, row in enumerate(rows, start=1):
                yield f"{path}: row {number}", row
    except pa.ArrowException as error:
        raise TandemError(f"{path}: not Parquet after row {number} ({_reason(error)}): damaged?") from error


def _batch_rows(batch: pa.RecordBatch) -> list[_Row]:
    scalars = [name for name in batch.schema.names if name != "prompt_token_ids"]
    rows: list[_Row] = batch.select(scalars).to_pylist()
    if len(scalars) < batch.num_columns:
        for row, ids in zip(rows, _split_ids(batch.column("prompt_token_ids")), strict=True):
            row["prompt_token_ids"] = ids
    return rows


def _split_ids(column: pa.Array) -> Iterator[array[int] | None]:
    import pyarrow as pa

    lists = column.cast(pa.list_(pa.int32()))
    flat = lists.flatten()
    if flat.null_count:
        raise TandemError("prompt_token_ids has a null among the ids of a request")
    flat = flat.to_numpy()
    end = 0
    for length in lists.value_lengths().to_pylist():
        start, end = end, end + (length or 0)
        yield None if length is None else array("i", flat[start:end].tobytes())


def _write_parquet(file: IO[bytes], trace: Trace) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    lists = {"prompt_token_ids": pa.list_(pa.int32())} | dict.fromkeys(_LONG_IDS, pa.list_(pa.int64()))
    types = dict.fromkeys(_COLUMNS, pa.int64()) | lists | {"client": pa.string()}
    schema = pa.schema(types, metadata={"tandem_trace": _header(trace)})
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, len(trace.requests), _BATCH_ROWS):
            requests = trace.requests[start : start + _BATCH_ROWS]
            columns = [_parquet_column(name, kind, requests) for name, kind in types.items()]
            writer.write_batch(pa.record_batch(columns, schema=schema))


def _parquet_column(name: str, kind: pa.DataType, requests: Sequence[TraceRequest]) -> pa.Array:
    import pyarrow as pa

    values = [_value(request, name) for request in requests]
    if name in _LONG_IDS:
        return pa.array([None if ids is None else list(ids) for ids in values], kind)
    if name != "prompt_token_ids":
        return pa.array(values, kind)
    absent = [ids is None for ids in values]
    lists = [np.asarray(() if ids is None else ids, dtype=np.int32) for ids in values]
    offsets = np.cumsum([0, *map(len, lists)], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, np.concatenate(lists), mask=pa.array(absent))


# CSV: published traces, read only.


def _csv_rows(path: Path, meta: dict[str, Any], notes: list[str]) -> Iterator[tuple[str, _Row]]:
    requests: list[tuple[str, _Row]] = []
    dropped = 0
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            with _at(path):
                layout = _csv_layout(reader.fieldnames or ())
            for cells in reader:
                place = f"{path}:{reader.line_num}"
                with _at(place):
                    row = _csv_row(cells, layout)
                if row["output_len"] == 0:
                    dropped += 1
                else:
                    requests.append((place, row))
    except (csv.Error, UnicodeDecodeError) as error:
        raise TandemError(f"{path}: not a CSV trace ({error})") from error
    if dropped:
        notes.append(f"{dropped} requests without output tokens were dropped")
    if layout == _AZURE:
        _count_from_first(requests)
    yield from requests


def _csv_layout(header: Sequence[str]) -> tuple[str, str, str]:
    for layout in (_AZURE, _BURSTGPT):
        if set(layout) <= set(header):
            return layout
    raise TandemError(f"not a known CSV trace: its columns must be {','.join(_AZURE)} or {','.join(_BURSTGPT)}")


def _csv_row(cells: Mapping[str, str | None], layout: tuple[str, str, str]) -> _Row:
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


def _count_from_first(rows: list[tuple[str, _Row]]) -> None:
    first_ns = min((row["arrival_ns"] for _, row in rows), default=0)
    for _, row in rows:
        row["arrival_ns"] -= first_ns
