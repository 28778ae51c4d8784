"""What a run writes down: a folder of tables and a manifest, the same for both riders.

`requests` has a row per request; `steps` per step; `spans` per prefill chunk and per stretch of decoding (from
it every token's time follows: a decoding request makes a token in each step of its span whose `decode_tokens`
is not 0); `iterations` per turn of the serving loop (from it a run can be replayed). Times are integer
nanoseconds since the run's start.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.step import DIGEST_BYTES
from traces.errors import TandemError

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 2

NULL = -(2**63)  # None, in a packed row
_CODES = {"int64": "q", "string": "q", "bool": "q", "binary": f"{DIGEST_BYTES}s"}  # struct's
_NUMPY = {"int64": "<i8", "string": "<i8", "bool": "<i8", "binary": f"V{DIGEST_BYTES}"}

_INT = "int64"
COLUMNS: dict[str, dict[str, str]] = {
    "requests": {
        "request": _INT,
        "arrival_ns": _INT,
        "delivered_ns": _INT,  # when the serving loop took it
        "first_scheduled_ns": _INT,
        "first_token_ns": _INT,
        "last_token_ns": _INT,
        "prompt_len": _INT,
        "max_tokens": _INT,
        "predicted_length": _INT,
        "cancel_ns": _INT,
        "output_len": _INT,  # tokens that count
        "wasted_tokens": _INT,  # made after the stop token, before the scheduler knew of it
        "preemptions": _INT,
        "swaps": _INT,  # of the preemptions
        "outcome": "string",  # length, stop, cancelled, rejected, unfinished
        "reason": "string",
        "priority": _INT,
        "client": "string",
    },
    "steps": {
        "step": _INT,
        "digest": "binary",
        "scheduled_ns": _INT,  # the iteration's clock read
        "planned_ns": _INT,
        "launched_ns": _INT,
        "prefill_tokens": _INT,
        "chunks": _INT,
        "decode_tokens": _INT,
        "kv_tokens": _INT,  # context of the decodes
        "kv_blocks_used": _INT,
        "running": _INT,
        "waiting": _INT,
        "preemptions": _INT,
        "swapped_out_blocks": _INT,
        "swapped_in_blocks": _INT,
        "completed_ns": _INT,
        "device_start_ns": _INT,
        "device_ns": _INT,
    },
    "spans": {
        "request": _INT,
        "first_step": _INT,
        "last_step": _INT,
        "kind": "string",  # prefill, decode
        "start": _INT,  # cached tokens when it began
        "tokens": _INT,  # run in each step
        "samples": "bool",  # whether each step makes an output token
    },
    "iterations": {
        "now_ns": _INT,
        "events": _INT,
        "step": _INT,
        "planned_ns": _INT,
        "launched_ns": _INT,
        "completed_step": _INT,
        "completed_ns": _INT,
    },
}


class Rows:
    """One table's rows on their way to Arrow, packed: eight bytes for each value of a row, however long the run."""

    def __init__(self, table: str) -> None:
        self._columns = COLUMNS[table]
        self._pack = struct.Struct("<" + "".join(_CODES[kind] for kind in self._columns.values())).pack
        self._packed = bytearray()
        self._words: dict[str, int] = {}  # strings are packed as numbers

    def append(self, *row: int | bytes) -> None:
        """Add a row of numbers and bytes, in the order of `COLUMNS`; `NULL` stands for None."""
        self._packed += self._pack(*row)

    def append_any(self, row: Sequence[Any]) -> None:
        """Add a row that may hold strings and None."""
        self.append(*map(self._number, row))

    def _number(self, value: Any) -> int | bytes:
        if isinstance(value, str):
            return self._words.setdefault(value, len(self._words))
        return NULL if value is None else value

    def table(self) -> pa.Table:
        """All rows so far."""
        import pyarrow as pa

        layout = np.dtype([(name, _NUMPY[kind]) for name, kind in self._columns.items()])
        rows = np.frombuffer(bytes(self._packed), layout)
        arrays = [self._array(np.ascontiguousarray(rows[name]), kind) for name, kind in self._columns.items()]
        return pa.table(arrays, names=list(self._columns))

    def _array(self, values: NDArray[Any], kind: str) -> pa.Array:
        import pyarrow as pa

        if kind == "binary":
            of_digests = pa.binary(DIGEST_BYTES)
            return pa.Array.from_buffers(of_digests, len(values), [None, pa.py_buffer(values)]).cast(kind)
        if kind == "bool":
            return pa.array(values.astype(bool))
        null = values == NULL
        numbers = pa.array(values, mask=null if null.any() else None)
        if kind == "string":
            return pa.DictionaryArray.from_arrays(numbers, pa.array(self._words, "string")).cast(kind)
        return numbers


