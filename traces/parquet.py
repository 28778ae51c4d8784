"""Traces as Parquet: a row for each request, and the header in the schema's metadata."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from traces.errors import TandemError, reason
from traces.request import TraceRequest
from traces.rows import COLUMNS, ID_BYTES, Row, errors_at, json_object, read_header, write_header, written_value

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_ROWS = 4096


def read_parquet(path: Path, meta: dict[str, Any], notes: list[str]) -> Iterator[tuple[str, Row]]:
    """Yields the place and the content of every row; fills `meta` from the header, which files from elsewhere lack."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with path.open("rb") as raw, pq.ParquetFile(raw) as file, errors_at(path):
            header = (file.schema_arrow.metadata or {}).get(b"tandem_trace")
            meta.update(read_header(json_object(header)) if header else {})
            rows = chain.from_iterable(map(_batch_rows, file.iter_batches(_BATCH_ROWS)))
            for number, row in enumerate(rows, start=1):
                yield f"{path}: row {number}", row
    except pa.ArrowException as error:
        raise TandemError(f"{path}: not Parquet after row {number} ({reason(error)}): damaged?") from error


def _batch_rows(batch: pa.RecordBatch) -> Iterator[Row]:
    import pyarrow as pa

    columns = {name: batch.column(name) for name in batch.schema.names}
    if "prompt_token_ids" in columns:
        lists = columns["prompt_token_ids"].cast(pa.list_(pa.int32()))
        if lists.flatten().null_count:
            raise TandemError("prompt_token_ids has a null among the ids of a request")
        ids = [array("i", each.values.to_numpy().tobytes()) if each.is_valid else None for each in lists]
        columns["prompt_token_ids"] = ids
    values = (column if isinstance(column, list) else column.to_pylist() for column in columns.values())
    return (dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True))


def write_parquet(file: IO[bytes], requests: Sequence[TraceRequest], meta: Mapping[str, Any]) -> None:
    """Writes a header and a row for each request."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    lists = {name: pa.list_(pa.int32() if size == 4 else pa.int64()) for name, size in ID_BYTES.items()}
    types = dict.fromkeys(COLUMNS, pa.int64()) | lists | {"client": pa.string()}
    schema = pa.schema(types, metadata={"tandem_trace": write_header(meta)})
    with pq.ParquetWriter(file, schema) as writer:
        for start in range(0, len(requests), _BATCH_ROWS):
            batch = requests[start : start + _BATCH_ROWS]
            columns = [pa.array([_cell(request, name) for request in batch], kind) for name, kind in types.items()]
            writer.write_batch(pa.record_batch(columns, schema=schema))


def _cell(request: TraceRequest, name: str) -> Any:
    value = written_value(request, name)
    return np.asarray(value, dtype=f"i{ID_BYTES[name]}") if name in ID_BYTES and value is not None else value
