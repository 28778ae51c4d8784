"""Traces: requests in order of arrival, and their files.

Two formats are read and written, chosen by suffix: JSONL and Parquet. CSV and arrays of JSON are read only. Every fault
of a file is a `TandemError` that names the line or row. This module knows nothing of models, tokenizers or schedulers.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import struct
import sys
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, TypeVar, cast

import numpy as np

from traces.arrival_order import ArrivalSorter, ascending
from traces.columns import WHOLE, Batch, Dialect, Reading, Window
from traces.csv import read_csv
from traces.errors import TandemError, check_no_pipe, reason
from traces.outputs import atomic_file, check_writable
from traces.parquet import read_parquet, write_parquet
from traces.request import CompactRequests, TraceRequest
from traces.rows import RowReader, errors_at, read_json, write_jsonl

SHIPPED = Path(__file__).with_name("shipped")

_Function = TypeVar("_Function")
_BatchesOf = Callable[[Path, IO[bytes], dict[str, Any]], Iterator[Batch]]

_READERS: dict[str, _BatchesOf] = {
    ".jsonl": read_json,
    ".parquet": read_parquet,
    ".csv": read_csv,
    ".json": read_json,
    ".tsv": read_csv,
}
_WRITERS = {".jsonl": write_jsonl, ".parquet": write_parquet}
_SNIFFED_ROWS = 100  # which show the dialect
LONGEST_WAIT_NS = 10 * 10**9  # for the first request of a trace that is served in real time


@dataclass(frozen=True, slots=True)
class Trace:
    """A workload: requests in arrival order, ids 0, 1, 2, ...

    Attributes:
        requests: at least one.
        meta: where the trace comes from, as JSON values; travels with the file, and is not part of the digest.
        notes: the repairs and omissions of reading it, one sentence each, for the user; not written to files.

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
        plain = isinstance(self.requests, CompactRequests)  # whose ids are in order
        if not plain and any(request.id != position for position, request in enumerate(self.requests)):
            raise ValueError("request ids must be 0, 1, 2, ... in order")
        if not ascending(self.requests):
            raise ValueError("requests must be in order of arrival")

    @property
    def digest(self) -> str:
        """SHA-256 of the requests, in hexadecimal: equal in every file format, whatever `meta` and `notes` say."""
        if isinstance(self.requests, CompactRequests) and self.requests.plain:
            return _plain_digest(self.requests)
        promised = any(request.ttft_slo_ns or request.e2e_slo_ns for request in self.requests)
        sha = hashlib.sha256(b"tandem-trace/2\n" if promised else b"tandem-trace/1\n")
        for request in self.requests:
            sha.update(_canonical_bytes(request))
            if promised:  # a trace without SLOs keeps the digest that it had before there were any
                sha.update(struct.pack("<2q", request.ttft_slo_ns or -1, request.e2e_slo_ns or -1))
            if request.output_ids is not None:  # likewise
                sha.update(b"output" + array("q", request.output_ids).tobytes())
        return sha.hexdigest()


def _plain_digest(requests: CompactRequests) -> str:
    """The digest of requests that have an arrival and lengths alone: what `_canonical_bytes` gives, all at once."""
    sha = hashlib.sha256(b"tandem-trace/1\n")
    absent = np.array([-1, 0, -1, -1, -1])
    for block in requests.blocks():
        sha.update(np.hstack([block, np.tile(absent, (len(block), 1))]).astype("<i8").tobytes())
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
    lengths = request.prompt_len, request.output_len, request.max_tokens
    predicted = -1 if request.predicted_length is None else request.predicted_length
    cancel_ns = -1 if request.cancel_ns is None else request.cancel_ns
    client_len = -1 if request.client is None else len(client)
    terms = predicted, request.priority, cancel_ns, client_len
    return struct.pack("<9q", request.arrival_ns, *lengths, *terms, number) + client + content


def shipped_traces() -> dict[str, Path]:
    """The files of the traces that ship, by name."""
    return {file.stem: file for file in sorted(SHIPPED.glob("*.parquet"))}


