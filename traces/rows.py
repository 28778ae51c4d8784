"""The rows of trace files: the request or the header that a row of any format holds; JSON, a row a line or an array."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from traces.columns import (
    COLUMNS,
    DATED,
    FIELD_OF,
    ID_BYTES,
    SECONDS_IN,
    SESSIONS,
    UNIT_OF,
    UNIT_WORDS,
    UNITS_NS,
    WITHOUT_ARRIVALS,
    Batch,
    Dialect,
    Placed,
    Reading,
    Row,
)
from traces.dates import Instant, read_date
from traces.errors import TandemError, reason
from traces.request import TraceRequest
from traces.spill import Rows

SCHEMA_VERSION = 3
_READABLE = (1, 2, 3)  # version 1 knew no SLOs, version 2 no output ids

_NUMBERS = {"arrival_ns", "prompt_len", "output_len", "max_tokens", "priority"}
_NONE = np.empty(0)
_LENGTHS = {"prompt_len", "output_len"}
_BATCH_ROWS = 1024
BOM = b"\xef\xbb\xbf"
_LATEST_NS = 9e18  # inside int64


@contextmanager
def errors_at(place: object) -> Iterator[None]:
    """Errors of the block say where they are."""
    try:
        yield
    except TandemError as error:
        raise TandemError(f"{place}: {error}") from None


class RowReader:
    """Makes requests of the rows of one file.

    Attributes:
        ignored: columns that are not read.
        empty: rows whose request made no output, which are left out.
        dated: whether arrivals are dates; None until there is one.
        unsaid: columns of arrivals that have come, whose name says no unit.
        timeless: whether a row of lengths came without an arrival, which then is 0.
    """

    def __init__(self, reading: Reading, dialect: Dialect) -> None:
        self.ignored: set[str] = set()
        self.empty = 0
        self.dated: bool | None = None
        self.unsaid: set[str] = set()
        self.timeless = False
        self._reading, self._dialect = reading, dialect
        units = dict.fromkeys(SECONDS_IN, "s") | {"timestamp": dialect.unit}
        self.units = (dict.fromkeys(units, reading.time_unit) if reading.time_unit else units) | UNIT_OF
        self._block_size = reading.hash_block_size or (dialect.hash_block_size if dialect.certain else None)

    def request(self, position: int, row: Mapping[str, Any]) -> TraceRequest | None:
        """The request of a row, whose id is its position; or None if it made no output.

        Raises:
            TandemError: it is not valid.
        """
        values: dict[str, Any] = {}
        for column, value in row.items():
            name = FIELD_OF.get(column)
            if name is None:
                self._ignore(column)
            elif value is not None:
                if name in values:
                    raise TandemError(f"{column} gives {name} a second time: keep one of the two")
                values[name] = self._value(column, name, value)
        if type(values.get("output_len")) is int and values["output_len"] == 0:
            self.empty += 1
            return None
        return self._made(position, row, values)

    def block(self, columns: Mapping[str, npt.NDArray[Any]]) -> Rows | None:
        """The requests of many rows, if all are valid.

        Args:
            columns: as in `Batch`.

        Returns:
            (n, 4), as `traces.request.CompactRequests` takes them; None: `request` says of each row what it is.
        """
        read = {column: values for column, values in columns.items() if column in FIELD_OF}
        fields = {FIELD_OF[column]: values for column, values in read.items()}
        arrivals = next((column for column in read if FIELD_OF[column] == "arrival_ns"), None)
        if len(fields) < len(read) or arrivals is None or not fields.keys() >= _LENGTHS or SESSIONS in columns:
            return None
        if not fields.keys() <= _NUMBERS or fields.pop("priority", _NONE).any():  # a priority of 0 is none
            return None
        prompt, output = fields["prompt_len"], fields["output_len"]
        arrival_ns, limit = self._arrivals_ns(arrivals, fields["arrival_ns"]), fields.get("max_tokens", output)
        if arrival_ns is None:
            return None
        made = output != 0
        if (output < 0).any() or (prompt[made] < 1).any() or (limit < output).any():
            return None
        self.ignored |= columns.keys() - read.keys()
        self.empty += len(output) - int(made.sum())
        rows: Rows = np.stack([arrival_ns[made], prompt[made], output[made], limit[made]], axis=1)
        return rows

    def _arrivals_ns(self, column: str, values: npt.NDArray[Any]) -> npt.NDArray[np.int64] | None:
        dated = values.dtype == "M8[ns]"
        if self.dated not in (None, dated) or (column == "TIMESTAMP" and not dated) or (dated and column not in DATED):
            return None
        unit_ns = 1 if dated else UNITS_NS[self.units.get(column, "ns")]
        numbers = values.astype(np.int64) if dated else values
        whole = numbers.dtype == np.int64
        if not ((numbers >= 0) & (numbers <= _LATEST_NS / unit_ns)).all() or not (whole or column in self.units):
            return None
        if self._doubts(column) and not whole and (numbers % 1).any():
            return None
        self.dated = dated
        self.unsaid |= set() if dated or column in UNIT_OF else {column}
        scaled: npt.NDArray[np.int64] = numbers * unit_ns if whole else np.rint(numbers * unit_ns).astype(np.int64)
        return scaled

    def unit_of(self, column: str) -> str:
        """The unit in which arrivals of a column are read, and why, in words."""
        word = UNIT_WORDS[self.units[column]]
        if self._reading.time_unit:
            return f"{word}, as --time-unit says"
        if column != "timestamp":
            return f"{word}, as in {SECONDS_IN[column]}'s traces"
        return f"{word}, as in {self._dialect.publisher}{'' if self._dialect.certain else ' (the file does not say)'}"

    def _ignore(self, column: str) -> None:
        if column == SESSIONS:
            raise TandemError(f"{SESSIONS}: requests that wait for another's end are not read: give each an arrival")
        self.ignored.add(column)

    def _value(self, column: str, name: str, value: Any) -> Any:
        if name in ID_BYTES:
            return _ids(column, value, ID_BYTES[name])
        if name == "arrival_ns" and column != "arrival_ns":
            return self._arrival_ns(column, value)
        return _nanoseconds(column, value, UNITS_NS[UNIT_OF[column]]) if column in UNIT_OF and column != name else value

    def _arrival_ns(self, column: str, value: Any) -> int:
        if column in DATED and isinstance(value, str) and "-" in value[1:]:
            value = read_date(value)
        dated = isinstance(value, Instant)
        if self.dated not in (None, dated):
            raise TandemError(f"{column} is {value!r:.60}: other rows have {'numbers' if dated else 'dates'}")
        self.dated = dated
        if dated:
            return int(value)
        if column == "TIMESTAMP":
            raise TandemError(f"TIMESTAMP is {value!r:.60}: it must be a date, as in Azure's traces")
        if column not in UNIT_OF:
            self.unsaid.add(column)
            self._check_whole(column, value)
        return _nanoseconds(column, value, UNITS_NS[self.units[column]])

    def _doubts(self, column: str) -> bool:
        return column == "timestamp" and not self._dialect.certain and not self._reading.time_unit

    def _check_whole(self, column: str, value: Any) -> None:
        """Mooncake's milliseconds are whole. Raises TandemError where fractions leave the unit open."""
        if self._doubts(column) and isinstance(value, float) and not value.is_integer():
            raise TandemError(
                f"timestamp is {value}, and the file does not say in which unit: give --time-unit s (as vLLM's "
                "timed_trace, Bailian, ServeGen) or ms (as Mooncake)"
            )

    def _made(self, position: int, row: Mapping[str, Any], values: dict[str, Any]) -> TraceRequest:
        if "prompt_token_ids" in values:
            values.setdefault("prompt_len", len(values["prompt_token_ids"]))
        if "arrival_ns" not in values and not WITHOUT_ARRIVALS.isdisjoint(row):
            values["arrival_ns"], self.timeless = 0, True
        for name in ("arrival_ns", "prompt_len", "output_len"):
            if name not in values:
                given = [column for column, field in FIELD_OF.items() if field == name]
                empty = next((column for column in row if FIELD_OF.get(column) == name), name)
                raise TandemError(f"no {empty}: give {' or '.join(given[:3])}")
        values.setdefault("max_tokens", values["output_len"])
        if "hash_ids" in values and self._block_size:
            self._set_block_size(values)
        return TraceRequest(id=position, **values)

    def _set_block_size(self, values: dict[str, Any]) -> None:
        size, said = values.get("hash_block_size"), self._reading.hash_block_size
        if size is not None and said is not None and size != said:
            raise TandemError(f"hash_block_size is {size!r:.60}, and --hash-block-size {said}: leave the option out")
        values.setdefault("hash_block_size", self._block_size)


