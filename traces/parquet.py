"""Traces as Parquet: a row for each request, and the header in the schema's metadata."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from traces.columns import COLUMNS, FIELD_OF, ID_BYTES, Batch, Placed, Row
from traces.dates import Instant
from traces.errors import TandemError, reason
from traces.request import CompactRequests, TraceRequest
from traces.rows import errors_at, json_object, read_header, write_header, written_value

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS = 4096
_GROUP_ROWS = 2**17  # many small groups take much memory to read
_BUFFER = 2**16  # bytes that are read of a column at a time
_NUMBERS = ("arrival_ns", "prompt_len", "output_len", "max_tokens")


def read_parquet(path: Path, raw: IO[bytes], meta: dict[str, Any]) -> Iterator[Batch]:
    """Yields the rows of a file; fills `meta` from the header, which files from elsewhere lack."""
    import pyarrow.parquet as pq

    number = 0
    # With `pre_buffer`, all that was read of the file would stay in memory.
    with _errors_after(path, number), pq.ParquetFile(raw, buffer_size=_BUFFER, pre_buffer=False) as file:
        header = (file.schema_arrow.metadata or {}).get(b"tandem_trace")
        meta.update(read_header(json_object(header)) if header else {})
        for batch in file.iter_batches(_BATCH_ROWS):
            yield Batch(partial(_placed_rows, path, number, batch), _arrays(batch))
            number += len(batch)


@contextmanager
def _errors_after(path: Path, row: int) -> Iterator[None]:
    """Errors of the block, among which are those of a damaged file, say where they are."""
    import pyarrow as pa

    try:
        with errors_at(path):
            yield
    except (pa.ArrowException, OverflowError, UnicodeDecodeError) as error:
        raise TandemError(f"{path}: not Parquet after row {row} ({reason(error)}): damaged?") from error


def _placed_rows(path: Path, before: int, batch: pa.RecordBatch) -> Iterator[Placed]:
    with _errors_after(path, before):
        rows = list(_batch_rows(batch))
    return ((f"{path}: row {number}", row) for number, row in enumerate(rows, start=before + 1))


def _arrays(batch: pa.RecordBatch) -> dict[str, npt.NDArray[Any]] | None:
    """The columns of a batch that are read, if all are 64-bit integers."""
    names = batch.schema.names
    read = {name: column for name, column in zip(names, batch.columns, strict=True) if name in FIELD_OF}
    said = {name: column for name, column in read.items() if column.null_count < len(column)}
    whole = all(str(column.type) == "int64" and not column.null_count for column in said.values())
    if not whole or len(set(names)) < len(names):
        return None
    arrays = {name: column.to_numpy() for name, column in said.items()}
    return arrays | {name: np.empty(0) for name in names if name not in FIELD_OF}


def _batch_rows(batch: pa.RecordBatch) -> Iterator[Row]:
    names = batch.schema.names
    if len(set(names)) < len(names):
        raise TandemError("two columns have one name: keep one of the two")
    columns = [_values(name, batch.column(place)) for place, name in enumerate(names)]
    return (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))


def _values(name: str, column: pa.Array) -> list[Any]:
    """A column's values: lists of ids as C arrays, dates as instants, and of a column that is not read none."""
    import pyarrow as pa

    field = FIELD_OF.get(name)
    if field is None:
        return [None] * len(column)
    if ID_BYTES.get(field) == 4:
        lists = column.cast(pa.list_(pa.int32()))
        if lists.flatten().null_count:
            raise TandemError(f"{name} has a null among the ids of a request")
        return [array("i", each.values.to_numpy().tobytes()) if each.is_valid else None for each in lists]
    if pa.types.is_timestamp(column.type):
        instants = column.cast(pa.timestamp("ns", column.type.tz)).cast(pa.int64()).to_pylist()
        return [each if each is None else Instant(each) for each in instants]
    values: list[Any] = column.to_pylist()
    return values


def write_parquet(file: IO[bytes], requests: Sequence[TraceRequest], meta: Mapping[str, Any]) -> None:
    """Writes a header and a row for each request."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lists = {name: pa.list_(pa.int32() if size == 4 else pa.int64()) for name, size in ID_BYTES.items()}
    types = dict.fromkeys(COLUMNS, pa.int64()) | lists | {"client": pa.string()}
    schema = pa.schema(types, metadata={"tandem_trace": write_header(meta)})
    with pq.ParquetWriter(file, schema) as writer:
        for columns in _written_columns(requests, types):
            writer.write_batch(pa.record_batch(columns, schema=schema))


def _written_columns(requests: Sequence[TraceRequest], types: Mapping[str, pa.DataType]) -> Iterator[list[pa.Array]]:
    """The columns of some thousand requests at a time."""
    import pyarrow as pa

    if isinstance(requests, CompactRequests) and requests.plain:
        for block in requests.blocks(_GROUP_ROWS):
            plain = dict(zip(_NUMBERS, block.T, strict=True)) | {"priority": np.zeros(len(block), np.int64)}
            yield [pa.array(plain[name]) if name in plain else pa.nulls(len(block), of) for name, of in types.items()]
        return
    for start in range(0, len(requests), _BATCH_ROWS):
        batch = requests[start : start + _BATCH_ROWS]
        yield [pa.array([_cell(request, name) for request in batch], kind) for name, kind in types.items()]


def _cell(request: TraceRequest, name: str) -> Any:
    value = written_value(request, name)
    return np.asarray(value, dtype=f"i{ID_BYTES[name]}") if name in ID_BYTES and value is not None else value