def read_trace(path: str | Path, reading: Reading = WHOLE) -> Trace:
    """Reads a .jsonl, .json, .parquet, .csv or .tsv trace, which may be compressed (.gz), or one that ships, by name.

    Arrivals are kept as given, but for dates, which count from the first, and parts of a file (`Reading`). Requests out
    of order are sorted (those of equal arrival stay in file order), with a note. So is whatever else is not as in the
    file, and the unit of arrivals where the file does not name it. Of many requests, most are in a temporary file.

    Raises:
        TandemError: the file is missing, damaged, empty, of another schema version, or has an invalid request.
    """
    path = shipped_traces().get(str(path)) or Path(path)
    plain = path.with_suffix("") if path.suffix == ".gz" else path
    read_batches = _by_suffix(plain, _READERS, shipped_traces())
    meta: dict[str, Any] = {}
    try:
        with open_plain(path) as file:
            batches = read_batches(path, file, meta)
            first = list(islice(batches, 1))
            sniffed = chain.from_iterable(islice(batch.rows(), _SNIFFED_ROWS) for batch in first)
            reader = RowReader(reading, Dialect.of([row for _, row in sniffed]))
            part = _read_part(chain(first, batches), reader, reading)
    except (OSError, EOFError, zlib.error) as error:
        raise TandemError(f"cannot read {path}: {reason(error)}") from error
    requests = part.in_order()
    with errors_at(path):
        if not requests and reading.is_window:
            raise TandemError(f"no request arrives from {reading.window_s[0]:g} to {reading.window_s[1]:g} s")
        trace = Trace(requests, meta)
    trace.notes.extend(_notes(reader, len(part.late), trace))
    return trace


def _read_part(batches: Iterable[Batch], reader: RowReader, reading: Reading) -> ArrivalSorter:
    """The requests that are wanted; time counts from the first date, or the start of the time that is wanted."""
    part, window, most = ArrivalSorter(), Window(reading), reading.requests or sys.maxsize
    for batch in batches:
        block = reader.block(batch.columns) if batch.columns and batch.size <= most - len(part) else None
        if block is not None:
            part.extend(block[window.has(block[:, 0])])
        for place, row in batch.rows() if block is None else ():
            with errors_at(place):
                request = reader.request(part.next_id, row)
            if request and window.has(np.array([request.arrival_ns]))[0]:
                part.add(request)
            if len(part) == most:
                break
        if len(part) == most:
            break
    part.origin_ns = part.first_ns if reader.dated else 0
    if window.start_ns is not None:
        part.origin_ns = window.start_ns
    return part


def _notes(reader: RowReader, late: int, trace: Trace) -> Iterator[str]:
    count, first_ns, last_ns = len(trace.requests), trace.requests[0].arrival_ns, trace.requests[-1].arrival_ns
    if reader.empty:
        yield f"{reader.empty} requests without output tokens were dropped"
    if reader.ignored:
        yield f"ignored unknown columns: {', '.join(sorted(map(str, reader.ignored)))}"
    if reader.timeless:
        yield "the file has no arrivals: all requests arrive at 0 (tandem trace convert --rate gives others)"
    if late:
        yield f"{late} of {count} arrivals were out of order: sorted"
    for column in sorted(reader.unsaid):
        span_s = (last_ns - first_ns) / 1e9
        rate = f", {(count - 1) / span_s:,.3g} a second" if span_s else ""
        said = f"{column} is read in {reader.unit_of(column)}: {count:,} requests in {span_s:,.6g} s{rate}"
        yield f"{said}; if that is wrong, give --time-unit"


def from_first_arrival(trace: Trace) -> Trace:
    """The trace as it is served in real time: nobody waits for a first request that comes late. A note says so."""
    first_ns = trace.requests[0].arrival_ns
    if first_ns <= LONGEST_WAIT_NS:
        return trace
    requests = trace.requests
    moved: Sequence[TraceRequest] = (
        requests.moved(-first_ns)
        if isinstance(requests, CompactRequests)
        else [each.moved(-first_ns) for each in requests]
    )
    note = f"the first request arrives after {first_ns / 1e9:,.6g} s: all are served so much earlier"
    return replace(trace, requests=moved, notes=[*trace.notes, note])


@contextmanager
def open_plain(path: Path) -> Iterator[IO[bytes]]:
    """A file's bytes, uncompressed if it is called .gz."""
    with check_no_pipe(path).open("rb") as raw:
        if path.suffix != ".gz":
            yield raw
            return
        with gzip.GzipFile(fileobj=raw) as file:
            yield cast(IO[bytes], io.BufferedReader(cast(io.RawIOBase, file)))


def check_trace_out(path: Path) -> None:
    """Raises TandemError if `write_trace` could not write to `path`."""
    _by_suffix(path, _WRITERS)
    if path.is_dir() or not path.parent.is_dir():
        raise TandemError(f"cannot write {path}: give --out a file in a folder that exists")
    check_writable(path)


def write_trace(path: str | Path, trace: Trace) -> None:
    """Writes a .jsonl or .parquet trace, whole or not at all.

    Raises:
        TandemError: the suffix is unknown, or the file cannot be written (no such folder, disk full).
    """
    path = Path(path)
    write = _by_suffix(path, _WRITERS)
    with atomic_file(path) as file:
        write(file, trace.requests, trace.meta)


def _by_suffix(path: Path, functions: dict[str, _Function], names: Iterable[str] = ()) -> _Function:
    if path.suffix not in functions:
        raise TandemError(f"{path}: unknown suffix {path.suffix!r}: use {', '.join([*functions, *names])}")
    return functions[path.suffix]