def _nanoseconds(column: str, value: Any, unit_ns: int) -> int:
    if type(value) not in (int, float) or not 0 <= value <= _LATEST_NS / unit_ns:
        raise TandemError(f"{column} is {value!r:.60}: it must be a number from 0 to {_LATEST_NS / unit_ns:.0e}")
    nanoseconds: int = round(value * unit_ns)
    return nanoseconds


def _ids(column: str, value: Any, size: int) -> array[int]:
    """Ids as a C array: 4 or 8 bytes an id, and no Python object for each."""
    if isinstance(value, list) and set(map(type, value)) <= {int}:
        with suppress(OverflowError):
            value = array("i" if size == 4 else "q", value)
    if not isinstance(value, array) or (np.asarray(value) < 0).any():
        raise TandemError(f"{column} must be a list of integers from 0 to {2 ** (8 * size - 1) - 1}")
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


def read_json(path: Path, file: IO[bytes], meta: dict[str, Any]) -> Iterator[Batch]:
    """Yields the rows of a file, of an array or one a line.

    Fills `meta` from the header, which files from elsewhere lack.
    """
    start = file.read(4096).removeprefix(BOM).lstrip()
    file.seek(0)
    rows = _read_array(path, file) if _opens_array(start) else _read_lines(path, file, meta)
    while batch := list(islice(rows, _BATCH_ROWS)):
        yield Batch(partial(iter, batch))


