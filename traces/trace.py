"""Traces: requests in order of arrival, and their files.

Two formats are read and written, chosen by suffix: JSONL and Parquet. CSV is read only. Every fault of a file is a
`TandemError` that names the line or row. This module knows nothing of models, tokenizers or schedulers.
"""

from __future__ import annotations

import hashlib
import os
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np

from traces.csv import read_csv
from traces.errors import TandemError, reason
from traces.parquet import read_parquet, write_parquet
from traces.request import CompactRequests, TraceRequest
from traces.rows import FIELD_OF, errors_at, read_jsonl, request_of, write_jsonl

SHIPPED = Path(__file__).with_name("shipped")

_Function = TypeVar("_Function")


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
    lengths = request.prompt_len, request.output_len, request.max_tokens
    predicted = -1 if request.predicted_length is None else request.predicted_length
    cancel_ns = -1 if request.cancel_ns is None else request.cancel_ns
    client_len = -1 if request.client is None else len(client)
    terms = predicted, request.priority, cancel_ns, client_len
    return struct.pack("<9q", request.arrival_ns, *lengths, *terms, number) + client + content


def shipped_traces() -> dict[str, Path]:
    """The files of the traces that ship, by name."""
    return {file.stem: file for file in sorted(SHIPPED.glob("*.parquet"))}


def read_trace(path: str | Path) -> Trace:
    """Reads a .jsonl, .parquet or .csv trace, or one that ships, by its name.

    Arrivals are kept as given, but for Azure's dates, which count from the first. Requests out of order are sorted
    (those of equal arrival stay in file order), with a note.

    Raises:
        TandemError: the file is missing, damaged, empty, of another schema version, or has an invalid request.
    """
    path = shipped_traces().get(str(path)) or Path(path)
    read_rows = _by_suffix(path, {".jsonl": read_jsonl, ".parquet": read_parquet, ".csv": read_csv}, shipped_traces())
    requests = CompactRequests()
    meta: dict[str, Any] = {}
    notes: list[str] = []
    unknown: set[str] = set()
    try:
        for place, row in read_rows(path, meta, notes):
            unknown |= row.keys() - FIELD_OF.keys()
            with errors_at(place):
                requests.append(request_of(len(requests), row))
    except OSError as error:
        raise TandemError(f"cannot read {path}: {reason(error)}") from error
    if unknown:
        notes.append(f"ignored unknown columns: {', '.join(sorted(unknown))}")
    with errors_at(path):
        return Trace(_in_arrival_order(requests, notes), meta, notes)


def write_trace(path: str | Path, trace: Trace) -> None:
    """Writes a .jsonl or .parquet trace, whole or not at all.

    Raises:
        TandemError: the suffix is unknown, or the file cannot be written (no such folder, disk full).
    """
    path = Path(path)
    write = _by_suffix(path, {".jsonl": write_jsonl, ".parquet": write_parquet})
    with atomic_file(path) as file:
        write(file, trace.requests, trace.meta)


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
            raise TandemError(f"cannot write {path}: {reason(error)}; nothing was written") from error
        raise


def _by_suffix(path: Path, functions: dict[str, _Function], names: Iterable[str] = ()) -> _Function:
    if path.suffix not in functions:
        raise TandemError(f"{path}: unknown suffix {path.suffix!r}: use {', '.join([*functions, *names])}")
    return functions[path.suffix]


def _in_arrival_order(requests: CompactRequests, notes: list[str]) -> Sequence[TraceRequest]:
    arrivals_ns = requests.arrivals_ns
    late = sum(arrival < latest for arrival, latest in zip(arrivals_ns, accumulate(arrivals_ns, max), strict=True))
    if not late:
        return requests
    notes.append(f"{late} of {len(requests)} arrivals were out of order: sorted")
    ordered = sorted(requests, key=lambda request: request.arrival_ns)
    return [replace(request, id=position) for position, request in enumerate(ordered)]