def tables_from_rows(rows: Mapping[str, Iterable[Sequence[Any]]]) -> dict[str, pa.Table]:
    """Turn rows, their fields in the order of `COLUMNS`, into Arrow tables."""
    packed = {name: Rows(name) for name in COLUMNS}
    for name, table in packed.items():
        for row in rows[name]:
            table.append_any(row)
    return {name: table.table() for name, table in packed.items()}


@dataclass(slots=True)
class RunRecords:
    """One run.

    Attributes:
        manifest: what was run, in three parts: workload, system, provenance.
        tables: `requests`, `steps`, `spans`, `iterations`.
        summary: metrics and counts.
        partial: whether the run was interrupted.
    """

    manifest: dict[str, Any]
    tables: dict[str, pa.Table]
    summary: dict[str, Any] = field(default_factory=dict)
    partial: bool = False

    def write(self, folder: Path) -> None:
        """Write the run, or nothing: an older run in `folder` is replaced once the new one is whole.

        Raises:
            TandemError: the folder holds something else, or cannot be written.
        """
        check_out(folder)
        draft = folder.with_name(folder.name + ".tmp")
        try:
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            self._write_files(draft)
            shutil.rmtree(folder, ignore_errors=True)
            draft.rename(folder)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise TandemError(f"cannot write {folder}: {error.strerror or error}; nothing was kept") from error

    def _write_files(self, folder: Path) -> None:
        import pyarrow.parquet as pq

        for name, table in self.tables.items():
            versioned = table.replace_schema_metadata({"tandem_schema": str(SCHEMA_VERSION)})
            pq.write_table(versioned, folder / f"{name}.parquet", compression="zstd")
        header = {"schema": SCHEMA_VERSION, "partial": self.partial}
        for name, content in (("summary", self.summary), ("manifest", self.manifest)):
            (folder / f"{name}.json").write_text(json.dumps(header | content, indent=2) + "\n")


def check_out(folder: Path) -> None:
    """Raises TandemError if a run may not be written to `folder`, because something else is there."""
    is_run = (folder / "manifest.json").exists()
    if folder.exists() and not is_run and (not folder.is_dir() or any(folder.iterdir())):
        raise TandemError(f"{folder} is not empty and not a run: choose another --out")


def read_run(folder: Path) -> RunRecords:
    """Read a run's folder.

    Raises:
        TandemError: it is not a run, a file is missing or damaged, or another schema version wrote it.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    manifest = _read_json(folder / "manifest.json")
    summary = _read_json(folder / "summary.json")
    tables = {}
    for name, columns in COLUMNS.items():
        path = folder / f"{name}.parquet"
        try:
            tables[name] = pq.read_table(path)
        except (OSError, pa.ArrowInvalid) as error:
            raise TandemError(f"{path}: cannot be read ({_first_line(error)}); record the run again") from error
        if tables[name].column_names != list(columns):
            raise TandemError(f"{path}: columns are not those of schema {SCHEMA_VERSION}; record the run again")
    partial = manifest.pop("partial", False)
    return RunRecords(manifest, tables, summary, partial)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise TandemError(f"{path.parent} is not a run: it has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise TandemError(f"{path}: cannot be read ({_first_line(error)})") from error
    if not isinstance(content, dict) or content.pop("schema", None) != SCHEMA_VERSION:
        raise TandemError(f"{path}: not schema {SCHEMA_VERSION}; it was written by another version of tandem")
    return content


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]