def _opens_array(start: bytes) -> bool:
    """Whether a file starts as an array of objects, and not as a line that is an array."""
    return start[:1] == b"[" and start[1:].lstrip()[:1] in (b"{", b"]", b"")


def _read_lines(path: Path, file: IO[bytes], meta: dict[str, Any]) -> Iterator[Placed]:
    for number, line in enumerate(file, start=1):
        content = line.removeprefix(BOM) if number == 1 else line
        if not content.strip():
            continue
        place = f"{path}:{number}"
        with errors_at(place):
            row = json_object(content)
            if number == 1 and "tandem_trace" in row:
                meta.update(read_header(row))
                continue
        yield place, row


def _read_array(path: Path, file: IO[bytes]) -> Iterator[Placed]:
    import ijson

    if file.read(len(BOM)) != BOM:
        file.seek(0)
    number = 0
    try:
        for number, row in enumerate(ijson.items(file, "item", use_float=True), start=1):
            if not isinstance(row, dict):
                raise TandemError(f"{path}: item {number}: not a JSON object")
            yield f"{path}: item {number}", row
    except (ijson.JSONError, UnicodeDecodeError, RecursionError) as error:
        raise TandemError(f"{path}: not JSON after item {number} ({reason(error)}): cut short or damaged?") from None


def json_object(line: bytes) -> Row:
    """The object on a line. Raises TandemError if there is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise TandemError(f"not a whole JSON object ({reason(error)}): cut short or damaged?") from None
    if not isinstance(row, dict):
        raise TandemError("not a JSON object: a trace has one request, in braces, a line")
    return row


def write_jsonl(file: IO[bytes], requests: Sequence[TraceRequest], meta: Mapping[str, Any]) -> None:
    """Writes a header and a line for each request."""
    file.write(f"{write_header(meta)}\n".encode())
    for request in requests:
        row = {name: value for name in COLUMNS if (value := written_value(request, name)) is not None}
        file.write(f"{json.dumps(row, default=lambda ids: np.asarray(ids).tolist())}\n".encode())
